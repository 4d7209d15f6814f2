"""Every transition of the table, ready to be run: what leads to it, the call, and what it has verified when it commits.

The tests by example, the ones that break off at every store, and the ones in the wrong state all run this list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sharedpool import view
from sharedpool.layout import (
    ANY_NUMBER,
    ARBITER_ROW,
    CELL_HIGH,
    CELL_OWNED,
    CELL_ROW_SHIFT,
    DOOMED,
    FREE_CELL,
    GATE,
    GEN_ONE,
    GRANT,
    HEAD,
    HEADER,
    HOLDER,
    HOLDER_SHIFT,
    KEYED,
    LEASED,
    LINE,
    LINE_ROW_SHIFT,
    LINE_USED,
    MAX,
    MOST_PASSED,
    NEXT,
    PASSED,
    PREV,
    ROW,
    ROW_CLOSES,
    ROW_DEAD,
    ROW_LIVE,
    SINCE,
    STAYS,
    STOPPED,
    TAIL,
    TICKET,
    VER,
    leased_word,
    opening_word,
    tag_of,
    with_state,
)
from sharedpool.table import Table

from .tables import ONE, THREE, TWO, A, B, Lease, World

#: A call of the transition on somebody's table, with the lease that it stores to.
Call = Callable[[Table, Any], int]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A transition in the state in which it is legal.

    Attributes:
        row: Who does it.
        call: Does it.
        guards: Places of words that it verifies: it is STALE when one of them differs.
        slots: The slots whose state it changes.
        cells: The cells whose state it changes.
        expected: The lease's word before.
        takes: Whether the lease gets the slot's word.
    """

    row: int
    call: Call
    guards: tuple[int, ...]
    slots: tuple[int, ...] = ()
    cells: tuple[int, ...] = ()
    expected: int = 0
    takes: bool = False


def owned_by(row: int) -> int:
    return CELL_OWNED | row << CELL_ROW_SHIFT


def take_own_idle(world: World) -> Ready:
    return _take_idle(world, world.idle(ONE), ONE)


def take_over(world: World) -> Ready:
    world.idle(TWO, B)
    return _take_idle(world, world.idle(TWO), ONE)


def _take_idle(world: World, at: int, row: int) -> Ready:
    seen, gate, counter = world.words[at], world.gate, world.table(row).counter(0)
    new, now = leased_word(seen, row), world.tick()
    return Ready(
        row,
        lambda table, lease: table.take_idle(at, seen, new, gate, lease, counter, now),
        (at, GATE),
        slots=(at,),
        takes=True,
    )


def take_a_slot_never_used(world: World) -> Ready:
    world.opening(TWO)
    return _take_free(world, B)


def take_a_slot_used_before(world: World) -> Ready:
    world.limit(4)
    used = [world.leased(TWO), world.leased(TWO), world.leased(THREE)]
    world.freed(used[0], used[2])
    return _take_free(world, B)


def take_a_permit(world: World) -> Ready:
    return _take_free(world, B, LEASED)


def _take_free(world: World, key: int, state: int = 1) -> Ready:
    at = world.next_free()
    seen, gate, counter = world.words[at], world.gate, world.table(ONE).counter(0)
    new, now = opening_word(seen, ONE, state), world.tick()
    return Ready(
        ONE,
        lambda table, lease: table.take_free(at, seen, new, gate, lease, key, counter, now),
        (at, GATE),
        slots=(at,),
        takes=True,
    )


def take_a_granted_connection(world: World) -> Ready:
    at, cell = world.granted(ONE)
    new = leased_word(world.words[at], ONE)
    return _take_grant(world, at, cell, new)


def take_a_granted_permit(world: World) -> Ready:
    at, cell = world.granted(ONE, bare=True, key=B)
    return _take_grant(world, at, cell, opening_word(world.words[at], ONE))


