"""Reading a table without changing it: counts, the longest lease, the next candidate. Optimistic, from copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

from .counting import folding, on_its_way
from .layout import (
    ARBITER_ROW,
    BARE,
    CAUSE,
    CELL,
    CELL_HIGH,
    CELL_KEY,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_SINCE,
    CELL_WAITING,
    CLOSING,
    FIRST_ROW,
    FREE,
    GRANT,
    GRANTED,
    HAND,
    HEAD,
    HEADER,
    HIGH,
    IDLE,
    IDLE_COUNT,
    KEY,
    KEYED,
    KEYS_OVER,
    LEASED,
    LINE,
    LINE_HIGH,
    LINE_KEY,
    LINE_ROW_SHIFT,
    MASK64,
    MAX,
    MAX_PER_KEY,
    MOST_PASSED,
    NEXT,
    NUMBER_SHIFT,
    OPENED,
    OPENING,
    ORDINARY,
    PART,
    PASSED,
    PREV,
    RESERVE,
    RESERVING,
    ROW,
    ROW_ARBITERS,
    ROW_CLOSES,
    ROW_CONNECT_SECONDS,
    ROW_COUNTERS,
    ROW_DEAD,
    ROW_LEASE_SECONDS,
    ROW_LIVE,
    ROW_WAIT_SECONDS,
    SINCE,
    SLOT,
    STATE,
    STAYS,
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
from .options import MOST_WAITING
from .stats import (
    ARBITER_COUNTERS,
    COUNTERS,
    REASONS,
    Histogram,
    KeyStats,
    PoolStats,
    from_closes,
    from_counts,
    histogram_of,
    key_counters,
)

#: The states as the stats name them.
_NAMES: Final = ("free", "opening", "idle", "in_use", "granted", "closing")
#: So often counts are read again that moved meanwhile.
_READS: Final = 20

#: Slots looked at before the first victim found is taken.
_HAND_SPAN: Final = 16


def idle_that_moves(w: memoryview[int], marks: memoryview[int], geometry: Geometry, key: int) -> tuple[int, int]:
    """The place and the word of the key's idle connection longest unused that may move; or zeros."""
    base = geometry.slot_base
    found = [
        (w[at + SINCE], at, word)
        for at in (base + SLOT * index for index in range(w[HIGH]) if marks[index])
        if (word := w[at]) & STATE == IDLE and not word & STAYS and w[at + KEY] == key
    ]
    return min(found, default=(0, 0, 0))[1:]


def in_use(w: memoryview[int]) -> int:
    """In a pool with a reserve: slots that are neither free nor idle."""
    return w[USED] - w[IDLE_COUNT]


def share(w: memoryview[int]) -> int:
    """In a pool with a reserve: normal priority is served while fewer slots than so many are in use."""
    return max(1, w[MAX] - w[RESERVE])


def share_for(w: memoryview[int], gate: int, waits: int) -> int:
    """The share that holds for a waiter, by its cell's word; 0 for none."""
    return share(w) if gate & RESERVING and w[RESERVE] and not is_high(waits) else 0


def keyed(w: memoryview[int], gate: int) -> int:
    """In a pool with a limit per key: KEYED, never 0; else 0."""
    return w[KEYED] if gate & RESERVING and w[MAX_PER_KEY] else 0


def count_keys(w: memoryview[int], geometry: Geometry, *, closing: bool = True) -> dict[int, int]:
    """How many slots each key has, those that are being closed too unless `closing` is False.

    Read KEYED before: while it stays the same, no key has more than this.
    """
    base = geometry.slot_base
    keys_at = slice(base + KEY, base + SLOT * w[HIGH], SLOT)
    words = slot_words(w, geometry)
    counts: dict[int, int] = {}
    for word, key in zip(words, w[keys_at].tolist(), strict=False):
        if word & STATE and (closing or word & STATE != CLOSING):
            counts[key] = counts.get(key, 0) + 1
    return counts


def surplus(w: memoryview[int], geometry: Geometry) -> int:
    """How many slots are to be closed, so that no more are in use than MAX; those that are closing already are not.

    Read VER before: who closes one of them gives it to `Table.close`.
    """
    closing = sum(word & STATE == CLOSING for word in slot_words(w, geometry))
    return w[USED] - w[MAX] - closing


def surplus_of_key(w: memoryview[int], geometry: Geometry, key: int) -> int:
    """The same for one key and MAX_PER_KEY; 0 while no key can have more than it may."""
    limit = w[MAX_PER_KEY]
    if not (limit and w[KEYS_OVER]):
        return 0
    return count_keys(w, geometry, closing=False).get(key, 0) - limit


