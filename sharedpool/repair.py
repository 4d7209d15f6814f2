"""Rebuilding everything derived in a table from its committed words, after a death in the middle of a section.

Runs under the mutex with DIRTY set; it may be interrupted or killed anywhere and run again. Reads copies of whole
columns, because a loop of single loads over thousands of words would hold the mutex for milliseconds.
"""

from __future__ import annotations

from .layout import (
    BARE,
    CELL,
    CELL_FREE,
    CELL_HIGH,
    CELL_KEY,
    CELL_STALLED,
    CELL_WAITING,
    EPOCH,
    FREE,
    FREE_CELL,
    FREE_SLOT,
    GATE,
    GRANT,
    GRANTED,
    HEAD,
    HIGH,
    HOLDER,
    HOLDER_SHIFT,
    IDLE,
    IDLE_COUNT,
    KEY,
    MANY_TICKETS,
    MASK64,
    MAX,
    MAX_PER_KEY,
    NEXT,
    NEXT_FREE,
    NUMBER_MASK,
    NUMBER_SHIFT,
    ORDINARY,
    OVER,
    PAUSED,
    PREV,
    QUEUED,
    RESERVE,
    RESERVING,
    SLOT,
    STATE,
    STOPPED,
    TAIL,
    TICKET,
    TURN_SHIFT,
    USED,
    VER,
    WAITING_COUNT,
    Geometry,
    is_high,
    tag_of,
    ticket_of,
)
from .sanity import mend


def rebuild(w: memoryview[int], marks: memoryview[int], geometry: Geometry) -> None:
    """Rebuild marks, counts, lists of free slots and cells, grants, the queue, and GATE's derived flags.

    Every plan made before is made void: VER and the epoch move on.
    """
    mend(w, geometry)
    granted = _slots(w, marks, geometry)
    _cells(w, geometry, granted)
    over = OVER if w[USED] > w[MAX] else 0
    queued = QUEUED if w[HEAD] else 0
    reserving = RESERVING if w[RESERVE] or w[MAX_PER_KEY] else 0
    w[GATE] = ((w[GATE] & -EPOCH) + EPOCH) & MASK64 | (w[GATE] & (PAUSED | STOPPED)) | queued | over | reserving
    w[VER] = w[VER] + 1 & MASK64


def _slots(w: memoryview[int], marks: memoryview[int], geometry: Geometry) -> dict[int, int]:
    """Rebuild what slots imply; gives which cell is granted which slot."""
    base = geometry.slot_base
    words = w[base : geometry.cell_base : SLOT].tolist()
    granted: dict[int, int] = {}
    used = idle = 0
    high = 0
    for index, word in enumerate(words):
        state = word & STATE
        if state != FREE:
            used += 1
        if state == IDLE:
            idle += 1
        if word:
            high = index + 1
        if state == GRANTED:
            cell = geometry.cell_base + CELL * ((word & HOLDER) >> HOLDER_SHIFT)
            granted[cell] = base + SLOT * index
            if word & BARE:
                w[base + SLOT * index + KEY] = w[cell + CELL_KEY]
    free = 0
    for index in range(high - 1, -1, -1):
        at = base + SLOT * index
        word = words[index]
        marks[index] = tag_of(w[at + KEY]) if word & STATE == IDLE else 0
        if word & STATE == FREE:
            w[at + NEXT_FREE] = free
            free = at
    for index in range(high, min(geometry.slots, max(high, w[HIGH]))):
        marks[index] = 0
    w[USED] = used
    w[IDLE_COUNT] = idle if w[RESERVE] or w[MAX_PER_KEY] else 0
    w[FREE_SLOT] = free
    w[HIGH] = high
    return granted


def _cells(w: memoryview[int], geometry: Geometry, granted: dict[int, int]) -> None:
    """Rebuild the queue in the order of the turns, the cells' grants, and the list of free cells."""
    base = geometry.cell_base
    if w[TICKET] >= MANY_TICKETS:
        _number_anew(w, geometry)
    words = w[base : base + CELL * geometry.cells : CELL].tolist()
    high = 0
    for index, word in enumerate(words):
        if word:
            high = index + 1
    free = 0
    queue: list[tuple[int, int]] = []
    ticket = w[TICKET]
    for index in range(high - 1, -1, -1):
        at = base + CELL * index
        word = words[index]
        if w[RESERVE] and word & 15 in (CELL_WAITING, CELL_STALLED) and is_high(word) and word & ORDINARY:
            word = w[at] = word & ~ORDINARY  # it waited before there was a reserve: now it stands before all others
        w[at + GRANT] = granted.get(at, 0)
        ticket = max(ticket, ticket_of(word) + 1)
        if word & 15 == CELL_FREE:
            w[at + NEXT] = free
            free = at
        elif word & 15 == CELL_WAITING and at not in granted:
            queue.append((word >> TURN_SHIFT, at))
    w[FREE_CELL] = free
    w[CELL_HIGH] = high
    w[TICKET] = ticket
    _link(w, [at for _, at in sorted(queue)])


def _number_anew(w: memoryview[int], geometry: Geometry) -> None:
    """Give those who wait the lowest tickets in the order that they have.

    The lowest first, and a new ticket is never above the old one: so the order holds at every store.
    """
    base = geometry.cell_base
    words = w[base : base + CELL * geometry.cells : CELL].tolist()
    waiting = [
        (ticket_of(word), word, base + CELL * index)
        for index, word in enumerate(words)
        if word & 15 in (CELL_WAITING, CELL_STALLED)
    ]
    number = last = 0
    for ticket, word, at in sorted(waiting):
        if ticket != last:
            number, last = number + 1, ticket
        w[at] = word & ~(NUMBER_MASK << NUMBER_SHIFT) | number << NUMBER_SHIFT
    w[TICKET] = number + 1


def _link(w: memoryview[int], queue: list[int]) -> None:
    before = 0
    for at in queue:
        w[at + PREV] = before
        w[at + NEXT] = 0
        if before:
            w[before + NEXT] = at
        before = at
    w[HEAD] = queue[0] if queue else 0
    w[TAIL] = before
    w[WAITING_COUNT] = len(queue)
