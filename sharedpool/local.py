"""The same API in one process: no arbiter, no shared memory, no thread. For development, notebooks and tests.

Chosen by SHAREDPOOL_MODE=local, never silently on Linux. The cap holds within this process only. Nobody watches between
calls: every call looks after what is due, and so does the first in line while it waits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import socket
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping
from threading import get_ident
from time import monotonic, sleep
from typing import Any, Final

from . import drivers, options
from .drivers.sockets import Ending, break_off, disown, readable
from .errors import (
    DrainTimeout,
    LeaseError,
    PoolNotFound,
    PoolOptionsDiffer,
    PoolStopped,
    PoolTimeout,
    SharedPoolError,
    TooManyWaiting,
    file_limit,
)
from .hooks import Hooks
from .layout import MOST_PASSED
from .lease import Lease
from .notices import Notices
from .options import PoolOptions
from .stats import (
    ARBITER_COUNTERS,
    BOUNDS,
    COUNTERS,
    OTHER_KEYS,
    REASONS,
    Histogram,
    KeyStats,
    PoolStats,
    from_closes,
    from_counts,
    key_counters,
)

log = logging.getLogger("sharedpool")

OPENING, LEASED, GRANTED, IDLE, CLOSING, FREE = "opening", "in_use", "granted", "idle", "closing", ""

#: Elsewhere the system does not say whether the peer has closed, too: a permit is free when our side has.
_WATCHES_ENDS: Final = sys.platform == "linux"
#: Who waits looks up so often, s: a forgotten lease is only noted by its finalizer, which can wake nobody.
_LOOK_UP: Final = 0.2
#: So many addresses are counted one by one.
_MOST_KEYS: Final = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRoute:
    """An address, and the driver that leads there."""

    driver: drivers.Driver[Any]
    host: str
    port: int
    place: str = ""
    high: bool = dataclasses.field(default=False, compare=False)

    @property
    def matters(self) -> tuple[str, ...]:
        return drivers.matters(self.driver, self.host)

    @property
    def where(self) -> str:
        return drivers.named(self.driver.name, self.host, self.port)


@dataclasses.dataclass(slots=True, eq=False)
class _Slot:
    """A permit in use and, unless it is bare, its connection.

    `state` is named as in the stats. `watch` is the pool's own descriptor of the connection, which the user cannot
    close; `beside`: of a stand-in, that of what it stands for; `number` is the one in `conn`. `word` is the lease's,
    while in force. `doomed`: the lease outlived its pool. `way`: how its lease was counted. `idle`: for how long it was
    idle before, s. `session`: what the driver exports.
    """

    route: LocalRoute
    state: str = OPENING
    since: float = 0.0
    conn: Any = None
    number: int = -1
    watch: socket.socket | None = None
    beside: socket.socket | None = None
    word: int = 0
    thread: int = 0
    opened: float = 0.0
    jitter: float = dataclasses.field(default_factory=lambda: random.random() / 10)  # of max_lifetime
    reported: bool = False
    doomed: bool = False
    ending: Ending | None = None
    give_up: float = 0.0
    look: float = 0.0
    idle: float = 0.0
    way: str = ""
    session: bytes | None = None

    def move(self, state: str) -> None:
        self.state, self.since = state, monotonic()

    def fill(self, seconds: float) -> None:
        """Open the connection."""
        driver = self.route.driver
        drivers.check_place(self.route)
        conn = driver.open(self.route.host, self.route.port, seconds, lambda sock: None)
        try:
            self.number = driver.fileno(conn)
            self.watch = socket.fromfd(self.number, -1, -1)  # -1: of the family and type that it is
            self.session = driver.export(conn)
            remote = getattr(conn, "stands_for", None)
            self.beside = None if remote is None else remote.dup()
            self.conn = conn
            self.opened = monotonic()
        except OSError as error:
            raise file_limit(error, f"hold a connection to {self.route.where}") from error
        finally:
            if self.conn is None:
                driver.close(conn)

    def reusable(self, polled: bool = True) -> bool:
        """Whether somebody else may have the connection: still the one that was lent, clean, open and silent."""
        driver = self.route.driver
        if driver.fileno(self.conn) != self.number or not driver.clean(self.conn) or getattr(self.conn, "inside", None):
            return False
        if hasattr(driver, "settled") and not driver.settled(self.conn):
            return False
        return not polled or not readable(self.number) or self._is_harmless()

    def _is_harmless(self) -> bool:
        """Whether its driver knows what it says, and has heard it all."""
        harmless = getattr(self.route.driver, "idle_readable", None)
        try:
            return harmless is not None and bool(harmless(self.conn)) and not readable(self.number)
        except Exception:  # noqa: BLE001 - the driver's; whatever it is, the connection is of no use
            return False

    def leads_to(self, address: drivers.Address | None) -> bool:
        """Whether this is a connection, or becomes one, to the address; None: to any."""
        route = self.route
        asked = None if address is None else address[:3]
        return route.driver.connects and asked in (None, (route.driver.name, route.host, route.port))

    @property
    def counts(self) -> bool:
        """Whether this is an open connection, not yet closed to the end."""
        return self.watch is not None and self.state != OPENING

    def let_go(self) -> None:
        """Close the pool's own descriptor, and only that."""
        if self.watch is not None:
            self.watch.close()
        if self.beside is not None:
            self.beside.close()


