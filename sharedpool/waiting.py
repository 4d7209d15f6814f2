"""Waiting in the queue: cells, sleeping, and taking what one was given. First come, first served.

Those with high priority come before the others, and first come, first served among themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

from . import view
from .counting import SUM, bucket_of
from .errors import PoolBroken, PoolStopped, TooManyWaiting
from .held import Patience, Route
from .hooks import Hooks
from .layout import (
    BARE,
    CELL_HIGH,
    CELL_KEY,
    CELL_OWNED,
    CELL_ROW_SHIFT,
    CELL_SHIFT,
    CELL_SINCE,
    CELL_STALLED,
    CELL_WAITING,
    DOOMED,
    FREE_CELL,
    GATE,
    GRANT,
    GRANTED,
    HEAD,
    HIGH,
    HOLDER,
    HOLDER_SHIFT,
    IDLE,
    KEY,
    LEASED,
    MASK64,
    MAX_PER_KEY,
    MAX_WAITING,
    NEXT,
    OPENING,
    OVER,
    PAUSED,
    RESERVING,
    ROW_SCRAP,
    ROW_WAIT_SECONDS,
    SERIAL_ONE,
    SHORT,
    SINCE,
    STATE,
    STOPPED,
    TURN_SHIFT,
    VER,
    WATCH,
    generation_of,
    granted_word,
    holder_of,
    opening_word,
)
from .lease import Lease
from .lines import CLOSES, COUNTS, Lines
from .native import Sleeper, any_set, heed
from .returns import Returns
from .segment import Segment
from .sticky import steal_after, unused_after
from .table import BUSY, DONE, FULL, STALE, NoLease, Table

_NEVER: Final = 0x4000_0000_0000_0000
#: Who sleeps looks up so often, ns, whatever happens.
_LOOK_UP: Final = 1_000_000_000
_GIVE_UP: Final = 50_000_000
#: Sticky order: who has waited long enough looks so often for an idle connection to close, ns.
_STEAL_LOOK: Final = 5_000_000
#: Who waits for what may move looks for it by itself so long after its time has come.
_STEAL_SLACK: Final = 1_000_000
#: The others look so often whether they are at the head now; there may be a thousand.
_STEAL_BEHIND: Final = 20_000_000
#: In the queue, and nothing was granted yet.
JOINED: Final = 3
_KEPT: Final = MASK64 & ~(STATE | HOLDER | DOOMED)


class OutOfTime(Exception):
    """The deadline has passed; the caller knows how to say it."""


class Waiter:
    """A cell of this process: a place in the queue for one thread, or one task, at a time.

    Attributes:
        cell: Its place in the table.
        kick: Its kick's index among the marks.
        sleeper: Sleeps there.
        apart: Whether it is used for waiting without a thread.
    """

    __slots__ = ("apart", "cell", "kick", "sleeper")

    def __init__(self, cell: int, kick: int, sleeper: Sleeper) -> None:
        self.cell = cell
        self.kick = kick
        self.sleeper = sleeper
        self.apart = False


class WaitingRoom:
    """The waiting threads of one process and pool.

    Args:
        table: The table, as this process's row.
        segment: For the places to sleep at.
        name: The pool's name, for errors.
        lines: Where evictions, and grants that came too late, are counted.
        tell_close: Called with a slot's number and generation after it went CLOSING.
        tell_watch: Called when the arbiter wants to know that somebody waits.
        hooks: Those of on_wait are told how long a checkout was in the queue, whether it was served or not.
    """

    def __init__(
        self,
        table: Table,
        segment: Segment,
        name: str,
        lines: Lines,
        tell_close: Callable[[int, int], None],
        tell_watch: Callable[[], None],
        hooks: Hooks,
    ) -> None:
        self._table = table
        self.words = self._words = table.words
        self.marks = self._marks = table.marks
        self._segment = segment
        self._name = name
        self._lines = lines
        self._tell_close = tell_close
        self._tell_watch = tell_watch
        self._hooks = hooks
        self._on_wait = hooks.of("wait")
        self._wait_bucket = table.row_at + ROW_WAIT_SECONDS
        self._wait_sum = self._wait_bucket + SUM
        self._free: list[Waiter] = []
        self._apart: list[Waiter] = []
        self._waiting: set[Waiter] = set()
        self._owned = CELL_OWNED | table.row << CELL_ROW_SHIFT
        self._waits = COUNTS["waits"]
        self._attempts = COUNTS["attempts"]
        self._scrap = table.row_at + ROW_SCRAP
        self._looked_at = 0
        self._any_idle = any_set(segment.marks_address, 0)
        self._leased = table.row << HOLDER_SHIFT | LEASED
        self.left = False
        self.returns: Returns | None = None
        #: In the place of a thread's sleep: (who, its kick as seen, ns at most).
        self.pause: Callable[[Waiter, int, int], None] | None = None

    def any_waiting(self) -> bool:
        """Whether a thread or task of this process waits in sticky order."""
        return bool(self._waiting)

    def longest_for(self, key: int) -> tuple[int, int]:
        """The cell of this process that has waited longest for a key, not yet granted anything, and its word."""
        w = self.words
        waiting = []
        for waiter in list(self._waiting):
            cell = waiter.cell
            word = w[cell]  # before its key: with another ticket it may wait for something else
            if word & 15 == CELL_WAITING and w[cell + CELL_KEY] == key and not w[cell + GRANT]:
                waiting.append((word >> TURN_SHIFT, cell, word))
        return min(waiting, default=(0, 0, 0))[1:]

    # --- joining ------------------------------------------------------------------------------------------------------

    def wait(
        self,
        route: Route,
        lease: Lease[Any],
        gate: int,
        ver: int,
        limit: int,
        now: int,
        behind: bool = False,
        keyed: int = 0,
        line: list[Waiter] | None = None,
    ) -> int:
        """Join the queue and wait until the lease has been given a slot.

        Args:
            route: What for.
            lease: Gets the slot.
            gate: GATE as it was searched.
            ver: VER as it was searched.
            limit: Until when, monotonic ns.
            now: Monotonic ns.
            behind: High priority, in a pool with a reserve: others of high priority waited when it decided to wait.
            keyed: In a pool with a limit per key: KEYED as it was searched.
            line: Do not wait: the place in the queue is put here and used again; `look` tells how it stands, and in the
                end it must be left by `leave`.

        Returns:
            DONE, with `line` JOINED; or STALE or BUSY if it did not come to queueing.

        Raises:
            OutOfTime, PoolStopped, TooManyWaiting: The place in the queue has been left.
        """
        if now >= limit:
            raise OutOfTime
        if line is not None:
            if not line:
                line.append(self._apart.pop() if self._apart else self._claim(0))
            waiter = line[0]
            waiter.apart = True
            result = self._enter(waiter, route, gate, ver, limit, now, behind, keyed)
            return JOINED if result == DONE else result
        waiter = self._free.pop() if self._free else self._claim(limit)
        joined = False
        try:
            result = self._enter(waiter, route, gate, ver, limit, now, behind, keyed)
            joined = result == DONE
            if joined:
                self._sleep_until_granted(waiter, route, lease, limit, now)
            return result
        finally:
            self.leave(waiter, _GIVE_UP)
            if joined:
                self.waited(monotonic_ns() - now)

    def _enter(
        self, waiter: Waiter, route: Route, gate: int, ver: int, limit: int, now: int, behind: bool, keyed: int
    ) -> int:
        """Join the queue with a cell, evicting where there is something to evict; DONE, STALE or BUSY."""
        w = self._words
        sticky = route.sticky and not gate & RESERVING
        if w[HIGH] != self._looked_at:
            self._look_at(w[HIGH])
        evict = seen = 0
        if not sticky and -self._any_idle and not gate & (OVER | PAUSED):
            evict = self._victim(route, gate, keyed)
            seen = w[evict] if evict else 0
            if evict and seen & STATE != IDLE:
                return self._table.missed(0)
        result = self._join(waiter.cell, route, gate, ver, evict, seen, limit, now, behind, keyed)
        if result == DONE:
            if sticky:
                self._waiting.add(waiter)
            if evict:
                self._tell_close(self._table.slot_index(evict), generation_of(seen))
            if w[WATCH]:
                self._tell_watch()
        return result

    def leave(self, waiter: Waiter, patience: int) -> bool:
        """Leave the queue, passing on what was granted and not taken.

        Args:
            waiter: The place in it; it is of no further use.
            patience: How long to try, ns.

        Returns:
            False: the mutex stayed busy. What the place is granted is revoked, until it is left after all.
        """
        if self.left:
            return True
        if self._waiting:
            self._waiting.discard(waiter)
        if self._words[waiter.cell] != self._owned and not self._abandon(waiter, patience):
            return False
        if waiter.apart:
            self._apart.append(waiter)
        else:
            self._free.append(waiter)
        return True

    def waited(self, took: int) -> None:
        """A checkout has been in the queue for so long, ns."""
        w = self._words
        at = self._wait_bucket
        if took > SHORT:
            at = at + bucket_of(took)
        w[at] = w[at] + 1
        at = self._wait_sum
        w[at] = w[at] + took
        if self._on_wait:
            self._hooks.tell("wait", took / 1e9)

    def _victim(self, route: Route, gate: int, keyed: int) -> int:
        """An idle connection to be closed for its permit; 0 for none, or where the permit is not for it.

        It is another key's, unless the key has all that it may: then one of its own that cannot come here.
        """
        w = self.words
        if gate & RESERVING and not route.high and view.in_use(w) >= view.share(w):
            return 0
        if keyed:
            geometry = self._segment.geometry
            room = w[MAX_PER_KEY] - view.count_keys(w, geometry).get(route.key, 0)
            if room <= 0:
                return view.immovable(w, geometry, route.key, self._table.row)
            if room <= sum(key == route.key for _, _, key in view.queue(w)):
                return 0
        return view.victim(w, self.marks, self._segment.geometry, route.key)

    def _join(
        self,
        cell: int,
        route: Route,
        gate: int,
        ver: int,
        evict: int,
        seen: int,
        limit: int,
        now: int,
        behind: bool,
        keyed: int,
    ) -> int:
        """Join the queue with the route's priority; TooManyWaiting where it is as long as it may be."""
        deadline = 0 if limit == _NEVER else limit
        counter = route.counts + self._waits
        evicted = self._lines.place(self.words[evict + KEY]) + CLOSES["evicted"] if evict else 0
        if not route.high:
            result = self._table.enqueue(
                cell, route.key, gate, ver, evict, seen, deadline, counter, now, keyed, evicted
            )
        else:
            turn = view.high_turn(self.words, CELL_WAITING | self._table.row << CELL_ROW_SHIFT, gate)
            if turn is None or (behind and not turn.after):  # those before it have gone: look again
                return self._table.missed(0)
            result = self._table.enqueue_high(
                cell, route.key, gate, ver, turn.word, turn.after, turn.after_word, turn.before, turn.before_word,
                turn.passed, turn.ticket, evict, seen, deadline, counter, now, keyed, evicted,
            )  # fmt: skip
        if result == FULL:
            raise self._full()
        return result

    def _full(self) -> TooManyWaiting:
        stats = view.stats(self.words, self._segment.geometry, self._name, monotonic_ns())
        limit = self.words[MAX_WAITING]
        text = f"pool {self._name!r}: {limit} checkouts wait already, and no more may (max_waiting) {stats.numbers()}"
        return TooManyWaiting(text, stats=stats, pool=self._name)

    def _look_at(self, slots: int) -> None:
        """`_any_idle` covers the slots ever used, not all of them: 4 kB of cold memory cost a wait 1 us."""
        self._any_idle = any_set(self._segment.marks_address, min(slots, self._segment.geometry.slots))
        self._looked_at = slots

    def _claim(self, limit: int) -> Waiter:
        """Get another cell for this process.

        Raises:
            TooManyWaiting: All cells of the pool are in use.
        """
        w = self.words
        table = self._table
        patience = Patience(limit)
        while True:
            cell = w[FREE_CELL] or table.cell_at(w[CELL_HIGH])
            if cell >= table.cell_at(table.geometry.cells):
                raise TooManyWaiting(f"pool {self._name!r}: all {table.geometry.cells} waiting places are taken")
            result = table.claim_cell(cell)
            if result == DONE:
                return Waiter(cell, table.kick_index(cell), Sleeper(self._segment.kick_address(cell)))
            if result == BUSY and not patience.wait():
                raise OutOfTime

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _sleep_until_granted(self, waiter: Waiter, route: Route, lease: Lease[Any], limit: int, now: int) -> None:
        marks = self._marks
        patience: Patience | None = None
        napped = False
        while True:
            kick = marks[waiter.kick]  # before looking: a grant after this changes it, and nobody sleeps
            result = self.look(waiter, route, lease, limit, now)
            if result == DONE:
                return
            if result == JOINED:
                nap = self.nap(waiter, route, limit - now, now)
                if napped:  # who was granted something is back in Python in a moment, where signals are looked for
                    heed()
                napped = True
                if self.pause is None:
                    waiter.sleeper.sleep(kick, nap)
                else:
                    self.pause(waiter, kick, nap)
                now = monotonic_ns()
            elif result == BUSY:
                patience = patience or Patience(limit + _GIVE_UP)
                if not patience.wait():
                    raise OutOfTime
            else:
                now = monotonic_ns()

    def look(self, waiter: Waiter, route: Route, lease: Lease[Any], limit: int, now: int) -> int:
        """How it stands with a place in the queue: DONE, the lease has a slot; JOINED, nothing yet; or STALE or BUSY.

        Raises:
            OutOfTime: The deadline has passed, and the place has been left.
            PoolStopped.
        """
        w = self._words
        cell = waiter.cell
        if self.left:  # its cell may be somebody else's in a moment
            raise PoolStopped(f"this process left pool {self._name!r} while this checkout waited", waited=True)
        if at := w[cell + GRANT]:
            return self._take(at, cell, route, lease, now)
        if w[GATE] & STOPPED:
            raise PoolStopped(f"pool {self._name!r} was stopped while this checkout waited", waited=True)
        word = w[cell]
        if now >= limit:
            result = self._table.leave(cell, word, self._owned)
            if result == DONE:
                raise OutOfTime
            return result
        if word & 15 != CELL_WAITING:
            self._rejoin(cell, word)
            return STALE
        return JOINED

    def nap(self, waiter: Waiter, route: Route, left: int, now: int) -> int:
        """How long to sleep at most until the next look, ns."""
        nap = left if left < _LOOK_UP else _LOOK_UP
        if route.sticky:
            look = self._steal(waiter.cell, route, now)
            return look if look < nap else nap
        return nap

    def _take(self, at: int, cell: int, route: Route, lease: Lease[Any], now: int) -> int:
        """Take what was granted: a connection becomes LEASED, a bare permit OPENING (or LEASED, where that is all)."""
        table = self._table
        seen = self._words[at]
        if seen & (STATE | HOLDER) != GRANTED | cell - table.cell_base >> CELL_SHIFT << HOLDER_SHIFT:
            return table.missed(0)
        if seen & BARE:
            connects = route.driver.connects
            new = opening_word(seen, table.row, OPENING if connects else LEASED)
            counter = route.counts + self._attempts if connects else self._scrap
        else:
            new = (seen & _KEPT) + SERIAL_ONE & MASK64 | self._leased
            counter = self._scrap  # counted when it is delivered
        lease.place = at
        return table.take_grant(at, seen, new, cell, lease, route.key, counter, now)

    def _rejoin(self, cell: int, word: int) -> None:
        """It slept through a grant, which went on to the next: back to its place by its ticket."""
        w = self.words
        if word & 15 != CELL_STALLED:
            raise PoolBroken(f"pool {self._name!r}: its shared memory was damaged: this checkout lost its place")
        gate, ver = w[GATE], w[VER]
        turn = word >> TURN_SHIFT
        after, before = 0, w[HEAD]
        for _ in range(self._table.geometry.cells):
            if not before or w[before] >> TURN_SHIFT >= turn:
                break
            after, before = before, w[before + NEXT]
        if self._table.rejoin(cell, word, after, before, ver, gate) == DONE:
            self._tell_watch()

    def _steal(self, cell: int, route: Route, now: int) -> int:
        """Sticky order: at the head, have or close an idle connection, when it is time; gives how long to sleep.

        Those who have a connection that may move hand it over at a checkin once its time has come. Only what is idle
        then, because its process does something else, is taken from here, `_STEAL_SLACK` later: who is about to be
        handed one is not to wake up for nothing.
        """
        w = self._words
        over: int = w[cell + CELL_SINCE] + steal_after(w, route.stays) - now
        if not route.stays:
            over += _STEAL_SLACK
            if 0 < over <= _STEAL_LOOK:
                return over
        gate = w[GATE]
        if gate & RESERVING:  # with a reserve there is no sticky order
            return _LOOK_UP
        unused = unused_after(w, route.stays)
        if w[HEAD] == cell and self.returns is not None and not gate & PAUSED:
            if self._take_over(cell, route, gate, now, 0 if over <= 0 else unused):
                return 0
            victim = view.victim(self.words, self.marks, self._segment.geometry, 0 if route.stays else route.key)
            if victim and (over <= 0 or now - w[victim + SINCE] >= unused):
                self.returns.evict(victim)
            return _STEAL_LOOK if over <= 0 else min(over, unused)
        behind = max(unused, _STEAL_BEHIND)
        return behind if over <= 0 else min(over, behind)

    def _take_over(self, cell: int, route: Route, gate: int, now: int, unused: int) -> bool:
        """Grant the head of the queue, which is this process's, what was idle for so long, ns, and may move."""
        w, table = self.words, self._table
        if route.stays or gate & OVER:
            return False
        at, seen = view.idle_that_moves(w, self.marks, self._segment.geometry, route.key)
        if not at or now - w[at + SINCE] < unused:
            return False
        new = granted_word(seen, table.cell_index(cell))
        return table.hand(at, seen, new, gate, cell, w[cell], 0, now) == DONE

    def _abandon(self, waiter: Waiter, seconds: int) -> bool:
        """Leave the queue after an exception, passing on what was granted meanwhile; False: the cell is not free."""
        w = self.words
        cell = waiter.cell
        patience = Patience(monotonic_ns() + seconds)
        while w[cell] != self._owned:
            word, at = w[cell], w[cell + GRANT]
            if not at:
                result = self._table.leave(cell, word, self._owned)
            else:
                result = self._pass_on(cell, at, patience)
            if result == BUSY and not patience.wait():
                return False  # it stays as it is until this process ends: its grants are revoked
        return True

    def _pass_on(self, cell: int, at: int, patience: Patience) -> int:
        """A grant that nobody wants any more is taken and given back."""
        w = self.words
        table = self._table
        seen = w[at]
        if seen & STATE != GRANTED or holder_of(seen) != table.cell_index(cell) or self.returns is None:
            return table.missed(0)
        unwanted = NoLease()
        bare = seen & BARE
        new = (seen & ~(STATE | HOLDER | BARE)) + SERIAL_ONE & MASK64 | table.row << HOLDER_SHIFT | LEASED
        key = w[at + KEY]
        counter = self._lines.place(w[cell + CELL_KEY]) + COUNTS["unwanted"]
        result = table.take_grant(at, seen, new, cell, unwanted, key, counter, monotonic_ns())
        if result == DONE:
            with contextlib.suppress(Exception):
                if bare:
                    self.returns.permit(at, new, patience.limit)
                else:
                    self.returns.closed(at, new, patience.limit, "unwanted")
        return result
