"""Reading a table: counts, the longest lease, and what is to be closed for its permit."""

from __future__ import annotations

import dataclasses

import pytest

from sharedpool import sticky, view
from sharedpool.layout import (
    ARBITER_ROW,
    BARE,
    CELL_KEY,
    CELL_SINCE,
    CONNECT_TIME,
    HAND,
    HEADER,
    KEY,
    ROW,
    ROW_ARBITERS,
    ROW_CLOSES,
    ROW_COUNTERS,
    SINCE,
    STAYS,
    STEAL_AFTER,
    TOTALS_ROW,
)
from sharedpool.stats import ARBITER_COUNTERS, COUNTERS

from .tables import ONE, THREE, TWO, A, B, C, World


def test_the_numbers_are_counted_over_all_slots_and_rows() -> None:
    world = World(maximum=7, slots=8)
    idle, _, _, granted, closing, freed = [world.leased(row) for row in (ONE, ONE, TWO, TWO, TWO, THREE)]
    world.opening(THREE)
    world.give_back(idle)
    world.freed(freed)
    world.close(closing)
    cell = world.waiting(ONE)
    world.grant(granted, cell)
    world.waiting(TWO)
    stats = view.stats(world.words, world.geometry, "x", 0)
    assert (stats.in_use, stats.idle, stats.opening, stats.granted, stats.closing) == (2, 1, 1, 1, 1)
    assert (stats.name, stats.max_connections, stats.waiting, stats.processes) == ("x", 7, 1, 3)
    assert stats.used == 6


def test_counters_are_those_of_the_living_the_dead_and_the_arbiter() -> None:
    world = World()
    w, last = world.words, len(COUNTERS) - 1
    for row, number in ((TOTALS_ROW, 1000), (ONE, 100), (TWO, 10)):
        w[HEADER + ROW * row + ROW_COUNTERS + last] = number
    w[HEADER + ROW * TOTALS_ROW + ROW_ARBITERS] = 3
    w[HEADER + ROW * ARBITER_ROW + ROW_COUNTERS] = 4  # there one of layout 2 counted
    stats = view.stats(w, world.geometry, "x", 0)
    assert getattr(stats, COUNTERS[last]) == 1110
    assert getattr(stats, ARBITER_COUNTERS[0]) == 7
    assert view.row_counts(w, world.geometry, ONE)[0][COUNTERS[last]] == 100


def test_counters_fit_into_a_row() -> None:
    assert ROW_COUNTERS + len(COUNTERS) <= ROW_ARBITERS
    assert ROW_ARBITERS + len(ARBITER_COUNTERS) <= ROW_CLOSES


def test_leases_are_listed_the_longest_first_with_their_processes() -> None:
    world = World(maximum=4)
    places = [world.leased(TWO), world.leased(ONE), world.leased(THREE)]
    world.idle(ONE, B)
    world.words[places[2] + SINCE] = 1
    found = view.leases(world.words, world.geometry)
    assert [(lease.index, lease.row, lease.pid) for lease in found] == [
        (2, THREE, 100 + THREE), (0, TWO, 100 + TWO), (1, ONE, 100 + ONE)
    ]  # fmt: skip
    assert found[0].since == 1


def test_idle_connections_are_counted_by_key() -> None:
    world = World(maximum=4)
    for key in (A, B, A):
        world.leased(ONE, key)
    for index in range(3):
        world.give_back(world.table(ONE).slot_at(index))
    counts = [view.count_idle(world.words, world.geometry, key) for key in (A, B, C)]
    assert counts == [2, 1, 0]


def test_the_victim_is_the_one_longest_idle_of_another_key() -> None:
    world = World(maximum=4)
    places = [world.leased(ONE, key) for key in (A, B, B, C)]
    for at in (places[1], places[0], places[2]):
        world.give_back(at)
    assert view.victim(world.words, world.marks, world.geometry, C) == places[1]
    assert view.victim(world.words, world.marks, world.geometry, B) == places[0]