def _take_grant(world: World, at: int, cell: int, new: int) -> Ready:
    seen, counter, now = world.words[at], world.table(ONE).counter(0), world.tick()
    return Ready(
        ONE,
        lambda table, lease: table.take_grant(at, seen, new, cell, lease, A, counter, now),
        (at, cell + GRANT),
        slots=(at,),
        cells=(cell,),
        takes=True,
    )


def become_connected(world: World) -> Ready:
    at = world.opening(ONE)
    word = world.words[at]
    new, counter, now = with_state(word, LEASED) | STAYS, world.table(ONE).counter(3), world.tick()
    return Ready(
        ONE,
        lambda table, lease: table.connected(at, word, new, lease, word, counter, now),
        (at,),
        slots=(at,),
        expected=word,
        takes=True,
    )


def be_opened_anew(world: World) -> Ready:
    at = world.leased(ONE)
    word, table, now = world.words[at], world.table(ONE), world.tick()
    new, reason, counter = opening_word(word, ONE), table.row_at + ROW_CLOSES, table.counter(3)
    return Ready(
        ONE,
        lambda table, lease: table.reopen(at, word, new, lease, word, reason, counter, now),
        (at,),
        slots=(at,),
        expected=word,
        takes=True,
    )


def be_doomed(world: World) -> Ready:
    at = world.leased(ONE)
    return _swap(world, ARBITER_ROW, at, world.words[at] | DOOMED, 0)


def be_adopted(world: World) -> Ready:
    at = world.idle(ONE)
    return _swap(world, ARBITER_ROW, at, world.words[at] & ~HOLDER | ARBITER_ROW << HOLDER_SHIFT, 0, 1)


def _swap(world: World, row: int, at: int, new: int, expected: int, bump: int = 0) -> Ready:
    seen, now = world.words[at], world.tick()
    return Ready(
        row,
        lambda table, lease: table.swap(at, seen, new, lease, expected, bump, now),
        (at,),
        slots=(at,),
        expected=expected,
        takes=bool(expected),
    )


def reserve(world: World, number: int, more: int = 0) -> None:
    world.limit(world.words[MAX] + more, reserve=number)


def take_idle_before_the_reserve(world: World) -> Ready:
    at = world.idle(TWO)
    world.idle(TWO, B)
    reserve(world, 1)
    return _take_idle_counted(world, at, view.share(world.words))


def take_idle_of_the_reserve(world: World) -> Ready:
    at = world.idle(TWO)
    world.leased(THREE)
    reserve(world, 1)
    world.waiting(TWO)
    return _take_idle_counted(world, at, ANY_NUMBER)


def _take_idle_counted(world: World, at: int, most: int) -> Ready:
    w, table = world.words, world.table(ONE)
    seen, gate, first, counter, now = w[at], world.gate, w[HEAD], table.counter(0), world.tick()
    waits, new = w[first] if first else 0, leased_word(seen, ONE)
    return Ready(
        ONE,
        lambda table, lease: table.take_idle_counted(at, seen, new, gate, first, waits, most, lease, counter, now),
        (at, GATE, HEAD, *([first] if first else [])),
        slots=(at,),
        takes=True,
    )


def take_free_before_the_reserve(world: World) -> Ready:
    reserve(world, 2, 1)
    return _take_free_counted(world, view.share(world.words))


def take_free_of_the_reserve(world: World) -> Ready:
    world.leased(TWO)
    reserve(world, 2, 1)
    world.waiting(TWO)
    return _take_free_counted(world, ANY_NUMBER)


def _take_free_counted(world: World, most: int) -> Ready:
    w, at, gate, first = world.words, world.next_free(), world.gate, world.words[HEAD]
    seen, counter, waits = w[at], world.table(ONE).counter(0), w[first] if first else 0
    new, now = opening_word(seen, ONE), world.tick()
    return Ready(
        ONE,
        lambda table, lease: table.take_free(at, seen, new, gate, lease, B, counter, now, first, waits, most),
        (at, GATE, HEAD, *([first] if first else [])),
        slots=(at,),
        takes=True,
    )


