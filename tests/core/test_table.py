"""Every transition by example: in its state it commits what it says, in every other it changes nothing."""

from __future__ import annotations

import errno

import pytest

from sharedpool import invariants, view
from sharedpool.errors import PoolBroken
from sharedpool.layout import (
    ARBITER_ROW,
    BARE,
    CAUSE,
    CELL_KEY,
    CELL_OWNED,
    CELL_ROW,
    CELL_ROW_SHIFT,
    CELL_STALLED,
    CELL_WAITING,
    CLOSING,
    DIRTY,
    DOOMED,
    EPOCH,
    FREE_SLOT,
    GATE,
    GATE_FLAGS,
    GRANT,
    GRANTED,
    HEAD,
    HEADER,
    HIGH,
    IDLE,
    IDLE_COUNT,
    KEY,
    LEASED,
    MANY_TICKETS,
    MAX,
    MAX_WAITING,
    MOST_PASSED,
    NEXT,
    OPENED,
    OPENING,
    OVER,
    PAUSED,
    QUEUED,
    RESERVE,
    ROW,
    ROW_CLOSES,
    SINCE,
    STATE,
    STAYS,
    STOPPED,
    TICKET,
    TURN_SHIFT,
    USED,
    VER,
    WAITING_COUNT,
    generation_of,
    holder_of,
    leased_word,
    opening_word,
    tag_of,
    ticket_of,
    with_state,
)
from sharedpool.table import BUSY, DONE, FULL, STALE

from . import operations
from .operations import Operation
from .tables import ONE, THREE, TWO, A, B, Breaker, Broken, Lease, World, breaking, is_free, must, state_of

# --- all of them ------------------------------------------------------------------------------------------------------


