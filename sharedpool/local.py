"""The same API in one process: no arbiter, no shared memory, no thread. For development, notebooks and tests.

Chosen by SHAREDPOOL_MODE=local, never silently on Linux. The cap holds within this process only.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from . import drivers
from .errors import LeaseError, PoolTimeout, SharedPoolError
from .lease import Lease
from .options import PoolOptions
from .stats import COUNTERS, PoolStats


class _Waiter:
    """One waiting thread; `granted` is None while it waits, then the connection it gets, or _PERMIT."""

    __slots__ = ("granted", "route")

    def __init__(self, route: LocalRoute) -> None:
        self.route = route
        self.granted: Any = None


class LocalRoute:
    """An address and the idle connections that lead there, each with the time since when."""

    def __init__(self, driver: drivers.Driver[Any], host: str, port: int) -> None:
        self.driver = driver
        self.host = host
        self.port = port
        self.idle: list[tuple[float, Any]] = []


_PERMIT = object()


class LocalAttachment:
    """One pool of this process.

    Args:
        name: Its name.
        options: Its options.
    """

    def __init__(self, name: str, options: PoolOptions) -> None:
        self.name = name
        self.options = options
        self.lost = False
        self.welcome: Mapping[str, Any] = {"warnings": [], "options": options.as_dict()}
        self._changed = threading.Condition(threading.RLock())
        self._routes: dict[tuple[str, str, int], LocalRoute] = {}
        self._queue: deque[_Waiter] = deque()
        self._leased: dict[int, tuple[LocalRoute, Any]] = {}
        self._opening = 0
        self._granted = 0
        self._serial = 0
        self._dropped: deque[int] = deque()
        self._counters = dict.fromkeys(COUNTERS, 0)

    def stays_inert(self) -> bool:
        """Never: after a fork the child has a pool of its own."""
        return False

    def own_counters(self) -> dict[str, int]:
        """What was counted."""
        return dict(self._counters)

    def stats(self) -> PoolStats:
        """The numbers of this process, which are all there are."""
        with self._changed:
            idle = sum(len(route.idle) for route in self._routes.values())
            return PoolStats(
                name=self.name, max_connections=self.options.max_connections, in_use=len(self._leased), idle=idle,
                opening=self._opening, granted=self._granted, waiting=len(self._queue), processes=1, **self._counters,
            )  # fmt: skip

    def route(self, transport: str, host: str, port: int) -> LocalRoute:
        """The route for an address."""
        driver = drivers.find(transport)
        address = (transport, *driver.address(host, port))
        with self._changed:
            return self._routes.setdefault(address, LocalRoute(driver, address[1], address[2]))

    def checkout(self, route: LocalRoute, patience: float | None, connect_timeout: float) -> Lease[Any]:
        """A lease, in the order of asking."""
        limit = None if patience is None else time.monotonic() + patience
        self._collect()
        with self._changed:
            granted = self._wait(route, limit)
            if granted is _PERMIT:
                self._opening += 1
        if granted is _PERMIT:
            granted = self._open(route, connect_timeout if limit is None else min(connect_timeout, limit - time.monotonic()))
        with self._changed:
            self._serial += 1
            lease: Lease[Any] = Lease(self, None, self._serial)
            lease.word, lease.conn = self._serial, granted
            self._leased[self._serial] = (route, granted)
            return lease

    def _wait(self, route: LocalRoute, limit: float | None) -> Any:
        """A connection or _PERMIT."""
        self._expire()
        if not self._queue:
            found = self._find(route)
            if found is not None:
                return found
        waiter = _Waiter(route)
        self._queue.append(waiter)
        self._counters["waits"] += 1
        try:
            while waiter.granted is None:
                left = None if limit is None else limit - time.monotonic()
                if left is not None and left <= 0:
                    self._counters["timeouts"] += 1
                    raise PoolTimeout(
                        f"pool {self.name!r}: no connection became free in time {self.stats().numbers()}", stats=self.stats()
                    )
                self._changed.wait(left)
            self._granted -= 1
            return waiter.granted
        except BaseException:
            if waiter.granted is None:
                self._queue.remove(waiter)
            else:
                self._granted -= 1
                self._end(waiter.granted, route)
            raise

    def _find(self, route: LocalRoute) -> Any:
        """An idle connection that is alive, or a permit for a new one, or None."""
        while route.idle:
            _, conn = route.idle.pop()
            if _quiet(route.driver.fileno(conn)):
                self._counters["reuses"] += 1
                return conn
            route.driver.close(conn)
        idle = [(other.idle[0][0], other) for other in self._routes.values() if other.idle]
        used = len(self._leased) + self._opening + self._granted + sum(len(r.idle) for r in self._routes.values())
        if used >= self.options.max_connections:
            if not idle:
                return None
            oldest = min(idle, key=lambda pair: pair[0])[1]
            oldest.driver.close(oldest.idle.pop(0)[1])
            self._counters["evictions"] += 1
        return _PERMIT

    def _open(self, route: LocalRoute, seconds: float) -> Any:
        try:
            conn = route.driver.open(route.host, route.port, seconds, lambda sock: None)
            self._counters["opens"] += 1
            return conn
        except SharedPoolError:
            self._counters["open_failures"] += 1
            raise
        finally:
            with self._changed:
                self._opening -= 1
                self._serve()

    def _serve(self) -> None:
        """Give the first in line what there is."""
        while self._queue:
            found = self._find(self._queue[0].route)
            if found is None:
                return
            waiter = self._queue.popleft()
            waiter.granted = found
            self._granted += 1
            self._changed.notify_all()

    def _end(self, conn: Any, route: LocalRoute) -> None:
        if conn is not _PERMIT and route.driver.connects:
            route.driver.close(conn)
        self._serve()

    def _take_back(self, lease: Lease[Any]) -> tuple[LocalRoute, Any]:
        word, lease.word = lease.word, 0
        found = self._leased.pop(word, None) if word else None
        if found is None:
            raise LeaseError("this lease is not in force: it was checked in or discarded before")
        return found

    def checkin(self, lease: Lease[Any]) -> None:
        """End a lease; its connection stays open if it is clean."""
        with self._changed:
            route, conn = self._take_back(lease)
            driver = route.driver
            if driver.connects:
                if driver.fileno(conn) >= 0 and driver.clean(conn) and _quiet(driver.fileno(conn)):
                    route.idle.append((time.monotonic(), conn))
                else:
                    driver.close(conn)
            self._serve()

    def discard(self, lease: Lease[Any]) -> None:
        """End a lease by closing its connection."""
        with self._changed:
            route, conn = self._take_back(lease)
            self._counters["discards"] += 1
            self._end(conn, route)

    def drop(self, lease: Lease[Any]) -> None:
        """A lease was forgotten; called by a finalizer, so it only takes note."""
        self._dropped.append(lease.word)

    def _collect(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                word = self._dropped.popleft()
                with self._changed:
                    found = self._leased.pop(word, None)
                    if found is not None:
                        self._counters["dropped"] += 1
                        self._end(found[1], found[0])

    def _expire(self) -> None:
        limit = self.options.idle_timeout
        if limit is None:
            return
        oldest = time.monotonic() - limit
        for route in self._routes.values():
            while route.idle and route.idle[0][0] <= oldest:
                route.driver.close(route.idle.pop(0)[1])

    def detach(self) -> None:
        """Close what is idle."""
        with self._changed:
            self.lost = True
            for route in self._routes.values():
                while route.idle:
                    route.driver.close(route.idle.pop()[1])


def _quiet(descriptor: int) -> bool:
    """Whether the connection is open and has said nothing."""
    if descriptor < 0:
        return False
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return not poller.poll(0)
