"""What workers and the arbiter do with a table, in single steps: read, read, commit.

The decisions are those of `attachment`, `waiting`, `returns` and `served`, written once more as plans: a plan is made
by reading and carried out by one transition, so that tests can put the steps of several actors in any order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from sharedpool import view
from sharedpool.invariants import cells, slots
from sharedpool.layout import (
    ANY_NUMBER,
    ARBITER_ROW,
    BARE,
    CELL_FREE,
    CELL_KEY,
    CELL_OWNED,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_WAITING,
    CLOSING,
    DOOMED,
    FREE_SLOT,
    GATE,
    GATE_FLAGS,
    GEN,
    GEN_ONE,
    GRANT,
    GRANTED,
    HEAD,
    HIGH,
    HOLDER,
    HOLDER_SHIFT,
    IDLE,
    KEY,
    LEASED,
    MAX,
    MAX_PER_KEY,
    NEXT,
    OPENING,
    OVER,
    PAUSED,
    QUEUED,
    RESERVE,
    RESERVING,
    ROW_CLOSES,
    SERIAL,
    SINCE,
    STATE,
    STAYS,
    STOPPED,
    TURN_SHIFT,
    USED,
    VER,
    holder_of,
    is_high,
    leased_word,
    opening_word,
    tag_of,
    with_state,
)
from sharedpool.stats import COUNTERS, REASONS
from sharedpool.table import Table

from .tables import Lease

CLOSED: Final = OVER | PAUSED | STOPPED


@dataclasses.dataclass(frozen=True)
class Plan:
    """One transition, not yet carried out; `method` is "" for "look again"."""

    method: str
    arguments: tuple[int, ...] = ()
    expected: int = 0

    @property
    def at(self) -> int:
        return self.arguments[0]


AGAIN: Final = Plan("")
STOP: Final = Plan("stop")

#: The arguments before and after the lease, by method.
LEASE_AT = {
    "take_idle": 4, "take_idle_counted": 7, "take_free": 4, "take_grant": 4, "swap": 3, "connected": 3, "reopen": 3,
}  # fmt: skip


def carry_out(table: Table, plan: Plan, lease: Any = None) -> tuple[int, int]:
    """Commit a plan, or find that it no longer holds: the answer, and the lease's word."""
    lease = lease or Lease()
    lease.word = plan.expected
    arguments: list[Any] = list(plan.arguments)
    if plan.method in LEASE_AT:
        arguments.insert(LEASE_AT[plan.method], lease)
    return getattr(table, plan.method)(*arguments), lease.word


# --- workers ----------------------------------------------------------------------------------------------------------


def checkout(
    table: Table, key: int, connects: bool, gate: int, ver: int, cell: int, now: int, high: bool = False
) -> Plan:
    """What a checkout decides that has read GATE and VER before: take, open, or queue in its cell."""
    if gate & STOPPED:
        return STOP
    counter = table.counter(0)
    keyed = view.keyed(table.words, gate)
    if gate & RESERVING:
        plan, behind = _take_with_reserve(table, key, connects, gate, counter, now, high, keyed)
    else:
        plan, behind = _take(table, key, connects, gate, counter, now), False
    return plan or _queue(table, key, gate, ver, cell, now, high, behind and not keyed, keyed)


def _take_with_reserve(
    table: Table, key: int, connects: bool, gate: int, counter: int, now: int, high: bool, keyed: int
) -> tuple[Plan | None, bool]:
    """What a checkout may take, and whether those of its like that wait come first."""
    w = table.words
    first = w[HEAD]
    waits = w[first] if first else 0
    passes = high and w[RESERVE] != 0
    behind = bool(first and is_high(waits)) if passes else bool(gate & QUEUED)
    counts = view.count_keys(w, table.geometry)
    if keyed and behind:
        behind = view.next_waiter(w, gate, counts, view.in_use(w), key, only_high=passes)[0] != 0
    most = ANY_NUMBER if high else view.share(w)
    if behind or gate & CLOSED or view.in_use(w) >= most:
        return None, behind
    if at := find_idle(table, key):
        new = leased_word(w[at], table.row)
        unseen = keyed if first else 0
        return Plan("take_idle_counted", (at, w[at], new, gate, first, waits, most, counter, now, unseen)), behind
    if keyed and counts.get(key, 0) >= w[MAX_PER_KEY]:
        return None, behind
    return _open(table, key, connects, gate, counter, now, first, waits, most, keyed), behind