def queue(w: memoryview[int]) -> Iterator[tuple[int, int, int]]:
    """(cell, word, key) of those who wait, in their order; it may change meanwhile: no more steps than wait."""
    cell = w[HEAD]
    for _ in range(w[WAITING_COUNT]):
        if not cell:
            return
        word = w[cell]  # before its key: with another ticket it may wait for something else
        yield cell, word, w[cell + CELL_KEY]
        cell = w[cell + NEXT]


def next_waiter(
    w: memoryview[int], gate: int, counts: dict[int, int], taken: int, own: int = 0, *, only_high: bool = False
) -> tuple[int, int, int]:
    """In a pool with a limit per key, who has waited longest of those who may have one slot.

    Args:
        w: The words.
        gate: GATE.
        counts: How many slots each key has; without that slot itself, unless `own` is given.
        taken: Slots that are neither free nor idle, without that slot itself.
        own: The key of that slot's connection: whoever wants that one may have it whatever its key has.
        only_high: Those of normal priority do not count.

    Returns:
        The cell, its word and its key; or zeros.
    """
    limit = w[MAX_PER_KEY]
    for cell, word, key in queue(w):
        most = share_for(w, gate, word)
        if (most and taken >= most) or (only_high and not is_high(word)):
            continue
        if key == own or counts.get(key, 0) < limit:
            return cell, word, key
    return 0, 0, 0


def permit_heir(w: memoryview[int], geometry: Geometry, gate: int, key: int) -> tuple[int, int]:
    """In a pool with a limit per key, who gets a slot's permit, which had this key: the cell and its word, or zeros."""
    counts = count_keys(w, geometry)
    counts[key] = counts.get(key, 1) - 1
    return next_waiter(w, gate, counts, in_use(w) - 1)[:2]


def slot_words(w: memoryview[int], geometry: Geometry) -> list[int]:
    """A copy of the words of all slots ever used."""
    base = geometry.slot_base
    return w[base : base + SLOT * w[HIGH] : SLOT].tolist()


def row_pid(w: memoryview[int], row: int) -> int:
    """The process that stores as this row, or 0."""
    word = w[HEADER + ROW * row]
    return word >> 4 if word & 15 == ROW_LIVE else 0


@dataclasses.dataclass(frozen=True, slots=True)
class LineView:
    """What a row has counted of a key: the line's place, its row and key, and its counts from ROW_COUNTERS on."""

    at: int
    row: int
    key: int
    counts: list[int]


def lines(w: memoryview[int], geometry: Geometry) -> list[LineView]:
    """All lines in use, from a copy."""
    base = geometry.line_base
    words = w[base : base + LINE * w[LINE_HIGH]].tolist()
    return [
        LineView(base + at, words[at] >> LINE_ROW_SHIFT, words[at + LINE_KEY], words[at + ROW_COUNTERS : at + LINE])
        for at in range(0, len(words), LINE)
        if words[at]
    ]


def row_counts(w: memoryview[int], geometry: Geometry, row: int) -> tuple[dict[str, int], dict[str, int]]:
    """What one row has counted, of whatever key, and how many connections it has closed, by reason."""
    counts = _added(
        [_row_counts(w, row)[: LINE - ROW_COUNTERS], *(line.counts for line in lines(w, geometry) if line.row == row)]
    )
    return _named(counts, COUNTERS), _named(counts, REASONS, ROW_CLOSES)


def worker_counts(w: memoryview[int], geometry: Geometry, row: int) -> dict[str, int]:
    """What one row has counted, by the names of PoolStats: its counters, and its closes by their reasons."""
    counters, closes = row_counts(w, geometry, row)
    return {**counters, **from_closes(closes)}


def _named(counts: list[int], names: tuple[str, ...], offset: int = ROW_COUNTERS) -> dict[str, int]:
    """The counts that begin at an offset, by name."""
    return dict(zip(names, counts[offset - ROW_COUNTERS :], strict=False))


def reason(w: memoryview[int], geometry: Geometry, at: int) -> str:
    """Why a slot's connection is being closed, or was; "" if it has never been told."""
    cause, base = w[at + CAUSE], geometry.line_base
    offset = ((cause - base) % LINE if cause >= base else (cause - HEADER) % ROW) - ROW_CLOSES
    return REASONS[offset] if cause and 0 <= offset < len(REASONS) else ""