def put_idle_where_nobody_waits_with_a_reserve(world: World) -> Ready:
    at = world.leased(ONE)
    reserve(world, 1)
    return _put_idle_counted(world, at, 0)


def put_idle_for_the_reserve(world: World) -> Ready:
    at = world.leased(ONE)
    world.leased(TWO)
    reserve(world, 1)
    world.waiting(THREE)
    return _put_idle_counted(world, at, view.share(world.words))


def _put_idle_counted(world: World, at: int, most: int) -> Ready:
    w = world.words
    seen, gate, first, now = w[at], world.gate, w[HEAD], world.tick()
    waits, new, tag = w[first] if first else 0, seen - 1, tag_of(A)
    return Ready(
        ONE,
        lambda table, _: table.put_idle_counted(at, seen, new, gate, first, waits, most, tag, now),
        (at, GATE, *([HEAD, first] if most else [])),
        slots=(at,),
    )


def put_idle(world: World) -> Ready:
    world.idle(TWO)
    at = world.leased(ONE)
    seen, gate, now = world.words[at], world.gate, world.tick()
    new, tag = seen - 1, tag_of(A)
    return Ready(ONE, lambda table, _: table.put_idle(at, seen, new, gate, tag, now), (at, GATE), slots=(at,))


def hand_to_the_only_waiter(world: World) -> Ready:
    return _hand(world, ONE, world.leased(ONE), world.waiting(TWO))


def hand_to_the_first_of_three(world: World) -> Ready:
    at = world.leased(ONE)
    first, *_ = [world.waiting(row) for row in (TWO, THREE, TWO)]
    return _hand(world, ONE, at, first)


def hand_to_one_in_the_middle(world: World) -> Ready:
    at = world.leased(ONE)
    _, own, _ = [world.waiting(row) for row in (TWO, ONE, TWO)]
    return _hand(world, ONE, at, own)


def hand_before_the_reserve(world: World) -> Ready:
    at = world.leased(ONE)
    reserve(world, 1)
    return _hand(world, ONE, at, world.waiting(TWO), most=view.share(world.words) + 1)


def hand_an_idle_connection_before_the_reserve(world: World) -> Ready:
    at = world.idle(ONE)
    reserve(world, 1)
    return _hand(world, ARBITER_ROW, at, world.waiting(TWO), most=view.share(world.words))


def hand_an_idle_connection_of_the_reserve(world: World) -> Ready:
    at = world.idle(ONE)
    world.leased(ONE)
    reserve(world, 1)
    world.waiting(TWO)
    return _hand(world, ARBITER_ROW, at, world.waiting(THREE, high=True))


def hand_a_free_slot_before_the_reserve(world: World) -> Ready:
    reserve(world, 1)
    world.waiting(TWO)
    return _hand_free(world, view.share(world.words))


def free_for_the_reserve(world: World) -> Ready:
    at = world.closing(ONE)
    world.leased(TWO)
    reserve(world, 1)
    cell = world.waiting(THREE)
    seen, gate, waits, most = world.words[at], world.gate, world.words[cell], view.share(world.words)
    return Ready(
        ARBITER_ROW,
        lambda table, _: table.free(at, seen, gate, 0, cell, waits, most),
        (at, GATE, HEAD, cell),
        slots=(at,),
    )


def close_an_idle_one_with_a_reserve(world: World) -> Ready:
    at = world.idle(ONE)
    reserve(world, 1)
    return _close(world, ARBITER_ROW, at)


def enqueue_and_evict_with_a_reserve(world: World) -> Ready:
    evict = world.idle(TWO, B)
    reserve(world, 1)
    return _enqueue(world, evict)


def enqueue_high_before_the_others_with_a_reserve(world: World) -> Ready:
    evict = world.idle(TWO, B)
    reserve(world, 1)
    world.waiting(TWO)
    world.waiting(THREE, high=True)
    world.waiting(TWO)
    return _enqueue_high(world, evict)


