"""A pool shaped like psycopg_pool.ConnectionPool, whose max_size is the cap over all processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg

from .. import control
from ..errors import ConnectFailed, ConnectTimeout, OptionError, SharedPoolError
from ..errors import PoolTimeout as Expired
from ..pool import Pool
from .base import BasePool, log, sizes
from .errors import PoolTimeout

C = TypeVar("C", bound="psycopg.Connection[Any]")


class ConnectionPool(BasePool[C]):
    """`psycopg_pool.ConnectionPool` for all processes together; docs/postgres.md has what differs.

    Lazy: making and opening it attaches to nothing, so it may stand before a fork; the first use attaches, and
    `open(wait=True)`.

    Args:
        conninfo: As for psycopg.connect, or a callable that gives it.
        connection_class: The class of the connections.
        kwargs: The keywords of psycopg.connect, or a callable that gives them.
        min_size: So many connections are kept ready, over all processes together.
        max_size: The cap over all processes that use the same name; not given: min_size.
        open: False: `open` is called later.
        configure: Called with a connection that was opened, taken over from another process, or set back.
        check: Called with each connection before it is lent; one for which it raises is replaced.
        reset: Called with each connection that comes back; or "handoff" (the default), "never" or "always": when
            DISCARD ALL sets a session back, see Psycopg3Driver.
        name: The shared pool's name.
        close_returns: Whether conn.close() gives the connection back.
        timeout: Seconds that `getconn` waits.
        max_waiting: So many may wait, in all processes together; 0: no limit.
        max_lifetime: Seconds after which a connection is closed once it is idle.
        max_idle: Seconds after which an idle connection is closed.
        reconnect_timeout: Seconds of failing to connect after which `reconnect_failed` is called.
        reconnect_failed: Called with the pool.
        num_workers: Not needed: nothing is done in the background but what keeps min_size.
        app: The scope's name, as for sharedpool.attach.
        move: False: sessions stay in the process that opened them; only permits move.
        order: "fifo": whoever waits is served in the order of asking; "sticky": a process goes on with its session for
            0.05 s while others wait: more leases a second, and longer waits; "auto": "fifo" for sessions that move.

    Raises:
        OptionError: `order` is none of these.
    """

    _of_psycopg = psycopg.Connection
    _shared: Pool[Any]

    # --- life ---------------------------------------------------------------------------------------------------------

    def open(self, wait: bool = False, timeout: float = 30.0) -> None:
        """Accept clients; with `wait`, attach and wait until min_size connections are there.

        Raises:
            PoolClosed: It was closed before.
            PoolTimeout: They are not there within `timeout` seconds.
        """
        if self._closed:
            self._begin()
        if wait:
            self.wait(timeout)

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until min_size connections are there, over all processes.

        Raises:
            PoolTimeout: They are not within `timeout` seconds; the pool is closed.
        """
        self._check_open()
        until = time.monotonic() + timeout
        self._attach()
        while self._shared.stats().connections < self._min_size:
            if time.monotonic() >= until:
                self.close()
                raise PoolTimeout(f"pool initialization incomplete after {timeout} sec")
            time.sleep(0.01)

    def _attach(self) -> None:
        """The first use in this process: whoever waits is counted, and min_size is kept."""
        if self._shared.attached is None:
            self._shared.open()
            if self._min_size:
                self._shared.prewarm(self.driver.host, self.driver.port, self._via, self._min_size)

    def close(self, timeout: float = 5.0) -> None:
        """Take no more clients in this process; connections that are out are closed as they come back.

        Idle connections are there for other processes; with the last one they are closed.
        """
        if not self._closed:
            self._closed = True
            if not self._out:
                self._shared.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resize(self, min_size: int, max_size: int | None = None) -> None:
        """Change the sizes, for all processes."""
        self._min_size, self._max_size = sizes(min_size, max_size)
        control.attach(self.name, app=self._app, max_connections=self._max_size).open().close()
        self._shared.prewarm(self.driver.host, self.driver.port, self._via, self._min_size)

    def drain(self) -> None:
        """Close all connections, of all processes: idle ones now, others when they come back."""
        self._check_open()
        self._attach()
        control.drain(self.name, app=self._app)

    def check(self) -> None:
        """Try the idle connections, those of other processes too; those that do not work are closed."""
        self._check_open()
        self._attach()
        for lease in list(self._idle()):
            try:
                self.driver.check(lease.conn)
            except Exception:  # noqa: BLE001 - whatever it is, the connection does not work
                self._end(lease, good=False)
            else:
                self._end(lease, good=True)

    def _idle(self) -> Iterator[Any]:
        """Leases of what is idle now, as far as it can be had at once."""
        with contextlib.suppress(SharedPoolError):
            for _ in range(self._shared.stats().idle):
                yield self._shared.checkout("", 0, self._via, checkout_timeout=0)

    @staticmethod
    def check_connection(conn: Any) -> None:
        """For `check`: raises if the connection does not work."""
        if conn.autocommit:
            conn.execute("")
        else:
            conn.autocommit = True
            try:
                conn.execute("")
            finally:
                conn.autocommit = False

    # --- leases -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[C]:
        """A connection for a with block: commits at its end, rolls back after an error, and gives it back."""
        conn = self.getconn(timeout)
        began = time.monotonic()
        try:
            with conn:
                yield conn
        finally:
            self.putconn(conn)
            self._counts["usage_ms"] += int((time.monotonic() - began) * 1000)

    def getconn(self, timeout: float | None = None) -> C:
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
            self._attach()
            while True:
                left = max(0.0, until - time.monotonic())
                try:
                    lease = self._shared.checkout(
                        "",
                        0,
                        self._via,
                        checkout_timeout=left,
                        connect_timeout=max(left, 0.001),
                    )
                except (ConnectFailed, ConnectTimeout) as error:
                    time.sleep(self._may_try_again(error, until, attempt))
                else:
                    self._failing_since = 0.0
                    conn: C = self._lent(lease)
                    if self._is_good(conn):
                        return conn
                attempt += 1
        except OptionError:
            raise
        except SharedPoolError as error:
            cause = error.__cause__ if isinstance(error, ConnectFailed | ConnectTimeout) else error
            raise self._translated(error, seconds) from (None if isinstance(error, Expired) else cause)

    def _is_good(self, conn: C) -> bool:
        """Whether the user's check, if there is one, lets it pass; if not, it is closed."""
        if self._check is None:
            return True
        try:
            self._check(conn)
        except Exception as error:  # noqa: BLE001 - whatever it is: the user says no
            return self._refuse(conn, error)
        except BaseException:
            self._end(self._taken_back(conn), good=False)
            raise
        return True

    def putconn(self, conn: C) -> None:
        """Give a connection back: rolled back if need be, closed if it is of no use.

        Raises:
            ValueError: It is not this pool's.
        """
        lease = self._taken_back(conn)
        good = False
        try:
            good = not self._closed and self._is_set_back(conn)
        finally:
            self._end(lease, good=good)
            if self._closed and not self._out:
                self._shared.close()

    def _is_set_back(self, conn: C) -> bool:
        if self._is_open(conn):
            try:
                conn.rollback()
            except psycopg.Error as error:
                log.warning("pool %r: rollback failed: %s; discarding connection %s", self.name, error, conn)
                return False
        elif not self._is_of_use(conn):
            return False
        if self._reset is not None:
            try:
                self._reset(conn)
            except Exception as error:  # noqa: BLE001 - whatever it is: the user says no
                log.warning("pool %r: error resetting connection: %s", self.name, error)
                return False
            return self._is_as_it_should(conn)
        return True
