"""Tables over plain memory in one thread, and ways to break them off in the middle. No operating system."""

from __future__ import annotations

import collections
import dataclasses
import errno
from collections.abc import Callable
from typing import Any

from sharedpool import invariants, view
from sharedpool.layout import (
    ANY_NUMBER,
    ARBITER_ROW,
    BARE,
    CELL_HIGH,
    CELL_KEY,
    CELL_ROW_SHIFT,
    CELL_WAITING,
    EPOCH,
    FIRST_ROW,
    FREE,
    FREE_CELL,
    FREE_SLOT,
    GATE,
    GRANTED,
    HEADER,
    HIGH,
    HOLDER_SHIFT,
    KEY,
    LEASED,
    MAX,
    MAX_PER_KEY,
    MAX_WAITING,
    RESERVING,
    ROW,
    ROW_CLOSES,
    ROW_LIVE,
    SLOT,
    STATE,
    TICKET,
    VER,
    Geometry,
    leased_word,
    opening_word,
    tag_of,
    with_state,
)
from sharedpool.stats import COUNTERS, REASONS
from sharedpool.table import DONE, NoLease, Table

A, B, C = 0xA00000000A, 0xB00000000B, 0xC00000000C  # keys

#: The rows of three workers.
ONE, TWO, THREE = FIRST_ROW, FIRST_ROW + 1, FIRST_ROW + 2


class Lease(NoLease):
    """What a section gives its word to."""


class PlainMutex:
    """The robust mutex's answers, in one thread: held, its holder dead, and lost where a death was not dealt with."""

    def __init__(self) -> None:
        self.held = False
        self.dead = False
        self.lost = False
        self.sections = 0

    def die(self) -> None:
        """The holder dies, or somebody dies holding it."""
        self.held = False
        self.dead = True

    def __neg__(self) -> int:
        if self.lost:
            return errno.ENOTRECOVERABLE
        if self.held:
            return errno.EBUSY
        self.held = True
        self.sections += 1
        return errno.EOWNERDEAD if self.dead else 0

    def __pos__(self) -> int:
        assert not self.lost, "a mutex that is not recoverable must never be unlocked"
        assert self.held, "unlocked without being held"
        self.held = False
        self.lost = self.dead
        return 0

    def __invert__(self) -> int:
        assert self.held, "made consistent without being held"
        assert self.dead, "made consistent although nobody died"
        self.dead = False
        return 0