def hand_the_last_one(world: World) -> Ready:
    at = world.leased(ONE)
    _, last = [world.waiting(row) for row in (TWO, THREE)]
    return _hand(world, ONE, at, last)


def hand_an_idle_connection(world: World) -> Ready:
    return _hand(world, ARBITER_ROW, world.idle(ONE), world.waiting(TWO))


def hand_a_permit_on(world: World) -> Ready:
    at = world.closing(ONE, B)
    return _hand(world, ARBITER_ROW, at, world.waiting(TWO), bare=True)


def revoke(world: World) -> Ready:
    at, slow = world.granted(ONE)
    return _hand(world, ARBITER_ROW, at, world.waiting(THREE), old_cell=slow)


def _hand(
    world: World, row: int, at: int, cell: int, *, bare: bool = False, old_cell: int = 0, most: int = 0, keyed: int = 0
) -> Ready:
    seen, gate, word, now = world.words[at], world.gate, world.words[cell], world.tick()
    new = world.granted_word(at, cell, bare=bare)
    return Ready(
        row,
        lambda table, _: table.hand(at, seen, new, gate, cell, word, old_cell, now, most, keyed),
        (at, GATE, cell, cell + GRANT, *([KEYED] if keyed else [])),
        slots=(at,),
        cells=(cell, old_cell) if old_cell else (cell,),
    )


def hand_a_slot_never_used(world: World) -> Ready:
    world.leased(ONE)
    world.waiting(TWO)
    return _hand_free(world)


def hand_a_slot_used_before(world: World) -> Ready:
    world.leased(ONE)
    world.freed(world.leased(ONE))
    world.waiting(TWO)
    world.waiting(THREE)
    return _hand_free(world)


def _hand_free(world: World, most: int = 0, keyed: int = 0) -> Ready:
    at, cell = world.next_free(), world.words[HEAD]
    seen, gate, word, now = world.words[at], world.gate, world.words[cell], world.tick()
    new = world.granted_word(at, cell, bare=True) + GEN_ONE
    return Ready(
        ARBITER_ROW,
        lambda table, _: table.hand_free(at, seen, new, gate, cell, word, now, most, keyed),
        (at, GATE, cell, cell + GRANT, *([KEYED] if keyed else [])),
        slots=(at,),
        cells=(cell,),
    )


def free_what_never_opened(world: World) -> Ready:
    return _free(world, ONE, world.opening(ONE))


def free_what_was_closed(world: World) -> Ready:
    world.freed(world.leased(TWO))
    return _free(world, ARBITER_ROW, world.closing(ONE))


def free_above_the_limit(world: World) -> Ready:
    at = world.closing(ONE)
    world.leased(TWO)
    world.waiting(THREE)
    world.limit(1)
    return _free(world, ARBITER_ROW, at)


def free_what_the_dead_were_granted(world: World) -> Ready:
    at, cell = world.granted(ONE, bare=True)
    return _free(world, ARBITER_ROW, at, cell)


def _free(world: World, row: int, at: int, old_cell: int = 0) -> Ready:
    seen, gate = world.words[at], world.gate
    cells = (old_cell,) if old_cell else ()
    return Ready(row, lambda table, _: table.free(at, seen, gate, old_cell), (at, GATE), slots=(at,), cells=cells)


def close_a_leased_one(world: World) -> Ready:
    return _close(world, ONE, world.leased(ONE))


def close_an_idle_one(world: World) -> Ready:
    return _close(world, ARBITER_ROW, world.idle(ONE))


def close_what_is_too_many(world: World) -> Ready:
    return _close(world, ONE, world.leased(ONE), surplus=True)


def close_what_was_not_taken(world: World) -> Ready:
    at, cell = world.granted(ONE)
    return _close(world, ARBITER_ROW, at, cell)


