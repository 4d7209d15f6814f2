"""One pool as the arbiter sees it: everything that needs a watcher rather than a worker.

Closing to the end, deaths, idle timeout, lowered limits, stuck grants. It is told the time and never sleeps longer than
a busy mutex takes; what cannot be done now stays on a list and is done at the next turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from . import counting, foreign, view
from . import options as rules
from . import segment as segments
from .drivers import abort_of
from .drivers.sockets import Ending, break_off
from .errors import OptionError
from .layout import (
    ACTIVE,
    ANY_NUMBER,
    ARBITER_ROW,
    BARE,
    BEAT,
    CAN_MOVE,
    CELL,
    CELL_HIGH,
    CELL_KEY,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_SINCE,
    CELL_WAITING,
    CHECK_AFTER,
    CLOSE_TIMEOUT,
    CLOSING,
    DECLARED_IDLE,
    DECLARED_MAX,
    DIRTY,
    DOOMED,
    FIRST_ROW,
    FREE,
    FREE_SLOT,
    GATE,
    GEN,
    GEN_ONE,
    GRANT,
    GRANTED,
    HEAD,
    HEADER,
    HIGH,
    HOLDER,
    HOLDER_SHIFT,
    IDLE,
    IDLE_TIMEOUT,
    KEY,
    KEYS_OVER,
    LAYOUT,
    LEASE_TIMEOUT,
    LEASED,
    MANY_TICKETS,
    MASK64,
    MAX,
    MAX_FOREIGN,
    MAX_IDLE,
    MAX_LIFETIME,
    MAX_PER_KEY,
    MAX_WAITING,
    MIN_IDLE,
    NOTED_PER_KEY,
    OPENED,
    OPENING,
    OVER,
    PAUSED,
    RECLAIM,
    RESERVE,
    RESERVING,
    ROW,
    ROW_ARBITERS,
    ROW_COUNTERS,
    ROW_DEAD,
    ROW_FREE,
    ROW_LIVE,
    RULES,
    SERIAL,
    SERIAL_SHIFT,
    SINCE,
    SLOT,
    STATE,
    STAYS,
    STEAL_AFTER,
    STICKY,
    STOPPED,
    STRICT,
    TICKET,
    UNPOLLED,
    USED,
    VER,
    WAITING_COUNT,
    WATCH,
    WITH_KEYS,
    Geometry,
    generation_of,
    granted_word,
    holder_of,
    is_high,
    tag_of,
    with_state,
)
from .lines import CLOSES, COUNTS, Lines
from .options import NOT_GIVEN, PoolOptions
from .policies import COUNT_EVERY, Drain, Policies
from .sanity import lasting_damage
from .stats import ARBITER_COUNTERS
from .sticky import steal_after
from .table import DONE, STALE, NoLease
from .view import row_pid, stats
from .wire import LONGEST_NAME, Kind, Message, WireError

log = logging.getLogger("sharedpool.arbiter")

ROWS: Final = 1024
CELLS: Final = 16_384
LINES: Final = 2048
LEAST_SLOTS: Final = 1024

#: A grant not taken for so long goes to the next waiter, ns.
GRANT_TIMEOUT: Final = 100_000_000
#: While anybody waits, untaken grants are looked at so often, ns.
WATCH_EVERY: Final = 20_000_000
#: Slots that are CLOSING without our knowing are looked for so often, ns.
SWEEP_EVERY: Final = 1_000_000_000
#: A waiter looks at its grant by itself so often, ns: after that it needs no more kicks.
_LOOKS_UP: Final = 1_000_000_000
#: That the cap is reached is said so often, ns.
_SAY_EVERY: Final = 60_000_000_000

#: So many names of keys are kept: 32,768 connections can lead to as many addresses, a little text each.
MOST_KEY_NAMES: Final = 40_000

_TRIES: Final = 40
_CLOSE_WAIT: Final = 8
_COUNTER: Final = {name: ROW_ARBITERS + index for index, name in enumerate(ARBITER_COUNTERS)}
_NOBODY: Final = NoLease()


class Later(Exception):
    """The mutex is held by a process that does not let go: this has to be done at another turn."""


@dataclasses.dataclass(slots=True)
class Held:
    """The arbiter's duplicate of one connection's descriptor, and its session's state, if its driver has any."""

    generation: int
    sock: socket.socket
    rows: set[int]
    driver: str = ""
    state: bytes | None = b""

    @property
    def usable(self) -> bool:
        """Whether another process could go on with it."""
        return self.state is not None


@dataclasses.dataclass(slots=True)
class Closing:
    """A connection on its way to its end."""

    ending: Ending | None
    generation: int
    give_up: int
    look: int
    opened: bool  # whether there was a connection at all
    reason: str


def options_in(w: memoryview[int]) -> PoolOptions:
    """The options that are in force in a table: what `apply` wrote down; the default for what cannot be one."""
    found = _options_in(w)
    wrong = {name for name, value in found.items() if not rules.allows(name, value)}
    sound = {name: value for name, value in found.items() if name not in wrong}
    if sound.get("max_foreign") is NOT_GIVEN:  # of a version that had no such option
        del sound["max_foreign"]
    if "reserve" in sound:  # its arbiter may have been killed between the two
        sound["reserve"] = min(sound["reserve"], int(sound.get("max_connections", PoolOptions().max_connections)) - 1)
    return rules.make(sound)


def _options_in(w: memoryview[int]) -> dict[str, Any]:
    flags = w[RULES]

    def seconds(at: int) -> float | None:
        return w[at] / 1e9 if w[at] else None

    return {
        "max_connections": w[MAX],
        "max_waiting": None if w[MAX_WAITING] == ANY_NUMBER else w[MAX_WAITING],
        "max_per_key": w[MAX_PER_KEY] or w[NOTED_PER_KEY] or None,
        "reserve": w[RESERVE],
        "idle_timeout": seconds(IDLE_TIMEOUT),
        "close_timeout": seconds(CLOSE_TIMEOUT) or 1.0,
        "steal_after": NOT_GIVEN if not w[STEAL_AFTER] else 0.0 if w[STEAL_AFTER] == _AT_ONCE else w[STEAL_AFTER] / 1e9,
        "move": bool(flags & CAN_MOVE),
        "order": "sticky" if flags & STICKY else "fifo" if flags & STRICT else "auto",
        "max_foreign": None if w[MAX_FOREIGN] == ANY_NUMBER else w[MAX_FOREIGN] - 1 if w[MAX_FOREIGN] else NOT_GIVEN,
        "max_idle": None if w[MAX_IDLE] == MASK64 else w[MAX_IDLE],
        "max_lifetime": seconds(MAX_LIFETIME),
        "lease_timeout": seconds(LEASE_TIMEOUT),
        "reclaim": bool(flags & RECLAIM),
        "min_idle": w[MIN_IDLE],
        "check": "none" if flags & UNPOLLED else "active" if flags & ACTIVE else "poll",
        "check_after": seconds(CHECK_AFTER) or 0.0,
    }


