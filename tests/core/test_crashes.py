"""A section broken off at every store, k = 1, 2, 3 ...: after the repair all is well, nothing lost, nothing doubled."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sharedpool import invariants
from sharedpool.errors import LeaseError
from sharedpool.layout import (
    ARBITER_ROW,
    BARE,
    DIRTY,
    FREE,
    GRANTED,
    HEADER,
    KEY,
    LEASED,
    MAX,
    MAX_PER_KEY,
    RESERVE,
    ROW,
    STATE,
    tag_of,
)
from sharedpool.lines import Lines
from sharedpool.returns import Returns
from sharedpool.table import BUSY, DONE, Table

from . import operations
from .operations import Operation, Ready
from .tables import ONE, THREE, TWO, A, Breaker, BreakingLease, Broken, World, breaking

MOST = 40  # stores in the longest section
FOUR = THREE + 1


def broken_off(operation: Operation, **pool: int) -> Iterator[tuple[World, Ready, Any, int]]:
    """The world after the transition was broken off at its 1st, 2nd, 3rd ... store, with the lease, and k."""
    for k in range(1, MOST):
        world = World(**pool)
        ready = operation(world)
        breaker = Breaker(k)
        lease = BreakingLease(breaker.store, ready.expected)
        try:
            answer = ready.call(breaking(world, ready.row, breaker.store), lease)
        except Broken:
            yield world, ready, lease, k
        else:
            assert answer == DONE
            assert k > 3, "the section has no stores"
            return
    raise AssertionError(f"{operation.__name__} does not end")


def finished(operation: Operation, **pool: int) -> World:
    """The world after the transition was done."""
    world = World(**pool)
    operations.run(world, operation(world))
    return world


def committed(world: World) -> dict[int, int]:
    """The words that everything else is derived from, by place."""
    table, geometry = world.table(ONE), world.geometry
    places = [MAX, RESERVE, MAX_PER_KEY, *(HEADER + ROW * row for row in range(geometry.rows))]
    places += map(table.slot_at, range(geometry.slots))
    places += map(table.cell_at, range(geometry.cells))
    return {place: world.words[place] for place in places}


def connection_key(world: World, at: int) -> int:
    """The key of the connection in a slot; 0 where there is none."""
    word = world.words[at]
    none = word & STATE == FREE or (word & STATE == GRANTED and word & BARE)
    return 0 if none else int(world.words[at + KEY])


@operations.each
def test_a_transition_broken_off_anywhere_is_done_or_not_begun(operation: Operation) -> None:
    start = World()
    ready = operation(start)
    before, after = committed(start), committed(done := finished(operation))
    for world, _, lease, k in broken_off(operation):
        where = f"store {k}"
        assert not world.mutex.held, where
        assert world.words[DIRTY] == (ready.row if k > 1 else 0), where
        # Whoever comes next repairs, or hears that the holder died and repairs.
        if k % 2:
            world.mutex.die()
            assert world.table(THREE).repair() == BUSY, "the death is told, the mutex made usable"
            assert world.table(THREE).repair() == DONE
        else:
            world.table(THREE).missed(0)
        assert not world.mutex.held, where
        invariants.check(world.table(ONE))
        for place, word in committed(world).items():
            assert word in (before[place], after[place]), f"{where}: word {place} is {word:#x}"
        for at in map(world.table(ONE).slot_at, range(world.geometry.slots)):
            right = start if world.words[at] == before[at] else done
            assert connection_key(world, at) == connection_key(right, at), where
        if ready.takes:
            at = ready.slots[0]
            if world.words[at] == after[at]:
                assert lease.word == after[at], f"{where}: the slot is taken and its taker does not know"
            else:
                assert lease.word in (ready.expected, after[at]), where


def test_what_a_broken_section_had_not_committed_can_be_done_after_the_repair() -> None:
    for operation in (operations.take_own_idle, operations.put_idle, operations.close_an_idle_one):
        for world, ready, _, k in broken_off(operation):
            (at,) = ready.slots
            seen = world.words[at]
            world.table(THREE).missed(0)
            if seen == committed(finished(operation))[at]:
                continue
            counter = world.table(ARBITER_ROW).counter(0)
            again = world.table(ARBITER_ROW).close(at, seen, world.words[at + 2], 0, counter, world.tick())
            assert again == DONE, f"{operation.__name__}, store {k}"


def test_a_repair_broken_off_anywhere_is_done_by_the_next() -> None:
    def half_done() -> World:
        world = World(maximum=4)
        world.idle(ONE)
        world.freed(world.leased(ONE), world.leased(TWO))
        world.granted(ONE)
        world.waiting(TWO)
        world.waiting(THREE)
        for place in range(3, 13):
            if place not in (MAX, 8):
                world.words[place] = 0
        world.words[DIRTY] = TWO
        return world

    repaired = half_done()
    repaired.table(ONE).repair()
    for k in range(1, 200):
        world = half_done()
        try:
            breaking(world, ONE, Breaker(k).store).repair()
        except Broken:
            assert world.words[DIRTY] == TWO
            assert world.table(THREE).repair() == DONE
            invariants.check(world.table(ONE))
            for place, word in committed(repaired).items():
                assert world.words[place] == word
        else:
            assert k > 20
            return
    raise AssertionError("the repair does not end")


# --- whoever meets a section left half done while giving back ---------------------------------------------------------


class Spinning(AssertionError):
    """Thousands of words were read, and nothing happened."""


class ReadWords:
    """Words that may be read a thousand times."""

    def __init__(self, under: Any) -> None:
        self._under = under
        self.reads = 0

    def __getitem__(self, place: Any) -> Any:
        self.reads += 1
        if self.reads > 1000:
            raise Spinning
        return self._under[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        self._under[place] = value


class NoWaker:
    """Wakes nobody."""

    def __neg__(self) -> int:
        return 0


def returns_of(world: World, row: int) -> Returns:
    words: Any = ReadWords(world.words)
    table = Table(words, world.marks, world.mutex, world.geometry, row, world.find)
    segment: Any = SimpleNamespace(waker=lambda cell: NoWaker())
    return Returns(table, segment, lambda slot, generation: None, Lines(table), lambda key: (0, 0))


ROUTE: Any = SimpleNamespace(key=A, tag=tag_of(A), stays=0, sticky=False)
NEVER = 1 << 62


@pytest.mark.parametrize("kind", ["connection", "permit"])
@pytest.mark.parametrize("dead", [True, False], ids=["its holder was killed", "an exception broke it off"])
def test_whoever_gives_back_after_a_broken_section_repairs_and_is_not_kept(kind: str, dead: bool) -> None:
    kept: list[str] = []

    def with_a_lease(operation: Operation) -> Operation:
        def prepare(world: World) -> Ready:
            world.leased(FOUR)
            return operation(world)

        return prepare

    for operation in operations.ALL:
        for world, _, _, k in broken_off(with_a_lease(operation), maximum=3, slots=5, workers=4):
            if dead:
                world.mutex.die()
            at = world.table(FOUR).slot_at(0)
            word = world.words[at]
            assert word & STATE == LEASED
            returns = returns_of(world, FOUR)
            try:
                if kind == "connection":
                    returns.connection(at, word, ROUTE, NEVER)
                else:
                    getattr(returns, kind)(at, word, NEVER)
            except Spinning:
                kept.append(f"{operation.__name__}, store {k}")
                continue
            assert world.words[at] != word
            world.table(FOUR).missed(0)
            invariants.check(world.table(ONE))
    assert not kept, f"reading for ever after: {kept}"


def test_a_lease_whose_slot_was_taken_away_is_not_given_back() -> None:
    world = World()
    at = world.leased(ONE)
    word = world.words[at]
    world.freed(at)
    before = world.save()
    returns = returns_of(world, ONE)
    for give_back in (returns.permit, returns.closed):
        with pytest.raises(LeaseError, match="taken away"):
            give_back(at, word, NEVER)
    with pytest.raises(LeaseError, match="taken away"):
        returns.connection(at, word, ROUTE, NEVER)
    assert world.save() == before
