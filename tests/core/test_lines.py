"""Counting by key: who gets a line, and that nothing is lost or doubled when lines end, become scarce or are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sharedpool import counting, view
from sharedpool.layout import (
    ARBITER_ROW,
    HEADER,
    LINE,
    LINE_HIGH,
    LINE_USED,
    ROW,
    ROW_CLOSES,
    ROW_COUNTERS,
    TOTALS_ROW,
)
from sharedpool.lines import CLOSES, COUNTS, Lines
from sharedpool.stats import OTHER_KEYS, KeyStats
from sharedpool.table import Table

from .tables import ONE, THREE, TWO, A, B, Breaker, BreakingWords, Broken, C, World


def count(world: World, place: int, name: str, number: int = 1) -> None:
    world.words[place + {**COUNTS, **CLOSES}[name]] += number


def reuses(world: World) -> dict[int, int]:
    """By key, where there are any; 0: what has no line."""
    counts = view.counts_by_key(world.words, world.geometry)
    at = COUNTS["reuses"] - ROW_COUNTERS
    return {key: numbers[at] for key, numbers in counts.items() if numbers[at]}


def test_each_process_has_one_line_for_a_key_and_they_are_added_up() -> None:
    world = World(lines=16)
    one, two = Lines(world.table(ONE)), Lines(world.table(TWO))
    places = [one.place(A), two.place(A), one.place(B)]
    assert len(set(places)) == 3
    assert places == [one.place(A), two.place(A), one.place(B)]
    for place, number in zip(places, (1, 10, 100), strict=True):
        count(world, place, "reuses", number)
    assert reuses(world) == {A: 11, B: 100}
    assert view.stats(world.words, world.geometry, "x", 0).reuses == 111
    assert view.row_counts(world.words, world.geometry, ONE)[0]["reuses"] == 101


def test_a_pool_without_lines_counts_in_its_rows() -> None:
    world = World(lines=0)
    for row, there in ((ONE, ONE), (ARBITER_ROW, TOTALS_ROW)):
        place = Lines(world.table(row)).place(A)
        assert place == HEADER + ROW * there
        count(world, place, "reuses")
    assert reuses(world) == {0: 2}


def test_a_process_gets_a_quarter_of_the_lines_and_the_last_ones_are_the_arbiters() -> None:
    world = World(lines=16, workers=4)
    for row in range(ONE, ONE + 4):
        lines = Lines(world.table(row))
        for key in range(1, 20):
            count(world, lines.place(key), "reuses")
    found = view.lines(world.words, world.geometry)
    assert [line.row for line in found] == [row for row in range(ONE, ONE + 4) for _ in range(4)][:14]
    arbiter = Lines(world.table(ARBITER_ROW))
    for key in range(101, 110):
        count(world, arbiter.place(key), "reuses")
    assert world.words[LINE_HIGH] == 16
    assert sum(reuses(world).values()) == 4 * 19 + 9 == view.stats(world.words, world.geometry, "x", 0).reuses
    assert reuses(world)[0] == 4 * 19 + 9 - 16
    assert reuses(world)[101] == 1


def test_a_line_that_somebody_else_takes_first_is_looked_for_again() -> None:
    world = World(lines=8)
    one, two = Lines(world.table(ONE)), Lines(world.table(TWO))

    class Slow(Lines):
        def _free(self) -> int:
            at = super()._free()
            two.place(A)  # in the very moment between looking and claiming
            return at

    slow = Slow(world.table(ONE))
    assert slow.place(A) != two.place(A)
    assert slow.place(A) == world.geometry.line_base + LINE
    assert one.place(B) not in (slow.place(A), two.place(A))


def test_while_the_mutex_is_busy_a_key_is_counted_in_the_row_and_gets_its_line_later() -> None:
    world = World(lines=8)
    lines = Lines(world.table(ONE))
    world.mutex.held = True
    assert lines.place(A) == HEADER + ROW * ONE
    world.mutex.held = False
    assert lines.place(A) == world.geometry.line_base


def some_counts(world: World) -> None:
    """Two processes and the arbiter have counted, of two keys and beyond the room."""
    for row, key, number in ((ONE, A, 1), (ONE, B, 2), (TWO, A, 4), (ARBITER_ROW, A, 8)):
        place = Lines(world.table(row)).place(key)
        count(world, place, "reuses", number)
        count(world, place, "expired", 100 * number)
    count(world, HEADER + ROW * ONE, "reuses", 16)


def test_the_lines_of_who_has_gone_become_the_arbiters() -> None:
    world = World(lines=16)
    some_counts(world)
    arbiter = Lines(world.table(ARBITER_ROW))
    arbiter.fold(ONE)
    assert reuses(world) == {A: 13, B: 2, 0: 16}
    rows = sorted((line.key, line.row) for line in view.lines(world.words, world.geometry))
    assert rows == [(A, TOTALS_ROW), (A, TWO), (B, TOTALS_ROW)]
    arbiter.fold(TWO)
    assert reuses(world) == {A: 13, B: 2, 0: 16}
    places = {line.key: line.at for line in view.lines(world.words, world.geometry)}
    assert places == {A: arbiter.place(A), B: arbiter.place(B)}
    heir = Lines(world.table(ARBITER_ROW))
    assert (heir.place(A), heir.place(B)) == (places[A], places[B])


@pytest.mark.parametrize("step", ["fold", "make_room"])
def test_broken_off_at_any_store_and_done_again_by_an_heir_nothing_is_lost_or_doubled(step: str) -> None:
    def arbiter(world: World, store: Callable[[], None] | None = None) -> Lines:
        words: Any = world.words if store is None else BreakingWords(world.words, store)
        table = Table(words, world.marks, world.mutex, world.geometry, ARBITER_ROW, world.find)
        counting.finish(words)
        return Lines(table)

    def work(lines: Lines) -> None:
        lines.fold(ONE)
        if step == "make_room":
            lines.fold(TWO)
            lines.make_room()

    for k in range(1, 3000, 1 if step == "fold" else 7):  # a count is moved by six stores
        world = World(lines=4)
        for row, key, number in ((ARBITER_ROW, A, 1), (ONE, A, 2), (TWO, B, 4), (ARBITER_ROW, C, 8)):
            place = Lines(world.table(row)).place(key)
            for offset in range(ROW_COUNTERS, LINE):
                world.words[place + offset] = number * (1000 + offset)
        before = view.stats(world.words, world.geometry, "x", 0)
        try:
            work(arbiter(world, Breaker(k).store))
        except Broken:
            assert view.stats(world.words, world.geometry, "x", 0) == before, f"store {k}, and nobody goes on"
            counting.finish(world.words)
            assert view.stats(world.words, world.geometry, "x", 0) == before, f"store {k}"
            work(arbiter(world))
        else:
            assert k > LINE - ROW_COUNTERS
            left = [line.key for line in view.lines(world.words, world.geometry)]
            assert left == ([A, B, C] if step == "fold" else [])
            return
        assert view.stats(world.words, world.geometry, "x", 0) == before, f"store {k}"
    raise AssertionError("it does not end")


def test_where_lines_get_scarce_keys_of_the_dead_without_connections_are_no_longer_counted_apart() -> None:
    world = World(lines=4)
    world.idle(TWO, B)
    arbiter = Lines(world.table(ARBITER_ROW))
    for key, number in ((A, 1), (B, 2), (C, 4)):
        count(world, arbiter.place(key), "reuses", number)
    count(world, Lines(world.table(THREE)).place(C), "reuses", 8)
    arbiter.make_room()
    assert reuses(world) == {0: 1 + 1, B: 2, C: 12}  # one is the table's helpers'
    assert arbiter.place(A) in range(world.geometry.line_base, world.geometry.words)


def test_while_there_is_room_no_key_is_forgotten() -> None:
    world = World(lines=16)
    arbiter = Lines(world.table(ARBITER_ROW))
    count(world, arbiter.place(A), "reuses")
    arbiter.make_room()
    assert reuses(world) == {A: 1}


def test_why_a_connection_was_closed_is_known_wherever_it_was_counted() -> None:
    world = World(lines=8, maximum=3)
    table = world.table(ONE)
    for lines in (0, 1):
        at = world.leased(ONE)
        place = Lines(table).place(A) if lines else table.row_at
        assert table.close(at, world.words[at], world.words[at + 2], 0, place + CLOSES["unclean"], 9)
        assert view.reason(world.words, world.geometry, at) == "unclean"
        assert (world.words[at + 6] >= world.geometry.line_base) == bool(lines)


def test_the_numbers_of_a_key_are_put_together() -> None:
    world = World(lines=8)
    world.idle(ONE, B)
    place = Lines(world.table(ONE)).place(A)
    for name, number in (("reuses", 3), ("opens", 2), ("opened", 2), ("replaced", 1), ("ended", 1)):
        count(world, place, name, number)
    found = view.keys(world.words, world.geometry)
    assert set(found) == {A, B, 0}, "what the table's helpers have counted lies in rows"
    assert (found[A].checkouts, found[A].opened, found[A].closed, found[A].closes["ended"]) == (5, 2, 1, 1)
    assert (found[B].idle, found[B].connections, found[B].opened, found[0].opened) == (1, 1, 0, 1)
    assert OTHER_KEYS not in KeyStats.__dataclass_fields__


def test_a_lines_counters_lie_where_a_rows_do() -> None:
    assert min(COUNTS.values()) == ROW_COUNTERS
    assert min(CLOSES.values()) == ROW_CLOSES
    assert max(CLOSES.values()) < LINE <= ROW
    assert LINE_USED == 1