#: What `nanoseconds` makes of 0; in STEAL_AFTER 0 stands for "not given".
_AT_ONCE: Final = 1


#: In GATE: what only operators decide.
_OPERATORS: Final = PAUSED | STOPPED


def _foreign_word(number: int | None) -> int:
    return ANY_NUMBER if number is None else number + 1


#: The words of the options.
_RULE_WORDS: Final = (
    MAX, RESERVE, MAX_WAITING, IDLE_TIMEOUT, CLOSE_TIMEOUT, STEAL_AFTER, RULES, MAX_IDLE, MAX_LIFETIME, LEASE_TIMEOUT,
    MIN_IDLE, CHECK_AFTER, MAX_FOREIGN,
)  # fmt: skip


def declared_in(w: memoryview[int]) -> dict[str, Any]:
    """Those options of a table that an operator may have changed, as they were declared."""
    if not w[DECLARED_MAX]:  # its arbiter was killed before it came so far
        return {}
    return {"max_connections": w[DECLARED_MAX], "idle_timeout": w[DECLARED_IDLE] / 1e9 if w[DECLARED_IDLE] else None}


def nanoseconds(seconds: float | None) -> int:
    """Seconds as the table keeps them; None, no limit, is 0."""
    return 0 if seconds is None else max(1, int(seconds * 1e9))


def geometry_for(maximum: int) -> Geometry:
    """Room for twice the first limit, so that it can be raised; memory that nobody touches costs little."""
    slots = LEAST_SLOTS
    while slots < 2 * maximum:
        slots *= 2
    return Geometry(ROWS, min(slots, 32_768), CELLS, LINES)