def _close(world: World, row: int, at: int, old_cell: int = 0, *, surplus: bool = False) -> Ready:
    seen, since, counter, now = world.words[at], world.words[at + SINCE], world.table(row).counter(2), world.tick()
    ver = world.words[VER] if surplus else 0
    return Ready(
        row,
        lambda table, _: table.close(at, seen, since, old_cell, counter, now, ver),
        (at, at + SINCE, *([VER] if surplus else [])),
        slots=(at,),
        cells=(old_cell,) if old_cell else (),
    )


def claim_a_cell_never_used(world: World) -> Ready:
    world.cell(TWO)
    return _claim(world)


def claim_a_cell_used_before(world: World) -> Ready:
    cells = [world.cell(TWO), world.cell(TWO)]
    for cell in cells:
        assert world.table(ARBITER_ROW).leave(cell, world.words[cell], 0)
    return _claim(world)


def _claim(world: World) -> Ready:
    table = world.table(ONE)
    cell = world.words[FREE_CELL] or table.cell_at(world.words[CELL_HIGH])
    return Ready(ONE, lambda table, _: table.claim_cell(cell), (cell,), cells=(cell,))


def claim_a_line(world: World) -> Ready:
    line, word = world.geometry.line_base + LINE, LINE_USED | ONE << LINE_ROW_SHIFT
    return Ready(ONE, lambda table, _: table.claim_line(line, A, word), (line,))


def enqueue_first(world: World) -> Ready:
    return _enqueue(world)


def enqueue_behind_others(world: World) -> Ready:
    world.waiting(TWO)
    world.waiting(THREE)
    return _enqueue(world)


def enqueue_and_evict(world: World) -> Ready:
    world.leased(TWO)
    return _enqueue(world, world.idle(TWO, B))


def _enqueue(world: World, evict: int = 0, keyed: int = 0) -> Ready:
    cell, table = world.cell(ONE), world.table(ONE)
    seen = world.words[evict] if evict else 0
    gate, ver, counter, now = world.gate, world.words[VER], table.counter(1), world.tick()
    return Ready(
        ONE,
        lambda table, _: table.enqueue(cell, A, gate, ver, evict, seen, now + 50, counter, now, keyed),
        (GATE, VER, cell, *([evict] if evict else []), *([KEYED] if keyed else [])),
        slots=(evict,) if evict else (),
        cells=(cell,),
    )


def enqueue_high_alone(world: World) -> Ready:
    return _enqueue_high(world)


def enqueue_high_before_the_head(world: World) -> Ready:
    world.waiting(TWO)
    world.waiting(THREE)
    return _enqueue_high(world)


def enqueue_high_behind_its_like(world: World) -> Ready:
    world.waiting(TWO)
    world.waiting(THREE, high=True)
    return _enqueue_high(world)


def enqueue_high_at_the_end(world: World) -> Ready:
    world.words[world.waiting(TWO) + PASSED] = MOST_PASSED
    world.waiting(THREE, high=True)
    return _enqueue_high(world)


def enqueue_high_and_evict(world: World) -> Ready:
    world.leased(TWO)
    evict = world.idle(TWO, B)
    world.waiting(TWO)
    return _enqueue_high(world, evict)


def _enqueue_high(world: World, evict: int = 0, keyed: int = 0) -> Ready:
    cell, table, turn = world.cell(ONE), world.table(ONE), world.high_turn(ONE)
    seen = world.words[evict] if evict else 0
    gate, ver, counter, now = world.gate, world.words[VER], table.counter(1), world.tick()
    places = dataclasses.astuple(turn)
    guards = [GATE, VER, cell, turn.after + NEXT if turn.after else HEAD, turn.before + PREV if turn.before else TAIL]
    guards += [turn.after] * bool(turn.after) + [turn.before, turn.before + PASSED] * bool(turn.before)
    guards += [TICKET] * bool(turn.ticket) + [evict] * bool(evict) + [KEYED] * bool(keyed)
    return Ready(
        ONE,
        lambda table, _: table.enqueue_high(cell, A, gate, ver, *places, evict, seen, now + 50, counter, now, keyed),
        tuple(guards),
        slots=(evict,) if evict else (),
        cells=(cell,),
    )


