"""Damage in a table: words that no section can have left there, by a stray store or a process gone wrong. Pure.

It can be told, and mended: what is derived is rebuilt anyway (`repair`), and of the committed words those that cannot
be are replaced by ones that can. A slot so mended is closed, which ends whatever connection it had.
"""

from __future__ import annotations

from typing import Final

from .layout import (
    ARBITER_ROW,
    CELL,
    CELL_HIGH,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_STALLED,
    CELL_WAITING,
    CLOSING,
    FOLD,
    FOLD_TO,
    FREE,
    FREE_CELL,
    FREE_SLOT,
    GATE,
    GEN,
    GRANT,
    GRANTED,
    HEAD,
    HEADER,
    HIGH,
    HOLDER_SHIFT,
    IDLE,
    KEYED,
    LINE_HIGH,
    NEXT,
    NEXT_FREE,
    ROW,
    ROW_COUNTERS,
    ROW_DEAD,
    ROW_FREE,
    SERIAL,
    SLOT,
    STATE,
    TAIL,
    TICKET,
    USED,
    VER,
    WAITING_COUNT,
    Geometry,
    holder_of,
    with_state,
)

#: A look takes 20 us in a small pool.
_LOOKS: Final = 50
#: What counts upwards is far below this for centuries.
_MOST: Final = 1 << 62


def mend(w: memoryview[int], geometry: Geometry) -> None:
    """Make every committed word one that can be. Under the mutex, before what is derived is rebuilt."""
    for at in (VER, GATE, TICKET, KEYED):
        if w[at] >= _MOST:
            w[at] = w[at] & STATE  # GATE keeps its flags; a repair gives new tickets
    w[LINE_HIGH] = min(w[LINE_HIGH], geometry.lines)
    counts = (range(HEADER, geometry.slot_base), range(geometry.line_base, geometry.words))
    for place in (w[FOLD] & 0xFFFF_FFFF, w[FOLD_TO]):
        if place and not any(place in places for places in counts):
            w[FOLD] = w[FOLD_TO] = 0
    states = [w[at] & STATE for at in _rows(geometry)]
    for row, at in enumerate(_rows(geometry)):
        if states[row] > ROW_DEAD:
            w[at] = with_state(w[at], ROW_DEAD)
        if row and w[at] & STATE != ROW_FREE:
            _mend_counts(w, at)
    used = {row for row, state in enumerate(states) if state != ROW_FREE} | {ARBITER_ROW}
    waiting = _mend_cells(w, geometry, used)
    _mend_slots(w, geometry, used, waiting)


def _rows(geometry: Geometry) -> range:
    return range(HEADER, geometry.slot_base, ROW)


def _mend_counts(w: memoryview[int], row_at: int) -> None:
    for offset, value in enumerate(w[row_at + ROW_COUNTERS : row_at + ROW].tolist(), ROW_COUNTERS):
        if value >= _MOST:
            w[row_at + offset] = 0


def _mend_cells(w: memoryview[int], geometry: Geometry, rows: set[int]) -> set[int]:
    """Free those that cannot be; gives the numbers of those that wait."""
    waiting = set()
    for index, word in enumerate(w[geometry.cell_base : geometry.line_base : CELL].tolist()):
        state = word & 15
        if word and (not 0 < state <= CELL_STALLED or (word & CELL_ROW) >> CELL_ROW_SHIFT not in rows):
            w[geometry.cell_base + CELL * index] = 0
        elif state == CELL_WAITING:
            waiting.add(index)
    return waiting


def _mend_slots(w: memoryview[int], geometry: Geometry, rows: set[int], waiting: set[int]) -> None:
    for index, word in enumerate(w[geometry.slot_base : geometry.cell_base : SLOT].tolist()):
        state, holder = word & STATE, holder_of(word)
        if state == GRANTED and holder in waiting:
            waiting.remove(holder)  # one grant for each
        elif state == GRANTED or state > CLOSING or (state not in (FREE, CLOSING) and holder not in rows):
            w[geometry.slot_base + SLOT * index] = word & (SERIAL | GEN) | ARBITER_ROW << HOLDER_SHIFT | CLOSING


