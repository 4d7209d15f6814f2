"""Damaged words: they are noticed, and after a repair every invariant holds again, whatever was written into them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sharedpool import invariants
from sharedpool.layout import (
    CELL_HIGH,
    FOLD,
    FREE_CELL,
    FREE_SLOT,
    GATE,
    GRANT,
    HEAD,
    HIGH,
    MASK64,
    MAX,
    RESERVE,
    TAIL,
    TICKET,
    USED,
    VER,
    WAITING_COUNT,
)
from sharedpool.sanity import damage, lasting_damage
from sharedpool.table import MANY_MISSES, STALE
from tests.core.tables import ONE, THREE, TWO, A, B, World

#: What the options say is for the arbiter to set anew.
OPTIONS = {MAX, RESERVE}


def busy() -> World:
    """Leased, idle, granted, closing and free slots; waiting, owned and free cells."""
    world = World(maximum=4, slots=8, cells=8)
    world.leased(ONE, A)
    world.idle(TWO, B)
    world.leased(TWO, A)
    world.leased(THREE, B)
    world.waiting(ONE, A)
    world.waiting(TWO, B)
    return world


def test_a_sound_table_shows_no_damage() -> None:
    world = busy()
    assert damage(world.words, world.marks, world.geometry) == ""


class Hasty:
    """The marks of a table in which, at every second look, a handoff is being carried out."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.looks = 0

    def __getitem__(self, places: slice) -> memoryview[int]:
        self.looks += 1
        w = self.world.words
        w[WAITING_COUNT] = w[WAITING_COUNT] + (1 if self.looks % 2 else -1)
        return self.world.marks[places]


def test_what_is_found_in_the_midst_of_a_handoff_is_no_damage() -> None:
    world = busy()
    marks: Any = Hasty(world)
    assert "counted" in damage(world.words, marks, world.geometry)
    assert damage(world.words, marks, world.geometry) == ""
    assert lasting_damage(world.words, marks, world.geometry) == ""
    assert marks.looks == 4


def test_damage_that_stays_is_found_by_many_looks() -> None:
    world = busy()
    world.words[WAITING_COUNT] += 1
    assert "counted" in lasting_damage(world.words, world.marks, world.geometry)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (HIGH, 1 << 40), (HIGH, 3), (CELL_HIGH, 1 << 40), (USED, 0), (USED, 99), (HEAD, 7), (HEAD, 0), (TAIL, 0),
        (WAITING_COUNT, 0), (WAITING_COUNT, 1 << 63), (FREE_SLOT, 1), (FREE_CELL, MASK64), (VER, MASK64),
        (GATE, MASK64), (TICKET, MASK64),
    ],
)  # fmt: skip
def test_a_damaged_header_word_is_noticed_and_mended(at: int, value: int) -> None:
    world = busy()
    world.words[at] = value
    assert damage(world.words, world.marks, world.geometry)
    world.table(ONE).suspect()
    invariants.check(world.table(ONE))
    assert damage(world.words, world.marks, world.geometry) == ""


def test_after_any_damage_a_repair_leaves_a_sound_table() -> None:
    for seed in range(1000):
        damage_and_mend(seed)


def damage_and_mend(seed: int) -> None:
    rng = random.Random(seed)
    world = busy()
    w = world.words
    for _ in range(rng.choice([1, 3, 30])):
        at = rng.randrange(1, world.geometry.words)
        if at not in OPTIONS:
            w[at] = rng.choice(
                [
                    rng.getrandbits(64),
                    rng.getrandbits(8),
                    MASK64,
                    0,
                    w[at] ^ 1 << rng.randrange(64),
                    w[rng.randrange(64)],
                ]
            )
    for index in range(rng.choice([0, 2])):
        world.marks[index] = rng.getrandbits(32)
    world.table(ONE).suspect()
    assert damage(w, world.marks, world.geometry) == "", f"seed {seed}"
    assert invariants.violations(world.table(ONE)) == [], f"seed {seed}"


def test_who_misses_very_often_looks_at_the_table_and_mends_it() -> None:
    world = busy()
    table = world.table(ONE)
    cell = world.words[HEAD]
    world.words[cell + GRANT] = table.slot_at(7)  # nothing was granted there
    for _ in range(MANY_MISSES):
        assert table.missed(0) == STALE
    assert world.words[cell + GRANT] == 0
    invariants.check(table)


def test_a_place_of_a_fold_beyond_the_rows_is_forgotten() -> None:
    world = busy()
    world.words[FOLD] = 1 << 32 | world.geometry.words + 5
    world.table(ONE).suspect()
    assert world.words[FOLD] == 0