class World:
    """A table over a bytearray, the rows of three workers, and short ways into every state by legal transitions."""

    def __init__(self, *, maximum: int = 2, slots: int = 4, cells: int = 6, workers: int = 3, lines: int = 2) -> None:
        self.geometry = Geometry(FIRST_ROW + workers, slots, cells, lines)
        self.memory = bytearray(self.geometry.size)
        view = memoryview(self.memory)
        split = 8 * self.geometry.words
        self.words: Any = view[:split].cast("Q")
        self.marks: Any = view[split:].cast("I")
        self.mutex = PlainMutex()
        self.words[VER] = 1
        self.words[TICKET] = 1
        self.words[GATE] = EPOCH
        self.words[MAX] = maximum
        self.words[MAX_WAITING] = ANY_NUMBER
        self.now = 1000
        self._tables: dict[int, Table] = {}
        arbiter = self.table(ARBITER_ROW)
        for row in range(FIRST_ROW, FIRST_ROW + workers):
            must(arbiter.set_row(row, 0, ROW_LIVE | (100 + row) << 4, row, self.now))

    def table(self, row: int) -> Table:
        """The table as this row stores in it."""
        if row not in self._tables:
            self._tables[row] = Table(self.words, self.marks, self.mutex, self.geometry, row, self.find)
        return self._tables[row]

    def find(self, tag: int, start: int, stop: int) -> int:
        return next((index for index in range(start, stop) if self.marks[index] == tag), -1)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def save(self) -> bytes:
        return bytes(self.memory)

    def restore(self, saved: bytes) -> None:
        self.memory[:] = saved
        for table in self._tables.values():  # what it has missed so far was in another world
            table._misses, table._progress = 0, ()

    @property
    def gate(self) -> int:
        return int(self.words[GATE])

    # --- short ways into a state --------------------------------------------------------------------------------------

    def next_free(self) -> int:
        """The place of the slot that a checkout would take."""
        return int(self.words[FREE_SLOT]) or self.table(ONE).slot_at(self.words[HIGH])

    def opening(self, row: int, key: int = A, lease: Any = None) -> int:
        table, at = self.table(row), self.next_free()
        seen = self.words[at]
        lease = lease or Lease()
        counter = table.counter(0)
        must(table.take_free(at, seen, opening_word(seen, row), self.gate, lease, key, counter, self.tick()))
        return at

    def leased(self, row: int, key: int = A, flags: int = 0) -> int:
        at = self.opening(row, key)
        seen = self.words[at]
        opened = self.table(row).counter(COUNTERS.index("opened"))
        must(self.table(row).connected(at, seen, with_state(seen, LEASED) | flags, Lease(), 0, opened, self.tick()))
        return at

    def idle(self, row: int, key: int = A, flags: int = 0) -> int:
        at = self.leased(row, key, flags)
        self.give_back(at)
        return at

    def give_back(self, at: int) -> None:
        """A leased slot becomes idle."""
        seen = self.words[at]
        key = self.words[at + 1]
        row = (seen >> HOLDER_SHIFT) & 0xFFFF
        table, gate, now = self.table(row), self.gate, self.tick()
        if gate & RESERVING:
            must(table.put_idle_counted(at, seen, seen - 1, gate, 0, 0, 0, tag_of(key), now))
        else:
            must(table.put_idle(at, seen, seen - 1, gate, tag_of(key), now))

    def take(self, row: int, at: int) -> None:
        """An idle slot becomes leased."""
        seen, table = self.words[at], self.table(row)
        new = leased_word(seen, row)
        must(table.take_idle(at, seen, new, self.gate, Lease(), table.counter(0), self.tick()))

    def close(self, at: int, old_cell: int = 0) -> int:
        table = self.table(ARBITER_ROW)
        reason = table.row_at + ROW_CLOSES + REASONS.index("drained")
        must(table.close(at, self.words[at], self.words[at + 2], old_cell, reason, self.tick()))
        return at

    def free(self, at: int) -> int:
        must(self.table(ARBITER_ROW).free(at, self.words[at], self.gate, 0))
        return at

    def closing(self, row: int, key: int = A) -> int:
        return self.close(self.leased(row, key))

    def freed(self, *ats: int) -> None:
        """Slots in whatever state end, so that they lie in the list of free ones."""
        for at in ats:
            self.free(self.close(at))

    def cell(self, row: int) -> int:
        """A cell that a row owns and nobody waits in."""
        table = self.table(row)
        cell = self.words[FREE_CELL] or table.cell_at(self.words[CELL_HIGH])
        must(table.claim_cell(cell))
        return int(cell)

    def waiting(self, row: int, key: int = A, cell: int = 0, *, high: bool = False) -> int:
        table = self.table(row)
        cell = cell or self.cell(row)
        now = self.tick()
        if high:
            turn = self.high_turn(row)
            places = dataclasses.astuple(turn)
            counter = table.counter(1)
            must(table.enqueue_high(cell, key, self.gate, self.words[VER], *places, 0, 0, now + 1000, counter, now))
            return cell
        must(table.enqueue(cell, key, self.gate, self.words[VER], 0, 0, now + 1000, table.counter(1), now))
        return cell

    def high_turn(self, row: int) -> view.Turn:
        turn = view.high_turn(self.words, CELL_WAITING | row << CELL_ROW_SHIFT, self.gate)
        assert turn is not None
        return turn

    def grant(self, at: int, cell: int, *, bare: bool = False, old_cell: int = 0) -> int:
        """Whatever the slot is, it is handed to the cell."""
        seen, table = self.words[at], self.table(ARBITER_ROW)
        new = self.granted_word(at, cell, bare=bare)
        must(table.hand(at, seen, new, self.gate, cell, self.words[cell], old_cell, self.tick()))
        return at

    def granted_word(self, at: int, cell: int, *, bare: bool = False) -> int:
        seen, index = self.words[at], self.table(ONE).cell_index(cell)
        return int(with_state(seen & ~0xFFFFF0, GRANTED) | (BARE if bare else 0) | index << HOLDER_SHIFT)

    def granted(self, row: int, *, bare: bool = False, key: int = A) -> tuple[int, int]:
        """(slot, cell): a lease of row TWO given to a waiter of this row."""
        at = self.leased(TWO, key)
        cell = self.waiting(row, key)
        self.grant(at, cell, bare=bare)
        return at, cell

    def stalled(self, row: int, key: int = A) -> int:
        """A cell that slept through its grant, which was closed since."""
        at = self.leased(TWO, key)
        cell = self.waiting(row, key)
        self.grant(at, cell)
        self.close(at, cell)
        return cell

    def limit(self, maximum: int, flags: int = 0, reserve: int = 0, per_key: int = 0) -> None:
        must(self.table(ARBITER_ROW).set_limit(maximum, flags, reserve, per_key))

    def keys(self) -> collections.Counter[int]:
        """How many slots each key has."""
        base, words = self.geometry.slot_base, self.words
        places = range(base, base + SLOT * self.geometry.slots, SLOT)
        return collections.Counter(words[at + KEY] for at in places if words[at] & STATE != FREE)

    def entitled(self, own: int = 0, without: int = 0) -> list[int]:
        """Who waits, in order, and may have a permit, or a connection of the key `own`, although others have theirs.

        `without` is the key of that slot, if what comes free is a permit.
        """
        counts, limit = self.keys(), self.words[MAX_PER_KEY]
        counts[without] -= 1
        waiting = invariants.queue(self.table(ARBITER_ROW))
        return [at for at in waiting if self.words[at + CELL_KEY] == own or counts[self.words[at + CELL_KEY]] < limit]

    def row_word(self, row: int) -> int:
        return int(self.words[HEADER + ROW * row])