def rejoin_alone(world: World) -> Ready:
    return rejoin(world, world.stalled(ONE), 0, 0)


def rejoin_at_the_head(world: World) -> Ready:
    cell = world.stalled(ONE)
    return rejoin(world, cell, 0, world.waiting(TWO))


def rejoin_at_the_end(world: World) -> Ready:
    at = world.leased(TWO)
    first, cell = world.waiting(THREE), world.waiting(ONE)
    world.close(world.grant(at, cell), cell)
    return rejoin(world, cell, first, 0)


def rejoin_in_the_middle(world: World) -> Ready:
    at = world.leased(TWO)
    first, cell, third = world.waiting(THREE), world.waiting(ONE), world.waiting(THREE)
    world.close(world.grant(at, cell), cell)
    return rejoin(world, cell, first, third)


def rejoin(world: World, cell: int, after: int, before: int) -> Ready:
    seen, ver, gate = world.words[cell], world.words[VER], world.gate
    guards = [cell, VER, GATE, after + NEXT if after else HEAD, before + PREV if before else TAIL]
    return Ready(
        ONE,
        lambda table, _: table.rejoin(cell, seen, after, before, ver, gate),
        tuple(guards),
        cells=(cell,),
    )


def leave_as_the_only_one(world: World) -> Ready:
    return _leave(world, world.waiting(ONE))


def leave_from_the_head(world: World) -> Ready:
    first, *_ = [world.waiting(row) for row in (ONE, TWO, THREE)]
    return _leave(world, first)


def leave_from_the_middle(world: World) -> Ready:
    _, middle, _ = [world.waiting(row) for row in (TWO, ONE, THREE)]
    return _leave(world, middle)


def leave_from_the_end(world: World) -> Ready:
    *_, last = [world.waiting(row) for row in (TWO, THREE, ONE)]
    return _leave(world, last)


def leave_after_sleeping_through(world: World) -> Ready:
    cell = world.stalled(ONE)
    world.waiting(TWO)
    return _leave(world, cell)


def leave_for_ever(world: World) -> Ready:
    world.waiting(TWO)
    cell = world.waiting(ONE)
    return _leave(world, cell, ARBITER_ROW)


def give_up_a_cell(world: World) -> Ready:
    return _leave(world, world.cell(ONE), ARBITER_ROW)


def _leave(world: World, cell: int, row: int = ONE) -> Ready:
    seen = world.words[cell]
    new = 0 if row == ARBITER_ROW else owned_by(ONE)
    return Ready(row, lambda table, _: table.leave(cell, seen, new), (cell, cell + GRANT), cells=(cell,))


def a_process_comes(world: World) -> Ready:
    arbiter = world.table(ARBITER_ROW)
    for state in (ROW_DEAD, 0):
        assert arbiter.set_row(THREE, world.row_word(THREE), state, 0, world.tick())
    now = world.tick()
    return Ready(
        ARBITER_ROW,
        lambda table, _: table.set_row(THREE, 0, ROW_LIVE | 4711 << 4, 99, now),
        (HEADER + ROW * THREE,),
    )


def a_process_dies(world: World) -> Ready:
    word, now = world.row_word(ONE), world.tick()
    new = with_state(word, ROW_DEAD)
    return Ready(ARBITER_ROW, lambda table, _: table.set_row(ONE, word, new, 0, now), (HEADER + ROW * ONE,))


def limit_keys(world: World, number: int = 1) -> None:
    world.limit(world.words[MAX], per_key=number)