def stats(w: memoryview[int], geometry: Geometry, name: str, now: int) -> PoolStats:
    """The pool's numbers over all processes; the time, monotonic ns, is what the longest ones are measured by."""
    states = dict.fromkeys(_NAMES, 0)
    connections = 0
    base = geometry.slot_base
    opened = w[base + OPENED : base + SLOT * w[HIGH] : SLOT].tolist()
    for word, since in zip(slot_words(w, geometry), opened, strict=False):
        if word & STATE < len(_NAMES):
            states[_NAMES[word & STATE]] += 1
        connections += word & STATE != FREE and not word & BARE and since != 0
    del states[_NAMES[FREE]]
    counts, processes = sums(w, geometry)
    return from_counts(
        name, w[MAX], states, _counters(counts), w[WAITING_COUNT], processes, _named(counts, REASONS, ROW_CLOSES),
        connections=connections, **_histograms(counts), **_longest(w, geometry, now),
    )  # fmt: skip


def _counters(counts: list[int]) -> dict[str, int]:
    return _named(counts, COUNTERS) | _named(counts, ARBITER_COUNTERS, ROW_ARBITERS)


def sums(w: memoryview[int], geometry: Geometry) -> tuple[list[int], int]:
    """The sums of all counts of rows and lines, and how many rows are live."""
    rows, found, processes = _all_counts(w, geometry)
    counts = [*map(sum, zip(*rows, strict=True))]
    for index, column in enumerate(zip(*(line.counts for line in found), strict=True)):
        counts[index] += sum(column)
    return [*map(_sum, counts)], processes


def counts_by_key(w: memoryview[int], geometry: Geometry) -> dict[int, list[int]]:
    """The sums of all lines' counts by key; at 0 those of the rows: what belongs to no key, or is beyond the room."""
    rows, found, _ = _all_counts(w, geometry)
    by_key = {0: rows}
    for line in found:
        by_key.setdefault(line.key, []).append(line.counts)
    return {key: _added(counts) for key, counts in by_key.items()}


def _all_counts(w: memoryview[int], geometry: Geometry) -> tuple[list[list[int]], list[LineView], int]:
    """The counts of every row in use and every line, and how many rows are live.

    Rows and lines that are being folded are read until nothing moved meanwhile; what an arbiter that does not go on was
    just moving is counted as moved.
    """
    for _ in range(_READS):
        before = folding(w)
        words = w[HEADER : HEADER + ROW * geometry.rows : ROW].tolist()
        rows = [row for row in range(FIRST_ROW, geometry.rows) if words[row] & 15 in (ROW_LIVE, ROW_DEAD)]
        counts = {row: _row_counts(w, row) for row in (TOTALS_ROW, ARBITER_ROW, *rows)}
        counts[ARBITER_ROW] = _as_in_layout_2(counts[ARBITER_ROW])
        found = lines(w, geometry)
        for place, value in on_its_way(w):
            _correct(geometry, counts, found, place, value)
        if folding(w) == before:
            break
    return [*counts.values()], found, sum(words[row] & 15 == ROW_LIVE for row in rows)


def _as_in_layout_2(counts: list[int]) -> list[int]:
    """There the arbiter counted in its own row, and where others count something else."""
    own = ROW_ARBITERS - ROW_COUNTERS
    return [0] * own + counts[: len(ARBITER_COUNTERS)] + counts[own + len(ARBITER_COUNTERS) :]


def _correct(geometry: Geometry, rows: dict[int, list[int]], found: list[LineView], place: int, value: int) -> None:
    """A count as it is to be, in what was read."""
    if place >= geometry.line_base:
        offset = (place - geometry.line_base) % LINE
        for line in found:
            if line.at == place - offset:
                line.counts[offset - ROW_COUNTERS] = value
    else:
        row, offset = divmod(place - HEADER, ROW)
        if row in rows:
            rows[row][offset - ROW_COUNTERS] = value


def _added(counts: list[list[int]]) -> list[int]:
    return [_sum(sum(column)) for column in zip(*counts, strict=True)]


def _sum(value: int) -> int:
    """Modulo 2**64: a reset takes what was counted until then from the arbiter's, which may so be below zero."""
    value &= MASK64
    return 0 if value >> 63 else value  # below zero only when read in the midst of a reset


def _row_counts(w: memoryview[int], row: int) -> list[int]:
    start = HEADER + ROW * row
    return w[start + ROW_COUNTERS : start + ROW].tolist()


def _histograms(counts: list[int]) -> dict[str, Histogram]:
    starts = {
        "wait_seconds": ROW_WAIT_SECONDS,
        "connect_seconds": ROW_CONNECT_SECONDS,
        "lease_seconds": ROW_LEASE_SECONDS,
    }
    return {name: histogram_of(counts[start - ROW_COUNTERS :]) for name, start in starts.items()}


def _longest(w: memoryview[int], geometry: Geometry, now: int) -> dict[str, Any]:
    """The longest lease and the longest wait in force."""
    found: dict[str, Any] = {}
    held = leases(w, geometry)
    if held:
        found.update(longest_lease=max(0, now - held[0].since) / 1e9, longest_lease_pid=held[0].pid)
    waits = waiters(w, geometry)
    if waits:
        found.update(longest_wait=max(0, now - waits[0].since) / 1e9, longest_wait_pid=waits[0].pid)
    return found


