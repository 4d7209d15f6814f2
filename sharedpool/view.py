"""Reading a table without changing it: counts, the longest lease, the next candidate. Optimistic, from copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from .layout import (
    ARBITER_ROW,
    CELL_WAITING,
    CONNECT_TIME,
    FIRST_ROW,
    HAND,
    HEAD,
    HEADER,
    HIGH,
    IDLE,
    IDLE_COUNT,
    KEY,
    LEASED,
    MAX,
    MOST_PASSED,
    NEXT,
    NUMBER_SHIFT,
    ORDINARY,
    PART,
    PASSED,
    PREV,
    RESERVE,
    RESERVING,
    ROW,
    ROW_COUNTERS,
    ROW_LIVE,
    SINCE,
    SLOT,
    STATE,
    STATE_NAMES,
    STEAL_AFTER,
    TAIL,
    TICKET,
    TOTALS_ROW,
    TURN_SHIFT,
    USED,
    WAITING_COUNT,
    Geometry,
    holder_of,
    is_high,
)
from .stats import ARBITER_COUNTERS, COUNTERS, PoolStats, from_counts

#: Slots looked at before the first victim found is taken.
_HAND_SPAN: Final = 16
#: Sticky order steals after this many connect times, within these bounds, ns.
_STEAL_CONNECTS: Final = 20
_STEAL_LEAST: Final = 50_000_000
_STEAL_MOST: Final = 500_000_000


def steal_after(w: memoryview[int]) -> int:
    """How long sticky order lets the longest waiter wait, ns."""
    return w[STEAL_AFTER] or min(_STEAL_MOST, max(_STEAL_LEAST, _STEAL_CONNECTS * w[CONNECT_TIME]))


def in_use(w: memoryview[int]) -> int:
    """In a pool with a reserve: slots that are neither free nor idle."""
    return w[USED] - w[IDLE_COUNT]


def share(w: memoryview[int]) -> int:
    """In a pool with a reserve: normal priority is served while fewer slots than so many are in use."""
    return max(1, w[MAX] - w[RESERVE])


def share_for(w: memoryview[int], gate: int, waits: int) -> int:
    """The share that holds for a waiter, by its cell's word; 0 for none."""
    return share(w) if gate & RESERVING and not is_high(waits) else 0


def slot_words(w: memoryview[int], geometry: Geometry) -> list[int]:
    """A copy of the words of all slots ever used."""
    base = geometry.slot_base
    return w[base : base + SLOT * w[HIGH] : SLOT].tolist()


def row_pid(w: memoryview[int], row: int) -> int:
    """The process that stores as this row, or 0."""
    word = w[HEADER + ROW * row]
    return word >> 4 if word & 15 == ROW_LIVE else 0


def row_counters(w: memoryview[int], row: int, names: tuple[str, ...] = COUNTERS) -> dict[str, int]:
    """What one row has counted."""
    start = HEADER + ROW * row + ROW_COUNTERS
    return dict(zip(names, w[start : start + len(names)].tolist(), strict=True))


def stats(w: memoryview[int], geometry: Geometry, name: str) -> PoolStats:
    """The pool's numbers over all processes."""
    states = dict.fromkeys(STATE_NAMES, 0)
    for word in slot_words(w, geometry):
        if word & STATE < len(STATE_NAMES):
            states[STATE_NAMES[word & STATE]] += 1
    del states["free"]
    states["in_use"] = states.pop("leased")
    counters = row_counters(w, TOTALS_ROW)
    processes = 0
    for row in live_rows(w, geometry):
        processes += 1
        for counter, value in row_counters(w, row).items():
            counters[counter] += value
    counters.update(row_counters(w, ARBITER_ROW, ARBITER_COUNTERS))
    return from_counts(name, w[MAX], states, counters, w[WAITING_COUNT], processes)


def live_rows(w: memoryview[int], geometry: Geometry) -> list[int]:
    """The rows of attached processes."""
    words = w[HEADER : HEADER + ROW * geometry.rows : ROW].tolist()
    return [row for row in range(FIRST_ROW, geometry.rows) if words[row] & 15 == ROW_LIVE]