def test_there_is_no_victim_where_nothing_is_idle_or_all_is_of_the_spared_key() -> None:
    world = World()
    assert view.victim(world.words, world.marks, world.geometry, A) == 0
    world.leased(TWO)
    assert view.victim(world.words, world.marks, world.geometry, A) == 0
    world.idle(ONE, B)
    assert view.victim(world.words, world.marks, world.geometry, B) == 0


@pytest.mark.parametrize("hand", [0, 16, 30, 39, 999])
def test_the_only_victim_is_found_wherever_the_hand_points(hand: int) -> None:
    world = World(maximum=40, slots=40)
    places = [world.leased(ONE) for _ in range(40)]
    world.give_back(places[33])
    world.words[HAND] = hand
    assert view.victim(world.words, world.marks, world.geometry, B) == places[33]


def test_the_hand_goes_round_so_that_not_always_the_same_are_looked_at() -> None:
    world = World(maximum=40, slots=40)
    for at in [world.leased(ONE) for _ in range(40)]:
        world.give_back(at)
    found = {view.victim(world.words, world.marks, world.geometry, B) for _ in range(3)}
    assert len(found) == 3
    assert all(world.words[at + KEY] == A for at in found)


@pytest.mark.parametrize(
    ("given", "measured", "stays", "expected"),
    [
        (5, 10**12, STAYS, 5),
        (0, 0, STAYS, 50_000_000),
        (0, 4_000_000, STAYS, 80_000_000),
        (0, 10**10, STAYS, 500_000_000),
        (5, 10**12, 0, 5),
        (0, 10**10, 0, 50_000_000),
    ],
)
def test_the_longest_wait_before_others_get_a_connection(given: int, measured: int, stays: int, expected: int) -> None:
    world = World()
    world.words[STEAL_AFTER], world.words[CONNECT_TIME] = given, measured
    assert sticky.steal_after(world.words, stays) == expected
    assert sticky.unused_after(world.words, stays) == max(1_000_000, expected // 10)


def test_the_longest_unused_connection_of_a_key_that_may_move() -> None:
    world = World(maximum=6, slots=8)
    world.idle(ONE, B)
    staying, younger, older = world.idle(ONE), world.idle(TWO), world.idle(ONE)
    world.words[staying] |= STAYS
    for at, since in ((staying, 1), (younger, 9), (older, 5)):
        world.words[at + SINCE] = since
    find = lambda key: view.idle_that_moves(world.words, world.marks, world.geometry, key)  # noqa: E731
    assert find(A) == (older, world.words[older])
    assert find(C) == (0, 0)


def test_keys_count_slots_by_state_and_who_waits() -> None:
    world = World(maximum=6, slots=8)
    world.leased(ONE)
    world.idle(TWO, B)
    world.opening(THREE)
    closing = world.leased(TWO)
    world.close(closing)
    world.waiting(ONE)
    found = view.keys(world.words, world.geometry)
    assert {state: number for state, number in dataclasses.asdict(found[A]).items() if number} == {
        "in_use": 1, "opening": 1, "closing": 1, "waiting": 1, "connections": 2,
    }  # fmt: skip
    assert {state: number for state, number in dataclasses.asdict(found[B]).items() if number} == {
        "idle": 1, "connections": 1,
    }  # fmt: skip
    assert set(found) == {A, B, 0}


def test_a_grant_counts_for_the_key_that_its_waiter_wants() -> None:
    world = World(maximum=2, slots=2)
    at = world.leased(ONE)
    cell = world.waiting(TWO)
    world.grant(at, cell)
    world.words[at] |= BARE
    wanted = world.words[cell + CELL_KEY]
    world.words[at + KEY] = C  # what a bare permit's slot was used for before says nothing
    assert view.keys(world.words, world.geometry)[wanted].granted == 1
    assert C not in view.keys(world.words, world.geometry)


def test_the_longest_wait_is_that_of_who_came_first() -> None:
    world = World(maximum=1, slots=1)
    world.leased(ONE)
    assert view.stats(world.words, world.geometry, "x", 10**12).longest_wait == 0
    cell = world.waiting(TWO)
    world.waiting(THREE)
    since = world.words[cell + CELL_SINCE]
    assert view.stats(world.words, world.geometry, "x", since + 5).longest_wait == 5e-9