def _take(table: Table, key: int, connects: bool, gate: int, counter: int, now: int) -> Plan | None:
    w = table.words
    if gate & GATE_FLAGS:
        return None
    if at := find_idle(table, key):
        return Plan("take_idle", (at, w[at], leased_word(w[at], table.row), gate, counter, now))
    return _open(table, key, connects, gate, counter, now)


def _open(table: Table, key: int, connects: bool, gate: int, counter: int, now: int, *with_reserve: int) -> Plan | None:
    w = table.words
    if w[USED] >= w[MAX]:
        return None
    at = w[FREE_SLOT] or table.slot_at(w[HIGH])
    seen = w[at]
    if seen & STATE:
        return AGAIN
    new = opening_word(seen, table.row, OPENING if connects else LEASED)
    return Plan("take_free", (at, seen, new, gate, key, counter, now, *with_reserve))


def _queue(
    table: Table, key: int, gate: int, ver: int, cell: int, now: int, high: bool, behind: bool, keyed: int
) -> Plan:
    """Nothing is to be had: queue, and close another key's idle connection for its permit."""
    w, counter = table.words, table.counter(0)
    evict = seen = 0
    if not gate & OVER and not (gate & RESERVING and not high and view.in_use(w) >= view.share(w)):
        evict = _victim(table, key, keyed)
        seen = w[evict] if evict else 0
        if evict and seen & STATE != IDLE:
            return AGAIN
    if high:
        turn = view.high_turn(w, CELL_WAITING | table.row << CELL_ROW_SHIFT, gate)
        if turn is None or (behind and not turn.after):
            return AGAIN
        places = dataclasses.astuple(turn)
        return Plan("enqueue_high", (cell, key, gate, ver, *places, evict, seen, 0, counter, now, keyed))
    return Plan("enqueue", (cell, key, gate, ver, evict, seen, 0, counter, now, keyed))


def _victim(table: Table, key: int, keyed: int) -> int:
    w = table.words
    if keyed:
        room = w[MAX_PER_KEY] - view.count_keys(w, table.geometry).get(key, 0)
        if room <= 0:
            return view.immovable(w, table.geometry, key, table.row)
        if room <= sum(wanted == key for _, _, wanted in view.queue(w)):
            return 0
    return view.victim(w, table.marks, table.geometry, key)


def find_idle(table: Table, key: int) -> int:
    """The place of an idle connection of the key, or 0; the marks tell which may be one."""
    w, start = table.words, 0
    while (index := table.find(tag_of(key), start, w[HIGH])) >= 0:
        at, start = table.slot_at(index), index + 1
        if w[at] & STATE == IDLE and w[at + KEY] == key and not (w[at] & STAYS and holder_of(w[at]) != table.row):
            return at
    return 0


def take(table: Table, cell: int, key: int, connects: bool, now: int) -> Plan:
    """What a waiter does with what its cell was granted."""
    w = table.words
    at = w[cell + GRANT]
    seen = w[at]
    if not at or seen & STATE != GRANTED or holder_of(seen) != table.cell_index(cell):
        return AGAIN
    if seen & BARE:
        new = opening_word(seen, table.row, OPENING if connects else LEASED)
    else:
        new = leased_word(seen & ~DOOMED, table.row)
    return Plan("take_grant", (at, seen, new, cell, key, table.counter(0), now))


