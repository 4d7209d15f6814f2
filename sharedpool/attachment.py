"""One process's side of one pool: checkout and checkin, and what this process holds.

Everything that the fast path needs lies in plain attributes here; nothing on it takes a lock, sends a message, or lets
go of the GIL. After a fork an attachment is inert in the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic_ns
from typing import Any, Final

from . import drivers, events, fdpass, held, launch, segment, view, wire
from .channel import Channel
from .counting import SUM, Durations, bucket_of
from .drivers.sockets import end, shut
from .errors import (
    NO_DESCRIPTOR,
    ArbiterLost,
    AttachRefused,
    ConnectFailed,
    LeaseError,
    PoolBroken,
    PoolStopped,
    PoolTimeout,
    SharedPoolError,
    file_limit,
)
from .held import Entry, Patience, Route
from .hooks import Hooks
from .layout import (
    ACTIVE,
    ANY_NUMBER,
    BEAT,
    CAN_MOVE,
    CELL_KEY,
    CELL_SINCE,
    CHECK_AFTER,
    CLOSE_TIMEOUT,
    CLOSING,
    CONNECT_TIME,
    DOOMED,
    FREE,
    FREE_SLOT,
    GATE,
    GATE_FLAGS,
    GRANTED,
    HEAD,
    HIGH,
    IDLE,
    KEY,
    LEASE_TIMEOUT,
    LEASED,
    MASK64,
    MAX,
    MAX_FOREIGN,
    MAX_PER_KEY,
    MIN_IDLE,
    OPENING,
    OVER,
    PAUSED,
    QUEUED,
    RESERVE,
    RESERVING,
    ROW_CONNECT_SECONDS,
    ROW_LEASE_SECONDS,
    ROW_SCRAP,
    RULES,
    SERIAL_ONE,
    SERIAL_SHIFT,
    SHORT,
    SINCE,
    STATE,
    STAYS,
    STICKY,
    STOPPED,
    STRICT,
    UNPOLLED,
    USED,
    VER,
    VERSION,
    WAITING_COUNT,
    WATCH,
    generation_of,
    holder_of,
    is_high,
    leased_word,
    opening_word,
)
from .lease import Lease
from .lines import CLOSES, COUNTS, Lines
from .native import Call, patched
from .notices import Notices
from .returns import CLOSED, GIVEN, LATER, Returns
from .stats import OTHER_KEYS, REASONS, KeyStats, PoolStats
from .sticky import steal_after
from .table import BUSY, DONE, LEFT
from .waiting import OutOfTime, Waiter, WaitingRoom
from .warming import Opening, Warmer
from .watching import Watch
from .wire import LONGEST_NAME, Kind, Message

log = logging.getLogger("sharedpool")

_NEVER: Final = 0x4000_0000_0000_0000
#: checkout_timeout=0: no waiting in the queue; what needs no waiting is done with the other time-outs.
_AT_ONCE: Final = 0
#: A fetch from the arbiter takes 50 us; it gets so long even at the end of a deadline, ns.
_FETCH: Final = 100_000_000
#: Registering a connection waits so long for a successor, even at the end of a deadline, ns.
_REGISTER: Final = 100_000_000
#: An arbiter beats once a second; this is long, ns.
_HUNG: Final = 2_000_000_000
#: What this process was not told of (its queue of events was full) it finds out by itself after so long, ns.
_SWEEP: Final = 500_000_000
#: Seconds between two attempts to find or start an arbiter.
_AGAIN: Final = 0.2
#: In GATE: somebody waits, or nothing new may begin.
_CROWDED: Final = GATE_FLAGS & ~RESERVING
#: From an idle slot's word to its lease by the same process: the next state, the next serial.
_TO_LEASED: Final = 1 + SERIAL_ONE
#: Giving back tries so long to get the mutex, then leaves it to the event thread, ns.
_GIVE_BACK: Final = 50_000_000
#: A thread whose socket is closed under its hands notices in so long, ns, unless it is the one that closes it.
_NOTICE: Final = 50_000_000
#: ... but where others wait for the thread only as long as a holder may be off its processor, ns.
_MOMENT: Final = 1_000_000


class Attachment:
    """A pool, attached.

    Args:
        directory: The scope's runtime directory.
        name: The pool's name.
        given: The options that somebody set.
        declares: Whether they make the pool if it does not exist.
        update: Whether options that differ are applied.
        seconds: How long attaching may take.
        defaults: What else the pool is made with, if it does not exist.
    """

    def __init__(
        self, directory: str, name: str, given: dict[str, Any], *, declares: bool, update: bool, seconds: float,
        defaults: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.inert = False
        self.lost = False
        self.notices = Notices(name)
        self.channel = Channel(
            directory, name, given, declares=declares, update=update, holdings=lambda: _holdings(self),
            defaults=defaults,
        )  # fmt: skip
        self.opening: dict[int, tuple[int, socket.socket, str]] = {}
        self._beat = 0
        self._sweep_at = self._sweeps = 0
        try:
            self._dead, other = socket.socketpair()
            other.close()
        except OSError as error:
            raise file_limit(error, f"attach to pool {name!r}") from error
        try:
            self.welcome, descriptor = self.channel.attach(seconds)
            self.segment = self.channel.memory = segment.attach(descriptor)
        except BaseException as error:
            self._tell(Kind.DETACH)
            self.channel.close()
            self._dead.close()
            if isinstance(error, OSError) and not isinstance(error, SharedPoolError):
                raise file_limit(error, f"attach to pool {name!r}") from error
            raise
        self.row: int = self.welcome["row"]
        self.table = self.segment.table(self.row)
        self.words = self._words = self.table.words
        self.gate = self.words[GATE] & ~GATE_FLAGS  # the value under which nothing is in the way
        self.routes: dict[tuple[drivers.Driver[Any], str, str, int, str], Route] = {}
        self.entries: dict[int, Entry] = {}
        self.permits: dict[int, int] = {}
        self.chores: deque[tuple[int, int, Entry | None, bool]] = deque()
        self.places: dict[int, events.Place | None] = {}
        self._tidying = threading.Lock()
        self.lines = Lines(self.table)
        self._scrap = self.table.row_at + ROW_SCRAP
        self._lease_bucket = self.table.row_at + ROW_LEASE_SECONDS
        self._lease_sum = self._lease_bucket + SUM
        self._connect_seconds = Durations(self.words, self.table.row_at + ROW_CONNECT_SECONDS)
        self._lease_seconds = Durations(self.words, self._lease_bucket)
        self._polls = not self.words[RULES] & UNPOLLED
        self.hooks = Hooks(name)
        self.on_checkout = self.hooks.of("checkout")
        self.on_abandoned = self.hooks.of("abandoned")
        self._on_checkin = self.hooks.of("checkin")
        self._warmer: Warmer | None = None
        self.watch: Watch | None = None
        self.room = WaitingRoom(
            self.table, self.segment, name, self.lines, self._tell_close, self._tell_watch, self.hooks
        )
        self.returns = Returns(self.table, self.segment, self._tell_close, self.lines, self.room.longest_for)
        self.room.returns = self.returns
        if patched():
            from . import green

            self.watch = Watch(self, self.segment, self.returns, name, green.start_thread)
            self.room.pause = green.Pause(self.watch)
        _attachments.add(self)
        self._note_places()
        channel = self.channel.events
        assert channel is not None
        threading.Thread(
            target=_listen, args=(weakref.ref(self), channel), name=f"sharedpool-{name}", daemon=True
        ).start()

    def stays_inert(self) -> bool:
        """Whether this is a forked child's copy."""
        return self.inert

    def count(self, name: str, counts: int) -> None:
        """One more of a counter behind a place of `lines`; nobody else writes there, until this process has left."""
        w, at = self.words, counts + COUNTS[name]
        if not self.inert:
            w[at] = w[at] + 1

    def stats(self) -> PoolStats:
        """The pool's numbers over all processes."""
        return view.stats(self.words, self.segment.geometry, self.name, monotonic_ns())

    def own_counters(self) -> dict[str, int]:
        """What this process has counted."""
        return view.worker_counts(self.words, self.segment.geometry, self.row)

    def key_stats(self) -> dict[str, KeyStats]:
        """The numbers of every address that this process has used, over all processes; "other": what has none."""
        known = view.keys(self.words, self.segment.geometry)
        found = {route.where: known.get(route.key, KeyStats()) for route in list(self.routes.values())}
        return {**found, OTHER_KEYS: known[0]} if 0 in known else found

    def _tell(self, kind: Kind, slot: int = 0, generation: int = 0) -> None:
        """A hint to the arbiter; it finds out by itself within a second if this does not arrive."""
        with contextlib.suppress(SharedPoolError):
            self.channel.tell(Message(kind, 0, slot, generation))

    def _tell_close(self, slot: int, generation: int) -> None:
        self._tell(Kind.CLOSE, slot, generation)

    def _tell_watch(self) -> None:
        if self.words[WATCH]:
            self._tell(Kind.WATCH)

    def _tell_name(self, route: Route) -> None:
        """The table knows keys as numbers only; who looks at the pool from outside wants to read where they lead."""
        with contextlib.suppress(SharedPoolError):
            self.channel.tell(Message(Kind.KEY_NAME, generation=route.key, body={"name": route.where[:LONGEST_NAME]}))

    def route(self, transport: str | drivers.Driver[Any], host: str, port: int) -> Route:
        """The route for an address; equal addresses of one driver give the same one.

        Raises:
            OptionError: It is no address.
        """
        driver = drivers.find(transport)
        address = drivers.key(driver, *driver.address(host, port))
        known = self.routes.get((driver, *address))
        if known is None:
            rules = self.words[RULES]
            moves = driver.moves and bool(rules & CAN_MOVE)
            sticky = bool(rules & STICKY) or not (moves or rules & STRICT)
            key = segment.key_of(self.segment.secret, address)
            checks = getattr(driver, "check", None) if rules & ACTIVE else None
            counts = self.lines.place(key)
            known = Route(
                driver, address[1], address[2], key, moves=moves, sticky=sticky, counts=counts, checks=checks,
                strict=bool(rules & STRICT), place=address[3], matters=drivers.matters(driver, address[1]),
            )  # fmt: skip
            known = self.routes.setdefault((driver, *address), known)
            self._tell_name(known)
        return known

    def watching(self) -> Watch:
        """Who looks after those that wait without a thread; from the first on."""
        watch = self.watch
        if watch is None:
            with _watches:
                watch = self.watch = self.watch or Watch(self, self.segment, self.returns, self.name)
        return watch

    def urgent(self, route: Route) -> Route:
        """The same route for checkouts with high priority."""
        return route.with_high_priority()

    # --- checkout -----------------------------------------------------------------------------------------------------

    def checkout(self, route: Route, patience: float | None, connect_timeout: float) -> Lease[Any]:
        """A lease: one's own idle connection if there is one, else by takeover, by opening, or after waiting.

        Args:
            route: Where to.
            patience: Seconds for all of it; None: no limit.
            connect_timeout: Seconds for opening a connection, within `patience`.
        """
        lease = self.take_own(route)
        if lease is None:
            return self._checkout_slowly(route, _limit(patience), connect_timeout)
        if lease.conn is None:
            return self._renew_or_anew(route, lease, _limit(patience), connect_timeout)
        return lease

    def take_own(self, route: Route) -> Lease[Any] | None:
        """Lease the connection that this process left idle last, without waiting; None: there is none.

        Its conn is None if it has ended, and is to be renewed by `furnish`.
        """
        # Written out in one piece: pop, take, poll, unpark; five calls less make a warm pair 0.5 us faster.
        if self.chores:
            self.tidy()
        stack = route.stack
        if stack and route.direct:
            try:
                entry = stack.pop()
            except IndexError:  # another thread was faster
                return None
            entry.stacked = False
            seen = entry.word
            at = entry.at
            lease: Lease[Any] = Lease.__new__(Lease)  # without its __init__: 0.1 us
            lease.word = 0
            lease._owner = self
            lease._entry = entry
            lease.place = at
            new = seen + _TO_LEASED & MASK64
            w = self._words
            if self.table.take_idle(at, seen, new, self.gate, lease, self._scrap, monotonic_ns()) == DONE:
                gate = entry.gate
                conn = entry.conn
                quiet = not (self._polls and gate.quiet(0))
                if quiet and entry.fileno[conn] == entry.number and +gate >= 0 and not entry.inside:
                    entry.thread = get_ident()
                    lease.conn = conn
                    counter = route.reuses
                    w[counter] = w[counter] + 1
                    return lease
                lease.conn = None
                return lease
            if w[at] == seen:
                route.push(entry)
        return None

    def _checkout_slowly(self, route: Route, limit: int, connect_timeout: float) -> Lease[Any]:
        refused: set[int] = set()
        while True:
            lease = self.blank()
            try:
                counter, idle = self._acquire(route, lease, limit, refused)
            except OutOfTime:
                raise self.timed_out(route) from None
            except (IndexError, ValueError, OverflowError) as error:
                raise self.damaged(error) from error
            if self.equip(route, lease, counter, idle):
                return lease
            found = self.furnish(route, lease, limit, connect_timeout, refused, counter, idle)
            if found is not None:
                return found

    def blank(self) -> Lease[Any]:
        """A lease of nothing yet."""
        lease: Lease[Any] = Lease.__new__(Lease)
        lease.word = 0
        lease._owner = self
        lease._entry = None
        return lease

    def equip(self, route: Route, lease: Lease[Any], counter: int, idle: int) -> bool:
        """What a lease of a slot needs to be used, where it is at hand and well: nothing here waits. Else `furnish`.

        Args:
            route: Where it leads.
            lease: It has a slot.
            counter: Where it is counted.
            idle: How long the connection was idle, ns.
        """
        if lease.word & STATE == OPENING:
            return False
        if not route.driver.connects:
            self.permits[lease.place] = get_ident()
            lease.conn = None
            self.count("opens", route.counts)
            return True
        entry = self._at_hand(route, lease)
        if entry is None or (route.checks is not None and idle > self.words[CHECK_AFTER]):
            return False
        if route.resets is not None and (route.always or entry.version != self._words[lease.place + VERSION]):
            return False
        if not self._unpark(entry):
            return False
        self._lend(lease, entry, counter)
        return True

    def furnish(
        self, route: Route, lease: Lease[Any], limit: int, connect_timeout: float, refused: set[int], counter: int,
        idle: int, opening: Opening | None = None,
    ) -> Lease[Any] | None:  # fmt: skip
        """The same with everything that may take its time: opens, fetches, checks, resets, closes what has ended.

        Args:
            route: Where it leads.
            lease: It has a slot, and `equip` said no.
            limit: Until when, monotonic ns.
            connect_timeout: Seconds for opening.
            refused: Slots that could not be fetched; one more may be added.
            counter: Where it is counted.
            idle: How long the connection was idle, ns.
            opening: May break an opening off.

        Returns:
            The lease; or None if its slot has gone, and another is to be looked for.
        """
        if lease.word & STATE == OPENING:
            return self._open(route, lease, limit, connect_timeout, opening=opening)
        entry = self._at_hand(route, lease)
        if entry is None:
            other = self.entries.get(lease.place)
            if lease.word & STAYS and other is not None:  # another driver's object, and no other can be made
                return self._renew(route, lease, other, limit, connect_timeout, "ended", opening)
            entry = self._fetch(route, lease, limit, refused)
            if entry is None:
                return None
        lease._entry = entry
        reason = "ended"
        if self._unpark(entry):
            checks = route.checks is not None and idle > self.words[CHECK_AFTER]
            if (not checks and route.resets is None) or self._passes(route, lease, entry, checks):
                self._lend(lease, entry, counter)
                return lease
            reason = "check_failed"
        return self._renew(route, lease, entry, limit, connect_timeout, reason, opening)

    def _at_hand(self, route: Route, lease: Lease[Any]) -> Entry | None:
        """What this process has of the connection just leased, if it is that very one."""
        at = lease.place
        entry = self.entries.get(at)
        if entry is None or entry.generation != generation_of(lease.word) or entry.route.driver is not route.driver:
            return None
        if len(self.entries) >= self._words[MAX_FOREIGN] and self.entries.pop(at, None) is entry:
            self.entries[at] = entry  # the most recently used is the last
        return entry

    def _unpark(self, entry: Entry) -> bool:
        """Make an idle connection usable; False: it has ended, or says what nobody asked."""
        gate = entry.gate
        quiet = not (self._polls and gate.quiet(0))
        return quiet and entry.fileno[entry.conn] == entry.number and +gate >= 0 and not entry.inside

    def _lend(self, lease: Lease[Any], entry: Entry, counter: int) -> None:
        w = self._words
        lease._entry = entry
        entry.thread = get_ident()
        lease.conn = entry.conn
        w[counter] = w[counter] + 1

    def unwanted(self, route: Route, lease: Lease[Any]) -> None:
        """A slot was got, and whoever wanted it has gone before it was furnished."""
        if lease.word & STATE == OPENING:
            self._give_up(lease, refused=True, registered=False)
        else:
            self._give_on(lease, route)

    def _passes(self, route: Route, lease: Lease[Any], entry: Entry, checks: bool) -> bool:
        """The driver's active check of a connection that was idle for long, then its reset of one that others used.

        An error is a refusal. VERSION counts those resets, and is changed by who leases the connection only: an object
        that knows the latest is the last that was used.
        """
        w, at = self.words, entry.at
        version = w[at + VERSION]
        try:
            if checks and route.checks is not None and not route.checks(entry.conn):
                return False
            if route.resets is not None and (route.always or entry.version != version):
                if not route.resets(entry.conn):
                    return False
                entry.version = w[at + VERSION] = version + 1 & MASK64 >> 1
            return True
        except Exception as error:  # noqa: BLE001 - the driver's; whatever it is, the connection is of no use
            self.hooks.log.debug("the check of a connection to %s failed: %r", route.where, error)
            return False
        except BaseException:  # a signal's handler, a greenlet's end
            self._break_off(lease)
            raise

    def _break_off(self, lease: Lease[Any]) -> None:
        """A lease that its user will never see ends with its connection, which is in an unknown state."""
        word, entry = lease.word, lease._entry
        lease.word = 0
        if entry is not None:
            self._close(entry, word, "unclean")

    def _acquire(self, route: Route, lease: Lease[Any], limit: int, refused: set[int]) -> tuple[int, int]:
        """Get a slot into the lease: LEASED with a connection or as a permit, or OPENING.

        Returns:
            The place where leases are counted that came about this way, and how long the connection was idle, ns.

        Raises:
            OutOfTime, PoolStopped, TooManyWaiting.
        """
        patience: Patience | None = None
        while True:
            result, counter, idle = self.attempt(route, lease, limit, refused)
            if result == DONE:
                return counter, idle
            if result == BUSY:
                patience = patience or Patience(limit or _soon())
                if not patience.wait():
                    raise OutOfTime

    def attempt(
        self, route: Route, lease: Lease[Any], limit: int, refused: set[int], line: list[Waiter] | None = None
    ) -> tuple[int, int, int]:
        """The same, once; with `line` nobody waits here, as in `WaitingRoom.wait`.

        Returns:
            DONE, JOINED, STALE or BUSY, then as `_acquire`.
        """
        w = self._words
        gate, ver, now = w[GATE], w[VER], monotonic_ns()
        counter, idle = route.handoffs, 0
        if gate & STOPPED:
            raise PoolStopped(f"pool {self.name!r} was stopped")
        straight = not gate & GATE_FLAGS
        if straight:
            self.gate = gate
        at = 0
        if straight or (route.sticky and self._may_stick(route, gate, now)):
            at, seen = self._find_idle(route, refused, own_only=not straight)
        if at:
            counter = route.reuses if holder_of(seen) == self.row else route.takeovers
            idle = now - self.words[at + SINCE]
            lease.place = at
            result = self.table.take_idle(at, seen, leased_word(seen, self.row), gate, lease, self._scrap, now)
        elif gate & RESERVING:
            return self._attempt_counted(route, lease, gate, ver, limit, now, refused, line)
        elif straight and w[USED] < w[MAX]:
            result = self._take_free(route, lease, gate, now)
        else:
            result = self.room.wait(route, lease, gate, ver, limit, now, False, 0, line)
        return result, counter, idle

    def _attempt_counted(
        self, route: Route, lease: Lease[Any], gate: int, ver: int, limit: int, now: int, refused: set[int],
        line: list[Waiter] | None,
    ) -> tuple[int, int, int]:  # fmt: skip
        """The same in a pool with a reserve or a limit per key, once.

        With a reserve high priority is behind its like only, and normal has its share. With a limit per key one is
        behind those only who may have what one takes.

        Returns:
            DONE, STALE or BUSY, then as `_acquire`.
        """
        w = self.words
        keyed = view.keyed(w, gate)
        first = w[HEAD]
        waits = w[first] if first else 0
        passes = route.high and w[RESERVE] != 0
        behind = bool(first and is_high(waits)) if passes else bool(gate & QUEUED)
        if keyed and behind:
            counts = view.count_keys(w, self.segment.geometry)
            behind = view.next_waiter(w, gate, counts, view.in_use(w), route.key, only_high=passes)[0] != 0
        most = ANY_NUMBER if route.high else view.share(w)
        if not behind and not gate & (OVER | PAUSED) and view.in_use(w) < most:
            at, seen = self._find_idle(route, refused, own_only=False)
            if at:
                counter = route.reuses if holder_of(seen) == self.row else route.takeovers
                idle = now - w[at + SINCE]
                lease.place = at
                new = leased_word(seen, self.row)
                unseen = keyed if first else 0
                result = self.table.take_idle_counted(
                    at, seen, new, gate, first, waits, most, lease, self._scrap, now, unseen
                )
                return result, counter, idle
            if w[USED] < w[MAX] and not (keyed and self._is_full(route)):
                return self._take_free(route, lease, gate, now, first, waits, most, keyed), route.handoffs, 0
        behind = behind and not keyed  # KEYED says whether they have gone
        return self.room.wait(route, lease, gate, ver, limit, now, behind, keyed, line), route.handoffs, 0

    def _is_full(self, route: Route) -> bool:
        """Whether the key has as many slots as it may."""
        w = self.words
        return view.count_keys(w, self.segment.geometry).get(route.key, 0) >= w[MAX_PER_KEY]

    def _take_free(
        self,
        route: Route,
        lease: Lease[Any],
        gate: int,
        now: int,
        first: int = 0,
        waits: int = 0,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        w = self.words
        at = w[FREE_SLOT] or self.table.slot_at(w[HIGH])
        seen = w[at]
        if seen & STATE:
            return self.table.missed(0)
        connects = route.driver.connects
        new = opening_word(seen, self.row, OPENING if connects else LEASED)
        counter = route.counts + COUNTS["attempts"] if connects else self._scrap
        lease.place = at
        if most:
            return self.table.take_free(at, seen, new, gate, lease, route.key, counter, now, first, waits, most, keyed)
        return self.table.take_free(at, seen, new, gate, lease, route.key, counter, now)

    def _keeps(self, route: Route, gate: int, now: int) -> bool:
        """Whether a connection that is given back while others wait stays idle here, its key being what they want."""
        w = self._words
        head = w[HEAD]
        if not head or gate & (OVER | PAUSED | RESERVING | STOPPED) or self.room.any_waiting():
            return False
        if now - w[head + CELL_SINCE] >= steal_after(w, route.stays):
            return False
        return bool(route.stays) or w[head + CELL_KEY] == route.key

    def _may_stick(self, route: Route, gate: int, now: int) -> bool:
        """Sticky order: whether a process may take its own idle connection while others wait.

        What stays here: until they have waited long. What may move was left idle when it was given back because they
        had not: once more. It would lie idle else until the head of the queue looks for it.
        """
        w = self._words
        head = w[HEAD]
        if not head or gate & (OVER | PAUSED | RESERVING):
            return False
        return not route.stays or now - w[head + CELL_SINCE] < steal_after(w, route.stays)

    def _find_idle(self, route: Route, refused: set[int], *, own_only: bool) -> tuple[int, int]:
        """An idle connection of the key and its word, this process's own first; or (0, 0)."""
        w = self.words
        while (entry := route.pop()) is not None:
            if w[entry.at] == entry.word and self.table.slot_index(entry.at) not in refused:
                return entry.at, entry.word
        start = 0
        while (index := self.table.find(route.tag, start, w[HIGH])) >= 0:
            start = index + 1
            at = self.table.slot_at(index)
            seen = w[at]
            if seen & STATE != IDLE or w[at + KEY] != route.key or index in refused:
                continue
            if holder_of(seen) == self.row:
                if not seen & STAYS or self._made_by(route, at):
                    return at, seen
            elif not (own_only or seen & STAYS):
                return at, seen
        return 0, 0

    def _made_by(self, route: Route, at: int) -> bool:
        """Whether this process's connection in a slot was made by the route's driver."""
        entry = self.entries.get(at)
        return entry is not None and entry.route.driver is route.driver

    # --- connections --------------------------------------------------------------------------------------------------

    def _fetch(self, route: Route, lease: Lease[Any], limit: int, refused: set[int]) -> Entry | None:
        """An object for a connection just leased that this process does not hold. None: look for another.

        The driver makes what it can of it while the arbiter looks for the connection.
        """
        ahead: list[drivers.Ahead] = []
        try:
            return self._fetch_meanwhile(route, lease, limit, refused, ahead)
        finally:
            for one in ahead:
                one.close()

    def _fetch_meanwhile(
        self, route: Route, lease: Lease[Any], limit: int, refused: set[int], ahead: list[drivers.Ahead]
    ) -> Entry | None:
        prepare = getattr(route.driver, "prepare", None)
        at, word = lease.place, lease.word
        index, until = self.table.slot_index(at), max(limit, monotonic_ns() + _FETCH)
        try:
            found = self.channel.fetch(
                index, generation_of(word), until, None if prepare is None else lambda: prepare(ahead)
            )
        except ArbiterLost:
            self._give_on(lease, route)
            if index in refused:
                raise
            refused.add(index)
            return None
        except BaseException:
            self._give_on(lease, route)
            raise
        if found is None:
            self._give_up(lease, refused=False, registered=False, reason="gone")
            return None
        self.count("fetches", route.counts)
        descriptor, state = found
        conn = None
        try:
            conn = route.driver.adopt(descriptor, state, *ahead)
            entry = self._keep(route, at, word, conn, state)
        except BaseException:
            if conn is not None:  # the connection itself is alive, and may be somebody else's next
                os.dup2(self._dead.fileno(), route.driver.fileno(conn), inheritable=False)
                route.driver.close(conn)
            self._give_on(lease, route)
            raise
        entry.version = MASK64  # others have used it
        return entry

    def _keep(self, route: Route, at: int, word: int, conn: Any, state: bytes | None) -> Entry:
        """Hold a connection that this process has just opened or fetched."""
        try:
            real = os.dup(route.driver.fileno(conn))
        except OSError as error:
            raise file_limit(error, f"hold a connection to {route.where}") from error
        entry = Entry(at, generation_of(word), self.words[at + VERSION], route, conn, real, self._dead.fileno(), state)
        old = self.entries.get(at)
        self.entries[at] = entry
        if old is not None:
            old.let_go()
        if len(self.entries) >= self.words[MAX_FOREIGN]:
            self.look_after_entries()
        return entry

    def look_after_entries(self) -> None:
        """Let go of connections that have ended, of which this process was not told, and of too many foreign ones."""
        w = self.words
        foreign = []
        for at, entry in list(self.entries.items()):
            word = w[at]
            if generation_of(word) != entry.generation or word & STATE == FREE:
                if self._let_go_of(entry):
                    self._was_closed(entry.route, view.reason(w, self.segment.geometry, at))
            elif not self._is_ours(word):
                foreign.append(entry)
        for entry in foreign[: max(0, len(foreign) + 1 - (w[MAX_FOREIGN] or 1))]:
            self._let_go_of(entry)

    def _is_ours(self, word: int) -> bool:
        """Whether a slot is this process's by its word; one that is being closed counts as its last holder's."""
        return word & STATE == CLOSING or (word & STATE != GRANTED and holder_of(word) == self.row)

    def _let_go_of(self, entry: Entry) -> bool:
        """Close this process's duplicate; False if a thread of it takes the connection just now, or has closed it.

        First it is out of reach, then its slot is looked at: who takes the slot from then on finds no entry and asks
        the arbiter; who had taken it before shows in the slot's word, and gets the entry back.
        """
        at = entry.at
        found = self.entries.pop(at, None)
        if found is not entry:
            if found is not None:
                self.entries.setdefault(at, found)
            return False
        word = self.words[at]
        if generation_of(word) == entry.generation and self._is_ours(word):
            if self.entries.setdefault(at, entry) is entry:
                return False
        entry.word = 0  # no word of a slot that was ever used: what is on a stack is not taken either
        entry.let_go()
        return True

    def _open(
        self, route: Route, lease: Lease[Any], limit: int, connect_timeout: float,
        way: str = "opens", opening: Opening | None = None,
    ) -> Lease[Any]:  # fmt: skip
        """Open the connection that the lease has a permit for; `opening` may break it off.

        Raises:
            ConnectFailed, ConnectTimeout: The permit has been passed on.
        """
        at = lease.place
        index, generation = self.table.slot_index(at), generation_of(lease.word)
        registered = False
        stateful = route.stateful

        def deliver(kind: Kind, sock: socket.socket, body: dict[str, Any]) -> None:
            until = _NEVER if limit == _NEVER else max(limit, monotonic_ns() + _REGISTER)
            self.channel.deliver(Message(kind, 0, index, generation, body), sock.fileno(), until)

        def register(sock: socket.socket) -> None:
            nonlocal registered
            registered = True
            if opening is not None:
                opening.begin(sock)
            self.opening[index] = (generation, sock, stateful)
            deliver(Kind.REGISTER, sock, wire.with_state(stateful, None))

        began = monotonic_ns()
        try:
            seconds = connect_timeout if limit == _AT_ONCE else min(connect_timeout, (limit - began) / 1e9)
            drivers.check_place(route)
            conn = route.driver.open(route.host, route.port, seconds, register)
            if opening is not None:
                opening.end()
            try:
                state = route.driver.export(conn)
                entry = self._keep(route, at, lease.word, conn, state)
                if state is None:
                    route.stay()
                elif stateful:
                    with socket.socket(fileno=os.dup(entry.real)) as sock:
                        deliver(Kind.HOLDS, sock, wire.with_state(stateful, state))
                if (remote := getattr(conn, "stands_for", None)) is not None:
                    deliver(Kind.HOLDS, remote, wire.beside(conn.calls_off))
            except BaseException:
                route.driver.close(conn)
                raise
            try:
                self._opened(route, lease)
            except BaseException:  # this process has left the pool, or the slot was taken away: nobody else closes it
                self._drop_entry(entry, "discarded")
                raise
        except BaseException as error:
            self.count("open_failures", route.counts)
            # What this process broke off itself fails, too, but nobody refused it: the arbiter sees its connection off.
            broken = self.inert or (opening is not None and opening.broken)
            refused = isinstance(error, ConnectFailed) and not broken
            self._give_up(lease, refused=refused, registered=registered)
            raise
        finally:
            self.opening.pop(index, None)
        took = monotonic_ns() - began
        self._smooth(took)
        self._connect_seconds.add(took)
        self.count(way, route.counts)
        self.hooks.tell("open", route.where)
        lease._entry = entry
        lease.conn = entry.conn
        entry.thread = get_ident()
        return lease

    def _opened(self, route: Route, lease: Lease[Any]) -> None:
        """OPENING -> LEASED."""
        w, at = self.words, lease.place
        opened = route.counts + COUNTS["opened"]
        patience = Patience(_NEVER)
        while True:
            seen, word = w[at], lease.word
            if (seen ^ word) & ~DOOMED:
                raise LeaseError("the slot was taken away while its connection was being opened")
            new = seen & ~STATE | LEASED | route.stays
            result = self.table.connected(at, seen, new, lease, word, opened, monotonic_ns())
            if result == DONE:
                lease.word = new & ~DOOMED
                return
            if result == BUSY:
                patience.wait()

    def _give_up(self, lease: Lease[Any], *, refused: bool, registered: bool, reason: str = "discarded") -> None:
        """An opening failed. Refused: there is no connection, the permit goes on at once; else it is closed first."""
        at, word = lease.place, lease.word
        result = LATER
        lease.word = 0
        try:
            if refused:
                if registered:
                    self._tell(Kind.FORGET, self.table.slot_index(at), generation_of(word))
                result = self.returns.permit(at, word, _soon())
            else:
                result = self.returns.closed(at, word, _soon(), reason)
        except LeaseError:  # it was taken away
            result = CLOSED
        finally:
            if result == LATER:  # or it was broken off, by a signal's handler
                self.chores.append((at, word, None, False))

    def _give_on(self, lease: Lease[Any], route: Route) -> None:
        """A connection that this process leased and could not get hold of stays for others."""
        at, word = lease.place, lease.word
        result = LATER
        lease.word = 0
        try:
            result = self.returns.connection(at, word, route, _soon())
        finally:
            if result == LATER:
                self.chores.append((at, word, None, False))

    def _smooth(self, took: int) -> None:
        """The mean connect time, over about the last eight."""
        w = self.words
        known = w[CONNECT_TIME]
        w[CONNECT_TIME] = known + (took - known) // 8 if known else took

    def _revives(self, route: Route, entry: Entry) -> bool:
        """An idle connection has said something: whether its driver knows it as harmless, and has heard it all."""
        harmless = getattr(route.driver, "idle_readable", None)
        if harmless is None or entry.route.driver is not route.driver or entry.fileno[entry.conn] != entry.number:
            return False
        if +entry.gate < 0 or entry.inside:
            return False
        try:
            return bool(harmless(entry.conn)) and not entry.gate.quiet(0)
        except Exception as error:  # noqa: BLE001 - the driver's; whatever it is, the connection is of no use
            self.hooks.log.debug("what an idle connection to %s said is not known: %r", route.where, error)
            return False

    def _renew(
        self, route: Route, lease: Lease[Any], entry: Entry, limit: int, connect_timeout: float, reason: str,
        opening: Opening | None = None,
    ) -> Lease[Any] | None:  # fmt: skip
        """The connection just leased has ended, or says what nobody asked: end it, and open anew on the same permit.

        None: the remote did not close in time, and the permit has gone.
        """
        w, at = self.words, lease.place
        if reason == "ended" and self._revives(route, entry):
            entry.thread = get_ident()
            lease.conn = entry.conn
            self.count("reuses", route.counts)
            return lease
        if self.entries.get(at) is entry:
            del self.entries[at]
        sock = socket.socket(fileno=entry.real)
        entry.real = -1
        beside = _beside(entry.conn)
        try:
            entry.let_go()  # first: of what never moves, the end is seen only after its object has been closed
            left = min(max(0.05, (limit - monotonic_ns()) / 1e9), w[CLOSE_TIMEOUT] / 1e9)
            confirmed = end(sock, left, cut=False)  # the arbiter goes on watching
            if beside is not None:
                confirmed = confirmed and end(beside, left, cut=False)
        finally:
            sock.close()
            if beside is not None:
                beside.close()
            self._was_closed(route, reason)
        closes, replaced = route.counts + CLOSES[reason], route.counts + COUNTS["replaced"]
        patience = Patience(limit or _soon())
        while confirmed:
            seen, word = w[at], lease.word
            if (seen ^ word) & ~DOOMED:
                break
            new = opening_word(seen, self.row)
            result = self.table.reopen(at, seen, new, lease, word, closes, replaced, monotonic_ns())
            if result == DONE:
                self.count("attempts", route.counts)
                return self._open(route, lease, limit, connect_timeout, opening=opening)
            if result == BUSY and not patience.wait():
                break
        self._give_up(lease, refused=False, registered=True, reason=reason)
        return None

    def _renew_or_anew(self, route: Route, lease: Lease[Any], limit: int, connect_timeout: float) -> Lease[Any]:
        renewed = self._renew(route, lease, lease._entry, limit, connect_timeout, "ended")
        return self._checkout_slowly(route, limit, connect_timeout) if renewed is None else renewed

    # --- giving back --------------------------------------------------------------------------------------------------

    def checkin(self, lease: Lease[Any]) -> None:
        """End a lease: hand its connection on, or keep it idle, or close it if it is not clean.

        Raises:
            LeaseError: It is not in force here; nothing changes.
        """
        word = lease.word
        if not word or self.inert:
            raise self._not_in_force(lease)
        if self._on_checkin:
            self.hooks.tell("checkin", lease)
        entry = lease._entry
        w = self._words
        lease.word = 0
        try:  # from here on nobody else gives it back
            now = monotonic_ns()
            took = now - w[lease.place + SINCE]
            bucket = self._lease_bucket
            if not 0 <= took <= SHORT:
                bucket, took = self._long_lease(took)
            w[bucket] = w[bucket] + 1
            bucket = self._lease_sum
            w[bucket] = w[bucket] + took
            if entry is None:
                self._return_permit(lease.place, word)
                return
            route = entry.route
            conn = entry.conn
            # Park first, then ask who is inside: a thread that comes in later finds it parked.
            if (
                not route.clean(conn)
                or entry.fileno[conn] != entry.number
                or -entry.gate < 0
                or entry.inside
                or (route.settles is not None and not route.settles(conn))
            ):
                self._close(entry, word, "unclean")
                return
            gate = w[GATE]
            if gate == self.gate or (route.sticky and self._keeps(route, gate, now)):
                new = word - 1
                if self.table.put_idle(entry.at, word, new, gate, route.tag, now) == DONE:
                    entry.word = new
                    if not entry.stacked:
                        entry.stacked = True
                        route.stack.append(entry)
                    return
            elif self.returns.straight_on(entry.at, word, route):
                return
            self._return(entry, word)
        except BaseException as error:
            self._not_ended(error, lease, word, entry)
            raise

    def _not_ended(self, error: BaseException, lease: Lease[Any], word: int, entry: Entry | None) -> None:
        """Something was raised while a lease was being ended: the event thread, or the next call, ends it."""
        if not isinstance(error, LeaseError):
            self.chores.append((lease.place, word, entry, False))
        if isinstance(error, IndexError | ValueError | OverflowError):
            raise self.damaged(error) from error

    def damaged(self, error: Exception) -> PoolBroken:
        """A word led out of the memory, or does not fit into one: whatever did that, everything is rebuilt."""
        self.table.suspect()
        return PoolBroken(f"pool {self.name!r}: its shared memory was damaged, and is being mended: {error}")

    def _long_lease(self, took: int) -> tuple[int, int]:
        """The place of a duration's bucket, and the duration; of another's lease it may be below 0."""
        took = max(0, took)
        return self._lease_bucket + bucket_of(took), took

    def _return(self, entry: Entry, word: int) -> None:
        result = self.returns.connection(entry.at, word, entry.route, _soon())
        if result == LATER:
            self.chores.append((entry.at, word, entry, False))
        elif result == CLOSED:
            self._drop_entry(entry, view.reason(self.words, self.segment.geometry, entry.at))
        elif result != GIVEN:
            entry.word = result
            entry.route.push(entry)

    def _return_permit(self, at: int, word: int) -> None:
        self.permits.pop(at, None)
        if self.returns.permit(at, word, _soon()) == LATER:
            self.chores.append((at, word, None, False))

    def discard(self, lease: Lease[Any]) -> None:
        """End a lease by closing its connection.

        Raises:
            LeaseError: It is not in force here; nothing changes.
        """
        word = lease.word
        if not word or self.inert:
            raise self._not_in_force(lease)
        if self._on_checkin:
            self.hooks.tell("checkin", lease)
        entry = lease._entry
        lease.word = 0
        try:  # from here on nobody else gives it back
            self._lease_seconds.add(monotonic_ns() - self.words[lease.place + SINCE])
            if entry is None:
                self._return_permit(lease.place, word)
            else:
                self._close(entry, word, "discarded")
        except BaseException as error:
            self._not_ended(error, lease, word, entry)
            raise

    def _close(self, entry: Entry, word: int, reason: str) -> None:
        """Close a leased connection; its permit goes on once the remote has closed, too."""
        goodbye = getattr(entry.route.driver, "goodbye", None)
        if goodbye is not None:
            goodbye(entry.conn)
        result = self.returns.closed(entry.at, word, _soon(), reason)
        if result == LATER:
            self.chores.append((entry.at, word, entry, False))
        self._drop_entry(entry, reason)

    def _was_closed(self, route: Route, reason: str) -> None:
        """A connection that this process held has been closed, by whomever: says why."""
        self.hooks.log.debug("closed a connection to %s: %s", route.where, reason)
        self.hooks.tell("close", reason)

    def _drop_entry(self, entry: Entry, reason: str) -> None:
        """Let go of a connection that has ended, and say why, once: the event thread may have been told before."""
        known = self.entries.get(entry.at) is entry and self.entries.pop(entry.at, None) is entry
        entry.let_go()
        if known:
            self._was_closed(entry.route, reason)

    def drop(self, lease: Lease[Any]) -> None:
        """A lease was forgotten and collected; called by a finalizer, so it only takes note."""
        if not self.inert:
            self.chores.append((lease.place, lease.word, lease._entry, True))

    def tidy(self) -> None:
        """End what finalizers, and givers-back that found the mutex busy, have left over."""
        if not self._tidying.acquire(blocking=False):
            return
        try:
            for _ in range(len(self.chores)):
                at, word, entry, forgotten = self.chores.popleft()
                if (self.words[at] ^ word) & ~DOOMED:
                    continue  # ended otherwise
                if forgotten:
                    self.count("dropped", self.lines.place(self.words[at + KEY]))
                    self._lease_seconds.add(monotonic_ns() - self.words[at + SINCE])
                reason = "dropped" if forgotten else "late"
                if word & STATE == LEASED and at in self.permits:
                    self._return_permit(at, word)
                elif self.returns.closed(at, word, _soon(), reason) == LATER:
                    self.chores.append((at, word, entry, False))
                elif entry is not None:
                    self._drop_entry(entry, reason)
        except (IndexError, LeaseError, PoolStopped):
            pass
        finally:
            self._tidying.release()

    # --- saying what is wrong -----------------------------------------------------------------------------------------

    def _not_in_force(self, lease: Lease[Any]) -> LeaseError:
        if self.inert:
            return LeaseError(
                "this lease ended when this process left the pool, or belongs to the process that it was forked from"
            )
        return LeaseError("this lease is not in force: it was checked in or discarded before")

    def timed_out(self, route: Route) -> PoolTimeout:
        """No lease in time: counted, and said with the pool's numbers."""
        self.count("timeouts", route.counts)
        stats = self.stats()
        stats = dataclasses.replace(stats, waiting=stats.waiting + 1)  # this one has just left the queue
        text = f"pool {self.name!r}: no connection to {route.where} became free in time {stats.numbers()}"
        if self.words[GATE] & PAUSED:
            text += "; the pool is paused"
        if self.words[MAX_PER_KEY] and self._is_full(route):
            text += f"; its address has all that it may (max_per_key={self.words[MAX_PER_KEY]})"
        leases = view.leases(self.words, self.segment.geometry)
        if leases:
            age = (monotonic_ns() - leases[0].since) / 1e9
            text += f"; the longest lease is {age:.1f} s old, of process {leases[0].pid}"
        mine = self._leases_of(get_ident(), {lease.index for lease in leases if lease.row == self.row})
        text += f"; this thread holds {mine or 'no'} lease{'s' if mine != 1 else ''} of this pool itself"
        return PoolTimeout(text, stats=stats, pool=self.name)

    def _leases_of(self, thread: int, indices: set[int]) -> int:
        held = 0
        for index in indices:
            at = self.table.slot_at(index)
            entry = self.entries.get(at)
            held += (entry.thread if entry is not None else self.permits.get(at)) == thread
        return held

    # --- events -------------------------------------------------------------------------------------------------------

    def attend(self, data: bytes | None) -> None:
        """The event thread's work: what the arbiter sent (None: nothing for a while), and what was left over."""
        try:
            if data:
                self.on_event(wire.unpack(data))
            if self.chores:
                self.tidy()
            now = monotonic_ns()
            if now >= self._sweep_at:
                self._sweep_at = now + _SWEEP
                self.look_after_entries()
                self._sweeps += 1
                if data is None and self._sweeps % 2 == 0:
                    self.look_after_arbiter()
        except SharedPoolError:
            pass
        except (IndexError, ValueError, OverflowError, TypeError) as error:  # nothing of the memory's ends this thread
            self.hooks.log.error(
                "pool %r: its shared memory, or what the arbiter says, is damaged: %r", self.name, error
            )

    def on_event(self, message: Message) -> None:
        """What the arbiter sent unasked."""
        if message.kind is Kind.CLOSED:
            at = self.table.slot_at(message.slot)
            entry = self.entries.get(at)
            if entry is not None and entry.generation == message.generation:
                number = message.request  # an event has none: it is the reason's here, from 1
                self._drop_entry(entry, REASONS[number - 1] if 0 < number <= len(REASONS) else "")
        elif message.kind is Kind.NOTIFY:
            self.notices.tell(message.body.get("message"))
        elif message.kind is Kind.ABANDONED:
            self._abandoned(message)
        elif message.kind is Kind.LOG:
            events.log_again(message.body)
        elif message.kind is Kind.OPTIONS:
            self._note_places()

    def _abandoned(self, message: Message) -> None:
        """A lease of this process lasts too long; unless it has come back meanwhile, say who has it."""
        at = self.table.slot_at(message.slot)
        word = self.words[at]
        serial = message.body.get("serial")
        held = (word & STATE, holder_of(word), word >> SERIAL_SHIFT) == (LEASED, self.row, serial)
        if held or message.body.get("reclaimed"):
            entry = self.entries.get(at)
            thread = self.permits.get(at, 0) if entry is None else entry.thread
            found = events.abandoned(self.name, thread, self.places.get(at), message.body)
            events.report(found, self.on_abandoned)

    def _note_places(self) -> None:
        """With a lease_timeout every checkout notes who called it."""
        self.noting = bool(self.words[LEASE_TIMEOUT])
        if not self.noting:
            self.places.clear()

    # --- prewarming ---------------------------------------------------------------------------------------------------

    def prewarm(self, route: Route, count: int | None, connect_timeout: float) -> None:
        """From now on see to it, in the background, that so many connections of a key exist.

        Args:
            route: The key.
            count: How many; None: the pool's min_idle; 0: no longer.
            connect_timeout: Seconds for opening each.
        """
        if self._warmer is None:
            self._warmer = Warmer(self, self.name)
        self._warmer.name(route, count, connect_timeout)

    def missing(self, route: Route, count: int | None) -> int:
        """How many connections of a key are missing: below 0, there are more."""
        w = self.words
        wanted = w[MIN_IDLE] if count is None else count
        wanted = min(wanted, w[MAX_PER_KEY] or wanted)
        return wanted - view.count_existing(self.words, self.segment.geometry, route.key)

    def crowded(self) -> bool:
        """Whether somebody waits, or nothing new may begin."""
        return self.inert or bool(self.words[GATE] & _CROWDED)

    def has_room(self) -> bool:
        """Whether a permit is free that nobody waits for, and that is not reserved."""
        w = self.words
        room = w[USED] < w[MAX] and (not w[GATE] & RESERVING or view.in_use(w) < view.share(w))
        return room and not self.crowded()

    def warm(self, route: Route, count: int | None, connect_timeout: float, opening: Opening) -> None:
        """Open one connection of a key and leave it idle, if a permit is free that nobody waits for.

        Whoever sees, with his permit in hand, more connections than are wanted gives it back: of several processes the
        last one always does.
        """
        w = self.words
        gate = w[GATE]
        lease: Lease[Any] = Lease(self, None, 0)
        if gate & _CROWDED or not self.has_room():
            return
        most = view.share(w) if gate & RESERVING else 0
        keyed = view.keyed(w, gate)
        if keyed and self._is_full(route):
            return
        if self._take_free(route, lease, gate, monotonic_ns(), 0, 0, most, keyed) != DONE:
            return
        if self.missing(route, count) < 0:
            self._give_up(lease, refused=True, registered=False)
            return
        self._open(route, lease, _NEVER, connect_timeout, "prewarmed", opening)
        entry, word = lease._entry, lease.word
        lease.word = 0
        if opening.broken or -entry.gate < 0:
            self._close(entry, word, "unclean")
        else:
            self._return(entry, word)

    def come_back(self, events: socket.socket) -> socket.socket | None:
        """The channels broke: open new ones for the same row. None: no arbiter is there, or it has given the row up."""
        if launch.exiting():
            self.lost = True
            return None
        if self.words[GATE] & STOPPED:  # no successor is needed; one that is there has to know what is held here
            self.lost = True
            if not self.channel.somebody_answers():
                return events
        try:
            found = self.channel.come_back(events)
            self.lost = False
            return found
        except AttachRefused as error:
            self.cut_off(of_nobody=error.fact == "row")
            return None
        except (SharedPoolError, OSError) as error:
            log.warning("pool %r: no arbiter answers, trying again: %s", self.name, error)
            return events

    def look_after_arbiter(self) -> None:
        """One that is needed and has not stirred for 2 s, twice in a row as seen from here, is killed and succeeded."""
        w = self.words
        beat = w[BEAT]
        needed = w[WAITING_COUNT] or self.channel.busy
        if needed and beat == self._beat and monotonic_ns() - beat > _HUNG:
            log.warning("pool %r: the arbiter does not stir, and is killed for a successor", self.name)
            self.channel.kill_arbiter()
        self._beat = beat

    def detach(self) -> None:
        """Leave the pool: idle connections stay with the arbiter, leases are ended."""
        if self.inert:
            return
        self.inert = True
        _attachments.discard(self)
        if self._warmer is not None:
            self._warmer.stop()
        self._leave_table()
        if self.watch is not None:
            self.watch.stop()
        self._end_openings()
        for entry in list(self.entries.values()):
            self._say_goodbye(entry)
        self._end_leases()
        self._let_go()
        self._tell(Kind.DETACH)
        self.channel.close()
        self.segment.let_go()

    def _end_leases(self) -> None:
        """End what this process has leased: there may be no arbiter that could, or one that knows nothing of it.

        From here on its users read nothing more: the arbiter reads away what still comes, and they would not know
        what is missing.
        """
        for entry in list(self.entries.values()):
            if self._leases(entry):
                with contextlib.suppress(OSError):
                    shut(entry.real)
                if entry.fileno[entry.conn] == entry.number:
                    _ = -entry.gate

    def _say_goodbye(self, entry: Entry) -> None:
        """Before this process leaves: on what only it can say it, because nobody else can have the connection."""
        goodbye = getattr(entry.route.driver, "goodbye", None)
        if goodbye is None or entry.state is not None or entry.fileno[entry.conn] != entry.number:
            return
        if self.words[entry.at] == entry.word and +entry.gate < 0:
            return
        goodbye(entry.conn)

    def _end_openings(self) -> None:
        """End what is being opened: it might connect after the arbiter has freed its permit.

        Whoever was about to connect has noticed before the arbiter hears of it.
        """
        for _, sock, _ in list(self.opening.values()):
            with contextlib.suppress(OSError):
                sock.close()
        until = monotonic_ns() + _NOTICE
        while self.opening and monotonic_ns() < until:
            time.sleep(0.001)

    def _leave_table(self) -> None:
        """From now on no thread of this process commits anything: its row may be somebody else's in a moment."""
        self.room.left = True
        self.table.mutex = Call(lambda: LEFT)

    def cut_off(self, *, of_nobody: bool) -> None:
        """The arbiter does not take this process back: it goes on with a new attachment.

        Args:
            of_nobody: Its row is not known, so nobody counts what it has leased: that ends. Otherwise leases go on, and
                the memory stays open: the pool's name is refused to everybody while this process has it.
        """
        self._leave_table()
        self.inert = self.lost = True
        _attachments.discard(self)
        if self.watch is not None:
            self.watch.stop()
        self._end_openings()
        if of_nobody:
            self._end_leases()
        self._let_go()
        self.channel.close()
        if of_nobody:
            self.segment.let_go()

    def _let_go(self) -> None:
        """Close what this process holds. What is leased stays its user's object; the arbiter ends its connection."""
        for entry in self.entries.values():
            if self.words[entry.at] == entry.word:
                entry.let_go()
            elif entry.real >= 0:
                real, entry.real = entry.real, -1
                with contextlib.suppress(OSError):
                    os.close(real)
        self.entries.clear()
        self._dead.close()

    def _leases(self, entry: Entry) -> bool:
        """Whether a connection is leased by this process; others may have been given what it only has a copy of."""
        word = self.words[entry.at]
        return (word & STATE, holder_of(word), generation_of(word)) == (LEASED, self.row, entry.generation)

    def forked(self) -> None:
        """This is a child's copy: it must not touch anything of the parent's, and keeps nothing of it.

        No descriptor is left to a finalizer: a daemon closes all that it inherits, and the number is a stranger's then.
        """
        self.inert = True
        self.channel.close()
        self.segment.let_go()
        for _, sock, _ in self.opening.values():
            sock.close()  # which ends a connection for the process only that opened it
        for entry in self.entries.values():
            entry.disown(self._dead.fileno(), lent=self._leases(entry))
        self.entries.clear()
        self._dead.close()


def _holdings(attachment: Attachment) -> Iterator[tuple[Message, int | None]]:
    """What a successor has to know: every connection that this process has, cached and half open ones too."""
    index_of = attachment.table.slot_index
    for entry in list(attachment.entries.values()):
        copy = _copy(lambda entry=entry: entry.real)  # type: ignore[misc]
        if copy >= 0:
            body = wire.with_state(entry.route.stateful, entry.state)
            yield Message(Kind.HOLDS, 0, index_of(entry.at), entry.generation, body), copy
            if (remote := getattr(entry.conn, "stands_for", None)) is not None and (copy := _copy(remote.fileno)) >= 0:
                body = wire.beside(entry.conn.calls_off)
                yield Message(Kind.HOLDS, 0, index_of(entry.at), entry.generation, body), copy
    for index, (generation, sock, driver) in list(attachment.opening.items()):
        copy = _copy(sock.fileno)
        if copy >= 0:
            yield Message(Kind.HOLDS, 0, index, generation, wire.with_state(driver, None)), copy
    for route in list(attachment.routes.values()):
        yield Message(Kind.KEY_NAME, generation=route.key, body={"name": route.where[:LONGEST_NAME]}), None


def _beside(conn: Any) -> socket.socket | None:
    """A duplicate of the connection that a stand-in stands for."""
    remote = getattr(conn, "stands_for", None)
    if remote is None:
        return None
    with contextlib.suppress(OSError):
        duplicate: socket.socket = remote.dup()
        return duplicate
    return None


def _copy(number: Callable[[], int]) -> int:
    """A duplicate of a descriptor that another thread may close, or -1: its number may be a stranger's by then."""
    real = number()
    if real < 0:
        return -1
    try:
        copy = os.dup(real)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:  # told as nothing, it would be taken for closed: again when there is room
            raise file_limit(error, "tell a new arbiter what is held") from error
        return -1
    if number() != real:  # it is forgotten before it is closed
        os.close(copy)
        return -1
    return copy


def _soon() -> int:
    """Until when giving back tries to get the mutex; a thread that runs an event loop does not sleep for it."""
    return monotonic_ns() + (_GIVE_BACK if held.running_loop() is None else _MOMENT)


def limit_of(patience: float | None) -> int:
    """Seconds as a deadline, monotonic ns."""
    return _limit(patience)


def _limit(patience: float | None) -> int:
    if patience is None:
        return _NEVER
    seconds: float = patience
    return monotonic_ns() + int(seconds * 1e9) if seconds else _AT_ONCE


def _listen(reference: weakref.ref[Attachment], events: socket.socket) -> None:
    """The event thread: waits for the arbiter's events, and ends what was left over."""
    while True:
        data: bytes | None = None
        try:
            events.settimeout(_SWEEP / 1e9)
            data, descriptor = fdpass.receive(events, wire.LONGEST)
            if descriptor is not None:
                os.close(descriptor)
        except TimeoutError:
            pass
        except OSError:
            data = b""
        attachment = reference()
        if attachment is None or attachment.inert:
            return
        if data == b"":
            found = attachment.come_back(events)
            if found is None:
                return
            if found is events:
                del attachment
                time.sleep(_AGAIN)
            else:
                events.close()
                events = found
            continue
        attachment.attend(data)
        del attachment


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()
#: Held while a Watch is made.
_watches = threading.Lock()


def forked() -> None:
    """In a forked child: everything inherited becomes inert."""
    global _watches
    _watches = threading.Lock()
    for attachment in list(_attachments):
        attachment.forked()
    _attachments.clear()
    segment.forked()


def detach_all() -> None:
    """At the end of the process: the rows end now, not when the kernel gets to it."""
    for attachment in list(_attachments):
        attachment.detach()
