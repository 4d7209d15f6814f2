"""Any sequence of checkouts, checkins, time-outs, deaths, limits and broken sections keeps every invariant.

Hypothesis prints the shortest sequence that fails, and how to play it again. SHAREDPOOL_TEST_EXAMPLES sets how many
sequences are tried; the default takes about half a second.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sharedpool import invariants
from sharedpool.layout import (
    ARBITER_ROW,
    CELL_STALLED,
    CELL_WAITING,
    CLOSING,
    DOOMED,
    GATE,
    GATE_FLAGS,
    GRANT,
    GRANTED,
    HEAD,
    IDLE,
    IDLE_COUNT,
    LEASED,
    MAX,
    MAX_PER_KEY,
    MAX_WAITING,
    MOST_PASSED,
    NUMBER_SHIFT,
    OPENING,
    OVER,
    PART,
    PASSED,
    PAUSED,
    RESERVE,
    RESERVING,
    ROW_DEAD,
    ROW_FREE,
    ROW_LIVE,
    STATE,
    STOPPED,
    USED,
    VER,
    WAITING_COUNT,
    holder_of,
    is_high,
    with_state,
)
from sharedpool.table import BUSY, DONE, FULL

from . import moves
from .moves import AGAIN, STOP, Plan
from .tables import ONE, THREE, TWO, A, B, Breaker, BreakingLease, Broken, World, breaking

EXAMPLES = int(os.environ.get("SHAREDPOOL_TEST_EXAMPLES", "20"))

rows = st.sampled_from([ONE, TWO, THREE])
keys = st.sampled_from([A, B])
flags = st.sampled_from([0, 0, 0, PAUSED, STOPPED])
per_keys = st.sampled_from([0, 0, 1, 2])
some = st.integers(min_value=0, max_value=7)


class TableMachine(RuleBasedStateMachine):
    """Three workers with up to two threads each, and the arbiter; each step is done at once."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(maximum=3, slots=6, cells=8)
        self.table = self.world.table(ARBITER_ROW)
        self.leases: dict[int, tuple[int, int, bool]] = {}  # place: (word, key, connects)
        self.waiters: dict[int, tuple[int, int, bool]] = {}  # cell: (row, key, connects)
        self.cells: dict[int, list[int]] = {ONE: [], TWO: [], THREE: []}

    # --- helpers ------------------------------------------------------------------------------------------------------

    def settle(self, row: int, plan: Callable[[], Plan]) -> tuple[Plan, int]:
        """Plan and carry out until it is done; a table at rest makes nobody try twice."""
        for _ in range(3):
            made = plan()
            if made in (AGAIN, STOP):
                return made, 0
            before = self.world.keys()
            answer, word = moves.carry_out(self.world.table(row), made)
            self.keys_hold(before)
            assert answer != BUSY
            if answer == FULL:
                return STOP, FULL
            if answer == DONE:
                return made, word
        raise AssertionError(f"a plan made at rest is stale: {made}")

    def keys_hold(self, before: collections.Counter[int]) -> None:
        limit = self.world.words[MAX_PER_KEY]
        for key, count in self.world.keys().items():
            assert not limit or count <= max(limit, before[key]), f"key {key:#x} has {count} slots"

    def live(self, row: int) -> bool:
        return self.world.row_word(row) & STATE == ROW_LIVE

    def pick(self, things: Any, number: int) -> Any:
        ordered = sorted(things)
        return ordered[number % len(ordered)] if ordered else None

    def lease(self, number: int, state: int) -> int | None:
        found: int | None = self.pick([at for at, held in self.leases.items() if held[0] & STATE == state], number)
        return found

    def in_state(self, state: int) -> list[int]:
        return [at for _, at, word in invariants.slots(self.table) if word & STATE == state]

    # --- workers ------------------------------------------------------------------------------------------------------

    @rule(row=rows, key=keys, connects=st.booleans(), high=st.booleans())
    def checkout(self, row: int, key: int, connects: bool, high: bool) -> None:
        if not self.live(row) or sum(waiter[0] == row for waiter in self.waiters.values()) >= 2:
            return
        table, w = self.world.table(row), self.world.words
        cell = self.cells[row].pop() if self.cells[row] else self.world.cell(row)
        wants = key if connects else ~key & 0xFFFF_FFFF_FFFF
        before = invariants.queue(table)
        plan, word = self.settle(
            row, lambda: moves.checkout(table, wants, connects, w[GATE], w[VER], cell, self.world.tick(), high)
        )
        if plan.method.startswith("enqueue"):
            self.waiters[cell] = (row, wants, connects)
            assert invariants.queue(table) == self.in_order(before, cell, high)
            return
        self.cells[row].append(cell)
        if word == FULL:
            assert w[WAITING_COUNT] == len(before) >= w[MAX_WAITING]
        if plan is not STOP:
            passes = high and w[RESERVE] and not any(is_high(w[at]) for at in before)
            full = w[MAX_PER_KEY] and not (w[RESERVE] or (set(self.world.entitled(own=wants)) & set(before)))
            assert not before or passes or full or (w[MAX_PER_KEY] and w[RESERVE]), "a newcomer overtook who waits"
            assert high or not w[RESERVE] or w[USED] - w[IDLE_COUNT] <= w[MAX] - w[RESERVE], "it had of the reserve"
            self.hold(plan.at, word, wants, connects)

    def in_order(self, before: list[int], cell: int, high: bool) -> list[int]:
        """The queue after a cell has joined it: those of high priority before the others."""
        if not high:
            return [*before, cell]
        w = self.world.words
        if w[RESERVE]:
            return [*filter(lambda at: is_high(w[at]), before), cell, *filter(lambda at: not is_high(w[at]), before)]
        passed = [
            at
            for at in before
            if w[at] & PART == PART
            and w[at + PASSED] - (w[at] >> NUMBER_SHIFT == w[cell] >> NUMBER_SHIFT) < MOST_PASSED
        ]
        where = before.index(passed[0]) if passed else len(before)
        return [*before[:where], cell, *before[where:]]

    def hold(self, at: int, word: int, key: int, connects: bool) -> None:
        assert at not in self.leases, "one slot leased twice"
        assert word == self.world.words[at]
        self.leases[at] = (word, key, connects)

    @rule(number=some, fails=st.booleans())
    def connect(self, number: int, fails: bool) -> None:
        at = self.lease(number, OPENING)
        if at is None:
            return
        word, key, connects = self.leases[at]
        table = self.world.table(holder_of(word))
        if fails:
            self.give_up(at)
        else:
            _, new = self.settle(table.row, lambda: moves.connected(table, at, word, self.world.tick()))
            self.leases[at] = (new & ~DOOMED, key, connects)

    def give_up(self, at: int) -> None:
        word, _, _ = self.leases.pop(at)
        table, w = self.world.table(holder_of(word)), self.world.words
        self.settle(table.row, lambda: moves.pass_on(table, at, w[at], w[GATE], 0, self.world.tick()))

    @rule(number=some, clean=st.booleans())
    def checkin(self, number: int, clean: bool) -> None:
        at = self.lease(number, LEASED)
        if at is None:
            return
        word, key, connects = self.leases[at]
        if not connects:
            self.give_up(at)
            return
        del self.leases[at]
        table, w = self.world.table(holder_of(word)), self.world.words
        first = next(iter(self.world.entitled(own=key)), 0) if w[MAX_PER_KEY] else w[HEAD]
        if clean:
            plan, _ = self.settle(table.row, lambda: moves.checkin(table, at, w[at], w[GATE], key, self.world.tick()))
            assert plan.method != "hand" or w[RESERVE] or (w[at] & STATE == GRANTED and w[first + GRANT] == at)
        else:
            self.settle(table.row, lambda: moves.close(table, at, w[at], 0, self.world.tick()))

    @rule(number=some)
    def find_it_ended(self, number: int) -> None:
        at = self.lease(number, LEASED)
        if at is None or not self.leases[at][2]:
            return
        word, key, connects = self.leases[at]
        table = self.world.table(holder_of(word))
        _, new = self.settle(table.row, lambda: moves.reopen(table, at, word, self.world.tick()))
        self.leases[at] = (new & ~DOOMED, key, connects)

    @rule(number=some)
    def take_grant(self, number: int) -> None:
        cell = self.pick([cell for cell in self.waiters if self.world.words[cell + GRANT]], number)
        if cell is None:
            return
        row, key, connects = self.waiters.pop(cell)
        table = self.world.table(row)
        plan, word = self.settle(row, lambda: moves.take(table, cell, key, connects, self.world.tick()))
        self.cells[row].append(cell)
        self.hold(plan.at, word, key, connects)

    @rule(number=some)
    def give_up_waiting(self, number: int) -> None:
        cell = self.pick([cell for cell in self.waiters if not self.world.words[cell + GRANT]], number)
        if cell is None:
            return
        row, _, _ = self.waiters.pop(cell)
        table = self.world.table(row)
        self.settle(row, lambda: moves.leave(table, cell, self.world.words[cell]))
        self.cells[row].append(cell)

    @rule(number=some)
    def stir(self, number: int) -> None:
        w = self.world.words
        cell = self.pick([cell for cell in self.waiters if w[cell] & 15 == CELL_STALLED], number)
        if cell is not None:
            row = self.waiters[cell][0]
            table = self.world.table(row)
            self.settle(row, lambda: moves.rejoin(table, cell, w[cell], w[GATE], w[VER]))
            assert w[cell] & 15 == CELL_WAITING

    # --- the arbiter --------------------------------------------------------------------------------------------------

    @rule(number=some)
    def end_closing(self, number: int) -> None:
        at = self.pick(self.in_state(CLOSING), number)
        if at is not None:
            w = self.world.words
            self.settle(ARBITER_ROW, lambda: moves.pass_on(self.table, at, w[at], w[GATE], 0, self.world.tick()))

    @rule()
    def serve(self) -> None:
        self.settle(ARBITER_ROW, lambda: moves.serve(self.table, self.world.gate, self.world.tick()))

    @rule(number=some)
    def revoke(self, number: int) -> None:
        at = self.pick(self.in_state(GRANTED), number)
        if at is not None:
            self.settle(ARBITER_ROW, lambda: moves.revoke(self.table, at, self.world.gate, self.world.tick()))

    @rule(number=some)
    def expire(self, number: int) -> None:
        at = self.pick(self.in_state(IDLE), number)
        if at is not None:
            self.world.close(at)

    @rule(number=some)
    def doom(self, number: int) -> None:
        at = self.pick(self.in_state(LEASED) + self.in_state(OPENING), number)
        if at is not None:
            word, since = self.world.words[at], self.world.words[at + 2]
            plan = Plan("swap", (at, word, word | DOOMED, 0, 0, since))
            assert moves.carry_out(self.table, plan)[0] == DONE

    @rule(maximum=st.integers(1, 6), flags=flags, reserve=st.integers(0, 5), per_key=per_keys)
    def limit(self, maximum: int, flags: int, reserve: int, per_key: int) -> None:
        self.world.limit(maximum, flags, reserve if reserve < maximum else 0, per_key)

    @rule(number=st.integers(1, 6))
    def limit_the_queue(self, number: int) -> None:
        self.world.words[MAX_WAITING] = number

    @rule(row=rows)
    def die_and_be_reaped(self, row: int) -> None:
        """Cells before slots, as nothing may be handed to a cell whose slots are dealt with already."""
        word, table = self.world.row_word(row), self.table
        if word & STATE == ROW_FREE:
            assert table.set_row(row, word, ROW_LIVE | (100 + row) << 4, row, self.world.tick()) == DONE
            return
        assert table.set_row(row, word, with_state(word, ROW_DEAD), 0, self.world.tick()) == DONE
        for cell in moves.cells_of(table, row):
            while self.world.words[cell]:
                self.settle(
                    ARBITER_ROW,
                    lambda: moves.reap_cell(table, cell, self.world.gate, self.world.tick()),  # noqa: B023
                )
        for at in moves.slots_of(table, row):
            self.settle(ARBITER_ROW, lambda: moves.reap_slot(table, at, self.world.tick()))  # noqa: B023
        assert table.set_row(row, with_state(word, ROW_DEAD), ROW_FREE, 0, self.world.tick()) == DONE
        self.cells[row] = []
        self.waiters = {cell: waiter for cell, waiter in self.waiters.items() if waiter[0] != row}
        self.leases = {at: held for at, held in self.leases.items() if holder_of(held[0]) != row}

    @rule(number=some, k=st.integers(1, 14))
    @precondition(lambda self: not self.world.gate & GATE_FLAGS & ~RESERVING)
    def be_killed_in_a_checkout(self, number: int, k: int) -> None:
        """A fourth process begins a checkout, dies at its k-th store, and whoever comes next repairs."""
        row, w = (ONE, TWO, THREE)[number % 3], self.world.words
        if not self.live(row):
            return
        before = sum(len(self.in_state(state)) for state in (LEASED, OPENING))
        breaker = Breaker(k)
        broken = breaking(self.world, row, breaker.store)
        plan = moves.checkout(self.world.table(row), A, True, w[GATE], w[VER], 0, self.world.tick())
        if plan.method not in ("take_idle", "take_free", "take_idle_counted"):
            return
        arguments: list[Any] = list(plan.arguments)
        arguments.insert(moves.LEASE_AT[plan.method], BreakingLease(breaker.store))
        try:
            getattr(broken, plan.method)(*arguments)
        except Broken:
            self.world.mutex.die()
            assert self.table.repair() == BUSY
            assert self.table.repair() == DONE
        taken = sum(len(self.in_state(state)) for state in (LEASED, OPENING)) - before
        assert taken in (0, 1)
        if taken:  # the arbiter closes what the dead had
            self.world.close(plan.at)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def the_invariants_hold(self) -> None:
        invariants.check(self.table)

    @invariant()
    def every_lease_is_known_to_one_holder(self) -> None:
        wrong = list(invariants.leases_are_single(self.table, [(at, held[0]) for at, held in self.leases.items()]))
        assert not wrong, wrong

    @invariant()
    def connections_opened_and_closed_add_up(self) -> None:
        wrong = list(invariants.connections_add_up(self.table))
        assert not wrong, wrong

    @invariant()
    def the_cap_holds_unless_it_was_lowered(self) -> None:
        w = self.world.words
        assert w[USED] <= w[MAX] or w[GATE] & OVER

    def teardown(self) -> None:
        """Everything ends: then everything is free."""
        self.world.limit(3)
        for at in self.leases:
            self.world.close(at)
        self.leases = {}
        for row in (ONE, TWO, THREE):
            if self.live(row):
                self.die_and_be_reaped(row)
        for at in self.in_state(IDLE):
            self.world.close(at)
        while closing := self.in_state(CLOSING):
            self.world.free(closing[0])
        self.the_invariants_hold()
        w = self.world.words
        assert (w[USED], w[HEAD], w[GATE] & GATE_FLAGS) == (0, 0, 0)


def test_any_sequence_of_transitions_keeps_every_invariant() -> None:
    hypothesis.stateful.run_state_machine_as_test(
        TableMachine,
        settings=hypothesis.settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            database=None,  # no files of ours in the tree; what fails is printed
            print_blob=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
