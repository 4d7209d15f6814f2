"""Reading a table without changing it: counts, the longest lease, the next candidate. Optimistic, from copies."""

from __future__ import annotations

import dataclasses
from typing import Final

from .layout import (
    ARBITER_ROW,
    CELL,
    CELL_HIGH,
    CELL_KEY,
    CELL_SINCE,
    CELL_WAITING,
    CONNECT_TIME,
    FIRST_ROW,
    FREE,
    GRANTED,
    HAND,
    HEAD,
    HEADER,
    HIGH,
    IDLE,
    KEY,
    LEASED,
    MASK64,
    MAX,
    ROW,
    ROW_COUNTERS,
    ROW_LIVE,
    SINCE,
    SLOT,
    STATE,
    STATE_NAMES,
    STEAL_AFTER,
    TOTALS_ROW,
    WAITING_COUNT,
    Geometry,
    holder_of,
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


def all_counters(w: memoryview[int], geometry: Geometry) -> dict[str, int]:
    """What all processes have counted, the dead ones too, since the numbers were last reset.

    A reset takes what was counted until then from the row of the dead, which may so be below zero, modulo 2**64.
    """
    counters = row_counters(w, TOTALS_ROW)
    for row in live_rows(w, geometry):
        for counter, value in row_counters(w, row).items():
            counters[counter] += value
    whole = {counter: value & MASK64 for counter, value in counters.items()}
    # Below zero only when read in the midst of a reset, or of a reaping.
    return {counter: 0 if value >> 63 else value for counter, value in whole.items()}


def stats(w: memoryview[int], geometry: Geometry, name: str) -> PoolStats:
    """The pool's numbers over all processes."""
    states = dict.fromkeys(STATE_NAMES, 0)
    for word in slot_words(w, geometry):
        if word & STATE < len(STATE_NAMES):
            states[STATE_NAMES[word & STATE]] += 1
    del states["free"]
    states["in_use"] = states.pop("leased")
    counters = all_counters(w, geometry)
    processes = len(live_rows(w, geometry))
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


def longest_wait(w: memoryview[int], now: int) -> int:
    """How long the head of the queue has waited, ns; 0 if nobody waits."""
    head = w[HEAD]
    return max(0, now - w[head + CELL_SINCE]) if head else 0


def keys(w: memoryview[int], geometry: Geometry) -> dict[int, dict[str, int]]:
    """How many slots of each key are in which state (named as in PoolStats), and how many wait for it."""
    found: dict[int, dict[str, int]] = {}
    cells = geometry.cell_base
    for index, word in enumerate(slot_words(w, geometry)):
        state = word & STATE
        if state == FREE or state >= len(STATE_NAMES):
            continue
        if state == GRANTED:  # a bare grant is for what its waiter wants, whatever lay in the slot before
            key = w[cells + CELL * holder_of(word) + CELL_KEY]
        else:
            key = w[geometry.slot_base + SLOT * index + KEY]
        _tally(found, key, "in_use" if state == LEASED else STATE_NAMES[state])
    for cell, word in enumerate(w[cells : cells + CELL * w[CELL_HIGH] : CELL].tolist()):
        if word & STATE == CELL_WAITING:
            _tally(found, w[cells + CELL * cell + CELL_KEY], "waiting")
    return found


def _tally(found: dict[int, dict[str, int]], key: int, state: str) -> None:
    if key not in found:
        found[key] = dict.fromkeys(("in_use", "idle", "opening", "granted", "closing", "waiting"), 0)
    found[key][state] += 1


def count_idle(w: memoryview[int], geometry: Geometry, key: int) -> int:
    """Idle connections of one key."""
    base = geometry.slot_base
    return sum(
        word & STATE == IDLE and w[base + SLOT * index + KEY] == key
        for index, word in enumerate(slot_words(w, geometry))
    )


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
