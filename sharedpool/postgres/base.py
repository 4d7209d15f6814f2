"""What the pool for threads and the one for asyncio have in common: arguments, names, numbers, what comes back."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import psycopg
from psycopg import pq

from .. import control
from ..errors import ConnectFailed, ConnectTimeout, SharedPoolError, TooManyWaiting
from ..errors import PoolTimeout as Expired
from ..options import LONGEST, allows, refusal
from ..pool import Pool
from .errors import PoolClosed, PoolTimeout, TooManyRequests
from .psycopg3 import Psycopg3Driver
from .sessions import RESETS, sessions_that_stay

log = logging.getLogger("sharedpool")

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")

_IDLE: Final = pq.TransactionStatus.IDLE
_OPEN: Final = (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)
#: Seconds between two attempts to connect, doubled each time.
_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


class BasePool(Generic[C]):
    """The arguments of psycopg_pool's pools, checked as there, and this process's numbers.

    `max_size` is the cap over all processes that use the same `name`. Not given, the name is made of the connection
    string, without its password.

    Attributes:
        driver: What opens the connections.
    """

    _of_psycopg: type[Any]
    _shared: Any
    #: The driver's `reset`, where the option does not say one of its words.
    _resets = RESETS[0]

    def __init__(
        self,
        conninfo: str | Callable[[], Any] = "",
        *,
        connection_class: type[C] | None = None,
        kwargs: dict[str, Any] | Callable[[], Any] | None = None,
        min_size: int = 4,
        max_size: int | None = None,
        open: bool | None = None,  # noqa: A002 - psycopg_pool's word
        configure: Callable[[C], Any] | None = None,
        check: Callable[[C], Any] | None = None,
        reset: Callable[[C], Any] | str | None = None,
        name: str | None = None,
        close_returns: bool = False,
        timeout: float = 30.0,
        max_waiting: int = 0,
        max_lifetime: float | None = 60 * 60.0,
        max_idle: float | None = 10 * 60.0,
        reconnect_timeout: float = 5 * 60.0,
        reconnect_failed: Callable[[Any], object] | None = None,
        num_workers: int = 3,
        app: str | None = None,
        move: bool = True,
        order: str = "auto",
    ) -> None:
        if max_size is None:
            log.warning(
                "max_size is not given: %s connections for all processes of the pool together, not for each", min_size
            )
        self._min_size, self._max_size = sizes(min_size, max_size)
        _check_count("max_waiting", max_waiting)
        for option, seconds in (("timeout", timeout), ("reconnect_timeout", reconnect_timeout)):
            _check_seconds(option, seconds, none=False)
        for option, life in (("max_lifetime", max_lifetime), ("max_idle", max_idle)):
            _check_seconds(option, life, none=True)
        self.conninfo = conninfo
        self.kwargs = kwargs
        self.connection_class = connection_class or self._of_psycopg
        self.timeout = timeout
        self.max_waiting = max_waiting
        self.max_lifetime = max_lifetime
        self.max_idle = max_idle
        self.reconnect_timeout = reconnect_timeout
        self.close_returns = close_returns
        self._configure = configure
        self._check = check
        self._reset = None if isinstance(reset, str) else reset
        self._reconnect_failed = reconnect_failed
        self._app = app
        self._order = order
        self.driver: Psycopg3Driver[Any] = Psycopg3Driver(
            self._asked(conninfo), self._asked(kwargs), connection_class=self.connection_class,
            configure=self._asked(configure), move=move, reset=reset if isinstance(reset, str) else self._resets,
        )  # fmt: skip
        self._via: Any = self.driver
        self.name = name or self._found_name()
        self._opened = False
        self._closed = True
        self._out = 0
        self._counts: Counter[str] = Counter()
        self._popped: Counter[str] = Counter()
        self._failing_since = 0.0
        handle = self._handle()
        handle.on_wait(self._waited)
        self._shared = self._shown(handle)
        if open or open is None:
            self._begin()

    def _asked(self, function: Any) -> Any:
        """What the user gave, as the driver may call it in any thread."""
        return function

    def _shown(self, handle: Pool[Any]) -> Any:
        """The handle as this kind of pool uses it."""
        return handle

    def _found_name(self) -> str:
        return self.driver.target.name

    def _tell_of_failing(self) -> None:
        if self._reconnect_failed is not None:
            self._reconnect_failed(self)

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__} {self.name!r} at 0x{id(self):x}>"

    @property
    def min_size(self) -> int:
        """So many connections are kept ready, over all processes together."""
        return self._min_size

    @property
    def max_size(self) -> int:
        """The cap over all processes together."""
        return self._max_size

    @property
    def closed(self) -> bool:
        """Whether this process has closed it, or not opened it yet."""
        return self._closed

    def _handle(self) -> Pool[Any]:
        """A handle on the shared pool; nothing happens yet."""
        options: dict[str, Any] = {
            "max_connections": self._max_size, "min_idle": 0, "idle_timeout": _limit(self.max_idle),
            "max_lifetime": _limit(self.max_lifetime), "max_waiting": self.max_waiting or None,
        }  # fmt: skip
        given = {name: value for name, value in options.items() if allows(name, value)}
        return control.attach(self.name, app=self._app, order=self._order, **given)

    def _begin(self) -> None:
        if self._opened:
            raise PoolClosed("pool has already been opened/closed and cannot be reused")
        self._opened, self._closed = True, False

    def _check_open(self) -> None:
        if self._closed:
            state = "already closed" if self._opened else "not open yet"
            raise PoolClosed(f"the pool {self.name!r} is {state}")

    # --- numbers ------------------------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, int]:
        """As psycopg_pool's: sizes over all processes, counters of this one."""
        return self._stats(forget=False)

    def pop_stats(self) -> dict[str, int]:
        """The same, and counters begin at zero again."""
        return self._stats(forget=True)

    def _stats(self, *, forget: bool) -> dict[str, int]:
        own = self._shared.worker_stats() if not self._closed else {}
        counts = self._counts + Counter(
            connections_num=own.get("opens", 0) + own.get("replaced", 0) + own.get("open_failures", 0),
            connections_errors=own.get("open_failures", 0),
            connections_lost=own.get("replaced", 0),
        )
        found = {name: value - self._popped[name] for name, value in counts.items() if value - self._popped[name]}
        if forget:
            self._popped = counts
        found.update({f"sessions_stay_{why}": n for why, n in sessions_that_stay(self.driver).items()})
        if self._closed:
            return {**found, "pool_min": self._min_size, "pool_max": self._max_size}
        now = self._shared.stats()
        found.update(
            pool_min=self._min_size, pool_max=now.max_connections, pool_available=now.idle,
            pool_size=now.in_use + now.idle + now.opening + now.granted, requests_waiting=now.waiting,
        )  # fmt: skip
        return found

    def _waited(self, seconds: float) -> None:
        self._counts["requests_queued"] += 1
        self._counts["requests_wait_ms"] += int(seconds * 1000)

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lent(self, lease: Any) -> Any:
        conn = lease.conn
        conn._pool = self
        conn._lease = lease
        self._out += 1
        return conn

    def _taken_back(self, conn: Any) -> Any:
        """The lease of a connection that comes back.

        Raises:
            ValueError: It is not this pool's.
        """
        pool = getattr(conn, "_pool", None)
        if pool is not self:
            whose = f"it comes from pool {pool.name!r}" if pool else "it doesn't come from any pool"
            raise ValueError(f"can't return connection to pool {self.name!r}, {whose}: {conn}")
        lease, conn._lease, conn._pool = conn._lease, None, None
        self._out -= 1
        return lease

    def _end(self, lease: Any, *, good: bool) -> None:
        if not good:
            self._counts["returns_bad"] += 1
        if not lease.in_force:  # a forked child's copy, or the process has left the pool
            return
        try:
            lease.checkin() if good else lease.discard()
        except SharedPoolError as error:
            log.warning("pool %r: a connection could not be given back: %s", self.name, error)

    def _is_open(self, conn: C) -> bool:
        """Whether it comes back with a transaction to roll back."""
        if not is_in_transaction(conn):
            return False
        log.warning("pool %r: rolling back returned connection: %s", self.name, conn)
        return True

    def _is_of_use(self, conn: C) -> bool:
        """Whether one that comes back without a transaction may be lent again."""
        if not is_idle(conn) and not conn.closed:
            log.warning("pool %r: closing returned connection: %s", self.name, conn)
        return is_idle(conn)

    def _is_as_it_should(self, conn: C) -> bool:
        """Whether the user's reset has left it without a transaction."""
        if not is_idle(conn):
            log.warning("pool %r: connection left in status %s by reset function", self.name, status_of(conn).name)
        return is_idle(conn)

    def _refuse(self, conn: C, error: Exception) -> bool:
        """The user's check has said no."""
        log.info("pool %r: a connection failed its check: %s", self.name, error)
        self._end(self._taken_back(conn), good=False)
        return False

    # --- failures -----------------------------------------------------------------------------------------------------

    def _translated(self, error: SharedPoolError, timeout: float) -> psycopg.OperationalError:
        """As psycopg_pool's users know it."""
        self._counts["requests_errors"] += 1
        if isinstance(error, TooManyWaiting):
            return TooManyRequests(f"the pool {self.name!r} has already {self.max_waiting} requests waiting")
        if isinstance(error, Expired | ConnectFailed | ConnectTimeout):
            return PoolTimeout(f"couldn't get a connection after {timeout:.2f} sec: {error}")
        return psycopg.OperationalError(str(error))

    def _may_try_again(self, error: SharedPoolError, until: float, attempt: int) -> float:
        """Seconds to wait before connecting again; the error, if it is too late."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._failing_since > self.reconnect_timeout:
            self._failing_since = now
            self._tell_of_failing()
        pause: float = min(_LONGEST_PAUSE, _PAUSE * 2**attempt) * random.uniform(0.9, 1.1)
        if now + pause >= until:
            raise error
        return pause


def status_of(conn: Any) -> pq.TransactionStatus:
    """Of its transaction; UNKNOWN for a broken one."""
    return pq.TransactionStatus(conn.pgconn.transaction_status)


def is_idle(conn: Any) -> bool:
    """Whether no transaction is open and nothing under way."""
    return bool(conn.pgconn.transaction_status == _IDLE)


def is_in_transaction(conn: Any) -> bool:
    """Whether there is one to roll back."""
    return conn.pgconn.transaction_status in _OPEN


def sizes(low: int, high: int | None) -> tuple[int, int]:
    """min_size and max_size, checked as psycopg_pool does.

    Raises:
        OptionError: One is no whole number.
        ValueError: They cannot be.
    """
    if high is None:
        high = low
    _check_count("min_size", low, least=None)
    _check_count("max_size", high, least=None)
    if low < 0:
        raise ValueError("min_size cannot be negative")
    if high < low:
        raise ValueError("max_size must be greater or equal than min_size")
    if high == 0:
        raise ValueError("if min_size is 0 max_size must be greater than 0")
    return low, high


def _check_count(option: str, value: object, least: int | None = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise refusal(option, value, "a whole number" + ("" if least is None else f", {least} or more"))


def _check_seconds(option: str, value: object, *, none: bool) -> None:
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise refusal(option, value, "seconds as a number, 0 or more" + (", or None for no limit" if none else ""))


def _limit(seconds: float | None) -> float | None:
    """For the shared pool, which knows no 0, and None for no limit."""
    return None if seconds is None or seconds > LONGEST else max(seconds, 0.001)
