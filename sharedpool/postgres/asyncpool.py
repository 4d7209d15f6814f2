"""A pool shaped like psycopg_pool.AsyncConnectionPool, whose max_size is the cap over all processes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import psycopg

from .. import aio, control
from ..errors import ConnectFailed, ConnectTimeout, OptionError, SharedPoolError
from ..errors import PoolTimeout as Expired
from .base import BasePool, is_idle, is_in_transaction, log, sizes, status_of
from .errors import PoolTimeout

C = TypeVar("C", bound="psycopg.AsyncConnection[Any]")

#: Seconds for a coroutine of the user's that a thread waits for.
_PATIENCE = 60.0


class AsyncConnectionPool(BasePool, Generic[C]):
    """`psycopg_pool.AsyncConnectionPool` for all processes together; docs/postgres.md has what differs.

    Arguments as for ConnectionPool; callbacks are coroutine functions, and `conninfo` and `kwargs` may be. A pool
    belongs to one loop, as psycopg_pool's.
    """

    def __init__(
        self,
        conninfo: str | Callable[[], str | Awaitable[str]] = "",
        *,
        connection_class: type[C] = psycopg.AsyncConnection,  # type: ignore[assignment]
        kwargs: dict[str, Any] | Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]] | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,  # noqa: A002 - psycopg_pool's word
        configure: Callable[[C], Awaitable[object]] | None = None,
        check: Callable[[C], Awaitable[object]] | None = None,
        reset: Callable[[C], Awaitable[object]] | str | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float = 60 * 60.0,
        max_idle: float = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[AsyncConnectionPool[C]], object] | None = None,
        num_workers: int = 3,
        app: str | None = None,
        move: bool = True,
    ) -> None:
        if name is None and (inspect.iscoroutinefunction(conninfo) or inspect.iscoroutinefunction(kwargs)):
            raise OptionError(
                "option 'name' is not given (in the call), and cannot be made of what a coroutine function says;"
                " allowed is a pool's name", option="name", value=None, source="the call", allowed="a pool's name",
            )  # fmt: skip
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            self._asked(conninfo), connection_class, self._asked(kwargs), min_size, max_size, configure, check, reset,
            name, close_returns, timeout, max_waiting, max_lifetime, max_idle, reconnect_timeout, reconnect_failed,
            app, move, self._asked(configure),
        )  # fmt: skip
        self.conninfo, self.kwargs = conninfo, kwargs
        handle = self._handle()
        handle.on_wait(self._waited)
        self._shared: aio.Pool[Any] = aio.Pool(handle)
        if inspect.iscoroutinefunction(reconnect_failed):
            self._reconnect_failed = lambda pool: asyncio.ensure_future(reconnect_failed(pool))
        if open or open is None:
            self._begin()

    def _asked(self, function: Any) -> Any:
        """A coroutine function as a thread can call it; the loop goes on meanwhile."""
        if not inspect.iscoroutinefunction(function):
            return function

        def ask(*arguments: Any) -> Any:
            if self._loop is None or self._loop.is_closed():
                raise psycopg.OperationalError(f"the pool {self.name!r} has no running loop")
            return asyncio.run_coroutine_threadsafe(function(*arguments), self._loop).result(_PATIENCE)

        return ask

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Accept clients; with `wait`, attach and wait until min_size connections are there.

        Raises:
            PoolClosed: It was closed before.
            PoolTimeout: They are not there within `timeout` seconds.
        """
        if self._closed:
            self._begin()
        if wait:
            await self.wait(timeout)

    async def wait(self, timeout: float = 30.0) -> None:
        """Wait until min_size connections are there, over all processes.

        Raises:
            PoolTimeout: They are not within `timeout` seconds; the pool is closed.
        """
        self._check_open()
        until = time.monotonic() + timeout
        await self._attach()
        while self._shared.stats().connections < self._min_size:
            if time.monotonic() >= until:
                await self.close()
                raise PoolTimeout(f"pool initialization incomplete after {timeout} sec")
            await asyncio.sleep(0.01)

    async def _attach(self) -> None:
        """The first use in this process: whoever waits is counted, and min_size is kept."""
        self._loop = asyncio.get_running_loop()
        if self._shared.attached is None:
            await asyncio.to_thread(self.driver.resolve)
            await self._shared.open()
            if self._min_size:
                await self._shared.prewarm(self.driver.host, self.driver.port, self._via, self._min_size)

    async def close(self, timeout: float = 5.0) -> None:
        """Take no more clients in this process; connections that are out are closed as they come back."""
        if not self._closed:
            self._closed = True
            if not self._out:
                await asyncio.to_thread(self._shared.close)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the sizes, for all processes."""
        self._min_size, self._max_size = sizes(min_size, max_size)
        other = control.attach(self.name, app=self._app, max_connections=self._max_size)
        await asyncio.to_thread(lambda: other.open().close())
        await self._shared.prewarm(self.driver.host, self.driver.port, self._via, self._min_size)

    async def drain(self) -> None:
        """Close all connections, of all processes: idle ones now, others when they come back."""
        self._check_open()
        await self._attach()
        await asyncio.to_thread(control.drain, self.name, app=self._app)

    async def check(self) -> None:
        """Try the idle connections, those of other processes too; those that do not work are closed."""
        self._check_open()
        await self._attach()
        leases: list[Any] = []
        with contextlib.suppress(SharedPoolError):
            for _ in range(self._shared.stats().idle):
                leases.append(await self._shared.checkout("", 0, self._via, checkout_timeout=0))  # noqa: PERF401
        for lease in leases:
            try:
                await asyncio.to_thread(self.driver.check, lease.conn)
            except Exception:  # noqa: BLE001 - whatever it is, the connection does not work
                self._end(lease, good=False)
            else:
                self._end(lease, good=True)

    @staticmethod
    async def check_connection(conn: Any) -> None:
        """For `check`: raises if the connection does not work."""
        if conn.autocommit:
            await conn.execute("")
        else:
            await conn.set_autocommit(True)
            try:
                await conn.execute("")
            finally:
                await conn.set_autocommit(False)

    def get_stats(self) -> dict[str, int]:
        """As psycopg_pool's: sizes over all processes, counters of this one."""
        return self._stats(self._shared, forget=False)

    def pop_stats(self) -> dict[str, int]:
        """The same, and counters begin at zero again."""
        return self._stats(self._shared, forget=True)

    # --- leases -------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[C]:
        """A connection for an async with block: commits at its end, rolls back after an error, and gives it back."""
        conn = await self.getconn(timeout)
        began = time.monotonic()
        try:
            async with conn:
                yield conn
        finally:
            await self.putconn(conn)
            self._counts["usage_ms"] += int((time.monotonic() - began) * 1000)

    async def getconn(self, timeout: float | None = None) -> C:
        """A connection, which must be given to `putconn`.

        Raises:
            PoolTimeout: None within `timeout` seconds (not given: the pool's), or the server cannot be reached.
            PoolClosed, TooManyRequests: As psycopg_pool's.
        """
        seconds = self.timeout if timeout is None else timeout
        until = time.monotonic() + seconds
        self._check_open()
        self._counts["requests_num"] += 1
        attempt = 0
        try:
            await self._attach()
            while True:
                left = max(0.0, until - time.monotonic())
                try:
                    lease = await self._shared.checkout(
                        "", 0, self._via, checkout_timeout=left, connect_timeout=max(left, 0.001)
                    )
                except (ConnectFailed, ConnectTimeout) as error:
                    await asyncio.sleep(self._may_try_again(error, until, attempt))
                else:
                    self._failing_since = 0.0
                    conn: C = self._lent(lease)
                    if await self._is_good(conn):
                        return conn
                attempt += 1
        except SharedPoolError as error:
            cause = error.__cause__ if isinstance(error, ConnectFailed | ConnectTimeout) else error
            raise self._translated(error, seconds) from (None if isinstance(error, Expired) else cause)

    async def _is_good(self, conn: C) -> bool:
        """Whether the user's check, if there is one, lets it pass; if not, it is closed."""
        if self._check is None:
            return True
        try:
            await self._check(conn)
        except Exception as error:  # noqa: BLE001 - whatever it is: the user says no
            log.info("pool %r: a connection failed its check: %s", self.name, error)
            self._end(self._taken_back(conn), good=False)
            return False
        except BaseException:
            self._end(self._taken_back(conn), good=False)
            raise
        return True

    async def putconn(self, conn: C) -> None:
        """Give a connection back: rolled back if need be, closed if it is of no use.

        Raises:
            ValueError: It is not this pool's.
        """
        lease = self._taken_back(conn)
        good = False
        try:
            good = not self._closed and await self._is_set_back(conn)
            if good and self.driver.talks(conn):
                await asyncio.shield(asyncio.to_thread(self._end, lease, good=True))
        finally:
            self._end(lease, good=good)
            if self._closed and not self._out:
                self._shared.close()

    async def _is_set_back(self, conn: C) -> bool:
        if is_in_transaction(conn):
            log.warning("pool %r: rolling back returned connection: %s", self.name, conn)
            try:
                await conn.rollback()
            except psycopg.Error as error:
                log.warning("pool %r: rollback failed: %s; discarding connection %s", self.name, error, conn)
                return False
        elif not is_idle(conn):
            if not conn.closed:
                log.warning("pool %r: closing returned connection: %s", self.name, conn)
            return False
        if self._reset is not None:
            try:
                await self._reset(conn)
            except Exception as error:  # noqa: BLE001 - whatever it is: the user says no
                log.warning("pool %r: error resetting connection: %s", self.name, error)
                return False
            if not is_idle(conn):
                log.warning("pool %r: connection left in status %s by reset function", self.name, status_of(conn).name)
                return False
        return True