@dataclasses.dataclass(frozen=True, slots=True)
class LeaseView:
    """One lease in force as the table shows it: its slot, its holder's row and pid, since when (monotonic ns)."""

    index: int
    row: int
    pid: int
    since: int


def leases(w: memoryview[int], geometry: Geometry) -> list[LeaseView]:
    """All leases in force, the longest first."""
    found = []
    for index, word in enumerate(slot_words(w, geometry)):
        if word & STATE == LEASED:
            row = holder_of(word)
            since = w[geometry.slot_base + SLOT * index + SINCE]
            found.append(LeaseView(index, row, row_pid(w, row), since))
    return sorted(found, key=lambda lease: lease.since)


def count_idle(w: memoryview[int], geometry: Geometry, key: int) -> int:
    """Idle connections of one key."""
    base = geometry.slot_base
    return sum(
        word & STATE == IDLE and w[base + SLOT * index + KEY] == key
        for index, word in enumerate(slot_words(w, geometry))
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """Where a high-priority waiter joins; the arguments of `Table.enqueue_high` in its order."""

    word: int
    after: int
    after_word: int
    before: int
    before_word: int
    passed: int
    ticket: int


def high_turn(w: memoryview[int], waiting: int, gate: int) -> Turn | None:
    """The turn of a high-priority waiter whose cell's word will be `waiting` besides; None: the queue is changing."""
    ticket = w[TICKET]
    reserving = gate & RESERVING
    after, before = _join_before(w, _is_ordinary if reserving else _may_be_passed)
    after_word = w[after] if after else 0
    if after and after_word & 15 != CELL_WAITING:
        return None
    if reserving:
        before_word, passed = (w[before], w[before + PASSED]) if before else (0, 0)
        return Turn(ticket << NUMBER_SHIFT | waiting, after, after_word, before, before_word, passed, ticket)
    if not before:
        return Turn(ORDINARY | ticket << NUMBER_SHIFT | waiting, after, after_word, 0, 0, 0, ticket)
    before_word, passed = w[before], w[before + PASSED]
    if before_word & (PART | 15) != PART | CELL_WAITING or passed >= MOST_PASSED:
        return None
    turn = (before_word & ~PART) >> TURN_SHIFT | passed
    return Turn(turn << TURN_SHIFT | waiting, after, after_word, before, before_word, passed, 0)


def _join_before(w: memoryview[int], passes: Callable[[memoryview[int], int], bool]) -> tuple[int, int]:
    """Behind which cell and before which: the first that `passes`. Looks from both ends of the queue at once."""
    first, last = w[HEAD], w[TAIL]
    if not last or not passes(w, last):
        return last, 0
    while first and last:
        if passes(w, first):
            return w[first + PREV], first
        earlier = w[last + PREV]
        if not earlier or not passes(w, earlier):
            return earlier, last
        first, last = w[first + NEXT], earlier
    return w[TAIL], 0  # the queue is changing: this will not hold


def _may_be_passed(w: memoryview[int], cell: int) -> bool:
    return not is_high(w[cell]) and w[cell + PASSED] < MOST_PASSED


def _is_ordinary(w: memoryview[int], cell: int) -> bool:
    return bool(w[cell] & ORDINARY)


def victim(w: memoryview[int], marks: memoryview[int], geometry: Geometry, spared: int) -> int:
    """The place of an idle slot to close for its permit, about the least recently used; 0 if none is idle.

    Connections of the key `spared` are none: whoever wants that key does not close them. Looks at the next 16 slots
    from a hand that goes round; only where none of them is idle, at all of them.
    """
    high = w[HIGH]
    if not high:
        return 0
    hand = w[HAND] % high
    end = min(high, hand + _HAND_SPAN)
    best = _oldest(w, marks, geometry, range(hand, end), spared)
    w[HAND] = end % high
    if not best and any(marks[:high]):
        best = _oldest(w, marks, geometry, range(high), spared)
    return best


def _oldest(w: memoryview[int], marks: memoryview[int], geometry: Geometry, indices: range, spared: int) -> int:
    base = geometry.slot_base
    places = [base + SLOT * index for index in indices if marks[index]]
    places = [at for at in places if w[at + KEY] != spared]
    return min(places, key=lambda at: w[at + SINCE], default=0)