def leave(table: Table, cell: int, word: int) -> Plan:
    return Plan("leave", (cell, word, CELL_OWNED | table.row << CELL_ROW_SHIFT))


def rejoin(table: Table, cell: int, word: int, gate: int, ver: int) -> Plan:
    """Back to its place by its ticket."""
    w = table.words
    after, before = 0, w[HEAD]
    while before and w[before] >> TURN_SHIFT < word >> TURN_SHIFT:
        after, before = before, w[before + NEXT]
    return Plan("rejoin", (cell, word, after, before, ver, gate))


def connected(table: Table, at: int, word: int, now: int) -> Plan:
    seen = table.words[at]
    opened = table.counter(COUNTERS.index("opened"))
    return Plan("connected", (at, seen, with_state(seen, LEASED), word, opened, now), expected=word)


def reopen(table: Table, at: int, word: int, now: int) -> Plan:
    """What was leased had ended: another connection is opened on the same permit."""
    seen = table.words[at]
    replaced = table.counter(COUNTERS.index("replaced"))
    return Plan(
        "reopen", (at, seen, opening_word(seen, table.row), word, reason(table, "ended"), replaced, now), expected=word
    )


def reason(table: Table, name: str) -> int:
    """Where closes for this reason are counted."""
    return table.row_at + ROW_CLOSES + REASONS.index(name)


def checkin(table: Table, at: int, seen: int, gate: int, key: int, now: int) -> Plan:
    """What the end of a lease decides that has read the slot's word and GATE before."""
    w = table.words
    if seen & DOOMED or gate & STOPPED:
        return close(table, at, seen, 0, now)
    if gate & OVER:
        ver = w[VER]
        if view.surplus(w, table.geometry) > 0:
            return close(table, at, seen, 0, now, ver)
    if not gate & QUEUED or gate & PAUSED:
        return put_idle(at, seen, gate, key, now, 0, 0, 0)
    head = w[HEAD]
    if not head:
        return AGAIN
    keyed = view.keyed(w, gate)
    if keyed:
        return _checkin_keyed(table, at, seen, gate, key, now, keyed)
    waits = w[head]
    most = view.share_for(w, gate, waits)
    if most and view.in_use(w) > most:
        return put_idle(at, seen, gate, key, now, head, waits, most)
    if w[head + CELL_KEY] != key:
        return close(table, at, seen, 0, now)
    return hand(table, at, seen, gate, head, 0, now, bare=False, most=most and most + 1)


def _checkin_keyed(table: Table, at: int, seen: int, gate: int, key: int, now: int, keyed: int) -> Plan:
    w = table.words
    counts = view.count_keys(w, table.geometry)
    cell, waits, wanted = view.next_waiter(w, gate, counts, view.in_use(w) - 1, key)
    if not cell:
        return put_idle(at, seen, gate, key, now, 0, 0, 0, keyed)
    if wanted != key or (seen & STAYS and (waits & CELL_ROW) >> CELL_ROW_SHIFT != table.row):
        return close(table, at, seen, 0, now)
    most = view.share_for(w, gate, waits)
    return hand(table, at, seen, gate, cell, 0, now, bare=False, most=most and most + 1, keyed=keyed)


def put_idle(
    at: int, seen: int, gate: int, key: int, now: int, head: int, waits: int, most: int, keyed: int = 0
) -> Plan:
    new, tag = with_state(seen, IDLE), tag_of(key)
    if gate & RESERVING:
        return Plan("put_idle_counted", (at, seen, new, gate, head, waits, most, tag, now, keyed))
    return Plan("put_idle", (at, seen, new, gate, tag, now))


def close(table: Table, at: int, seen: int, old_cell: int, now: int, ver: int = 0) -> Plan:
    return Plan("close", (at, seen, table.words[at + SINCE], old_cell, reason(table, "discarded"), now, ver))