def lasting_damage(w: memoryview[int], marks: memoryview[int], geometry: Geometry) -> str:
    """What cannot be, in a word, as every one of many looks finds it; "" for a sound table.

    A table at its cap changes ten thousand times a second, and two looks in three fall into a change.
    """
    found = damage(w, marks, geometry)
    for _ in range(_LOOKS if found else 0):
        if damage(w, marks, geometry) != found:
            return ""
    return found


def damage(w: memoryview[int], marks: memoryview[int], geometry: Geometry) -> str:
    """What cannot be, in a word; "" for a sound table.

    Read without the mutex: what is found in a table that changes meanwhile may be none; see `lasting_damage`.
    """
    high, cell_high = w[HIGH], w[CELL_HIGH]
    if w[LINE_HIGH] > geometry.lines:
        return f"LINE_HIGH {w[LINE_HIGH]}"
    if high > geometry.slots or cell_high > geometry.cells or max(w[VER], w[GATE], w[TICKET], w[KEYED]) >= _MOST:
        return f"HIGH {high}, CELL_HIGH {cell_high}, VER {w[VER]}, GATE {w[GATE]}, TICKET {w[TICKET]}"
    return _damage_in_slots(w, marks, geometry) or _damage_in_cells(w, geometry)


def _damage_in_slots(w: memoryview[int], marks: memoryview[int], geometry: Geometry) -> str:
    base, high = geometry.slot_base, w[HIGH]
    words = w[base : base + SLOT * high : SLOT].tolist()
    states = [word & STATE for word in words]
    free, idle = states.count(FREE), states.count(IDLE)
    marked = sum(map(bool, marks[:high].tolist()))
    listed = _length(w, w[FREE_SLOT], NEXT_FREE, range(base, base + SLOT * high, SLOT), free)
    if any(not _can_be(word, geometry) for word in words):
        return "a slot's state or holder"
    if (w[USED], listed, marked) != (high - free, free, idle):
        return f"USED {w[USED]} of {high - free}, {listed} of {free} free slots listed, {marked} of {idle} idle marked"
    return ""


def _can_be(word: int, geometry: Geometry) -> bool:
    state = word & STATE
    if state in (FREE, CLOSING):
        return True
    return state < CLOSING and holder_of(word) < (geometry.cells if state == GRANTED else geometry.rows)


def _damage_in_cells(w: memoryview[int], geometry: Geometry) -> str:
    base = geometry.cell_base
    places = range(base, base + CELL * w[CELL_HIGH], CELL)
    words = w[places.start : places.stop : CELL].tolist()
    if any(word & 15 > CELL_STALLED or (word & CELL_ROW) >> CELL_ROW_SHIFT >= geometry.rows for word in words):
        return "a cell's state or row"
    grants = w[places.start + GRANT : places.stop : CELL].tolist()
    waiting = sum(word & 15 == CELL_WAITING and not grant for word, grant in zip(words, grants, strict=False))
    free = sum(word & 15 == 0 for word in words)
    queued = _length(w, w[HEAD], NEXT, places, waiting)
    listed = _length(w, w[FREE_CELL], NEXT, places, free)
    if (w[WAITING_COUNT], queued, listed) != (waiting, waiting, free) or bool(w[TAIL]) != bool(waiting):
        return f"{w[WAITING_COUNT]} counted, {queued} queued of {waiting} waiting; {listed} of {free} free cells listed"
    granted = [at for at in grants if at]
    if any(not _is_slot(at, geometry) or w[at] & STATE != GRANTED for at in granted):
        return "a cell's grant"
    return ""


def _is_slot(at: int, geometry: Geometry) -> bool:
    return geometry.slot_base <= at < geometry.cell_base and (at - geometry.slot_base) % SLOT == 0


def _length(w: memoryview[int], at: int, link: int, places: range, most: int) -> int:
    """How many a list has; -1 if it leads astray, and no more than one above `most`."""
    number = 0
    while at and number <= most:
        if at not in places:
            return -1
        number += 1
        at = w[at + link]
    return number