@operations.each
def test_in_its_state_a_transition_is_done_and_the_invariants_hold(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    invariants.check(world.table(ONE))
    answer, lease = operations.run(world, ready)
    assert answer == DONE
    invariants.check(world.table(ONE))
    assert not world.mutex.held
    if ready.takes:
        assert lease.word == world.words[ready.slots[0]]
    else:
        assert lease.word == ready.expected


@operations.each
def test_done_once_it_is_stale_and_changes_nothing(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    operations.run(world, ready)
    if not ready.guards:
        return  # a new limit may be set as often as one likes
    before = world.save()
    assert operations.run(world, ready)[0] == STALE
    assert world.save() == before


@operations.each
def test_in_every_other_state_of_its_slots_it_is_stale_and_changes_nothing(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    for at in ready.slots:
        right = world.words[at]
        for state in {0, 1, 2, 3, 4, 5} - {right & STATE}:
            world.words[at] = with_state(right, state)
            before = world.save()
            answer, lease = operations.run(world, ready)
            assert (answer, lease.word) == (STALE, ready.expected), f"state {state}"
            assert world.save() == before
        world.words[at] = right
    assert operations.run(world, ready)[0] == DONE


@operations.each
def test_in_every_other_state_of_its_cells_it_is_stale_and_changes_nothing(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    for cell in set(ready.cells) & set(ready.guards):
        right = world.words[cell]
        for state in {0, CELL_OWNED, CELL_WAITING, CELL_STALLED} - {right & 15}:
            world.words[cell] = right & ~15 | state
            before = world.save()
            assert operations.run(world, ready)[0] == STALE, f"state {state}"
            assert world.save() == before
        world.words[cell] = right
    assert operations.run(world, ready)[0] == DONE


@operations.each
def test_what_it_verifies_may_not_differ_by_a_bit(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    for place in ready.guards:
        for bit in (0, 4, 8, 24, 52):
            if place == GATE and bit == 0 and operation.__name__.startswith(("enqueue", "rejoin")):
                continue  # who joins the queue does not mind whether somebody waits
            right = world.words[place]
            world.words[place] = right ^ 1 << bit
            before = world.save()
            assert operations.run(world, ready)[0] == STALE, f"word {place}, bit {bit}"
            assert world.save() == before
            world.words[place] = right
    assert operations.run(world, ready)[0] == DONE


@operations.each
def test_while_another_holds_the_mutex_it_is_busy_and_changes_nothing(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    before = world.save()
    world.mutex.held = True
    assert operations.run(world, ready)[0] == BUSY
    assert world.save() == before
    world.mutex.held = False
    assert operations.run(world, ready)[0] == DONE


@operations.each
def test_whoever_finds_a_section_left_half_done_repairs_first(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    world.words[DIRTY] = THREE
    answer, lease = operations.run(world, ready)
    assert (answer, lease.word) == (STALE, ready.expected)
    assert world.words[DIRTY] == 0
    invariants.check(world.table(ONE))


@operations.each
def test_whoever_inherits_the_mutex_of_the_dead_repairs_first(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    world.mutex.die()
    answer, lease = operations.run(world, ready)
    assert (answer, lease.word) == (STALE, ready.expected)
    assert (world.words[DIRTY], world.mutex.dead, world.mutex.held) == (0, False, False)
    invariants.check(world.table(ONE))


@operations.each
def test_a_mutex_that_cannot_be_recovered_is_told_and_never_unlocked(operation: Operation) -> None:
    world = World()
    ready = operation(world)
    world.mutex.lost = True  # its operator + would fail the test
    with pytest.raises(PoolBroken, match="cannot be recovered"):
        operations.run(world, ready)


# --- taking -----------------------------------------------------------------------------------------------------------


def test_a_takeover_leases_anothers_idle_connection_under_a_new_serial() -> None:
    world = World()
    at = world.idle(TWO)
    seen = world.words[at]
    lease, counter = Lease(), world.table(ONE).counter(3)
    must(world.table(ONE).take_idle(at, seen, leased_word(seen, ONE), world.gate, lease, counter, 77))
    word = world.words[at]
    assert (word & STATE, holder_of(word), generation_of(word)) == (LEASED, ONE, generation_of(seen))
    assert word >> 52 == (seen >> 52) + 1
    assert (lease.word, world.words[at + SINCE], world.words[counter]) == (word, 77, 1)
    assert world.marks[world.table(ONE).slot_index(at)] == 0


def test_two_leases_of_one_connection_by_one_row_have_different_words() -> None:
    world = World()
    at = world.leased(ONE)
    first = world.words[at]
    world.give_back(at)
    world.take(ONE, at)
    assert world.words[at] != first


@pytest.mark.parametrize("flag", [QUEUED, OVER, PAUSED, STOPPED])
def test_nobody_takes_what_he_found_before_something_came_in_the_way(flag: int) -> None:
    world = World()
    at = world.idle(ONE)
    gate, seen = world.gate, world.words[at]
    if flag == QUEUED:
        world.waiting(TWO, B)
    elif flag == OVER:
        world.leased(ONE)
        gate = world.gate
        world.limit(1)
    else:
        world.limit(2, flag)
    assert world.gate & flag
    assert world.table(ONE).take_idle(at, seen, leased_word(seen, ONE), gate, Lease(), 90, 1) == STALE
    free = world.next_free()
    word = opening_word(0, ONE)
    assert world.table(ONE).take_free(free, world.words[free], word, gate, Lease(), A, 90, 1) == STALE
    assert world.words[at] == seen


def test_a_permit_is_taken_up_to_the_cap_and_not_above() -> None:
    world = World(maximum=2, slots=4)
    world.opening(ONE)
    world.opening(TWO, B)
    at = world.next_free()
    before = world.save()
    assert world.table(ONE).take_free(at, 0, opening_word(0, ONE), world.gate, Lease(), A, 90, 1) == STALE
    assert world.save() == before
    assert (world.words[USED], world.words[MAX], world.words[HIGH]) == (2, 2, 2)


def test_a_slot_taken_again_is_a_new_generation_with_a_new_key() -> None:
    world = World()
    at = world.leased(ONE)
    old = world.words[at]
    world.freed(at)
    assert is_free(world, at)
    assert world.words[FREE_SLOT] == at
    assert world.opening(TWO, B) == at
    word = world.words[at]
    assert (word & STATE, holder_of(word)) == (OPENING, TWO)
    assert (generation_of(word), word >> 52) == (generation_of(old) + 1, (old >> 52) + 1)
    assert (world.words[at + KEY], world.words[at + OPENED]) == (B, 0)


def test_a_slot_is_taken_only_from_the_head_of_the_list_of_free_ones() -> None:
    world = World(maximum=4)
    first, second = world.leased(ONE), world.leased(ONE)
    world.freed(first, second)
    before = world.save()
    for at in (first, world.table(ONE).slot_at(2)):
        seen = world.words[at]
        assert world.table(ONE).take_free(at, seen, opening_word(seen, ONE), world.gate, Lease(), A, 90, 1) == STALE
    assert world.save() == before


def test_the_place_of_a_cell_is_never_taken_for_a_slot() -> None:
    world = World(maximum=2, slots=2)
    world.opening(ONE)
    world.opening(ONE)
    at = world.next_free()  # every slot was used: this is the first cell's place
    assert at == world.table(ONE).cell_base
    before = world.save()
    assert world.table(ONE).take_free(at, 0, opening_word(0, ONE), world.gate, Lease(), A, 90, 1) == STALE
    assert world.save() == before


@pytest.mark.parametrize("bare", [True, False])
def test_a_grant_is_taken_by_its_cell_which_is_then_owned_and_empty(bare: bool) -> None:
    world = World()
    at, cell = world.granted(ONE, bare=bare)
    seen = world.words[at]
    new = opening_word(seen, ONE) if bare else leased_word(seen, ONE)
    lease = Lease()
    must(world.table(ONE).take_grant(at, seen, new, cell, lease, B, world.table(ONE).counter(2), 5))
    word = world.words[at]
    assert word & STATE == (OPENING if bare else LEASED)
    assert (holder_of(word), word & BARE, lease.word, world.words[at + KEY]) == (ONE, 0, word, B)
    assert (world.words[cell], world.words[cell + GRANT]) == (operations.owned_by(ONE), 0)


def test_a_grant_that_was_revoked_is_not_taken() -> None:
    world = World()
    at, slow = world.granted(ONE)
    seen = world.words[at]
    world.grant(at, world.waiting(THREE), old_cell=slow)
    before = world.save()
    assert world.table(ONE).take_grant(at, seen, leased_word(seen, ONE), slow, Lease(), A, 90, 1) == STALE
    assert world.save() == before


# --- holding ----------------------------------------------------------------------------------------------------------


def test_an_opening_that_got_connected_is_leased_under_the_same_word_but_its_state() -> None:
    world = World()
    lease = Lease()
    at = world.opening(ONE, A, lease)
    word = lease.word
    counter = world.table(ONE).counter(2)
    must(world.table(ONE).connected(at, word, with_state(word, LEASED), lease, word, counter, 9))
    assert lease.word == world.words[at] == with_state(word, LEASED)
    assert world.words[VER] == 1
    assert (world.words[at + OPENED], world.words[counter]) == (9, 1)


def test_a_lease_whose_connection_had_ended_opens_anew_and_both_are_counted() -> None:
    world = World()
    table, lease = world.table(ONE), Lease()
    at = world.leased(ONE)
    seen = lease.word = world.words[at]
    reason, replaced = table.row_at + ROW_CLOSES + 3, table.counter(3)
    must(table.reopen(at, seen, opening_word(seen, ONE), lease, seen, reason, replaced, 9))
    assert (lease.word, world.words[at] & STATE) == (world.words[at], OPENING)
    assert (world.words[at + OPENED], world.words[reason], world.words[replaced]) == (0, 1, 1)


def test_the_close_of_what_was_never_open_is_not_counted() -> None:
    world = World(maximum=3)
    table = world.table(ONE)
    opening, leased = world.opening(ONE), world.leased(ONE)
    reason = table.row_at + ROW_CLOSES + 2
    for at in (opening, leased):
        must(table.close(at, world.words[at], world.words[at + SINCE], 0, reason, 9))
        assert world.words[at + CAUSE] == reason
    assert world.words[reason] == 1


def test_an_eviction_is_counted_by_the_section_that_decides_it() -> None:
    world = World()
    operations.run(world, operations.enqueue_and_evict(world))
    assert view.row_counts(world.words, world.geometry, ONE)[1]["evicted"] == 1


def test_a_permit_granted_after_its_connection_was_closed_has_none() -> None:
    world = World(maximum=1)
    table, lease = world.table(ONE), Lease()
    at, cell = world.closing(TWO), world.waiting(ONE, B)
    world.grant(at, cell, bare=True)
    seen = world.words[at]
    assert world.words[at + OPENED]
    must(table.take_grant(at, seen, opening_word(seen, ONE), cell, lease, B, table.counter(0), 9))
    assert world.words[at + OPENED] == 0


def test_a_swap_for_a_lease_that_was_ended_meanwhile_changes_nothing() -> None:
    world = World()
    at = world.opening(ONE)
    word, lease = world.words[at], Lease()  # its word is 0: somebody else has ended it
    before = world.save()
    assert world.table(ONE).swap(at, word, with_state(word, LEASED), lease, word, 0, 9) == STALE
    assert (world.save(), lease.word) == (before, 0)


def test_a_doomed_lease_no_longer_has_the_word_that_its_holder_knows() -> None:
    world = World()
    at = world.leased(ONE)
    seen = world.words[at]
    must(world.table(ARBITER_ROW).swap(at, seen, seen | DOOMED, Lease(), 0, 0, world.words[at + SINCE]))
    assert world.table(ONE).put_idle(at, seen, seen - 1, world.gate, tag_of(A), 1) == STALE
    assert world.words[at] == seen | DOOMED


def test_an_adoption_changes_the_holder_and_makes_everybody_decide_again() -> None:
    world = World()
    ready = operations.be_adopted(world)
    (at,) = ready.slots
    ver, mark = world.words[VER], world.marks[0]
    operations.run(world, ready)
    assert (holder_of(world.words[at]), state_of(world, at)) == (ARBITER_ROW, IDLE)
    assert (world.words[VER], world.marks[0]) == (ver + 1, mark)


# --- giving back ------------------------------------------------------------------------------------------------------


def test_a_checkin_leaves_the_connection_idle_to_be_found_and_makes_everybody_decide_again() -> None:
    world = World()
    at = world.leased(ONE)
    seen, ver = world.words[at], world.words[VER]
    must(world.table(ONE).put_idle(at, seen, seen - 1, world.gate, tag_of(A), 55))
    assert (world.words[at], world.words[at + SINCE]) == (with_state(seen, IDLE), 55)
    assert world.marks[world.table(ONE).slot_index(at)] == tag_of(A)
    assert world.words[VER] == ver + 1


def test_a_checkin_that_saw_nobody_waiting_is_stale_once_somebody_waits() -> None:
    world = World()
    at = world.leased(ONE)
    seen, gate = world.words[at], world.gate
    world.waiting(TWO)
    assert world.table(ONE).put_idle(at, seen, seen - 1, gate, tag_of(A), 55) == STALE
    assert world.words[at] == seen


def test_a_handoff_gives_the_connection_to_the_cell_and_kicks_it() -> None:
    world = World()
    at, cell = world.leased(ONE), world.waiting(TWO)
    kick = world.table(ONE).kick_index(cell)
    seen, before = world.words[at], world.marks[kick]
    world.grant(at, cell)
    word = world.words[at]
    assert (word & STATE, holder_of(word)) == (GRANTED, world.table(ONE).cell_index(cell))
    assert (generation_of(word), word >> 52) == (generation_of(seen), seen >> 52)
    assert world.words[cell + GRANT] == at
    assert world.marks[kick] == before + 1
    assert (world.words[HEAD], world.words[WAITING_COUNT], world.gate & QUEUED) == (0, 0, 0)


def test_a_kick_goes_round_and_stays_within_its_32_bits() -> None:
    world = World()
    at, cell = world.leased(ONE), world.waiting(TWO)
    kick = world.table(ONE).kick_index(cell)
    world.marks[kick] = 0xFFFF_FFFF
    world.grant(at, cell)
    assert world.marks[kick] == 0


def test_a_handoff_leaves_the_others_in_their_order() -> None:
    world = World()
    at = world.leased(ONE)
    cells = [world.waiting(row) for row in (TWO, THREE, TWO, THREE)]
    world.grant(at, cells[1])
    table = world.table(ONE)
    assert invariants.queue(table) == [cells[0], cells[2], cells[3]]
    assert world.gate & QUEUED


def test_a_grant_not_taken_goes_on_and_its_cell_stalls_with_its_ticket() -> None:
    world = World()
    at, slow = world.granted(ONE)
    ticket = world.words[slow] >> TURN_SHIFT
    other = world.waiting(THREE)
    world.grant(at, other, old_cell=slow)
    assert (world.words[slow] & 15, world.words[slow] >> TURN_SHIFT) == (CELL_STALLED, ticket)
    assert (world.words[slow + GRANT], world.words[other + GRANT]) == (0, at)


@pytest.mark.parametrize("state", [0, CELL_OWNED, CELL_STALLED])
def test_nothing_is_handed_to_a_cell_in_which_nobody_waits(state: int) -> None:
    world = World()
    at, cell = world.leased(ONE), world.waiting(TWO)
    word = world.words[cell] = world.words[cell] & ~15 | state
    new, before = world.granted_word(at, cell), world.save()
    assert world.table(ONE).hand(at, world.words[at], new, world.gate, cell, word, 0, 1) == STALE
    free = world.next_free()
    assert world.table(ONE).hand_free(free, 0, new, world.gate, cell, word, 1) == STALE
    assert world.save() == before


def test_a_free_permit_is_given_bare_to_the_head_of_the_queue() -> None:
    world = World(maximum=1)
    world.leased(ONE)
    cell = world.waiting(TWO)
    world.limit(2)
    ready = operations._hand_free(world)
    operations.run(world, ready)
    (at,) = ready.slots
    word = world.words[at]
    assert (word & STATE, bool(word & BARE), generation_of(word)) == (GRANTED, True, 1)
    assert (world.words[cell + GRANT], world.words[USED], world.words[HIGH]) == (at, 2, 2)


def test_no_free_permit_is_given_above_the_cap() -> None:
    world = World(maximum=1)
    world.leased(ONE)
    world.waiting(TWO)
    before = world.save()
    assert operations.run(world, operations._hand_free(world))[0] == STALE
    assert world.save() == before


def test_a_freed_slot_keeps_its_generation_and_loses_all_else() -> None:
    world = World()
    at = world.leased(ONE, A, STAYS)
    word = world.words[at]
    ver = world.words[VER]
    world.freed(at)
    assert world.words[at] == word & ~0xFFFFFF
    assert (world.words[USED], world.words[VER] > ver) == (0, True)


def test_over_the_limit_ends_with_the_last_slot_above_it() -> None:
    world = World(maximum=3)
    slots = [world.leased(ONE), world.leased(ONE), world.leased(ONE)]
    world.limit(1)
    assert world.gate & OVER
    world.freed(slots[0])
    assert world.gate & OVER
    world.freed(slots[1])
    assert not world.gate & OVER
    assert world.words[USED] == 1


def test_closing_keeps_the_permit_and_says_since_when() -> None:
    world = World()
    at = world.idle(ONE)
    counter = world.table(ARBITER_ROW).counter(0)
    must(world.table(ARBITER_ROW).close(at, world.words[at], world.words[at + SINCE], 0, counter, 4321))
    assert (state_of(world, at), world.words[USED], world.marks[0]) == (CLOSING, 1, 0)
    assert (world.words[at + SINCE], world.words[counter]) == (4321, 1)


def test_an_idle_connection_that_was_used_since_is_not_closed_for_its_age() -> None:
    world = World()
    at = world.idle(ONE)
    seen, since = world.words[at], world.words[at + SINCE]
    world.words[at + SINCE] = since + 1  # 4,096 leases later its word is the same again
    assert world.table(ARBITER_ROW).close(at, seen, since, 0, 90, 1) == STALE
    assert state_of(world, at) == IDLE


def test_a_granted_connection_that_is_closed_is_held_by_whoever_closes_it() -> None:
    world = World()
    at, cell = world.granted(ONE)
    world.close(at, cell)
    assert (state_of(world, at), holder_of(world.words[at])) == (CLOSING, ARBITER_ROW)
    assert (world.words[cell] & 15, world.words[cell + GRANT]) == (CELL_STALLED, 0)


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_cells_are_claimed_one_after_another_and_those_left_first() -> None:
    world = World(cells=3)
    cells = [world.cell(ONE), world.cell(TWO), world.cell(THREE)]
    assert cells == [world.table(ONE).cell_at(index) for index in range(3)]
    for cell in (cells[0], cells[2]):
        must(world.table(ARBITER_ROW).leave(cell, world.words[cell], 0))
    assert [world.cell(TWO), world.cell(TWO)] == [cells[2], cells[0]]


def test_of_two_who_saw_the_same_free_cell_one_gets_it() -> None:
    world = World()
    cell = world.table(ONE).cell_at(0)
    assert [world.table(row).claim_cell(cell) for row in (ONE, TWO)] == [DONE, STALE]
    assert (world.words[cell] & CELL_ROW) >> CELL_ROW_SHIFT == ONE


def test_who_queues_gets_the_next_ticket_and_the_end_of_the_queue() -> None:
    world = World()
    cells = [world.waiting(row) for row in (TWO, ONE, THREE)]
    assert invariants.queue(world.table(ONE)) == cells
    assert [ticket_of(world.words[cell]) for cell in cells] == [1, 2, 3]
    assert [world.words[cell + CELL_KEY] for cell in cells] == [A, A, A]
    assert (world.words[WAITING_COUNT], world.gate & GATE_FLAGS) == (3, QUEUED)


def test_who_found_nothing_does_not_queue_once_something_came_back() -> None:
    world = World(maximum=1)
    at = world.leased(ONE)
    cell, gate, ver = world.cell(TWO), world.gate, world.words[VER]
    world.give_back(at)
    before = world.save()
    assert world.table(TWO).enqueue(cell, A, gate, ver, 0, 0, 0, 90, 1) == STALE
    assert world.save() == before


def test_who_found_nothing_queues_although_others_have_queued_meanwhile() -> None:
    world = World(maximum=1)
    world.leased(ONE)
    cell, gate, ver = world.cell(TWO), world.gate, world.words[VER]
    other = world.waiting(THREE)
    must(world.table(TWO).enqueue(cell, A, gate, ver, 0, 0, 0, 90, 1))
    assert invariants.queue(world.table(ONE)) == [other, cell]


def test_as_many_wait_as_may_and_who_comes_then_is_told_and_changes_nothing() -> None:
    world = World()
    world.words[MAX_WAITING] = 2
    first, _ = world.waiting(ONE), world.waiting(TWO)
    cell = world.cell(THREE)
    before = world.save()
    assert world.table(THREE).enqueue(cell, A, world.gate, world.words[VER], 0, 0, 0, 90, 1) == FULL
    assert world.save() == before
    must(world.table(ONE).leave(first, world.words[first], operations.owned_by(ONE)))
    world.waiting(THREE, A, cell)


def test_who_would_be_refused_looks_again_once_something_came_back() -> None:
    world = World(maximum=1)
    world.words[MAX_WAITING] = 1
    at = world.leased(ONE)
    first, cell = world.waiting(TWO), world.cell(THREE)
    gate, ver = world.gate, world.words[VER]
    must(world.table(TWO).leave(first, world.words[first], operations.owned_by(TWO)))
    world.give_back(at)
    assert world.table(THREE).enqueue(cell, A, gate, ver, 0, 0, 0, 90, 1) == STALE


def test_who_stalled_returns_although_as_many_wait_as_may() -> None:
    world = World()
    world.words[MAX_WAITING] = 1
    ready = operations.rejoin_at_the_head(world)
    assert operations.run(world, ready)[0] == DONE
    assert world.words[WAITING_COUNT] == 2


def test_queueing_for_the_permit_of_anothers_idle_connection_closes_that_in_the_same_go() -> None:
    world = World()
    ready = operations.enqueue_and_evict(world)
    (evicted,) = ready.slots
    operations.run(world, ready)
    assert state_of(world, evicted) == CLOSING
    assert world.marks[world.table(ONE).slot_index(evicted)] == 0
    assert invariants.queue(world.table(ONE)) == list(ready.cells)


def test_nobody_queues_for_the_permit_of_a_connection_that_was_leased_meanwhile() -> None:
    world = World()
    ready = operations.enqueue_and_evict(world)
    (at,) = ready.slots
    world.take(THREE, at)
    before = world.save()
    assert operations.run(world, ready)[0] == STALE
    assert world.save() == before


def test_who_has_high_priority_stands_before_the_others_and_behind_its_like() -> None:
    world = World(cells=8)
    normal = [world.waiting(TWO), world.waiting(THREE)]
    high = [world.waiting(row, high=True) for row in (ONE, TWO, THREE)]
    assert invariants.queue(world.table(ONE)) == [*high, *normal]
    invariants.check(world.table(ONE))
    must(world.table(TWO).leave(high[1], world.words[high[1]], operations.owned_by(TWO)))
    high[1:] = [high[2], world.waiting(TWO, high=True, cell=high[1])]
    assert invariants.queue(world.table(ONE)) == [*high, *normal]


def test_between_two_of_normal_priority_pass_so_many_of_high_that_came_later_and_no_more() -> None:
    world = World(cells=30)
    early = [world.waiting(ONE, high=True) for _ in range(2)]
    normal = [world.waiting(TWO) for _ in range(3)]
    high = [world.waiting(THREE, high=True) for _ in range(2 * MOST_PASSED + 1)]
    first, second, third = high[:MOST_PASSED], high[MOST_PASSED : 2 * MOST_PASSED], high[2 * MOST_PASSED :]
    expected = [*early, *first, normal[0], *second, normal[1], *third, normal[2]]
    assert invariants.queue(world.table(ONE)) == expected
    invariants.check(world.table(ONE))
    scramble(world)
    world.table(ONE).repair()
    assert invariants.queue(world.table(ONE)) == expected


def test_where_all_have_been_passed_often_enough_one_of_high_priority_joins_the_end() -> None:
    world = World(cells=30)
    normal = world.waiting(TWO)
    high = [world.waiting(THREE, high=True) for _ in range(MOST_PASSED + 2)]
    expected = [*high[:MOST_PASSED], normal, *high[MOST_PASSED:]]
    last = world.waiting(TWO)
    expected += [world.waiting(THREE, high=True), last]
    assert invariants.queue(world.table(ONE)) == expected


def test_who_slept_through_a_grant_is_passed_by_nobody_any_more() -> None:
    world = World(maximum=3, cells=8)
    stalled = world.stalled(ONE)
    other = world.waiting(TWO)
    high = world.waiting(THREE, high=True)
    ready = operations.rejoin(world, stalled, 0, high)
    assert operations.run(world, ready)[0] == DONE
    later = world.waiting(THREE, high=True)
    assert invariants.queue(world.table(ONE)) == [stalled, high, later, other]


def test_one_of_high_priority_does_not_pass_whom_another_has_passed_meanwhile() -> None:
    world = World(cells=8)
    ready = operations.enqueue_high_before_the_head(world)
    world.waiting(THREE, high=True)
    before = world.save()
    assert operations.run(world, ready)[0] == STALE
    assert world.save() == before
    must(world.table(THREE).leave(world.words[HEAD], world.words[world.words[HEAD]], operations.owned_by(THREE)))
    before = world.save()
    assert operations.run(world, ready)[0] == STALE, "the other has left, its turn is used all the same"
    assert world.save() == before


def test_as_many_wait_as_may_of_high_priority_too() -> None:
    world = World()
    ready = operations.enqueue_high_before_the_head(world)
    world.words[MAX_WAITING] = 2
    before = world.save()
    assert operations.run(world, ready)[0] == FULL
    assert world.save() == before


def test_who_stirs_returns_to_his_place_by_his_ticket() -> None:
    world = World()
    ready = operations.rejoin_in_the_middle(world)
    (cell,) = ready.cells
    operations.run(world, ready)
    table = world.table(ONE)
    queue = invariants.queue(table)
    assert queue[1] == cell
    assert [ticket_of(world.words[place]) for place in queue] == [1, 2, 3]


def test_who_stirs_does_not_return_between_others_than_he_saw() -> None:
    world = World()
    ready = operations.rejoin_at_the_head(world)
    head = world.words[HEAD]
    must(world.table(TWO).leave(head, world.words[head], operations.owned_by(TWO)))
    before = world.save()
    assert operations.run(world, ready)[0] == STALE
    assert world.save() == before


def test_who_stirs_does_not_return_behind_someone_who_came_later() -> None:
    world = World(maximum=2)
    at, cell = world.leased(ONE), world.stalled(THREE)  # ticket 1
    other = world.waiting(TWO)
    # ... as a plan made before would have it: the other one was served, and waits again in the same cell
    assert world.words[other] >> TURN_SHIFT > world.words[cell] >> TURN_SHIFT
    before = world.save()
    gate, ver = world.gate, world.words[VER]
    assert world.table(THREE).rejoin(cell, world.words[cell], other, 0, ver, gate) == STALE
    assert world.save() == before
    assert state_of(world, at) == LEASED


def test_who_was_granted_something_cannot_leave() -> None:
    world = World()
    at, cell = world.granted(ONE)
    before = world.save()
    assert world.table(ONE).leave(cell, world.words[cell], operations.owned_by(ONE)) == STALE
    assert world.save() == before
    assert world.words[cell + GRANT] == at


def test_whoever_leaves_makes_those_decide_again_who_would_have_queued_behind_him() -> None:
    world = World()
    cell = world.waiting(ONE)
    ver = world.words[VER]
    must(world.table(ONE).leave(cell, world.words[cell], operations.owned_by(ONE)))
    assert (world.words[VER], world.gate & QUEUED) == (ver + 1, 0)


def test_the_last_grant_makes_those_decide_again_who_would_have_queued_behind_its_waiter() -> None:
    world = World(maximum=3)
    world.idle(ONE, B)
    at = world.leased(ONE, A)
    waiter, cell = world.waiting(TWO, A), world.cell(THREE)
    gate, ver = world.gate, world.words[VER]  # THREE wants B, and sees that somebody is before it
    world.grant(at, waiter)
    assert world.table(THREE).enqueue(cell, B, gate, ver, 0, 0, 0, 90, 1) == STALE, "it waits beside an idle B"


# --- the arbiter's ----------------------------------------------------------------------------------------------------


def test_a_row_changes_hands_only_from_the_state_that_was_seen() -> None:
    world = World()
    arbiter = world.table(ARBITER_ROW)
    assert arbiter.set_row(ONE, 0, 1 | 7 << 4, 1, 1) == STALE
    must(arbiter.set_row(ONE, world.row_word(ONE), 0, 5, 6))
    assert world.words[HEADER + ROW * ONE : HEADER + ROW * ONE + 3].tolist() == [0, 5, 6]


@pytest.mark.parametrize("flags", [0, PAUSED, STOPPED, PAUSED | STOPPED])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("maximum", [1, 2, 3])
def test_a_new_limit_begins_a_new_epoch_and_says_what_is_in_the_way(flags: int, queued: bool, maximum: int) -> None:
    world = World(maximum=2)
    world.leased(ONE)
    world.leased(ONE)
    if queued:
        world.waiting(TWO)
    epoch, ver = world.gate & ~GATE_FLAGS, world.words[VER]
    world.limit(maximum, flags)
    expected = flags | (QUEUED if queued else 0) | (OVER if maximum < 2 else 0)
    assert world.gate == epoch + EPOCH + expected
    assert (world.words[MAX], world.words[VER]) == (maximum, ver + 1)
    invariants.check(world.table(ONE))


# --- very many tickets ------------------------------------------------------------------------------------------------


def after_very_many_tickets() -> tuple[World, list[int]]:
    """A world in which all kinds of waiters have high tickets, and their cells in order."""
    world = World(maximum=4, cells=30)
    world.limit(4, reserve=1)
    strict = [world.waiting(ONE, high=True), world.waiting(ONE, high=True)]
    world.words[TICKET] = MANY_TICKETS - 2
    strict.append(world.waiting(ONE, high=True))
    world.limit(4)
    normal = [world.waiting(TWO), world.waiting(TWO), world.waiting(TWO)]
    high = [world.waiting(THREE, high=True) for _ in range(MOST_PASSED + 2)]
    return world, [*strict, *high[:MOST_PASSED], normal[0], *high[MOST_PASSED:], *normal[1:]]


def test_after_very_many_tickets_those_who_wait_are_numbered_anew_in_their_order() -> None:
    world, expected = after_very_many_tickets()
    assert ticket_of(world.words[expected[-1]]) > MANY_TICKETS
    world.limit(4)
    assert invariants.queue(world.table(ONE)) == expected
    assert world.words[TICKET] == 1 + len({ticket_of(world.words[cell]) for cell in expected})
    invariants.check(world.table(ONE))
    expected.insert(-2, world.waiting(THREE, high=True))
    expected.append(world.waiting(TWO))
    assert invariants.queue(world.table(ONE)) == expected
    invariants.check(world.table(ONE))


def test_their_order_holds_wherever_the_numbering_is_broken_off() -> None:
    for k in range(1, 400):
        world, expected = after_very_many_tickets()
        try:
            breaking(world, ARBITER_ROW, Breaker(k).store).set_limit(4, 0)
        except Broken:
            turns = [world.words[cell] >> TURN_SHIFT for cell in expected]
            assert turns == sorted(turns)
            world.table(THREE).missed(0)
            invariants.check(world.table(ONE))
            assert invariants.queue(world.table(ONE)) == expected
        else:
            assert k > 60
            return
    raise AssertionError("it does not end")


# --- a reserve --------------------------------------------------------------------------------------------------------


@operations.each
def test_with_a_reserve_what_is_counted_outside_is_verified_inside(operation: Operation) -> None:
    """One more or one less in use, and what was decided about the reserve no longer holds."""
    more = {"take_idle_before_the_reserve", "take_free_before_the_reserve", "hand_before_the_reserve"}
    more |= {"hand_an_idle_connection_before_the_reserve", "hand_a_free_slot_before_the_reserve"}
    fewer = {"put_idle_for_the_reserve", "free_for_the_reserve"}
    name = operation.__name__
    if name not in more | fewer:
        return
    world = World()
    ready = operation(world)
    world.words[IDLE_COUNT] = world.words[IDLE_COUNT] + (name in fewer)
    world.words[USED] = world.words[USED] + (name in more)
    before = world.save()
    assert operations.run(world, ready)[0] == STALE
    assert world.save() == before


def test_a_checkin_for_the_reserve_is_stale_once_one_of_high_priority_waits() -> None:
    world = World()
    ready = operations.put_idle_for_the_reserve(world)
    world.waiting(TWO, high=True)
    before = world.save()
    assert operations.run(world, ready)[0] == STALE
    assert world.save() == before


def test_those_of_high_priority_who_wait_come_before_the_others_once_there_is_a_reserve() -> None:
    def with_a_queue() -> tuple[World, list[int], list[int]]:
        world = World(maximum=4, cells=30)
        world.leased(ONE)
        early = world.waiting(ONE, high=True)
        normal = [world.waiting(TWO), world.waiting(TWO)]
        high = [world.waiting(THREE, high=True) for _ in range(MOST_PASSED + 2)]
        return world, [early, *high], normal

    world, high, normal = with_a_queue()
    world.limit(4, reserve=1)
    high.append(world.waiting(ONE, high=True))
    assert invariants.queue(world.table(ONE)) == [*high, *normal]
    invariants.check(world.table(ONE))
    world.limit(4)
    last = world.waiting(ONE, high=True)  # the first of normal priority has been passed often enough
    assert invariants.queue(world.table(ONE)) == [*high, normal[0], last, normal[1]]
    for k in range(1, 300):
        world, high, normal = with_a_queue()
        try:
            breaking(world, ARBITER_ROW, Breaker(k).store).set_limit(4, 0, 1)
        except Broken:
            world.table(THREE).missed(0)
            queue = invariants.queue(world.table(ONE))
            assert queue == [*high, *normal] or not world.words[RESERVE]
            assert [cell for cell in queue if cell in high] == high
            invariants.check(world.table(ONE))
        else:
            assert k > 60
            return
    raise AssertionError("it does not end")


# --- repair -----------------------------------------------------------------------------------------------------------


def scramble(world: World) -> None:
    """Everything derived is wrong."""
    table, w = world.table(ONE), world.words
    for index in range(w[HIGH]):
        world.marks[index] = 77
    for place in (USED, HEAD, HEAD + 1, WAITING_COUNT, FREE_SLOT, HIGH, 11, 12):
        w[place] = 0
    w[GATE] = w[GATE] ^ (QUEUED | OVER)
    for cell in map(table.cell_at, range(world.geometry.cells)):
        w[cell + GRANT] = w[cell + NEXT] = w[cell + NEXT + 1] = table.slot_at(0)
    for slot in map(table.slot_at, range(world.geometry.slots)):
        w[slot + 5] = slot
    w[DIRTY] = THREE


def test_everything_derived_is_rebuilt_from_what_was_committed() -> None:
    world = World(maximum=4)
    idle = world.idle(ONE, B)
    world.freed(world.leased(ONE))
    granted, granted_to = world.leased(TWO), world.waiting(ONE)
    world.grant(granted, granted_to)
    waiting = [world.waiting(TWO), world.waiting(THREE)]
    committed = [world.words[at] for at in (idle, granted, granted_to, *waiting)]
    scramble(world)
    assert world.table(TWO).repair() == DONE
    invariants.check(world.table(ONE))
    assert [world.words[at] for at in (idle, granted, granted_to, *waiting)] == committed
    assert invariants.queue(world.table(ONE)) == waiting
    assert world.words[granted_to + GRANT] == granted


def test_a_repair_keeps_what_was_paused_and_voids_every_plan() -> None:
    world = World()
    world.limit(2, PAUSED)
    gate, ver = world.gate, world.words[VER]
    scramble(world)
    world.table(ONE).repair()
    assert world.gate == gate + EPOCH
    assert world.words[VER] == ver + 1


def test_a_repair_of_a_table_at_rest_changes_nothing() -> None:
    world = World()
    world.granted(ONE)
    before = world.save()
    assert world.table(TWO).repair() == DONE
    assert world.save() == before


def test_a_repair_that_finds_the_mutex_busy_leaves_it_to_the_holder() -> None:
    world = World()
    world.words[DIRTY] = TWO
    world.mutex.held = True
    assert world.table(ONE).repair() == BUSY
    assert world.words[DIRTY] == TWO


def test_a_repair_that_inherits_the_mutex_is_done_at_the_next_try() -> None:
    world = World()
    world.idle(TWO)
    scramble(world)
    world.mutex.die()
    assert world.table(ONE).repair() == BUSY
    assert world.words[DIRTY] == THREE  # still naming who was storing
    assert world.table(ONE).repair() == DONE
    invariants.check(world.table(ONE))


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EDEADLK])
def test_held_by_another_or_by_this_thread_is_busy(code: int) -> None:
    assert World().table(ONE).missed(code) == BUSY