class Durations:
    """A histogram of seconds, under its pool's lock."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def histogram(self) -> Histogram:
        """What it is by now."""
        return Histogram(tuple(self._counts), self._sum)


@dataclasses.dataclass(slots=True, eq=False)
class _Waiter:
    """One waiting thread: for what, how it is woken, what it was granted, whether the pool was stopped.

    `passed`: how many with high priority came later and stand before it.
    """

    route: LocalRoute
    bell: threading.Condition
    slot: _Slot | None = None
    stopped: bool = False
    since: float = dataclasses.field(default_factory=monotonic)
    passed: int = 0


class LocalPool:
    """One pool of this process, for all handles on it.

    Nothing waits under its lock, which methods with an underscore need. `stopped`: until it is declared again; `ended`,
    by stop(): until it is used again.
    """

    lost = False

    def __init__(self, name: str, wanted: PoolOptions) -> None:
        self.name = name
        self.options = wanted
        self.notices = Notices(name)
        self.handles = 0
        self.slots: set[_Slot] = set()
        self.inert = self.stopped = self.ended = self.paused = False
        self._lock = threading.RLock()
        self._idle: dict[LocalRoute, list[_Slot]] = {}
        self._closing: list[_Slot] = []
        self._queue: collections.deque[_Waiter] = collections.deque()
        self._dropped: collections.deque[tuple[_Slot, int]] = collections.deque()
        self._serial = 0
        self._count_anew()
        self.hooks = Hooks(name)
        self.on_checkout = self.hooks.of("checkout")
        self.noting = False
        self.places: dict[int, Any] = {}
        self.welcome: Mapping[str, Any] = {}

    def _count_anew(self) -> None:
        self.counters = collections.Counter(dict.fromkeys((*COUNTERS, *ARBITER_COUNTERS), 0))
        self.closes = collections.Counter(dict.fromkeys(REASONS, 0))
        self._by_key: dict[str, tuple[collections.Counter[str], collections.Counter[str]]] = {}
        self._seconds = {name: Durations() for name in ("wait_seconds", "connect_seconds", "lease_seconds")}

    def _count(self, name: str, route: LocalRoute, by: int = 1) -> None:
        self.counters[name] += by
        self._of_key(route)[0][name] += by

    def _of_key(self, route: LocalRoute) -> tuple[collections.Counter[str], collections.Counter[str]]:
        """The counters of a key, and its closes."""
        where = route.where
        if where not in self._by_key and len(self._by_key) >= _MOST_KEYS:
            where = OTHER_KEYS
        return self._by_key.setdefault(where, (collections.Counter(), collections.Counter(dict.fromkeys(REASONS, 0))))

    def own_counters(self) -> dict[str, int]:
        """What a worker counts."""
        return {**{name: self.counters[name] for name in COUNTERS}, **from_closes(self.closes)}

    def key_stats(self) -> dict[str, KeyStats]:
        """The numbers of every address that was used."""
        with self._lock:
            self._tidy()
            counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
            for slot in self.slots:
                counts[slot.route.where][slot.state] += 1
                counts[slot.route.where]["connections"] += slot.counts
            for waiter in self._queue:
                counts[waiter.route.where]["waiting"] += 1
            closes: dict[str, dict[str, int]] = {}
            for where, (counters, closed) in self._by_key.items():
                counts[where].update(key_counters(counters))
                closes[where] = dict(closed)
            return {where: KeyStats(**count, closes=closes.get(where, {})) for where, count in counts.items()}

    def route(self, transport: str | drivers.Driver[Any], host: str, port: int) -> LocalRoute:
        """The route for an address; equal addresses give equal ones."""
        driver = drivers.find(transport)
        _, where, number, place = drivers.key(driver, *driver.address(host, port))
        return LocalRoute(driver, where, number, place)

    def urgent(self, route: LocalRoute) -> LocalRoute:
        """The same route for checkouts with high priority."""
        return dataclasses.replace(route, high=True)

    def stats(self) -> PoolStats:
        """The numbers of this process, which are all there are."""
        with self._lock:
            self._tidy()
            states = collections.Counter(slot.state for slot in self.slots)
            more: dict[str, Any] = {name: durations.histogram() for name, durations in self._seconds.items()}
            leased = [slot.since for slot in self.slots if slot.state == LEASED]
            if leased:
                more.update(longest_lease=monotonic() - min(leased), longest_lease_pid=os.getpid())
            if self._queue:
                longest = monotonic() - min(waiter.since for waiter in self._queue)
                more.update(longest_wait=longest, longest_wait_pid=os.getpid())
            more["connections"] = sum(slot.counts for slot in self.slots)
            return from_counts(
                self.name, self.options.max_connections, states, self.counters, len(self._queue), 1, self.closes, **more
            )

    def take_own(self, route: LocalRoute) -> None:
        """Nothing here is leased without the pool's lock."""

    def checkout(
        self, route: LocalRoute, patience: float | None, connect_timeout: float,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Lease[Any]:  # fmt: skip
        """A lease, in the order of asking: an idle connection, else a new one. Patience 0 is: not in the queue.

        Where `given_up` turns true the queue is left, as at the end of the patience.
        """
        limit = None if patience is None else monotonic() + patience
        lease: Lease[Any] = Lease(self, None, 0)
        with self._lock:
            self._tidy()
            if self.ended:
                self.stopped = self.ended = False
            if self.stopped:
                raise PoolStopped(f"pool {self.name!r} was stopped")
            slot = None if self._is_behind(route) else self._find(route)
            self._begin(slot or self._wait(route, limit, given_up), lease)
        slot = lease._entry
        if slot.state == OPENING:
            left = limit - monotonic() if limit and patience else connect_timeout
            self._open(slot, lease, min(connect_timeout, left))
        elif not self._passes(slot):
            with self._lock:
                if slot.word == lease.word:  # else the pool was closed meanwhile, and the connection with it
                    slot.word = 0
                    self._close(slot, "check_failed")
                lease.word = 0
                self._count(slot.way, route, -1)
                self._serve()
            rest = None if limit is None else max(0.0, limit - monotonic())
            return self.checkout(route, rest, connect_timeout, given_up)
        lease.conn = slot.conn
        return lease

    def _passes(self, slot: _Slot) -> bool:
        """The driver's active check after a long rest, where the pool wants it and there is one; and its reset.

        An error is a refusal. With one process, only a driver that always resets does.
        """
        driver = slot.route.driver
        checks = self.options.check == "active" and slot.idle > self.options.check_after
        check = getattr(driver, "check", None) if checks else None
        reset = getattr(driver, "reset", None) if getattr(driver, "always", False) else None
        try:
            return (check is None or bool(check(slot.conn))) and (reset is None or bool(reset(slot.conn)))
        except Exception as error:  # noqa: BLE001 - the driver's; whatever it is, the connection is of no use
            self.hooks.log.debug("the check of a connection to %s failed: %r", slot.route.where, error)
            return False

    def prewarm(self, route: LocalRoute, count: int | None, connect_timeout: float) -> None:
        """Open what is missing of a key now, as far as nobody waits and the cap allows; a failure is logged."""
        wanted = self.options.min_idle if count is None else count
        made: list[Lease[Any]] = []
        try:
            while self._missing(route, wanted):
                lease: Lease[Any] = Lease(self, None, 0)
                with self._lock:
                    slot = _Slot(route)
                    full = len(self.slots) >= self.options.max_connections or not self._may_have(route)
                    if self._queue or full or self._is_full(route) or self.stopped:
                        return
                    self.slots.add(slot)
                    self._begin(slot, lease)
                self._open(slot, lease, connect_timeout, "prewarmed")
                made.append(lease)
        except SharedPoolError as error:
            self.hooks.log.warning("prewarming %s: %s", route.where, error)
        finally:
            for lease in made:
                with self._lock:
                    word, lease.word = lease.word, 0
                    if lease._entry.word == word:
                        self._give_back(lease._entry, keep=True)

    def _missing(self, route: LocalRoute, wanted: int) -> bool:
        with self._lock:
            self._tidy()
            return sum(slot.route == route and slot.state != CLOSING for slot in self.slots) < wanted

    def _is_behind(self, route: LocalRoute) -> bool:
        """Whether those come first who wait; with a reserve, normal priority waits although others need not."""
        passes = self.options.reserve and route.high
        before = [waiter.route for waiter in self._queue if waiter.route.high or not passes]
        return any(one == route or not self._is_full(one) for one in before)

    def _is_full(self, route: LocalRoute, *, above: int = 0, closing: bool = True) -> bool:
        """Whether max_per_key lets its address have no more; or has more than that, if `above` is 1."""
        limit = self.options.max_per_key
        if limit is None:
            return False
        count = sum(slot.route == route and (closing or slot.state != CLOSING) for slot in self.slots)
        return count >= limit + above

    def _may_have(self, route: LocalRoute) -> bool:
        """Whether the cap and the reserve let it have one more."""
        most = self.options.max_connections
        if route.high or not self.options.reserve:
            return len(self.slots) <= most
        return len(self.slots) - sum(map(len, self._idle.values())) < most - self.options.reserve

    def _find(self, route: LocalRoute) -> _Slot | None:
        """An idle connection that is alive, else a permit for a new one, if there is any of the two."""
        if self.paused or not self._may_have(route):
            return None
        idle = self._idle.get(route, [])
        while idle:
            slot = idle.pop()
            if slot.reusable(self.options.check != "none"):
                slot.idle = monotonic() - slot.since
                return slot
            self._close(slot, "ended")
        if len(self.slots) >= self.options.max_connections or self._is_full(route):
            return None
        slot = _Slot(route)
        self.slots.add(slot)
        return slot

    def _begin(self, slot: _Slot, lease: Lease[Any]) -> None:
        """A lease begins; without a connection it is to be opened first."""
        opens = slot.conn is None and slot.route.driver.connects
        if slot.conn is not None:
            slot.way = "handoffs" if slot.state == GRANTED else "reuses"
            self._count(slot.way, slot.route)
        else:
            self._count("attempts" if opens else "opens", slot.route)
        slot.move(OPENING if opens else LEASED)
        slot.thread = get_ident()
        slot.reported = False
        self._serial += 1
        lease._entry = slot
        slot.word = lease.word = self._serial

    def _open(self, slot: _Slot, lease: Lease[Any], seconds: float, way: str = "opens") -> None:
        """Open the connection that the lease has a permit for; after a failure the permit goes on."""
        began = monotonic()
        try:
            slot.fill(seconds)
        except BaseException:
            with self._lock:
                lease.word = 0
                self._count("open_failures", slot.route)
                self._free(slot)
                self._serve()
            raise
        with self._lock:
            slot.move(LEASED)
            slot.idle = 0.0
            self._count("opened", slot.route)
            self._seconds["connect_seconds"].add(monotonic() - began)
            if slot.word != lease.word:
                lease.word = 0
                self._give_back(slot, keep=False)
                raise LeaseError("the pool was closed while this connection was being opened")
            self._count(way, slot.route)
        self.hooks.tell("open", slot.route.where)

    def _wait(self, route: LocalRoute, limit: float | None, given_up: Callable[[], bool]) -> _Slot:
        """Queue until something is granted; whatever is raised, the place in the queue has been left."""
        if limit is not None and monotonic() >= limit:
            raise self._timeout(route)
        if len(self._queue) >= (self.options.max_waiting or options.MOST_WAITING):
            raise self._full()
        waiter = _Waiter(route, threading.Condition(self._lock))
        self._join(waiter)
        self._count("waits", route)
        try:
            self._serve()
            while waiter.slot is None and not waiter.stopped and (limit is None or monotonic() < limit):
                if given_up():
                    break
                self._nap(waiter, limit)
        except BaseException:
            self._leave(waiter)
            raise
        finally:
            self._seconds["wait_seconds"].add(monotonic() - waiter.since)
            self.hooks.tell("wait", monotonic() - waiter.since)
        if waiter.slot is not None:
            return waiter.slot
        self._leave(waiter)
        if waiter.stopped:
            raise PoolStopped(f"pool {self.name!r} was stopped while this checkout waited")
        raise self._timeout(route)

    def _join(self, waiter: _Waiter) -> None:
        """The end of the queue, or with high priority before the first that may be passed."""
        normal = (one for one in self._queue if not one.route.high)
        may_be_passed = (one for one in normal if self.options.reserve or one.passed < MOST_PASSED)
        passed = next(may_be_passed, None) if waiter.route.high else None
        if passed is None:
            self._queue.append(waiter)
        else:
            passed.passed += 1
            self._queue.insert(self._queue.index(passed), waiter)

    def _nap(self, waiter: _Waiter, limit: float | None) -> None:
        """Sleep until woken, or until there is something to look after."""
        until = monotonic() + _LOOK_UP
        if self._closing and self._queue[0] is waiter:
            until = min(until, *(slot.look for slot in self._closing))
        waiter.bell.wait(max(0.0, (until if limit is None else min(until, limit)) - monotonic()))
        if self._queue and self._queue[0] is waiter:
            self._tidy()

    def _leave(self, waiter: _Waiter) -> None:
        """Leave the queue, passing on what was granted meanwhile."""
        if waiter.slot is not None:
            self._count("unwanted", waiter.route)
            self._give_back(waiter.slot, keep=True)
        elif waiter in self._queue:
            self._queue.remove(waiter)
            self._serve()

    def _serve(self) -> None:
        """Give the first in line what there is; who is first then is woken to watch what is closing."""
        while any(self._serve_one(waiter) for waiter in self._next()):
            pass
        if self._queue and self._closing:
            self._queue[0].bell.notify()

    def _next(self) -> list[_Waiter]:
        """The first in line, and before it those whose addresses have all that they may."""
        full = list(itertools.takewhile(lambda waiter: self._is_full(waiter.route), self._queue))
        return [*full, *itertools.islice(self._queue, len(full), len(full) + 1)]

    def _serve_one(self, waiter: _Waiter) -> bool:
        """Give a waiter what there is, or begin to make room for it; whether anything was done."""
        slot = self._find(waiter.route)
        if slot is None:
            return self._may_have(waiter.route) and not self._is_full(waiter.route) and self._make_room()
        slot.move(GRANTED)
        self._queue.remove(waiter)
        waiter.slot = slot
        waiter.bell.notify()
        return True

    def _make_room(self) -> bool:
        """Close the idle connection longest unused, wherever it leads, unless as many are closing as are waited for."""
        over = self.paused or len(self.slots) > self.options.max_connections
        wanted = sum(not self._is_full(waiter.route) for waiter in self._queue)
        return not over and len(self._closing) < wanted and self._close_idle(1, "evicted")

    def _full(self) -> TooManyWaiting:
        stats = self.stats()
        text = f"pool {self.name!r}: {self.options.max_waiting} checkouts wait already, and no more may"
        text += f" (max_waiting) {stats.numbers()}"
        return TooManyWaiting(text, stats=stats, pool=self.name)

    def _timeout(self, route: LocalRoute) -> PoolTimeout:
        self._count("timeouts", route)
        stats = self.stats()
        stats = dataclasses.replace(stats, waiting=stats.waiting + 1)  # this one has just left the queue
        text = f"pool {self.name!r}: no connection to {route.where} became free in time {stats.numbers()}"
        if self.paused:
            text += "; the pool is paused"
        if self._is_full(route):
            text += f"; its address has all that it may (max_per_key={self.options.max_per_key})"
        leased = [slot for slot in self.slots if slot.state == LEASED]
        if leased:
            age = monotonic() - min(slot.since for slot in leased)
            text += f"; the longest lease is {age:.1f} s old, of process {os.getpid()}"
        mine = sum(slot.thread == get_ident() for slot in leased)
        text += f"; this thread holds {mine or 'no'} lease{'s' if mine != 1 else ''} of this pool itself"
        return PoolTimeout(text, stats=stats, pool=self.name)

    def checkin(self, lease: Lease[Any]) -> None:
        """End a lease: its connection goes to who waits, or stays open and idle; it is closed if it is not clean."""
        self._end(lease, keep=True)

    def discard(self, lease: Lease[Any]) -> None:
        """End a lease by closing its connection."""
        self._end(lease, keep=False)

    def drop(self, lease: Lease[Any]) -> None:
        """A lease was forgotten and collected; called by a finalizer, so it only takes note."""
        self._dropped.append((lease._entry, lease.word))

    def stays_inert(self) -> bool:
        """Whether this is a forked child's copy."""
        return self.inert

    def _end(self, lease: Lease[Any], *, keep: bool) -> None:
        if self.inert:  # and its lock may be held for ever
            raise LeaseError("this lease belongs to the process that this one was forked from; check it in there")
        with self._lock:
            word = lease.word
            if not word or lease._entry.word != word:
                lease.word = 0
                raise LeaseError("this lease is not in force: it was checked in or discarded before")
        self.hooks.tell("checkin", lease)
        with self._lock:
            lease.word = 0
            if lease._entry.word == word:
                self._seconds["lease_seconds"].add(monotonic() - lease._entry.since)
                self._give_back(lease._entry, keep=keep, reason="discarded")

    def _give_back(self, slot: _Slot, *, keep: bool, reason: str = "dropped") -> None:
        """Where a connection or a permit goes when its lease ends, or when nobody wants its grant."""
        slot.word = 0
        if slot.conn is None:
            self._free(slot)
        elif not keep:
            self._close(slot, reason)
        elif slot.doomed or len(self.slots) - len(self._closing) > self.options.max_connections:
            self._close(slot, "stopped" if slot.doomed else "over_limit")
        elif self._is_full(slot.route, above=1, closing=False):
            self._close(slot, "over_limit")
        elif not slot.reusable():
            self._close(slot, "unclean")
        else:
            slot.move(IDLE)
            self._idle.setdefault(slot.route, []).append(slot)
        self._serve()
        self._trim()

    def _close(self, slot: _Slot, reason: str) -> None:
        """Begin to close a connection; its permit is free once the remote has closed, too."""
        assert slot.watch is not None
        self.closes[reason] += 1
        self._of_key(slot.route)[1][reason] += 1
        self.hooks.log.debug("closed a connection to %s: %s", slot.route.where, reason)
        self.hooks.tell("close", reason)
        driver = slot.route.driver
        if hasattr(driver, "goodbye"):
            driver.goodbye(slot.conn)
        then = None
        if slot.beside is not None:
            name, state = slot.conn.calls_off
            then = Ending(slot.beside, drivers.abort_of(name, slot.beside, state))
        slot.ending = Ending(slot.watch, drivers.abort_of(driver.name, slot.watch, slot.session), then)
        slot.ending.begin()
        driver.close(slot.conn)
        slot.conn = None
        slot.move(CLOSING)
        slot.give_up = slot.since + self.options.close_timeout
        self._closing.append(slot)
        self._look(slot)

    def _look(self, slot: _Slot) -> None:
        """See whether a connection has ended; if so, or if its time is over, its permit is free."""
        if _WATCHES_ENDS and slot.ending is not None and not slot.ending.ended():
            if (now := monotonic()) < slot.give_up:
                slot.look = min(slot.give_up, now + slot.ending.pause())
                return
            slot.ending.force()
            self._count("closed_unconfirmed", slot.route)
        self._count("closed", slot.route)
        self._closing.remove(slot)
        self._free(slot)

    def _free(self, slot: _Slot) -> None:
        slot.state = FREE
        self.slots.discard(slot)
        slot.let_go()

    def _tidy(self) -> None:
        """Do what is due: forgotten leases, idle timeout, ends of connections; then serve who waits."""
        while self._dropped:
            slot, word = self._dropped.popleft()
            if slot.word == word:
                self._count("dropped", slot.route)
                self._give_back(slot, keep=False)
        now = monotonic()
        if self.options.idle_timeout is not None:
            for idle in self._idle.values():
                while idle and idle[0].since + self.options.idle_timeout <= now:
                    self._close(idle.pop(0), "expired")
        self._retire(now)
        self._look_at_leases(now)
        for slot in [slot for slot in self._closing if slot.look <= now]:
            self._look(slot)
        self._serve()

    def _trim(self) -> None:
        """Close the idle connections longest unused while there are more than max_idle."""
        if self.options.max_idle is not None:
            self._close_idle(sum(map(len, self._idle.values())) - self.options.max_idle, "over_idle")

    def _retire(self, now: float) -> None:
        """Close idle connections past max_lifetime, and mark leased ones."""
        limit = self.options.max_lifetime
        if limit is None:
            return
        for slot in [slot for slot in self.slots if slot.conn is not None]:
            if slot.opened + limit * (1 - slot.jitter) <= now:
                self._retire_one(slot)

    def _retire_one(self, slot: _Slot) -> None:
        slot.doomed = True
        if slot.state == IDLE:
            self._idle[slot.route].remove(slot)
            self._close(slot, "max_lifetime")

    def _look_at_leases(self, now: float) -> None:
        """Report every lease that lasts too long, once; take its connection away if that is wanted."""
        limit = self.options.lease_timeout
        if limit is None:
            return
        for slot in [slot for slot in self.slots if slot.state == LEASED and now - slot.since > limit]:
            if not slot.reported:
                slot.reported = True
                self._count("abandoned", slot.route)
                log_of_pool = logging.getLogger(f"sharedpool.pool.{self.name}")
                log_of_pool.warning(
                    "pool %r: abandoned: thread %d has held a lease to %s for %.1f s (lease_timeout %g)", self.name,
                    slot.thread, slot.route.where, now - slot.since, limit,
                )  # fmt: skip
            if self.options.reclaim:
                slot.word = 0
                if slot.conn is None:
                    self._free(slot)
                else:
                    self._close(slot, "reclaimed_leases")

    # --- operations ---------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Nobody gets anything any more until `resume`."""
        with self._lock:
            self.paused = True

    def resume(self) -> None:
        """Those who wait are served in their order."""
        with self._lock:
            self.paused = False
            self._tidy()

    def reset_stats(self) -> None:
        """Every counter starts from zero."""
        with self._lock:
            self._count_anew()
            for slot in self.slots:  # what is open now was opened
                self._count("opened", slot.route, slot.counts)

    def drain(self, address: drivers.Address | None, seconds: float | None, *, kill: bool = False) -> int:
        """Close idle connections now and leased ones at their checkin; with `seconds`, wait until they have ended."""
        with self._lock:
            self._tidy()
            chosen = [slot for slot in self.slots if slot.leads_to(address)]
            number = sum(slot.state != CLOSING for slot in chosen)
            for slot in chosen:
                self._drain_one(slot, kill=kill)
            self._serve()
        if seconds is not None:
            self._await_end(chosen, number, seconds)
        return number

    def kill(self, address: drivers.Address | None) -> int:
        """As drain, and leased ones are shut down under their users' hands."""
        return self.drain(address, None, kill=True)

    def _drain_one(self, slot: _Slot, *, kill: bool) -> None:
        if slot.state == IDLE:
            self._idle[slot.route].remove(slot)
            self._close(slot, "killed" if kill else "drained")
        elif slot.state != CLOSING:
            slot.doomed = True
            if kill and slot.watch is not None:
                with contextlib.suppress(OSError):
                    break_off(slot.watch)

    def _await_end(self, chosen: list[_Slot], number: int, seconds: float) -> None:
        limit = monotonic() + seconds
        while True:
            with self._lock:
                self._tidy()
                left = [slot for slot in chosen if slot.state != FREE]
            if not left:
                return
            if monotonic() >= limit:
                break
            sleep(0.002)
        raise DrainTimeout(
            f"pool {self.name!r}: {len(left)} of {number} connections have not ended within {seconds:g} s: leased by"
            f" process {os.getpid()}; they are closed as soon as they come back",
            left=len(left), pids=[os.getpid()],
        )  # fmt: skip

    def _close_idle(self, most: int, reason: str) -> bool:
        """Close so many idle connections, those longest unused first; whether there was one."""
        idle = sorted((slot for slots in self._idle.values() for slot in slots), key=lambda slot: slot.since)
        chosen = idle[: max(0, most)]
        for slot in chosen:
            self._idle[slot.route].remove(slot)
            self._close(slot, reason)
        return bool(chosen)

    def apply(self, wanted: PoolOptions) -> None:
        """Put options in force, at once, for idle connections and waiters too; a stopped pool runs again.

        Raises:
            OptionError: The reserve is not below the limit.
        """
        options.check_reserve(wanted)
        with self._lock:
            self.options = wanted
            if wanted.reserve:
                self._queue = collections.deque(sorted(self._queue, key=lambda waiter: not waiter.route.high))
            self.stopped = self.ended = False
            self._tidy()
            self._close_idle(len(self.slots) - len(self._closing) - wanted.max_connections, "over_limit")
            for route, idle in list(self._idle.items()):
                while idle and self._is_full(route, above=1, closing=False):
                    self._close(idle.pop(0), "over_limit")
            self._trim()

    def stop(self, *, ended: bool = False) -> None:
        """Waiters are sent away, idle connections closed; leased ones are closed when they come back."""
        with self._lock:
            self.stopped, self.ended = True, ended
            for waiter in self._queue:
                waiter.stopped = True
                waiter.bell.notify()
            self._queue.clear()
            self._close_idle(len(self.slots), "stopped")
            for slot in self.slots:
                slot.doomed = True

    def handle_call(self, request: str, *arguments: Any) -> Any:
        """Answer a question, as the arbiter's pool object does in shared mode."""
        calls: dict[str, Callable[..., Any]] = {
            "count": self._idle_of,
            "max_connections": lambda: self.options.max_connections,
            "timeout": lambda: self.options.idle_timeout,
        }
        return calls[request](*arguments)

    def handle_cast(self, request: str, *arguments: Any) -> Any:
        """Carry out a change, as the arbiter's pool object does in shared mode."""
        casts: dict[str, Callable[..., Any]] = {
            "notify": self._notify,
            "set_max_connections": lambda value, _: self.apply(
                dataclasses.replace(self.options, max_connections=value)
            ),
            "set_timeout": lambda value, _: self.apply(dataclasses.replace(self.options, idle_timeout=value)),
        }
        return casts[request](*arguments)

    def _idle_of(self, address: drivers.Address | None = None) -> int:
        if address is None:
            return self.stats().idle
        with self._lock:
            self._tidy()
            return sum(slot.leads_to(address) for idle in self._idle.values() for slot in idle)

    def _notify(self, text: str) -> int:
        """Tell this process, which is all there are, if it uses the pool."""
        if not self.handles:
            return 0
        self.notices.tell(json.loads(text))
        return 1

    def cut_off(self) -> None:
        """End what is being closed, without waiting for its remote."""
        with self._lock:
            for slot in list(self._closing):
                slot.give_up = 0.0
                self._look(slot)

    def detach(self) -> None:
        """One handle less. With the last one leases end, and idle connections are closed: nobody else can have them."""
        with _declaring:
            self.handles -= 1
            if self.handles:
                return
        with self._lock:
            for slot in [slot for slot in self.slots if slot.state in (LEASED, OPENING)]:
                slot.word = 0  # who is opening finds out afterwards
                if slot.state == LEASED:
                    self._give_back(slot, keep=False, reason="reaped")
            self._close_idle(len(self.slots), "reaped")

    def forked(self) -> None:
        """This is a child's copy: nothing is its own but its descriptors. Takes no lock."""
        self.inert = True
        for slot in self.slots:
            slot.let_go()
        connected = [slot for slot in self.slots if slot.conn is not None]
        if connected:
            dead, other = socket.socketpair()
            other.close()
            for slot in connected:
                disown(slot.route.driver, slot.conn, slot.number, dead.fileno(), lent=slot.state != IDLE)
            dead.close()


_declaring = threading.Lock()
_pools: dict[tuple[str, str], LocalPool] = {}


def _scope(app: str | None) -> str:
    """What makes pools of one name the same: as in shared mode, but no directory is made."""
    directory = os.environ.get("SHAREDPOOL_DIR")
    return f"/{directory}" if app is None and directory else app or os.environ.get("SHAREDPOOL_APP") or "default"


def pools(app: str | None = None) -> dict[str, LocalPool]:
    """The pools of the environment's scope, or of an app's, by name, that are not stopped."""
    scope = _scope(app)
    return {name: pool for (where, name), pool in list(_pools.items()) if where == scope and not pool.stopped}


def find(name: str, *, app: str | None = None) -> LocalPool:
    """The pool of that name.

    Raises:
        PoolNotFound: There is none.
    """
    known = pools(app)
    if name not in known:
        raise PoolNotFound(f"there is no pool {name!r}; pools here: {', '.join(sorted(known)) or 'none'}")
    return known[name]


def attach(
    name: str, given: dict[str, Any], *, app: str | None = None, update: bool = True,
    defaults: dict[str, Any] | None = None,
) -> LocalPool:  # fmt: skip
    """The pool for one more handle, as Attachment is in shared mode."""
    ours = {option: value for option, value in given.items() if option not in options.OF_THE_HANDLE}
    pool = declare(name, ours, app=app, update=update, implicit=not given, defaults=defaults)
    with _declaring:
        pool.handles += 1
    return pool


def declare(
    name: str, given: dict[str, Any], *, app: str | None = None, update: bool = True, implicit: bool = False,
    defaults: dict[str, Any] | None = None,
) -> LocalPool:  # fmt: skip
    """Find a pool, make it, or apply what differs; the rules and errors are those of the arbiter's `declare`."""
    with _declaring:
        pool = _pools.get((_scope(app), name))
        if pool is None or pool.stopped:
            given = {**(defaults or {}), **given}
            if implicit and not given and name != "default":
                raise PoolNotFound(
                    f"nobody declared a pool {name!r} here; give options, as in attach({name!r}, max_connections=20);"
                    f" pools here: {', '.join(sorted(pools())) or 'none'}"
                )
            options.check_reserve(options.make(given))
            if pool is None:
                pool = _pools[_scope(app), name] = LocalPool(name, options.make(given))
            pool.apply(options.make(given))
        else:
            _change(pool, given, update)
        return pool


def _change(pool: LocalPool, given: dict[str, Any], update: bool) -> None:
    old = pool.options.as_dict()
    differing = options.differing(old, given)
    texts = [f"{name}: {old.get(name)!r} (by process {os.getpid()}) -> {value!r}" for name, value in differing.items()]
    refused = sorted(set(differing) & options.FIXED) if update else sorted(differing)
    if refused:
        why = "cannot change while it runs" if update else "differ, and update=False"
        raise PoolOptionsDiffer(f"pool {pool.name!r}: {', '.join(refused)} {why}: {'; '.join(texts)}")
    if differing:
        pool.apply(dataclasses.replace(pool.options, **differing))
    for text in texts:
        log.warning("pool %r: option %s (by process %d)", pool.name, text, os.getpid())


def forked() -> None:
    """In a forked child: everything inherited becomes inert, and the child makes pools of its own."""
    global _declaring
    _declaring = threading.Lock()
    for pool in list(_pools.values()):
        pool.forked()
    _pools.clear()


def forget_all() -> None:
    """Stop the pools of every scope at once, and know them no more; who uses their names next makes new ones."""
    with _declaring:
        known = list(_pools.values())
        _pools.clear()
    for pool in known:
        pool.stop(ended=True)
        pool.cut_off()
