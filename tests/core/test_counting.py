"""Counts: where they lie, that threads lose none, and that a row that ends loses and doubles none."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sharedpool import counting, invariants, stats, view
from sharedpool.counting import Durations, bucket_of, fold
from sharedpool.layout import (
    HEADER,
    LINE,
    PAUSED,
    ROW,
    ROW_ARBITERS,
    ROW_CLOSES,
    ROW_CONNECT_SECONDS,
    ROW_COUNTERS,
    ROW_EVICTED,
    ROW_LEASE_SECONDS,
    ROW_WAIT_SECONDS,
    TOTALS_ROW,
)
from sharedpool.stats import ARBITER_COUNTERS, BOUNDS, COUNTERS, REASONS, Histogram

from .tables import ONE, THREE, TWO, A, B, Breaker, BreakingWords, Broken, World
from .test_table_machine import TableMachine


def test_every_count_has_its_place_in_a_row() -> None:
    assert ROW_COUNTERS + len(COUNTERS) <= ROW_ARBITERS
    assert ROW_ARBITERS + len(ARBITER_COUNTERS) <= ROW_CLOSES
    assert ROW_CLOSES + len(REASONS) <= min(ROW_WAIT_SECONDS, LINE)
    starts = (ROW_WAIT_SECONDS, ROW_CONNECT_SECONDS, ROW_LEASE_SECONDS, ROW)
    assert all(there - here == len(BOUNDS) + 2 for here, there in itertools.pairwise(starts))
    assert ROW_EVICTED == ROW_CLOSES + REASONS.index("evicted")
    assert len(set(REASONS)) == len(REASONS)


@pytest.mark.parametrize(
    ("nanoseconds", "bucket"), [(0, 0), (500_000, 0), (500_001, 1), (1_000_000, 1), (10**10, 13), (10**10 + 1, 14)]
)
def test_a_duration_is_in_the_first_bucket_whose_bound_is_not_below_it(nanoseconds: int, bucket: int) -> None:
    assert bucket_of(nanoseconds) == bucket


def test_durations_are_counted_and_summed() -> None:
    world = World()
    seconds = Durations(world.words, HEADER + ROW * ONE + ROW_LEASE_SECONDS)
    for took in (1_000_000, 2_000_000, -5):
        seconds.add(took)
    found = view.stats(world.words, world.geometry, "x", 0).lease_seconds
    assert (found.counts[:4], found.sum, found.count) == ((1, 1, 1, 0), 0.003, 3)
    assert view.stats(world.words, world.geometry, "x", 0).wait_seconds == Histogram()


def test_threads_that_count_at_once_lose_none() -> None:
    world = World()
    seconds = Durations(world.words, HEADER + ROW * ONE + ROW_WAIT_SECONDS)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [seconds.add(7) for _ in range(20_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    found = view.stats(world.words, world.geometry, "x", 0).wait_seconds
    assert (found.count, round(found.sum * 1e9)) == (80_000, 560_000)


def counted(row: int) -> World:
    """A world in which a row, and the totals, have counted something at every place."""
    world = World()
    for offset in range(ROW_COUNTERS, ROW):
        world.words[HEADER + ROW * TOTALS_ROW + offset] = 1000 + offset
        world.words[HEADER + ROW * row + offset] = offset
    return world


def test_a_fold_broken_off_anywhere_is_finished_by_the_next_and_loses_and_doubles_nothing() -> None:
    before = view.stats(counted(TWO).words, counted(TWO).geometry, "x", 0)
    for k in range(1, 1000):
        world = counted(TWO)
        words: Any = BreakingWords(world.words, Breaker(k).store)
        try:
            fold(words, TWO)
        except Broken:
            assert view.stats(world.words, world.geometry, "x", 0) == before, f"store {k}, and nobody goes on"
            counting.finish(world.words)
            assert view.stats(world.words, world.geometry, "x", 0) == before, f"store {k}"
            fold(world.words, TWO)
        totals = [world.words[HEADER + ROW * TOTALS_ROW + offset] for offset in range(ROW_COUNTERS, ROW)]
        assert totals == [1000 + 2 * offset for offset in range(ROW_COUNTERS, ROW)], f"store {k}"
        assert not any(world.words[HEADER + ROW * TWO + offset] for offset in range(ROW_COUNTERS, ROW))
        assert view.stats(world.words, world.geometry, "x", 0) == before
        if k > 5 * (ROW - ROW_COUNTERS):
            return
    raise AssertionError("the fold does not end")


def test_closes_are_counted_over_all_rows_and_some_are_numbers_of_their_own() -> None:
    world = World()
    for row, name in ((ONE, "expired"), (TWO, "expired"), (TWO, "unclean"), (TOTALS_ROW, "evicted")):
        world.words[HEADER + ROW * row + ROW_CLOSES + REASONS.index(name)] += 2
    found = view.stats(world.words, world.geometry, "x", 0)
    assert {name: number for name, number in found.closes.items() if number} == {
        "expired": 4, "unclean": 2, "evicted": 2
    }  # fmt: skip
    assert (found.expired, found.discards, found.evictions) == (4, 2, 2)


def test_what_holders_closed_to_the_end_counts_as_closed() -> None:
    found = stats.from_counts("x", 1, {}, {"closed": 3, "replaced": 2}, 0, 0)
    assert (found.closed, found.replaced) == (5, 2)


def some_step(machine: TableMachine, chance: random.Random) -> None:
    """Whatever a worker, a remote or the arbiter may do; mostly checkouts and checkins."""
    number, row, key = chance.randrange(8), chance.choice([ONE, TWO, THREE]), chance.choice([A, B])
    steps: list[Callable[[], None]] = [
        lambda: machine.checkout(row=row, key=key, connects=chance.random() < 0.9, high=chance.random() < 0.3),
        lambda: machine.connect(number=number, fails=chance.random() < 0.2),
        lambda: machine.checkin(number=number, clean=chance.random() < 0.8),
        lambda: machine.take_grant(number=number),
        lambda: machine.end_closing(number=number),
        lambda: machine.find_it_ended(number=number),
        machine.serve,
        lambda: machine.revoke(number=number),
        lambda: machine.stir(number=number),
        lambda: machine.expire(number=number),
        lambda: machine.doom(number=number),
        lambda: machine.give_up_waiting(number=number),
        lambda: machine.limit(
            maximum=chance.randint(1, 6),
            flags=chance.choice([0, 0, 0, PAUSED]),
            reserve=chance.choice([0, 0, 0, 1, 2]),
            per_key=chance.choice([0, 0, 1, 2]),
        ),
        lambda: machine.die_and_be_reaped(row=row),
    ]
    chance.choices(steps, weights=[8, 8, 8, 6, 4, 2, 2, 1, 2, 1, 1, 1, 1, 1])[0]()


def test_connections_opened_and_closed_add_up_over_long_runs() -> None:
    reached: set[str] = set()
    for seed in range(5):
        chance, machine = random.Random(seed), TableMachine()
        for step in range(600):
            some_step(machine, chance)
            wrong = list(invariants.connections_add_up(machine.table))
            assert not wrong, f"seed {seed}, step {step}: {wrong}"
        for row in (ONE, TWO, THREE):
            reached |= {
                name
                for name, count in view.row_counts(machine.world.words, machine.world.geometry, row)[1].items()
                if count
            }
        machine.teardown()
    assert reached >= {"evicted", "discarded", "ended"}, "the runs have to get there"