def hand(
    table: Table,
    at: int,
    seen: int,
    gate: int,
    cell: int,
    old_cell: int,
    now: int,
    *,
    bare: bool,
    most: int = 0,
    keyed: int = 0,
) -> Plan:
    new = seen & ~(STATE | HOLDER | 0xF0) | seen & STAYS | (BARE if bare else 0)
    new |= table.cell_index(cell) << HOLDER_SHIFT | GRANTED
    return Plan("hand", (at, seen, new, gate, cell, table.words[cell], old_cell, now, most, keyed))


def pass_on(table: Table, at: int, seen: int, gate: int, old_cell: int, now: int) -> Plan:
    """A permit without a connection goes to the longest waiter, or becomes free."""
    head = table.words[HEAD]
    if head and not gate & CLOSED:
        keyed = view.keyed(table.words, gate)
        if keyed:
            head, waits = view.permit_heir(table.words, table.geometry, gate, table.words[at + KEY])
            if not head:
                return Plan("free", (at, seen, gate, old_cell, 0, 0, 0, keyed))
        else:
            waits = table.words[head]
        most = view.share_for(table.words, gate, waits)
        if not keyed and most and view.in_use(table.words) > most:
            return Plan("free", (at, seen, gate, old_cell, head, waits, most))
        return hand(table, at, seen, gate, head, old_cell, now, bare=True, most=most and most + 1, keyed=keyed)
    if not head and gate & QUEUED:
        return AGAIN
    return Plan("free", (at, seen, gate, old_cell))


# --- the arbiter ------------------------------------------------------------------------------------------------------


def serve(table: Table, gate: int, now: int) -> Plan:
    """What the head of the queue could have and has not got: after a raised limit, or when the order held it up."""
    w = table.words
    cell = w[HEAD]
    if not cell or gate & CLOSED:
        return AGAIN
    if keyed := view.keyed(w, gate):
        return _serve_keyed(table, gate, keyed, now)
    most = view.share_for(w, gate, w[cell])
    if most and view.in_use(w) >= most:
        return AGAIN
    if w[USED] < w[MAX]:
        at = w[FREE_SLOT] or table.slot_at(w[HIGH])
        word = w[at]
        new = (word + GEN_ONE & GEN) | word & SERIAL | BARE | table.cell_index(cell) << HOLDER_SHIFT | GRANTED
        return Plan("hand_free", (at, word, new, gate, cell, w[cell], now, most))
    idle = [(at, word) for _, at, word in slots(table) if word & STATE == IDLE and not word & STAYS]
    closing = sum(word & STATE == CLOSING for _, _, word in slots(table))
    for at, word in idle:
        if w[at + KEY] == w[cell + CELL_KEY]:
            return hand(table, at, word, gate, cell, 0, now, bare=False, most=most)
    if idle and not closing:
        return close(table, *idle[0], 0, now)
    return AGAIN


def trim(table: Table, now: int) -> Plan:
    """What is idle above a lowered limit, or in a stopped pool, is closed."""
    w = table.words
    idle = [(w[at + SINCE], at, word) for _, at, word in slots(table) if word & STATE == IDLE]
    ver = w[VER]
    if not idle or not (w[GATE] & STOPPED or (w[GATE] & OVER and view.surplus(w, table.geometry) > 0)):
        return AGAIN
    _, at, word = min(idle)
    return close(table, at, word, 0, now, 0 if w[GATE] & STOPPED else ver)