class ServedPool:
    """The arbiter's side of one pool.

    Args:
        name: The pool's name.
        options: What it is made with.
        declared_by: The pid of who made it.
        watch: Called with a descriptor whose end of stream is to be reported to `remote_ended`.
        unwatch: Undoes `watch`.
        tell_closed: Called with rows, a slot, a generation and the reason: drop what you hold of it.
        tell: Called with rows (None: all) and an event for their processes.
        drain: Reads whatever the workers have sent: a registration may be under way.
        clock: Gives the time in monotonic ns.
        scope: What tells this scope's segments from those of others.
        inherited: The segment of an arbiter that was killed.

    Attributes:
        expected: The rows of live processes that have not yet told an heir what they hold. Until they all have,
            nobody knows which connections are still open, and no slot becomes free.
        layouts: The newest layout that each row's process knows, as it told.
    """

    def __init__(
        self,
        name: str,
        options: PoolOptions,
        declared_by: int,
        *,
        watch: Callable[[ServedPool, int, socket.socket], None],
        unwatch: Callable[[socket.socket], None],
        tell_closed: Callable[[ServedPool, set[int], int, int, str], None],
        tell: Callable[[ServedPool, set[int] | None, Message], None],
        drain: Callable[[ServedPool], None],
        clock: Callable[[], int],
        scope: str = "",
        inherited: segments.Segment | None = None,
    ) -> None:
        rules.check_reserve(options)
        self.name = name
        self.options = options
        self.declared_by = declared_by
        self.segment = inherited or segments.create(name, geometry_for(options.max_connections), scope)
        self.memory = segments.memory_of(self.segment.fd)
        self.expected: set[int] = set()
        self._unbacked = False
        self._unheld: dict[int, tuple[int, int]] = {}  # by slot: generation and row of what could not be received
        self._took_over = 0
        self._inherited: dict[int, int] | None = None  # generations: connections of which there may be no descriptor
        self.table = self.segment.table(ARBITER_ROW)
        self.words = self.table.words
        counting.finish(self.words)
        self.lines = Lines(self.table)
        self.held: dict[int, Held] = {}
        self.closings: dict[int, Closing] = {}
        self.key_names: dict[int, str] = {}
        self.reaping: set[int] = set()
        self.layouts: dict[int, int] = {}
        self._watch = watch
        self._unwatch = unwatch
        self._tell_closed = tell_closed
        self._tell = tell
        self._drain = drain
        self._clock = clock
        self._expire_at = 0
        self._sweep_at = 0
        self._keys_at = 0
        self._watching = False
        self._watch_at = 0
        self._served = (0, 0, 0)
        self._cap_said = -_SAY_EVERY
        self._damage = ""
        self._rules = self._rule_words()
        self._flags = self.words[GATE] & _OPERATORS
        self._ended: dict[int, int] = {}
        self._wakers: dict[int, Any] = {}
        self._log = logging.getLogger(f"sharedpool.pool.{name}")
        self.policies = Policies(
            self.table, slots=self.slots, close=self._close, doom=self._doom, registered=self._registered,
            shut=self._shut, abandoned=self._abandoned, reclaims=lambda: self.options.reclaim,
        )  # fmt: skip
        if inherited is None:
            self.apply(options)
        else:
            self._take_over()

    # --- doing one thing ----------------------------------------------------------------------------------------------

    def _settle(self, attempt: Callable[[], int]) -> bool:
        """Try a transition until it is done (True) or no longer applies (False).

        Raises:
            Later: The mutex stayed busy.
        """
        for _ in range(_TRIES):
            result = attempt()
            if result == DONE:
                return True
            if result == STALE:
                return False
            time.sleep(50e-6)
        raise Later

    def _insist(self, attempt: Callable[[], int]) -> None:
        """As `_settle`, for what can only fail for a moment."""
        for _ in range(_TRIES):
            if self._settle(attempt):
                return
        raise Later

    def _count(self, name: str, key: int) -> None:
        at = self.lines.place(key) + _COUNTER[name]
        self.words[at] = self.words[at] + 1

    def _key(self, at: int) -> int:
        return self.words[at + KEY]

    def _wake(self, cell: int) -> None:
        waker = self._wakers.get(cell)
        if waker is None:
            waker = self._wakers[cell] = self.segment.waker(cell)
        -waker

    def slots(self) -> Iterator[tuple[int, int, int]]:
        """(index, place, word) of every slot that is not FREE, from a copy."""
        base = self.table.slot_base
        words = self.words[base : base + SLOT * self.words[HIGH] : SLOT].tolist()
        return ((index, base + SLOT * index, word) for index, word in enumerate(words) if word & STATE)

    # --- options ------------------------------------------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        return bool(self._flags & STOPPED)

    def apply(self, options: PoolOptions) -> None:
        """Put options in force, at once, for idle connections and waiters too.

        Raises:
            OptionError: The limit is above what the segment has room for, or not above the reserve.
        """
        rules.check_reserve(options)
        room = self.segment.geometry.slots
        if options.max_connections > room:
            raise OptionError(
                f"option 'max_connections' has the value {options.max_connections}; pool {self.name!r} was made with"
                f" room for {room}: stop it and start it anew to go above",
                option="max_connections", value=options.max_connections, source="the call", allowed=f"1 to {room}",
            )  # fmt: skip
        w = self.words
        w[IDLE_TIMEOUT] = nanoseconds(options.idle_timeout)
        w[CLOSE_TIMEOUT] = nanoseconds(options.close_timeout)
        steal: Any = options.steal_after
        w[STEAL_AFTER] = 0 if steal is NOT_GIVEN else nanoseconds(steal)
        w[RULES] = (
            (CAN_MOVE if options.move else 0)
            | (RECLAIM if options.reclaim else 0)
            | {"auto": 0, "sticky": STICKY, "fifo": STRICT}[options.order]
            | {"poll": 0, "none": UNPOLLED, "active": ACTIVE}[options.check]
        )
        w[MIN_IDLE] = options.min_idle
        w[CHECK_AFTER] = nanoseconds(options.check_after)
        w[MAX_FOREIGN] = _foreign_word(options.max_foreign)
        w[MAX_IDLE] = MASK64 if options.max_idle is None else options.max_idle
        w[MAX_LIFETIME] = nanoseconds(options.max_lifetime)
        w[LEASE_TIMEOUT] = nanoseconds(options.lease_timeout)
        w[MAX_WAITING] = options.max_waiting or ANY_NUMBER
        flags = self._flags & PAUSED
        per_key = self._per_key(options)
        w[KEYS_OVER] = 1 if per_key else 0  # before it holds: from then on checkins look
        self._insist(lambda: self.table.set_limit(options.max_connections, flags, options.reserve, per_key))
        self._flags = flags
        self.options = options
        self._rules = self._rule_words()
        self._expire_at = 0
        self.policies.changed()
        self._tell(self, None, Message(Kind.OPTIONS, body={"lease_timeout": options.lease_timeout}))
        self._trim()
        self._trim_keys()
        self.policies.trim(self._clock())

    def _per_key(self, options: PoolOptions) -> int:
        """The limit per key that may be in force now: none while processes are attached that know nothing of it."""
        w, wanted = self.words, options.max_per_key or 0
        late = self.segment.layout < WITH_KEYS
        if late and wanted and w[NOTED_PER_KEY] != wanted:
            self._log.warning(
                "pool %r: max_per_key=%d is noted, but not in force before the last process of an older version"
                " has ended (%s)", self.name, wanted, ", ".join(str(row_pid(w, row)) for row in self.old_rows()),
            )  # fmt: skip
        w[NOTED_PER_KEY] = wanted if late else 0
        return 0 if late else wanted

    def old_rows(self) -> list[int]:
        """The rows in use of processes whose version knows only an older layout, or has not told yet."""
        words = self.words[HEADER : HEADER + ROW * self.segment.geometry.rows : ROW].tolist()
        rows = [row for row in range(FIRST_ROW, len(words)) if words[row] & STATE != ROW_FREE]
        return [row for row in rows if self.layouts.get(row, 0) < LAYOUT]

    def stop(self) -> None:
        """Waiters are sent away, idle connections closed; leased ones are closed when they come back."""
        self._set_flags(STOPPED)
        now = self._clock()
        for _, at, word in self.slots():
            if word & STATE == IDLE:
                self._close(at, word, "stopped", now)
            elif word & STATE in (LEASED, OPENING):
                self._doom(at)
        for cell, _ in self._cells():
            index = self.table.kick_index(cell)
            self.table.marks[index] = self.table.marks[index] + 1 & 0xFFFF_FFFF
            self._wake(cell)

    def pause(self) -> None:
        """Nobody gets anything any more until `resume`; leases go on, and checkouts wait within their deadlines."""
        self._set_flags(self._flags | PAUSED)

    def resume(self) -> None:
        """Those who wait are served at once, in their order."""
        self._set_flags(self._flags & ~PAUSED)
        self._serve(self._clock())

    def _set_flags(self, flags: int) -> None:
        """Put STOPPED and PAUSED in force. Nobody else sets them, so what is here is what they should be."""
        w = self.words
        self._insist(lambda: self.table.set_limit(w[MAX], flags, w[RESERVE], w[MAX_PER_KEY]))
        self._flags = flags

    def drain(self, address: tuple[str, str, int] | None, seconds: float | None, *, kill: bool = False) -> Drain:
        """Close idle connections now and leased ones at their checkin; those of an address, or all.

        Args:
            address: (transport, host, port) as the driver gives it, or None for all.
            seconds: How long somebody will wait for the end of them; None: nobody.
            kill: Shut leased ones down at once. Their leases go on until their users give them back.
        """
        self._drain(self)  # a registration may be under way
        key = 0 if address is None else segments.key_of(self.segment.secret, address)
        now = self._clock()
        until = now + nanoseconds(seconds) if seconds else 0
        drain = self.policies.begin(key, "killed" if kill else "drained", until=until, shut=kill)
        with contextlib.suppress(Later):  # the rest at the next turn
            self.policies.turn(now)
        return drain

    def reset_stats(self) -> None:
        """Every counter starts from zero again for those who read it; the workers' own rows are theirs to write."""
        w, geometry = self.words, self.segment.geometry
        totals = view.counts_by_key(w, geometry)
        for key, numbers in view.keys(w, geometry).items():  # what is open now was opened
            totals.get(key, totals[0])[COUNTS["opened"] - ROW_COUNTERS] -= numbers.connections
        for _, at, word in self.slots():  # and what is being closed has a reason
            if word & STATE == CLOSING and w[at + OPENED]:
                reason = view.reason(w, self.segment.geometry, at)
                totals.get(w[at + KEY], totals[0])[CLOSES[reason] - ROW_COUNTERS] -= 1
        for key, counted in totals.items():
            start = (self.lines.place(key) if key else self.lines.rest) + ROW_COUNTERS
            for index, value in enumerate(counted):
                w[start + index] = (w[start + index] - value) & MASK64

    @property
    def empty(self) -> bool:
        return self.words[USED] == 0

    @property
    def lends(self) -> bool:
        """Whether anything is leased, or about to be."""
        return any(word & STATE in (LEASED, OPENING, GRANTED) for _, _, word in self.slots())

    def _trim(self) -> None:
        """Close the idle connections longest unused while there are more than the limit allows; all of a stopped pool.

        In every turn, because the arbiter that lowered the limit or stopped the pool may have been killed over it.
        """
        w = self.words
        if not w[GATE] & (OVER | STOPPED):
            return
        surplus, reason = w[USED] - w[MAX], "over_limit"
        surplus -= sum(word & STATE == CLOSING for _, _, word in self.slots())
        idle = sorted((w[at + SINCE], at, word) for _, at, word in self.slots() if word & STATE == IDLE)
        if self.stopped:
            surplus, reason = len(idle), "stopped"
        for _, at, word in idle[: max(0, surplus)]:
            self._close(at, word, reason, self._clock())

    def _look_after_keys(self, now: int) -> None:
        if self.words[NOTED_PER_KEY] and self.segment.layout >= WITH_KEYS:
            self.apply(self.options)
        if self.words[KEYS_OVER] and now >= self._keys_at:
            self._keys_at = now + COUNT_EVERY
            self._trim_keys()

    def _trim_keys(self) -> None:
        """The same for every key that has more than it may; once none has, checkins need not look any more."""
        w = self.words
        limit = w[MAX_PER_KEY]
        surplus = view.count_keys(w, self.segment.geometry, closing=False)
        surplus = {key: count - limit for key, count in surplus.items() if limit and count > limit}
        idle = sorted((w[at + SINCE], at, word) for _, at, word in self.slots() if word & STATE == IDLE)
        for _, at, word in idle:
            key = w[at + KEY]
            if surplus.get(key, 0) > 0 and self._close(at, word, "over_limit", self._clock()):
                surplus[key] -= 1
        w[KEYS_OVER] = 1 if any(surplus.values()) else 0

    # --- descriptors --------------------------------------------------------------------------------------------------

    def register(
        self, row: int, index: int, generation: int, sock: socket.socket, driver: str = "", state: bytes | None = b""
    ) -> None:
        """A worker's connection-to-be. Of an older generation: drop it, which ends it."""
        if index >= self.segment.geometry.slots:
            foreign.close_socket(sock)
            return
        word = self.words[self.table.slot_at(index)]
        if generation_of(word) != generation or word & STATE == FREE:
            _cut(sock)
            return
        old = self.held.get(index)
        if old is not None and old.generation != generation:  # opened anew on the same permit
            self._tell_closed(self, old.rows - {row}, index, old.generation, "ended")
        self.forget(index)
        self._unheld.pop(index, None)
        self.held[index] = Held(generation, sock, {row}, driver, state)
        self._watch(self, index, sock)

    def unheld(self, row: int, index: int, generation: int, now: int) -> None:
        """A connection whose descriptor could not be received here: it is lent once, as only its process can end it."""
        if index >= self.segment.geometry.slots:
            return
        self._unheld[index] = generation, row
        at = self.table.slot_at(index)
        word = self.words[at]
        idle = generation_of(word) == generation and word & STATE == IDLE
        if not (idle and self._close(at, word, "doomed", now)):
            self._doom(at, generation)

    def holds(
        self, row: int, index: int, generation: int, sock: socket.socket, driver: str = "", state: bytes | None = b""
    ) -> None:
        """A worker holds this connection, as it tells an heir, or when its session has begun.

        Whose slot was given to another connection is ended.
        """
        held = self.held.get(index)
        if held is not None and held.generation == generation:
            held.rows.add(row)
            if state is not None:
                held.driver, held.state = driver, state
            foreign.close_socket(sock)
        else:
            self.register(row, index, generation, sock, driver, state)

    def registered(self, row: int, now: int) -> None:
        """A row (0: none) has told all that it holds, or has gone. After the last one, what nobody holds goes."""
        if self._inherited is None or (row and row not in self.expected):
            return
        self.expected.discard(row)
        if self.expected:
            return
        self._unbacked = True
        with contextlib.suppress(Later):
            self._give_up_unbacked(now)

    def _give_up_unbacked(self, now: int) -> None:
        """Idle connections that nobody holds went with the arbiter that did."""
        for index, at, word in self.slots():
            if word & STATE == IDLE and not self._registered(index, generation_of(word)):
                self._close(at, word, "reaped", now)
        self._unbacked = False
        self._sweep(now)

    def _take_over(self) -> None:
        """Begin where a killed arbiter was: rows that it was reaping, and a section that it may have left half done."""
        self._mend()
        self.words[MAX_FOREIGN] = _foreign_word(self.options.max_foreign)
        self._took_over = self._clock()
        self._inherited = {index: generation_of(word) for index, _, word in self.slots()}
        for row in range(FIRST_ROW, self.segment.geometry.rows):
            if self.words[HEADER + ROW * row] & STATE == ROW_DEAD:
                self.reaping.add(row)

    def _mend(self) -> None:
        """A section was left half done, and perhaps nobody else enters one: who was granted something does not know."""
        self._watching = True
        with contextlib.suppress(Later):  # the next turn, then
            self._settle(self.table.repair)

    def forget(self, index: int, generation: int | None = None) -> None:
        """Let go of a descriptor."""
        held = self.held.get(index)
        if held is not None and (generation is None or held.generation == generation):
            del self.held[index]
            self._unwatch(held.sock)
            foreign.close_socket(held.sock)

    def fetch(self, row: int, index: int, generation: int) -> Held | None:
        """The connection that the row has leased, or None."""
        if index >= self.segment.geometry.slots:
            return None
        held = self.held.get(index)
        if held is None or held.generation != generation or not held.usable:
            self._drain(self)
            held = self.held.get(index)
        word = self.words[self.table.slot_at(index)]
        if held is None or held.generation != generation or word & STATE != LEASED or holder_of(word) != row:
            return None
        if not held.usable:
            return None
        held.rows.add(row)
        return held

    def remote_ended(self, index: int, now: int) -> None:
        """The remote closed: an idle connection is closed, a leased one marked, so that its checkin closes it.

        It is told once: what cannot be done now, because the mutex is busy or the slot is changing, is done in a turn.
        """
        held = self.held.get(index)
        if held is not None:
            self._ended[index] = held.generation
            with contextlib.suppress(Later):
                self._end(index, now)

    def _end(self, index: int, now: int) -> None:
        held = self.held.get(index)
        at = self.table.slot_at(index)
        word = self.words[at]
        state = word & STATE
        if held is not None and held.generation == self._ended[index] == generation_of(word):
            if state == IDLE and not self._close(at, word, "remote_closed", now):
                return
            if state == LEASED or (state == OPENING and _remote_closed(held.sock)):
                self._doom(at, held.generation)
        del self._ended[index]

    def _registered(self, index: int, generation: int) -> bool:
        held = self.held.get(index)
        return held is not None and held.generation == generation

    def _shut(self, index: int) -> None:
        """End a leased connection under its user's hands."""
        held = self.held.get(index)
        if held is not None:
            with contextlib.suppress(OSError):
                break_off(held.sock)

    def _abandoned(self, index: int, word: int, age: int) -> None:
        """A lease has lasted longer than lease_timeout: its process is told, and everybody by the log."""
        self._count("abandoned", self._key(self.table.slot_at(index)))
        row = holder_of(word)
        body = {"seconds": round(age / 1e9, 3), "serial": word >> SERIAL_SHIFT, "reclaimed": self.options.reclaim}
        self._tell(self, {row}, Message(Kind.ABANDONED, 0, index, generation_of(word), body))
        held = self.held.get(index)
        self._log.warning(
            "pool %r: abandoned: process %d has held a lease%s for %.1f s (lease_timeout %g)%s", self.name,
            row_pid(self.words, row), "" if held is None else _leads_to(held.sock), age / 1e9,
            self.options.lease_timeout or 0, "; it is taken away" if self.options.reclaim else "",
        )  # fmt: skip

    def _doom(self, at: int, generation: int | None = None) -> None:
        """Mark a lease, so that its checkin closes the connection; of this generation only, if one is given."""

        def attempt() -> int:
            w = self.words
            word, since = w[at], w[at + SINCE]
            if word & STATE not in (LEASED, OPENING) or word & DOOMED:
                return DONE
            if generation is not None and generation_of(word) != generation:  # opened anew while the mutex was busy
                return DONE
            return self.table.swap(at, word, word | DOOMED, _NOBODY, 0, 0, since)

        self._insist(attempt)

    def name_key(self, key: int, name: object) -> None:
        """What a key stands for, for those who look at the pool; when too many are known, only those in the table."""
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise WireError(f"a key's name of {len(str(name))} characters; a string of up to {LONGEST_NAME} is allowed")
        if len(self.key_names) >= MOST_KEY_NAMES and key not in self.key_names:
            used = view.keys(self.words, self.segment.geometry)
            self.key_names = {key: text for key, text in self.key_names.items() if key in used}
        if key in self.key_names or len(self.key_names) < MOST_KEY_NAMES:
            self.key_names[key] = name

    # --- closing ------------------------------------------------------------------------------------------------------

    def _close(self, at: int, word: int, reason: str, now: int, old_cell: int = 0) -> bool:
        """A slot -> CLOSING, and begin."""
        since = self.words[at + SINCE]
        counter = self.lines.place(self._key(at)) + CLOSES[reason]
        done = self._settle(lambda: self.table.close(at, word, since, old_cell, counter, now))
        if done:
            self.begin_closing(self.table.slot_index(at), now)
        return done

    def _closes(self, index: int, generation: int) -> bool:
        known = self.closings.get(index)
        return known is not None and known.generation == generation

    def begin_closing(self, index: int, now: int) -> None:
        """A slot was found or reported CLOSING: start closing its connection to the end, once."""
        if index >= self.segment.geometry.slots:
            return
        word = self.words[self.table.slot_at(index)]
        if word & STATE != CLOSING:
            return
        generation = generation_of(word)
        if self._closes(index, generation):
            return
        held = self.held.get(index)
        if held is None or held.generation != generation:
            self._drain(self)
            if self.words[self.table.slot_at(index)] != word or self._closes(index, generation):
                return  # what came in has begun it, or even ended it
            held = self.held.get(index)
        ending = None
        at = self.table.slot_at(index)
        if held is not None and held.generation == generation:
            ending = Ending(held.sock, abort_of(held.driver, held.sock, held.state))
            ending.begin()
            if word & STAYS:  # its object knows how to say goodbye, and may be all that there is
                reason = view.reason(self.words, self.segment.geometry, at)
                self._tell_closed(self, held.rows, index, generation, reason)
        elif self.expected:  # somebody may hold it; found again by the sweep
            return
        opened, reason = self.words[at + OPENED] != 0, view.reason(self.words, self.segment.geometry, at)
        # Where an arbiter held the descriptor alone, the goodbye was said when it was killed, long after it was due.
        began = max(self.words[at + SINCE], self._took_over)
        give_up = began + self.words[CLOSE_TIMEOUT]
        unseen = ending is None and self._inherited is not None and self._inherited.get(index) == generation
        known, opener = self._unheld.get(index, (-1, 0))
        if ending is None and known == generation:
            self._tell_closed(self, {opener}, index, generation, reason)
            unseen = True
        if unseen and now < give_up:
            self.closings[index] = Closing(None, generation, give_up, give_up, opened, reason)
            return
        self.closings[index] = Closing(ending, generation, now + self.words[CLOSE_TIMEOUT], now, opened, reason)
        self._look(index, now)

    def _look(self, index: int, now: int) -> None:
        """See whether a connection has ended; if so, or if its time is over, its permit goes on."""
        closing = self.closings[index]
        key = self._key(self.table.slot_at(index))
        ending = closing.ending
        if ending is not None and not ending.ended():
            if now < closing.give_up:
                closing.look = min(closing.give_up, now + nanoseconds(ending.pause()))
                return
            ending.force()
            if closing.opened:
                self._count("closed_unconfirmed", key)
        held = self.held.get(index)
        if held is not None and held.generation == closing.generation:
            rows = held.rows
            self.forget(index)
            self._tell_closed(self, rows, index, closing.generation, closing.reason)
        closing.ending = None
        closing.look = now
        if closing.opened:  # counted before anybody can see that it is no longer closing
            closing.opened = False
            self._count("closed", key)
            log.debug("pool %r: slot %d: closed a connection: %s", self.name, index, closing.reason)
        at = self.table.slot_at(index)
        word = self.words[at]
        if word & STATE == CLOSING and generation_of(word) == closing.generation:
            self._pass_on(at, word, 0, now)
        del self.closings[index]

    def _pass_on(self, at: int, word: int, old_cell: int, now: int) -> None:
        """A permit without a connection goes to the longest waiter, or becomes free."""

        def attempt() -> int:
            w = self.words
            gate, cell = w[GATE], w[HEAD]
            if w[at] != word:
                return DONE
            if cell and not gate & (OVER | PAUSED | STOPPED):
                waits = w[cell]
                keyed = view.keyed(w, gate)
                if keyed:
                    cell, waits = view.permit_heir(w, self.segment.geometry, gate, w[at + KEY])
                    if not cell:
                        return self.table.free(at, word, gate, old_cell, 0, 0, 0, keyed)
                most = view.share_for(w, gate, waits)
                if not keyed and most and view.in_use(w) > most:
                    return self.table.free(at, word, gate, old_cell, cell, waits, most)
                new = granted_word(word, self.table.cell_index(cell)) | BARE
                result = self.table.hand(at, word, new, gate, cell, waits, old_cell, now, most and most + 1, keyed)
                if result == DONE:
                    self._wake(cell)
                return result
            return self.table.free(at, word, gate, old_cell)

        self._insist(attempt)

    # --- waiters ------------------------------------------------------------------------------------------------------

    def _cells(self) -> Iterator[tuple[int, int]]:
        """(place, word) of every cell in use, from a copy."""
        base = self.table.cell_base
        words = self.words[base : base + CELL * self.words[CELL_HIGH] : CELL].tolist()
        return ((base + CELL * index, word) for index, word in enumerate(words) if word)

    def _anybody_waits(self) -> bool:
        return self.words[HEAD] != 0

    def _serve(self, now: int) -> None:
        """Give the head of the queue what it could have: after a raised limit, a pause, a repair, a release astray."""
        w = self.words
        while (cell := w[HEAD]) and not (gate := w[GATE]) & (OVER | PAUSED | STOPPED):
            if view.keyed(w, gate):
                self._serve_keys(now)
                return
            cell_word = w[cell]
            most = view.share_for(w, gate, cell_word)
            if most and view.in_use(w) >= most:
                return
            if self._serve_idle(cell, cell_word, gate, now, most):
                continue
            if w[USED] < w[MAX]:
                at = w[FREE_SLOT] or self.table.slot_at(w[HIGH])
                word = w[at]
                new = granted_word(word + GEN_ONE & GEN | word & SERIAL, self.table.cell_index(cell)) | BARE
                if self._settle(lambda: self.table.hand_free(at, word, new, gate, cell, cell_word, now, most)):  # noqa: B023
                    self._count("rescued", w[cell + CELL_KEY])
                    self._wake(cell)
            elif not self._make_room(cell, now):
                return

    def _serve_keys(self, now: int) -> None:
        """The same with a limit per key: whoever may have something gets it, in the order of the queue."""
        w = self.words
        while not (gate := w[GATE]) & (OVER | PAUSED | STOPPED) and w[HEAD]:
            seen = w[VER], view.keyed(w, gate), gate
            if seen == self._served or not self._serve_key(now, gate, seen[1]):
                self._served = seen
                return

    def _serve_key(self, now: int, gate: int, keyed: int) -> bool:
        """Do something for the first waiter for whom something can be done; False if there is none."""
        w, table = self.words, self.table
        counts = view.count_keys(w, self.segment.geometry)
        closing = sum(word & STATE == CLOSING for _, _, word in self.slots())
        idle = sorted((w[at + SINCE], at, word, w[at + KEY]) for _, at, word in self.slots() if word & STATE == IDLE)
        movable = {key: (at, word) for _, at, word, key in idle if not word & STAYS}
        staying = {key for *_, word, key in idle if word & STAYS}
        wanted: dict[int, int] = {}
        entitled = 0
        for cell, waits, key in view.queue(w):
            most = view.share_for(w, gate, waits)
            if most and view.in_use(w) >= most:
                continue
            if key in movable:
                at, word = movable[key]
                new = granted_word(word, table.cell_index(cell))
                return self._rescue(cell, lambda: table.hand(at, word, new, gate, cell, waits, 0, now, most, keyed))  # noqa: B023
            wanted[key] = wanted.get(key, 0) + 1
            room = w[MAX_PER_KEY] - counts.get(key, 0)
            if room > 0 and w[USED] < w[MAX]:
                at = w[FREE_SLOT] or table.slot_at(w[HIGH])
                word = w[at]
                new = granted_word(word + GEN_ONE & GEN | word & SERIAL, table.cell_index(cell)) | BARE
                return self._rescue(cell, lambda: table.hand_free(at, word, new, gate, cell, waits, now, most, keyed))  # noqa: B023
            if wanted[key] > room and key not in staying:
                continue
            entitled += 1
            victims = [one for one in idle if wanted[key] <= room or one[3] == key]
            if victims and closing < entitled:
                _, at, word, _ = victims[0]
                self._close(at, word, "reclaimed", now)
                return True
        return False

    def _rescue(self, cell: int, attempt: Callable[[], int]) -> bool:
        """Give a waiter something; True, as it was given or the table has changed: look again."""
        if self._settle(attempt):
            self._count("rescued", self.words[cell + CELL_KEY])
            self._wake(cell)
        return True

    def _serve_idle(self, cell: int, cell_word: int, gate: int, now: int, most: int) -> bool:
        """Try to give an idle connection of its key to the head of the queue; False if there is none."""
        w = self.words
        key = w[cell + CELL_KEY]
        start = 0
        while (index := self.table.find(tag_of(key), start, w[HIGH])) >= 0:
            start = index + 1
            at = self.table.slot_at(index)
            word = w[at]
            own = holder_of(word) == (cell_word & CELL_ROW) >> CELL_ROW_SHIFT
            free = not word & STAYS and (own or not self._sticks(word, cell, now))
            if word & STATE == IDLE and w[at + KEY] == key and free:
                new = granted_word(word, self.table.cell_index(cell))
                if self._settle(lambda: self.table.hand(at, word, new, gate, cell, cell_word, 0, now, most)):  # noqa: B023
                    self._count("rescued", key)
                    self._wake(cell)
                return True
        return False

    def _make_room(self, cell: int, now: int) -> bool:
        """Close the idle connection longest unused for the head of the queue; False if there is nothing to do."""
        w = self.words
        closing = 0
        idle: list[tuple[int, int, int]] = []
        for _, at, word in self.slots():
            closing += word & STATE == CLOSING
            if word & STATE == IDLE and not self._sticks(word, cell, now):
                idle.append((w[at + SINCE], at, word))
        if not idle or closing >= w[WAITING_COUNT]:
            return False
        _, at, word = min(idle)
        self._close(at, word, "reclaimed", now)
        return True

    def _sticks(self, word: int, cell: int, now: int) -> bool:
        """Sticky order: an idle connection is its process's own until the head of the queue has waited long."""
        w = self.words
        rules = w[RULES]
        if w[GATE] & RESERVING or holder_of(word) == ARBITER_ROW:
            return False
        sticky = rules & STICKY or (word & STAYS and not rules & STRICT)
        return bool(sticky) and now - w[cell + CELL_SINCE] < steal_after(w, word & STAYS)

    def look_for_grants(self) -> None:
        """Somebody queues, and may be given something before the next turn sees the queue."""
        self._watching = True

    def _watch_grants(self, now: int) -> bool:
        """Kick those who do not take their grants; after GRANT_TIMEOUT give them to others who wait.

        Gives whether there are grants that may need another kick: whoever gave them may have died before he woke them.
        """
        w = self.words
        untaken = False
        for _, at, word in self.slots():
            if word & STATE != GRANTED:
                continue
            age = now - w[at + SINCE]
            cell = self.table.cell_at(holder_of(word))
            untaken |= age < _LOOKS_UP
            if age < WATCH_EVERY:
                continue
            self._wake(cell)
            if age >= GRANT_TIMEOUT and w[HEAD]:
                self._revoke(at, word, cell, now)
        return untaken

    def _revoke(self, at: int, word: int, cell: int, now: int) -> None:
        w = self.words
        head, gate = w[HEAD], w[GATE]
        if not head or w[cell + GRANT] != at:
            return
        keyed = view.keyed(w, gate)
        if keyed:
            self._revoke_for_a_key(at, word, cell, gate, keyed, now)
            return
        waits = w[head]  # before its key: with another ticket it may wait for something else
        key = w[cell + CELL_KEY]  # of who did not take it
        bare = word & BARE
        most = view.share_for(w, gate, waits) if is_high(w[cell]) else 0
        if most and view.in_use(w) > most:
            return  # it is not for one of normal priority
        if not bare and (w[head + CELL_KEY] != w[at + KEY] or gate & (OVER | PAUSED | STOPPED)):
            if self._close(at, word, "revoked", now, cell):
                self._count("revoked", key)
            return
        if gate & (OVER | PAUSED | STOPPED):
            return
        new = granted_word(word, self.table.cell_index(head)) | bare
        if self._settle(lambda: self.table.hand(at, word, new, gate, head, waits, cell, now, most and most + 1)):
            self._count("revoked", key)
            self._wake(head)

    def _revoke_for_a_key(self, at: int, word: int, cell: int, gate: int, keyed: int, now: int) -> None:
        """The same with a limit per key: to the longest waiter who may have it."""
        w, key, bare = self.words, self.words[at + KEY], word & BARE
        closed = gate & (OVER | PAUSED | STOPPED)
        counts = view.count_keys(w, self.segment.geometry)
        if bare:
            counts[key] = counts.get(key, 1) - 1
        taken = view.in_use(w) - 1
        head, waits, wants = view.next_waiter(w, gate, counts, taken, 0 if bare else key)
        if not head or (bare and closed):
            return
        if not bare and (wants != key or closed):
            if self._close(at, word, "revoked", now, cell):
                self._count("revoked", w[cell + CELL_KEY])
            return
        most = view.share_for(w, gate, waits)
        new = granted_word(word, self.table.cell_index(head)) | bare
        attempt = lambda: self.table.hand(at, word, new, gate, head, waits, cell, now, most and most + 1, keyed)  # noqa: E731
        if self._settle(attempt):
            self._count("revoked", w[cell + CELL_KEY])
            self._wake(head)

    # --- processes ----------------------------------------------------------------------------------------------------

    def claim_row(self, pid: int, nonce: int, now: int) -> int | None:
        """A free row for a process, or None."""
        w = self.words
        for row in range(FIRST_ROW, self.segment.geometry.rows):
            at = HEADER + ROW * row
            if w[at] == ROW_FREE:
                self._insist(lambda: self.table.set_row(row, ROW_FREE, ROW_LIVE | pid << 4, nonce, now))  # noqa: B023
                return row
        return None

    def reap(self, row: int, now: int) -> None:
        """A process has gone: its cells, then its slots, then its row. Idle connections that can move are kept."""
        self.reaping.add(row)
        self._sweep_at = 0  # it may have begun to close something, and died before it said so
        with contextlib.suppress(Later):
            self._reap(row, now)
            self.reaping.discard(row)

    def _reap(self, row: int, now: int) -> None:
        w = self.words
        row_at = HEADER + ROW * row
        word = w[row_at]
        if word & STATE == ROW_LIVE:
            self._insist(lambda: self.table.set_row(row, w[row_at], with_state(w[row_at], ROW_DEAD), 0, now))
        for cell, cell_word in self._cells():
            if (cell_word & CELL_ROW) >> CELL_ROW_SHIFT == row:
                self._reap_cell(cell, now)
        for _, at, slot_word in self.slots():
            if slot_word & STATE != GRANTED and holder_of(slot_word) == row:
                self._reap_slot(at, slot_word, now)
        self.lines.fold(row)
        counting.fold(w, row)
        self._insist(lambda: self.table.set_row(row, w[row_at], ROW_FREE, 0, now))
        self.layouts.pop(row, None)

    def _reap_cell(self, cell: int, now: int) -> None:
        w = self.words

        def attempt() -> int:
            at = w[cell + GRANT]
            if at and w[at] & STATE == GRANTED and holder_of(w[at]) == self.table.cell_index(cell):
                word = w[at]
                if word & BARE:
                    self._pass_on(at, word, cell, now)
                else:
                    self._close(at, word, "reaped", now, cell)
            if w[cell] == 0:
                return DONE
            return self.table.leave(cell, w[cell], 0)

        if w[cell] & 15 == CELL_WAITING:
            self._count("reaped", w[cell + CELL_KEY])
        self._insist(attempt)

    def _reap_slot(self, at: int, word: int, now: int) -> None:
        state = word & STATE
        held = self.held.get(self.table.slot_index(at))
        if state == IDLE and not word & STAYS and held is not None and held.usable:
            new = word & ~HOLDER | ARBITER_ROW << HOLDER_SHIFT
            since = self.words[at + SINCE]
            if self._settle(lambda: self.table.swap(at, word, new, _NOBODY, 0, 1, since)):
                self._count("adopted", self._key(at))
        elif state in (IDLE, LEASED, OPENING):
            for _ in range(_TRIES):  # its word may get DOOMED meanwhile
                done = self._close(at, self.words[at], "reaped", now)
                if done:
                    self._count("reaped", self._key(at))
                if done or self.words[at] & STATE == CLOSING:
                    return

    # --- time ---------------------------------------------------------------------------------------------------------

    def turn(self, now: int) -> int:
        """Do what is due; gives when to come again, monotonic ns."""
        w = self.words
        w[BEAT] = now
        try:
            return self._turn(now)
        except Later:
            return now + 1_000_000
        except (IndexError, ValueError, OverflowError):
            self._log.exception("pool %r: its shared memory was damaged, and is mended", self.name)
            self.table.suspect()
            return now + SWEEP_EVERY

    def _turn(self, now: int) -> int:
        w = self.words
        due = now + SWEEP_EVERY
        if w[DIRTY]:
            self._mend()
        for row in list(self.reaping):
            self.reap(row, now)
            due = min(due, now + 1_000_000 if row in self.reaping else due)
        for index in [index for index, closing in self.closings.items() if closing.look <= now]:
            self._look(index, now)
        for index in list(self._ended):
            self._end(index, now)
        if self._ended:
            due = min(due, now + 1_000_000)
        if self._unbacked:
            self._give_up_unbacked(now)
        self._trim()
        self._look_after_keys(now)
        if now >= self._expire_at:
            self._expire_at = self._expire(now)
        due = min(due, self.policies.turn(now))
        if w[HEAD]:
            w[WATCH] = 0
            self._watching = True
            self._watch_grants(now)
            self._serve(now)
            self._say_cap_reached(now)
        else:
            w[WATCH] = 1
            if self._watching and now >= self._watch_at:  # the last one has been given something; was he woken?
                self._watch_at = now + WATCH_EVERY
                self._watching = self._watch_grants(now)
        if self._watching or self._anybody_waits():  # or has queued just now, and was told nothing of it
            due = min(due, now + WATCH_EVERY)
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_EVERY
            self._sweep(now)
        due = min(due, self._expire_at)
        return min([due, *(closing.look for closing in self.closings.values())])

    def _say_cap_reached(self, now: int) -> None:
        """Once a minute at most, with how many wait."""
        w = self.words
        waiting = w[WAITING_COUNT]
        if waiting and w[USED] >= w[MAX] and not w[GATE] & PAUSED and now >= self._cap_said + _SAY_EVERY:
            self._cap_said = now
            numbers = stats(w, self.segment.geometry, self.name).numbers()
            self._log.warning("pool %r: cap reached: %d in the queue %s", self.name, waiting, numbers)

    def _sweep(self, now: int) -> None:
        """Find what nobody told: a worker may die between a commit and its message."""
        for index, _, word in self.slots():
            if word & STATE == CLOSING:
                self.begin_closing(index, now)
        self._look_for_damage()
        self.lines.make_room()
        w = self.words
        if w[TICKET] >= MANY_TICKETS:
            self._set_flags(self._flags)

    def _look_for_damage(self) -> None:
        """What cannot be, and still cannot at the next look a second later, is mended; so are the options."""
        found = lasting_damage(self.words, self.table.marks, self.segment.geometry)
        before, self._damage = self._damage, found
        if found and found == before:
            self._log.error("pool %r: its shared memory was damaged (%s), and is mended", self.name, found)
            self.table.suspect()
        if not self.stopped and self._rule_words() != self._rules:
            self._log.error("pool %r: the options in its shared memory were damaged, and are set anew", self.name)
            self.apply(self.options)
        if self.words[GATE] & _OPERATORS != self._flags:
            self._log.error("pool %r: its state (stopped, paused) was damaged, and is set anew", self.name)
            self._set_flags(self._flags)

    def _rule_words(self) -> list[int]:
        return [self.words[at] for at in _RULE_WORDS]

    def _expire(self, now: int) -> int:
        """Close what has been idle too long; gives when the next one will be."""
        limit = self.words[IDLE_TIMEOUT]
        if not limit:
            return now + 3600 * 1_000_000_000
        soonest = now + limit
        for _, at, word in self.slots():
            if word & STATE == IDLE:
                until = self.words[at + SINCE] + limit
                if until > now:
                    soonest = min(soonest, until)
                else:
                    self._close(at, word, "expired", now)
        return soonest


def _remote_closed(sock: socket.socket) -> bool:
    """Whether the remote closed an established connection (a refused one looks alike to epoll)."""
    if sock.family == socket.AF_UNIX:
        return False
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _CLOSE_WAIT
    except OSError:
        return False


def _leads_to(sock: socket.socket) -> str:
    """Where a connection leads, for people; empty if the system does not say."""
    try:
        peer = sock.getpeername()
    except OSError:
        return ""
    return f" to {peer[0]}:{peer[1]}" if isinstance(peer, tuple) else f" to {peer!s}" if peer else ""


def _cut(sock: socket.socket) -> None:
    """End a connection whose slot is no longer its own."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    foreign.close_socket(sock)
