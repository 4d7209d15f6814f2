"""Giving back: where a connection or a permit goes when its lease ends. The one place where that is decided.

To the longest waiter, if it may have it; idle, if nobody waits; else it is closed, and the arbiter passes the permit
on.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from . import view
from .errors import LeaseError
from .held import Patience, Route
from .layout import (
    BARE,
    CELL_KEY,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_SHIFT,
    CELL_SINCE,
    DOOMED,
    GATE,
    GATE_FLAGS,
    GRANTED,
    HEAD,
    HOLDER,
    HOLDER_SHIFT,
    IDLE,
    KEY,
    MASK64,
    OVER,
    PAUSED,
    QUEUED,
    RESERVING,
    SINCE,
    STATE,
    STAYS,
    STOPPED,
    VER,
    generation_of,
    with_state,
)
from .lines import CLOSES, Lines
from .segment import Segment
from .sticky import steal_after
from .table import BUSY, DONE, Table

#: What a connection keeps of its slot's word when it is granted: serial, generation, and whether it stays.
_KEPT = MASK64 & ~(STATE | HOLDER | 0xF0) | STAYS

CLOSED = 0
GIVEN = -1
LATER = -2


class Returns:
    """Ends leases of one process.

    Args:
        table: The table, as this process's row.
        segment: For the places where waiters sleep.
        tell_close: Called with a slot's number and generation after it went CLOSING.
        lines: Where closes are counted.
        own_waiter: Gives the cell of this process that has waited longest for a key, and its word; or (0, 0).
    """

    def __init__(
        self,
        table: Table,
        segment: Segment,
        tell_close: Callable[[int, int], None],
        lines: Lines,
        own_waiter: Callable[[int], tuple[int, int]],
    ) -> None:
        self._table = table
        self.words = self._words = table.words
        self._segment = segment
        self._tell_close = tell_close
        self._lines = lines
        self._own_waiter = own_waiter
        self._cells = table.cell_base
        self._wakers: dict[int, Any] = {}

    def _waker(self, cell: int) -> Any:
        waker = self._wakers[cell] = self._segment.waker(cell)
        return waker

    def straight_on(self, at: int, word: int, route: Route) -> bool:
        """Hand a connection to the longest waiter, where nothing else has to be considered; False: see `connection`.

        The path of every checkin at the cap, in one piece.
        """
        w = self._words
        gate = w[GATE]
        cell = w[HEAD]
        if gate & GATE_FLAGS != QUEUED or not cell or route.stays:
            return False
        cell_word = w[cell]  # before its key: with another ticket it may wait for something else
        if w[cell + CELL_KEY] != route.key:
            return False
        now = monotonic_ns()
        if route.sticky and now - w[cell + CELL_SINCE] < steal_after(w, 0):
            return False
        waker = self._wakers.get(cell) or self._waker(cell)
        new = word & _KEPT | cell - self._cells >> CELL_SHIFT << HOLDER_SHIFT | GRANTED
        if self._table.hand(at, word, new, gate, cell, cell_word, 0, now) != DONE:
            return False
        -waker
        return True

    def connection(self, at: int, word: int, route: Route, limit: int) -> int:
        """End the lease of a clean, parked connection.

        Args:
            at: Its slot.
            word: The lease's word.
            route: Where it leads.
            limit: Until when to try, monotonic ns.

        Returns:
            The slot's word if it is idle now; else GIVEN (to a waiter), CLOSED, or LATER (the mutex stayed busy).

        Raises:
            LeaseError: The slot is no longer this lease's.
        """
        w = self.words
        patience: Patience | None = None
        while True:
            seen = w[at]
            if seen != word:
                seen = self._check(at, word)
            gate = w[GATE]
            now = monotonic_ns()
            over = self._over(route, gate) if gate & (OVER | RESERVING) else 0
            if gate & STOPPED or seen & DOOMED:
                result = self._close(at, seen, now, "stopped" if gate & STOPPED else "doomed")
                outcome = CLOSED
            elif over:
                result = self._close(at, seen, now, "over_limit", over)
                outcome = CLOSED
            elif not gate & QUEUED or gate & PAUSED:
                outcome = with_state(seen, IDLE) | route.stays
                result = self._put_idle(at, seen, outcome, gate, route.tag, now)
            else:
                result, outcome = self._to_waiter(at, seen, route, gate, now)
            if result == DONE:
                return outcome
            if result == BUSY:
                patience = patience or Patience(limit)
                if not patience.wait():
                    return LATER

    def _to_waiter(self, at: int, seen: int, route: Route, gate: int, now: int) -> tuple[int, int]:
        """Somebody waits: hand it over if it fits and may move; sticky ones stay for a while; else close it."""
        w = self.words
        head = w[HEAD]
        if not head:  # the queue is changing, or a section was left half done
            return self._table.missed(0), GIVEN
        waits = w[head]  # before its key: with another ticket it may wait for something else
        keyed = view.keyed(w, gate)
        if keyed:
            return self._to_waiter_of_a_key(at, seen, route, gate, keyed, now)
        same = w[head + CELL_KEY] == route.key
        fits = same and (not route.stays or (waits & CELL_ROW) >> CELL_ROW_SHIFT == self._table.row)
        most = view.share_for(w, gate, waits)
        if most and view.in_use(w) > most:
            outcome = with_state(seen, IDLE) | route.stays
            return self._put_idle(at, seen, outcome, gate, route.tag, now, head, waits, most), outcome
        if route.sticky and not gate & RESERVING:
            if now - w[head + CELL_SINCE] < steal_after(w, route.stays):
                own, own_waits = self._own_waiter(route.key)
                if own:
                    return self._hand(at, seen | route.stays, seen, own, own_waits, gate, now), GIVEN
                if route.stays or same:
                    outcome = with_state(seen, IDLE) | route.stays
                    return self._table.put_idle(at, seen, outcome, gate, route.tag, now), outcome
        if not fits:
            return self._close(at, seen, now, "evicted"), CLOSED
        return self._hand(at, seen, seen, head, waits, gate, now, 0, most and most + 1), GIVEN

    def _over(self, route: Route, gate: int) -> int:
        """VER as it was when the pool, or the key, had more connections than a lowered limit allows; 0: it has not."""
        w, geometry = self.words, self._table.geometry
        ver: int = w[VER]
        if gate & OVER and view.surplus(w, geometry) > 0:
            return ver
        return ver if gate & RESERVING and view.surplus_of_key(w, geometry, route.key) > 0 else 0

    def _to_waiter_of_a_key(self, at: int, seen: int, route: Route, gate: int, keyed: int, now: int) -> tuple[int, int]:
        """The same with a limit per key: the longest waiter who may have it, or its permit; idle if nobody may."""
        w = self.words
        counts = view.count_keys(w, self._table.geometry)
        cell, waits, key = view.next_waiter(w, gate, counts, view.in_use(w) - 1, route.key)
        if not cell:
            outcome = with_state(seen, IDLE) | route.stays
            return self._put_idle(at, seen, outcome, gate, route.tag, now, keyed=keyed), outcome
        if key != route.key or (route.stays and (waits & CELL_ROW) >> CELL_ROW_SHIFT != self._table.row):
            return self._close(at, seen, now, "evicted"), CLOSED
        most = view.share_for(w, gate, waits)
        return self._hand(at, seen, seen, cell, waits, gate, now, 0, most and most + 1, keyed), GIVEN

    def _put_idle(
        self,
        at: int,
        seen: int,
        new: int,
        gate: int,
        tag: int,
        now: int,
        first: int = 0,
        waits: int = 0,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        if gate & RESERVING:
            return self._table.put_idle_counted(at, seen, new, gate, first, waits, most, tag, now, keyed)
        return self._table.put_idle(at, seen, new, gate, tag, now)

    def _hand(
        self,
        at: int,
        word: int,
        seen: int,
        cell: int,
        waits: int,
        gate: int,
        now: int,
        bare: int = 0,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        """To a waiter, and wake it in the same stretch: nothing can come between the commit and the call."""
        number = cell - self._cells >> CELL_SHIFT
        waker = self._wakers.get(cell) or self._waker(cell)
        new = word & _KEPT | bare | number << HOLDER_SHIFT | GRANTED
        result = self._table.hand(at, seen, new, gate, cell, waits, 0, now, most, keyed)
        if result == DONE:
            -waker
        return result

    def permit(self, at: int, word: int, limit: int) -> int:
        """End the lease of a bare permit, or of an opening that never became a connection.

        Returns:
            GIVEN or LATER.

        Raises:
            LeaseError: The slot is no longer this lease's.
        """
        w = self.words
        patience = Patience(limit)
        while True:
            seen = self._check(at, word)
            gate, head = w[GATE], w[HEAD]
            if head and not gate & (OVER | PAUSED | STOPPED):
                result = self._permit_to_waiter(at, seen, head, gate)
            elif not head and gate & QUEUED:
                result = self._table.missed(0)  # the queue is changing, or a section was left half done
            else:
                result = self._table.free(at, seen, gate, 0)
            if result == DONE:
                return GIVEN
            if result == BUSY and not patience.wait():
                return LATER

    def _permit_to_waiter(self, at: int, seen: int, head: int, gate: int) -> int:
        w = self.words
        keyed = view.keyed(w, gate)
        if keyed:
            head, waits = view.permit_heir(w, self._table.geometry, gate, w[at + KEY])
            if not head:
                return self._table.free(at, seen, gate, 0, 0, 0, 0, keyed)
        else:
            waits = w[head]
        most = view.share_for(w, gate, waits)
        if not keyed and most and view.in_use(w) > most:
            return self._table.free(at, seen, gate, 0, head, waits, most)
        return self._hand(at, seen, seen, head, waits, gate, monotonic_ns(), BARE, most and most + 1, keyed)

    def closed(self, at: int, word: int, limit: int, reason: str = "discarded") -> int:
        """End a lease by closing its connection; the permit goes on once the remote has closed, too.

        Args:
            at: Its slot.
            word: The lease's word.
            limit: Until when to try, monotonic ns.
            reason: One of stats.REASONS.

        Returns:
            CLOSED or LATER.

        Raises:
            LeaseError: The slot is no longer this lease's.
        """
        patience = Patience(limit)
        while True:
            result = self._close(at, self._check(at, word), monotonic_ns(), reason)
            if result == DONE:
                return CLOSED
            if result == BUSY and not patience.wait():
                return LATER

    def _close(self, at: int, seen: int, now: int, reason: str, ver: int = 0) -> int:
        w = self.words
        counter = self._lines.place(w[at + KEY]) + CLOSES[reason]
        result = self._table.close(at, seen, w[at + SINCE], 0, counter, now, ver)
        if result == DONE:
            self._tell_close(self._table.slot_index(at), generation_of(seen))
        return result

    def evict(self, at: int) -> int:
        """Close an idle connection for its permit, while this process waits at the head of the queue."""
        seen = self.words[at]
        return self._close(at, seen, monotonic_ns(), "evicted") if seen & STATE == IDLE else 0

    def _check(self, at: int, word: int) -> int:
        """The slot's word now, which may have got DOOMED since the lease began."""
        seen = self.words[at]
        if (seen ^ word) & ~DOOMED:
            raise LeaseError("the lease is no longer in force: its slot was taken away")
        return seen