def take_free_below_the_limit_of_its_key(world: World) -> Ready:
    world.leased(TWO)
    limit_keys(world)
    world.waiting(THREE)
    w, at, gate, first, keyed = world.words, world.next_free(), world.gate, world.words[HEAD], world.words[KEYED]
    seen, counter, waits, most = w[at], world.table(ONE).counter(0), w[first], w[MAX]
    new, now = opening_word(seen, ONE), world.tick()
    return Ready(
        ONE,
        lambda table, lease: table.take_free(at, seen, new, gate, lease, B, counter, now, first, waits, most, keyed),
        (at, GATE, HEAD, first, KEYED),
        slots=(at,),
        takes=True,
    )


def take_idle_past_one_whose_key_is_full(world: World) -> Ready:
    world.leased(TWO)
    at = world.idle(TWO, B)
    limit_keys(world)
    world.waiting(THREE)
    w, gate, first, keyed = world.words, world.gate, world.words[HEAD], world.words[KEYED]
    seen, counter, waits, most, now = w[at], world.table(ONE).counter(0), w[first], w[MAX], world.tick()
    new = leased_word(seen, ONE)
    return Ready(
        ONE,
        lambda table, lease: table.take_idle_counted(
            at, seen, new, gate, first, waits, most, lease, counter, now, keyed
        ),
        (at, GATE, HEAD, first, KEYED),
        slots=(at,),
        takes=True,
    )


def put_idle_past_one_whose_key_is_full(world: World) -> Ready:
    world.leased(TWO)
    at = world.leased(ONE, B)
    limit_keys(world)
    world.waiting(THREE)
    seen, gate, keyed, now = world.words[at], world.gate, world.words[KEYED], world.tick()
    new, tag = seen - 1, tag_of(B)
    return Ready(
        ONE,
        lambda table, _: table.put_idle_counted(at, seen, new, gate, 0, 0, 0, tag, now, keyed),
        (at, GATE, KEYED),
        slots=(at,),
    )


def hand_past_one_whose_key_is_full(world: World) -> Ready:
    world.leased(TWO)
    at = world.leased(ONE, B)
    limit_keys(world)
    world.waiting(THREE)
    return _hand(world, ONE, at, world.waiting(TWO, B), keyed=world.words[KEYED])


def hand_a_permit_to_another_key(world: World) -> Ready:
    at = world.closing(ONE, B)
    limit_keys(world)
    return _hand(world, ARBITER_ROW, at, world.waiting(TWO), bare=True, keyed=world.words[KEYED])


def hand_a_free_slot_below_the_limit_of_its_key(world: World) -> Ready:
    limit_keys(world)
    world.waiting(TWO)
    return _hand_free(world, keyed=world.words[KEYED])


def free_past_one_whose_key_is_full(world: World) -> Ready:
    world.leased(TWO)
    at = world.closing(ONE, B)
    limit_keys(world)
    world.waiting(THREE)
    seen, gate, keyed = world.words[at], world.gate, world.words[KEYED]
    return Ready(
        ARBITER_ROW,
        lambda table, _: table.free(at, seen, gate, 0, 0, 0, 0, keyed),
        (at, GATE, KEYED),
        slots=(at,),
    )


def enqueue_for_a_full_key(world: World) -> Ready:
    world.leased(TWO)
    limit_keys(world)
    return _enqueue(world, keyed=world.words[KEYED])


def enqueue_high_for_a_full_key(world: World) -> Ready:
    world.leased(TWO)
    limit_keys(world)
    world.waiting(TWO)
    return _enqueue_high(world, keyed=world.words[KEYED])


def make_a_limit_per_key(world: World) -> Ready:
    world.idle(ONE)
    world.granted(THREE, bare=True)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(3, 0, 0, 1), ())


def end_a_limit_per_key(world: World) -> Ready:
    world.idle(ONE)
    limit_keys(world)
    world.waiting(TWO)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(2, 0), ())


def raise_the_limit(world: World) -> Ready:
    world.leased(ONE)
    world.leased(ONE)
    world.waiting(TWO)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(3, 0), ())


