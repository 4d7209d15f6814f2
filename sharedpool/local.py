"""The same API in one process: no arbiter, no shared memory, no thread. For development, notebooks and tests.

Chosen by SHAREDPOOL_MODE=local, never silently on Linux. The cap holds within this process only. Nobody watches between
calls: every call looks after what is due, and so does the first in line while it waits.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Mapping
from threading import get_ident
from time import monotonic
from typing import Any, Final

from . import drivers, options
from .drivers.sockets import Ending
from .errors import LeaseError, PoolNotFound, PoolOptionsDiffer, PoolStopped, PoolTimeout, TooManyWaiting, file_limit
from .layout import MOST_PASSED
from .lease import Lease
from .options import PoolOptions
from .stats import ARBITER_COUNTERS, COUNTERS, PoolStats

log = logging.getLogger("sharedpool")

OPENING, LEASED, GRANTED, IDLE, CLOSING, FREE = "opening", "in_use", "granted", "idle", "closing", ""

#: Elsewhere the system does not say whether the peer has closed, too: a permit is free when our side has.
_WATCHES_ENDS: Final = sys.platform == "linux"
#: Who waits looks up so often, s: a forgotten lease is only noted by its finalizer, which can wake nobody.
_LOOK_UP: Final = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class LocalRoute:
    """An address, and the driver that leads there."""

    driver: drivers.Driver[Any]
    host: str
    port: int
    high: bool = dataclasses.field(default=False, compare=False)

    @property
    def where(self) -> str:
        return f"{self.driver.name}://{self.host}:{self.port}" if self.port else f"{self.driver.name}:{self.host}"


@dataclasses.dataclass(slots=True, eq=False)
class _Slot:
    """A permit in use and, unless it is bare, its connection.

    `state` is named as in the stats. `watch` is the pool's own descriptor of the connection, which the user cannot
    close; `number` is the one in `conn`. `word` is the lease's, while in force. `doomed`: the lease outlived its pool.
    """

    route: LocalRoute
    state: str = OPENING
    since: float = 0.0
    conn: Any = None
    number: int = -1
    watch: socket.socket | None = None
    word: int = 0
    thread: int = 0
    doomed: bool = False
    ending: Ending | None = None
    give_up: float = 0.0
    look: float = 0.0

    def move(self, state: str) -> None:
        self.state, self.since = state, monotonic()

    def fill(self, seconds: float) -> None:
        """Open the connection."""
        driver = self.route.driver
        conn = driver.open(self.route.host, self.route.port, seconds, lambda sock: None)
        try:
            self.number = driver.fileno(conn)
            self.watch = socket.fromfd(self.number, -1, -1)  # -1: of the family and type that it is
            self.conn = conn
        except OSError as error:
            raise file_limit(error, f"hold a connection to {self.route.where}") from error
        finally:
            if self.conn is None:
                driver.close(conn)

    def reusable(self) -> bool:
        """Whether somebody else may have the connection: still the one that was lent, clean, open and silent."""
        driver = self.route.driver
        return driver.fileno(self.conn) == self.number and driver.clean(self.conn) and not _readable(self.number)

    def let_go(self) -> None:
        """Close the pool's own descriptor, and only that."""
        if self.watch is not None:
            self.watch.close()


def _readable(number: int) -> bool:
    """Whether the peer has closed, or said something."""
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([number], [], [], 0)[0])
    poller = select.poll()
    poller.register(number, select.POLLIN)
    return bool(poller.poll(0))