def _serve_keyed(table: Table, gate: int, keyed: int, now: int) -> Plan:
    w = table.words
    counts = view.count_keys(w, table.geometry)
    idle = [(at, word) for _, at, word in slots(table) if word & STATE == IDLE]
    closing = sum(word & STATE == CLOSING for _, _, word in slots(table))
    for cell, waits, key in view.queue(w):
        most = view.share_for(w, gate, waits)
        if most and view.in_use(w) >= most:
            continue
        for at, word in idle:
            if w[at + KEY] == key and not word & STAYS:
                return hand(table, at, word, gate, cell, 0, now, bare=False, most=most, keyed=keyed)
        room = counts.get(key, 0) < w[MAX_PER_KEY]
        if room and w[USED] < w[MAX]:
            at = w[FREE_SLOT] or table.slot_at(w[HIGH])
            word = w[at]
            new = (word + GEN_ONE & GEN) | word & SERIAL | BARE | table.cell_index(cell) << HOLDER_SHIFT | GRANTED
            return Plan("hand_free", (at, word, new, gate, cell, waits, now, most, keyed))
        victims = [at for at, _ in idle if room or w[at + KEY] == key]
        if victims and not closing:
            return close(table, victims[0], w[victims[0]], 0, now)
    return AGAIN


def revoke(table: Table, at: int, gate: int, now: int) -> Plan:
    """A grant that was not taken in time goes to the next waiter, or its connection is closed for it."""
    w = table.words
    word, head = w[at], w[HEAD]
    if word & STATE != GRANTED or not head:
        return AGAIN
    cell = table.cell_at(holder_of(word))
    if w[cell + GRANT] != at:
        return AGAIN
    if keyed := view.keyed(w, gate):
        return _revoke_keyed(table, at, gate, cell, keyed, now)
    most = view.share_for(w, gate, w[head]) if is_high(w[cell]) else 0
    if most and view.in_use(w) > most:
        return AGAIN
    bare = bool(word & BARE)
    if not bare and (w[head + CELL_KEY] != w[at + KEY] or gate & CLOSED):
        return close(table, at, word, cell, now)
    if gate & CLOSED:
        return AGAIN
    return hand(table, at, word, gate, head, cell, now, bare=bare, most=most and most + 1)


def _revoke_keyed(table: Table, at: int, gate: int, cell: int, keyed: int, now: int) -> Plan:
    w = table.words
    word, key = w[at], w[at + KEY]
    bare = bool(word & BARE)
    counts = view.count_keys(w, table.geometry)
    counts[key] -= bare
    head, waits, wanted = view.next_waiter(w, gate, counts, view.in_use(w) - 1, 0 if bare else key)
    if not head or (bare and gate & CLOSED):
        return AGAIN
    if not bare and (wanted != key or gate & CLOSED):
        return close(table, at, word, cell, now)
    most = view.share_for(w, gate, waits)
    return hand(table, at, word, gate, head, cell, now, bare=bare, most=most and most + 1, keyed=keyed)


def reap_cell(table: Table, cell: int, gate: int, now: int) -> Plan:
    """One step towards the end of a dead process's cell; AGAIN once it is free."""
    w = table.words
    at = w[cell + GRANT]
    if at and w[at] & STATE == GRANTED and holder_of(w[at]) == table.cell_index(cell):
        return pass_on(table, at, w[at], gate, cell, now) if w[at] & BARE else close(table, at, w[at], cell, now)
    return Plan("leave", (cell, w[cell], 0)) if w[cell] else AGAIN


def cells_of(table: Table, row: int) -> list[int]:
    return [
        cell for cell, word in cells(table) if word & 15 != CELL_FREE and (word & CELL_ROW) >> CELL_ROW_SHIFT == row
    ]


def slots_of(table: Table, row: int) -> list[int]:
    return [at for _, at, word in slots(table) if word & STATE in (IDLE, LEASED, OPENING) and holder_of(word) == row]


def reap_slot(table: Table, at: int, now: int) -> Plan:
    """A dead process's idle connection is adopted, everything else closed."""
    word = table.words[at]
    if word & STATE == IDLE and not word & STAYS:
        return Plan("swap", (at, word, word & ~HOLDER | ARBITER_ROW << HOLDER_SHIFT, 0, 1, table.words[at + SINCE]))
    return close(table, at, word, 0, now)