def lower_the_limit(world: World) -> Ready:
    world.leased(ONE)
    world.idle(ONE)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(1, 0), ())


def make_a_reserve(world: World) -> Ready:
    world.idle(ONE)
    world.leased(THREE)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(3, 0, 2), ())


def end_a_reserve(world: World) -> Ready:
    world.idle(ONE)
    world.leased(THREE)
    reserve(world, 1)
    world.waiting(TWO)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(2, 0), ())


def stop(world: World) -> Ready:
    world.leased(ONE)
    world.waiting(TWO)
    return Ready(ARBITER_ROW, lambda table, _: table.set_limit(2, STOPPED), ())


#: Leads to a state and gives the transition.
Operation = Callable[[World], Ready]

ALL: tuple[Operation, ...] = (
    take_own_idle, take_over, take_a_slot_never_used, take_a_slot_used_before, take_a_permit,
    take_a_granted_connection, take_a_granted_permit,
    become_connected, be_opened_anew, be_doomed, be_adopted,
    put_idle,
    hand_to_the_only_waiter, hand_to_the_first_of_three, hand_to_one_in_the_middle, hand_the_last_one,
    hand_an_idle_connection, hand_a_permit_on, revoke, hand_a_slot_never_used, hand_a_slot_used_before,
    free_what_never_opened, free_what_was_closed, free_above_the_limit, free_what_the_dead_were_granted,
    close_a_leased_one, close_an_idle_one, close_what_was_not_taken, close_what_is_too_many,
    claim_a_cell_never_used, claim_a_cell_used_before, claim_a_line,
    enqueue_first, enqueue_behind_others, enqueue_and_evict,
    enqueue_high_alone, enqueue_high_before_the_head, enqueue_high_behind_its_like, enqueue_high_at_the_end,
    enqueue_high_and_evict,
    rejoin_alone, rejoin_at_the_head, rejoin_at_the_end, rejoin_in_the_middle,
    leave_as_the_only_one, leave_from_the_head, leave_from_the_middle, leave_from_the_end,
    leave_after_sleeping_through, leave_for_ever, give_up_a_cell,
    a_process_comes, a_process_dies,
    take_idle_before_the_reserve, take_idle_of_the_reserve, take_free_before_the_reserve, take_free_of_the_reserve,
    put_idle_where_nobody_waits_with_a_reserve, put_idle_for_the_reserve, free_for_the_reserve,
    hand_before_the_reserve, hand_an_idle_connection_before_the_reserve, hand_an_idle_connection_of_the_reserve,
    hand_a_free_slot_before_the_reserve, close_an_idle_one_with_a_reserve, enqueue_and_evict_with_a_reserve,
    enqueue_high_before_the_others_with_a_reserve, make_a_reserve, end_a_reserve,
    take_free_below_the_limit_of_its_key, take_idle_past_one_whose_key_is_full, put_idle_past_one_whose_key_is_full,
    hand_past_one_whose_key_is_full, hand_a_permit_to_another_key, hand_a_free_slot_below_the_limit_of_its_key,
    free_past_one_whose_key_is_full, enqueue_for_a_full_key, enqueue_high_for_a_full_key,
    make_a_limit_per_key, end_a_limit_per_key,
    raise_the_limit, lower_the_limit, stop,
)  # fmt: skip


def run(world: World, ready: Ready, table: Table | None = None, lease: Any = None) -> tuple[int, Any]:
    """Do it; gives the answer and the lease."""
    if lease is None:
        lease = Lease()
        lease.word = ready.expected
    return ready.call(table or world.table(ready.row), lease), lease


def each(test: Callable[[Operation], None]) -> Callable[[], None]:
    """One test over all transitions, which names the one that fails: as many tests would take seconds by themselves."""

    def over_all() -> None:
        for operation in ALL:
            try:
                test(operation)
            except BaseException as error:
                error.add_note(f"the transition: {operation.__name__}")
                raise

    over_all.__name__ = test.__name__
    return over_all