@dataclasses.dataclass(slots=True, eq=False)
class _Waiter:
    """One waiting thread: for what, how it is woken, what it was granted, whether the pool was stopped.

    `passed`: how many with high priority came later and stand before it.
    """

    route: LocalRoute
    bell: threading.Condition
    slot: _Slot | None = None
    stopped: bool = False
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
        self.handles = 0
        self.slots: set[_Slot] = set()
        self.inert = self.stopped = self.ended = False
        self._lock = threading.RLock()
        self._idle: dict[LocalRoute, list[_Slot]] = {}
        self._closing: list[_Slot] = []
        self._queue: collections.deque[_Waiter] = collections.deque()
        self._dropped: collections.deque[tuple[_Slot, int]] = collections.deque()
        self._serial = 0
        self.counters = collections.Counter(dict.fromkeys((*COUNTERS, *ARBITER_COUNTERS), 0))
        self.welcome: Mapping[str, Any] = {}

    def own_counters(self) -> dict[str, int]:
        """What a worker counts."""
        return {name: self.counters[name] for name in COUNTERS}

    def route(self, transport: str, host: str, port: int) -> LocalRoute:
        """The route for an address; equal addresses give equal ones."""
        driver = drivers.find(transport)
        return LocalRoute(driver, *driver.address(host, port))

    def urgent(self, route: LocalRoute) -> LocalRoute:
        """The same route for checkouts with high priority."""
        return dataclasses.replace(route, high=True)

    def stats(self) -> PoolStats:
        """The numbers of this process, which are all there are."""
        with self._lock:
            self._tidy()
            states = collections.Counter(slot.state for slot in self.slots)
            return PoolStats(
                name=self.name, max_connections=self.options.max_connections, waiting=len(self._queue), processes=1,
                **states, **self.counters,
            )  # fmt: skip

    def checkout(self, route: LocalRoute, patience: float | None, connect_timeout: float) -> Lease[Any]:
        """A lease, in the order of asking: an idle connection, else a new one. Patience 0 is: not in the queue."""
        limit = None if patience is None else monotonic() + patience
        lease: Lease[Any] = Lease(self, None, 0)
        with self._lock:
            self._tidy()
            if self.ended:
                self.stopped = self.ended = False
            if self.stopped:
                raise PoolStopped(f"pool {self.name!r} was stopped")
            slot = None if self._is_behind(route) else self._find(route)
            self._begin(slot or self._wait(route, limit), lease)
        slot = lease._entry
        if slot.state == OPENING:
            left = limit - monotonic() if limit and patience else connect_timeout
            self._open(slot, lease, min(connect_timeout, left))
        lease.conn = slot.conn
        return lease

    def _is_behind(self, route: LocalRoute) -> bool:
        """Whether those come first who wait; with a reserve, normal priority waits although others need not."""
        passes = self.options.reserve and route.high
        return bool(self._queue) and not (passes and not self._queue[0].route.high)

    def _may_have(self, route: LocalRoute) -> bool:
        """Whether the cap and the reserve let it have one more."""
        most = self.options.max_connections
        if route.high or not self.options.reserve:
            return len(self.slots) <= most
        return len(self.slots) - sum(map(len, self._idle.values())) < most - self.options.reserve

    def _find(self, route: LocalRoute) -> _Slot | None:
        """An idle connection that is alive, else a permit for a new one, if there is any of the two."""
        if not self._may_have(route):
            return None
        idle = self._idle.get(route, [])
        while idle:
            slot = idle.pop()
            if slot.reusable():
                return slot
            self._close(slot)
        if len(self.slots) >= self.options.max_connections:
            return None
        slot = _Slot(route)
        self.slots.add(slot)
        return slot

    def _begin(self, slot: _Slot, lease: Lease[Any]) -> None:
        """A lease begins; without a connection it is to be opened first."""
        opens = slot.conn is None and slot.route.driver.connects
        if slot.conn is not None:
            self.counters["handoffs" if slot.state == GRANTED else "reuses"] += 1
        else:
            self.counters["attempts" if opens else "opens"] += 1
        slot.move(OPENING if opens else LEASED)
        slot.thread = get_ident()
        self._serial += 1
        lease._entry = slot
        slot.word = lease.word = self._serial

    def _open(self, slot: _Slot, lease: Lease[Any], seconds: float) -> None:
        """Open the connection that the lease has a permit for; after a failure the permit goes on."""
        try:
            slot.fill(seconds)
        except BaseException:
            with self._lock:
                lease.word = 0
                self.counters["open_failures"] += 1
                self._free(slot)
                self._serve()
            raise
        with self._lock:
            slot.move(LEASED)
            self.counters["opens"] += 1
            if slot.word != lease.word:
                lease.word = 0
                self._give_back(slot, keep=False)
                raise LeaseError("the pool was closed while this connection was being opened")

    def _wait(self, route: LocalRoute, limit: float | None) -> _Slot:
        """Queue until something is granted; whatever is raised, the place in the queue has been left."""
        if limit is not None and monotonic() >= limit:
            raise self._timeout(route)
        if len(self._queue) >= (self.options.max_waiting or options.MOST_WAITING):
            raise self._full()
        waiter = _Waiter(route, threading.Condition(self._lock))
        self._join(waiter)
        self.counters["waits"] += 1
        try:
            self._serve()
            while waiter.slot is None and not waiter.stopped and (limit is None or monotonic() < limit):
                self._nap(waiter, limit)
        except BaseException:
            self._leave(waiter)
            raise
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
            self.counters["unwanted"] += 1
            self._give_back(waiter.slot, keep=True)
        elif waiter in self._queue:
            self._queue.remove(waiter)
            self._serve()

    def _serve(self) -> None:
        """Give the first in line what there is; who is first then is woken to watch what is closing."""
        while self._queue:
            slot = self._find(self._queue[0].route)
            if slot is not None:
                slot.move(GRANTED)
                waiter = self._queue.popleft()
                waiter.slot = slot
                waiter.bell.notify()
            elif not (self._may_have(self._queue[0].route) and self._make_room()):
                break
        if self._queue and self._closing:
            self._queue[0].bell.notify()

    def _make_room(self) -> bool:
        """Close the idle connection longest unused, wherever it leads, unless as many are closing as are waited for."""
        over = len(self.slots) > self.options.max_connections
        return not over and len(self._closing) < len(self._queue) and self._close_idle(1, "evictions")

    def _full(self) -> TooManyWaiting:
        stats = self.stats()
        text = f"pool {self.name!r}: {self.options.max_waiting} checkouts wait already, and no more may"
        text += f" (max_waiting) {stats.numbers()}"
        return TooManyWaiting(text, stats=stats, pool=self.name)

    def _timeout(self, route: LocalRoute) -> PoolTimeout:
        self.counters["timeouts"] += 1
        stats = self.stats()
        text = f"pool {self.name!r}: no connection to {route.where} became free in time {stats.numbers()}"
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
            word, lease.word = lease.word, 0
            if not word or lease._entry.word != word:
                raise LeaseError("this lease is not in force: it was checked in or discarded before")
            self._give_back(lease._entry, keep=keep)

    def _give_back(self, slot: _Slot, *, keep: bool) -> None:
        """Where a connection or a permit goes when its lease ends, or when nobody wants its grant."""
        slot.word = 0
        if slot.conn is None:
            self._free(slot)
        elif slot.doomed or len(self.slots) > self.options.max_connections or not (keep and slot.reusable()):
            self._close(slot, "discards")
        else:
            slot.move(IDLE)
            self._idle.setdefault(slot.route, []).append(slot)
        self._serve()

    def _close(self, slot: _Slot, reason: str | None = None) -> None:
        """Begin to close a connection; its permit is free once the remote has closed, too."""
        assert slot.watch is not None
        self.counters.update([reason] if reason else [])
        slot.ending = Ending(slot.watch)
        slot.ending.begin()
        slot.route.driver.close(slot.conn)
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
            self.counters["closed_unconfirmed"] += 1
        self.counters["closed"] += 1
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
                self.counters["dropped"] += 1
                self._give_back(slot, keep=False)
        now = monotonic()
        if self.options.idle_timeout is not None:
            for idle in self._idle.values():
                while idle and idle[0].since + self.options.idle_timeout <= now:
                    self._close(idle.pop(0), "expired")
        for slot in [slot for slot in self._closing if slot.look <= now]:
            self._look(slot)
        self._serve()

    def _close_idle(self, most: int, reason: str | None = None) -> bool:
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

    def stop(self, *, ended: bool = False) -> None:
        """Waiters are sent away, idle connections closed; leased ones are closed when they come back."""
        with self._lock:
            self.stopped, self.ended = True, ended
            for waiter in self._queue:
                waiter.stopped = True
                waiter.bell.notify()
            self._queue.clear()
            self._close_idle(len(self.slots))
            for slot in self.slots:
                slot.doomed = True

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
                    self._give_back(slot, keep=False)
            self._close_idle(len(self.slots))

    def forked(self) -> None:
        """This is a child's copy: nothing is its own but its descriptors. Takes no lock."""
        self.inert = True
        for slot in self.slots:
            slot.let_go()
            if slot.state == IDLE:
                slot.route.driver.close(slot.conn)