def workers(w: memoryview[int], geometry: Geometry) -> dict[int, dict[str, Any]]:
    """What each attached process has counted, by pid; its closes by reason under "closes"."""
    found: dict[int, dict[str, Any]] = {}
    for row in live_rows(w, geometry):
        counters, closes = row_counts(w, geometry, row)
        ways = sum(counters[name] for name in ("reuses", "takeovers", "handoffs", "opens"))
        found[row_pid(w, row)] = {"checkouts": ways, **counters, **from_closes(closes), "closes": closes}
    return found


def keys(w: memoryview[int], geometry: Geometry) -> dict[int, KeyStats]:
    """Connections by state, waiters and counters, for every key that is in use or has a line; at 0 what has none."""
    found: dict[int, dict[str, Any]] = {}
    base = geometry.slot_base
    for index, word in enumerate(slot_words(w, geometry)):
        if word & STATE != FREE and word & STATE < len(_NAMES):
            bare = word & BARE and word & STATE == GRANTED  # for what its waiter wants, whatever lay there before
            key = w[geometry.cell_base + CELL * holder_of(word) + CELL_KEY] if bare else w[base + SLOT * index + KEY]
            counts = found.setdefault(key, {})
            name = _NAMES[word & STATE]
            counts[name] = counts.get(name, 0) + 1
            if not word & BARE and w[base + SLOT * index + OPENED]:
                counts["connections"] = counts.get("connections", 0) + 1
    for waiter in waiters(w, geometry):
        counts = found.setdefault(waiter.key, {})
        counts["waiting"] = counts.get("waiting", 0) + 1
    for key, numbers in counts_by_key(w, geometry).items():
        closes = _named(numbers, REASONS, ROW_CLOSES)
        counters = key_counters(_counters(numbers))
        if key or any(counters.values()):
            found.setdefault(key, {}).update(counters, closes=closes)
    return {key: KeyStats(**counts) for key, counts in found.items()}


def keys_in_use(w: memoryview[int], geometry: Geometry) -> set[int]:
    """The keys of all slots that are not free, and of whoever waits."""
    base = geometry.slot_base
    words = enumerate(slot_words(w, geometry))
    slots = {w[base + SLOT * index + KEY] for index, word in words if word & STATE != FREE}
    return slots | {waiter.key for waiter in waiters(w, geometry)}


@dataclasses.dataclass(frozen=True, slots=True)
class WaitView:
    """One waiter as the table shows it: its cell's place, its row and pid, its key, since when (monotonic ns)."""

    cell: int
    row: int
    pid: int
    key: int
    since: int


def waiters(w: memoryview[int], geometry: Geometry) -> list[WaitView]:
    """Everybody in the queue, the longest waiting first."""
    base = geometry.cell_base
    found = []
    for index, word in enumerate(w[base : base + CELL * w[CELL_HIGH] : CELL].tolist()):
        at = base + CELL * index
        if word & 15 == CELL_WAITING and not w[at + GRANT]:
            row = (word & CELL_ROW) >> CELL_ROW_SHIFT
            found.append(WaitView(at, row, row_pid(w, row), w[at + CELL_KEY], w[at + CELL_SINCE]))
    return sorted(found, key=lambda waiter: waiter.since)


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


def count_existing(w: memoryview[int], geometry: Geometry, key: int) -> int:
    """Connections of one key that are open or being opened."""
    base = geometry.slot_base
    return sum(
        word & STATE in (OPENING, IDLE, LEASED, GRANTED) and not word & BARE and w[base + SLOT * index + KEY] == key
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
    reserving = gate & RESERVING and w[RESERVE]
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
    for _ in range(MOST_WAITING):
        if not (first and last):
            break
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


def immovable(w: memoryview[int], geometry: Geometry, key: int, row: int) -> int:
    """The place of the key's idle connection longest unused that cannot move to this row; 0 for none."""
    base = geometry.slot_base
    places = [
        base + SLOT * index
        for index, word in enumerate(slot_words(w, geometry))
        if word & STATE == IDLE and word & STAYS and holder_of(word) != row
    ]
    places = [at for at in places if w[at + KEY] == key]
    return min(places, key=lambda at: w[at + SINCE], default=0)


def _oldest(w: memoryview[int], marks: memoryview[int], geometry: Geometry, indices: range, spared: int) -> int:
    base = geometry.slot_base
    places = [base + SLOT * index for index in indices if marks[index]]
    places = [at for at in places if w[at + KEY] != spared]
    return min(places, key=lambda at: w[at + SINCE], default=0)