def must(result: int) -> None:
    """A transition that is legal here."""
    assert result == DONE, f"a legal transition answered {result}"


class Broken(Exception):
    """The store at which a section was broken off."""


class Breaker:
    """Counts stores, and raises instead of the k-th one."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.stores = 0

    def store(self) -> None:
        self.stores += 1
        if self.stores == self.at:
            raise Broken


class BreakingWords:
    """Words, or marks, whose k-th store raises."""

    def __init__(self, under: Any, store: Callable[[], None]) -> None:
        self._under = under
        self._store = store

    def __getitem__(self, place: Any) -> Any:
        return self._under[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        self._store()
        self._under[place] = value


class BreakingLease:
    """A lease that is stored to as words are."""

    def __init__(self, store: Callable[[], None], word: int = 0) -> None:
        self._word = word
        self._store = store

    @property
    def word(self) -> int:
        return self._word

    @word.setter
    def word(self, value: int) -> None:
        self._store()
        self._word = value


def breaking(world: World, row: int, store: Callable[[], None]) -> Table:
    """The table as a row sees it, with every store announced before it happens."""
    words: Any = BreakingWords(world.words, store)
    marks: Any = BreakingWords(world.marks, store)
    return Table(words, marks, world.mutex, world.geometry, row, world.find)


def state_of(world: World, at: int) -> int:
    return int(world.words[at] & 15)


def is_free(world: World, at: int) -> bool:
    return state_of(world, at) == FREE