_declaring = threading.Lock()
_pools: dict[tuple[str, str], LocalPool] = {}


def _scope(app: str | None) -> str:
    """What makes pools of one name the same: as in shared mode, but no directory is made."""
    directory = os.environ.get("SHAREDPOOL_DIR")
    return f"/{directory}" if app is None and directory else app or os.environ.get("SHAREDPOOL_APP") or "default"


def pools() -> dict[str, LocalPool]:
    """The pools of the environment's scope, by name, that are not stopped."""
    scope = _scope(None)
    return {name: pool for (where, name), pool in list(_pools.items()) if where == scope and not pool.stopped}


def attach(name: str, given: dict[str, Any], *, app: str | None = None, update: bool = True) -> LocalPool:
    """The pool for one more handle, as Attachment is in shared mode."""
    ours = {option: value for option, value in given.items() if option not in options.OF_THE_HANDLE}
    pool = declare(name, ours, app=app, update=update, implicit=not given)
    with _declaring:
        pool.handles += 1
    return pool


def declare(
    name: str, given: dict[str, Any], *, app: str | None = None, update: bool = True, implicit: bool = False
) -> LocalPool:
    """Find a pool, make it, or apply what differs; the rules and errors are those of the arbiter's `declare`."""
    with _declaring:
        pool = _pools.get((_scope(app), name))
        if pool is None or pool.stopped:
            if implicit and name != "default":
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
    differing = {
        name: value for name, value in given.items()
        if name not in options.OF_THE_HANDLE and old.get(name, options.NOT_GIVEN) != value
    }  # fmt: skip
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
