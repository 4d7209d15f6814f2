"""A pool shaped like psycopg_pool.AsyncConnectionPool, whose max_size is the cap over all processes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg

from .. import aio, control
from ..errors import ConnectFailed, ConnectTimeout, OptionError, SharedPoolError
from ..errors import PoolTimeout as Expired
from ..pool import Pool
from .base import BasePool, log, sizes
from .errors import PoolTimeout

C = TypeVar("C", bound="psycopg.AsyncConnection[Any]")

#: Seconds for a coroutine of the user's that a thread waits for.
_PATIENCE = 60.0


class AsyncConnectionPool(BasePool[C]):
    """`psycopg_pool.AsyncConnectionPool` for all processes together; docs/postgres.md has what differs.

    Arguments as for ConnectionPool; callbacks are coroutine functions, and `conninfo` and `kwargs` may be. A pool
    belongs to one loop, as psycopg_pool's.
    """

    _of_psycopg = psycopg.AsyncConnection
    _shared: aio.Pool[Any]
    _loop: asyncio.AbstractEventLoop | None = None

    def _shown(self, handle: Pool[Any]) -> aio.Pool[Any]:
        return aio.Pool(handle)

    def _found_name(self) -> str:
        if inspect.iscoroutinefunction(self.conninfo) or inspect.iscoroutinefunction(self.kwargs):
            raise OptionError(
                "option 'name' is not given (in the call), and cannot be made of what a coroutine function says;"
                " allowed is a pool's name", option="name", value=None, source="the call", allowed="a pool's name",
            )  # fmt: skip
        return super()._found_name()

    def _tell_of_failing(self) -> None:
        if inspect.iscoroutinefunction(self._reconnect_failed):
            self._telling = asyncio.ensure_future(self._reconnect_failed(self))
        else:
            super()._tell_of_failing()

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
        except OptionError:
            raise
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
            return self._refuse(conn, error)
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
        if self._is_open(conn):
            try:
                await conn.rollback()
            except psycopg.Error as error:
                log.warning("pool %r: rollback failed: %s; discarding connection %s", self.name, error, conn)
                return False
        elif not self._is_of_use(conn):
            return False
        if self._reset is not None:
            try:
                await self._reset(conn)
            except Exception as error:  # noqa: BLE001 - whatever it is: the user says no
                log.warning("pool %r: error resetting connection: %s", self.name, error)
                return False
            return self._is_as_it_should(conn)
        return True
