"""The slot table: who holds which permit, who waits, in which order. The heart of sharedpool.

A pure data structure over shared memory: no I/O, no clock (time is an argument), no logging. Callers search outside
the mutex (attachment, waiting, returns, served), then ask for one transition here, which is verified and committed
inside. Each method returns DONE, STALE (what was seen no longer holds: search again) or BUSY (the mutex is taken: wait
a moment).

The shape of a critical section is a law here, and `tests/core/test_section_shape.py` checks it in the byte code:

* trylock and unlock are C functions behind unary operators, because CPython looks for signals and for other threads
  after calls, at backward jumps and at function starts, but not after operators, loads, stores and comparisons;
* between them only item loads and stores, arithmetic on ints, comparisons and `if`;
* the first store sets DIRTY to the storing row and the last one clears it; whoever finds it set repairs first;
* one store commits, and what is written before it is without meaning unless it follows;
* a trylock that tells of the holder's death has the mutex, too: the table is marked DIRTY, the mutex made usable and
  let go in the same stretch. To repair is a section of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, Protocol

from .errors import PoolBroken, PoolStopped
from .layout import (
    BARE,
    CAUSE,
    CELL,
    CELL_DEADLINE,
    CELL_HIGH,
    CELL_KEY,
    CELL_OWNED,
    CELL_ROW_SHIFT,
    CELL_SINCE,
    CELL_STALLED,
    CELL_WAITING,
    DIRTY,
    EPOCH,
    FREE_CELL,
    FREE_SLOT,
    GATE,
    GRANT,
    HEAD,
    HEADER,
    HIGH,
    HOLDER,
    HOLDER_SHIFT,
    IDLE,
    IDLE_COUNT,
    KEY,
    KEYED,
    LINE,
    LINE_HIGH,
    LINE_KEY,
    MANY_TICKETS,
    MASK32,
    MAX,
    MAX_PER_KEY,
    MAX_WAITING,
    MOST_PASSED,
    NEXT,
    NEXT_FREE,
    NUMBER_SHIFT,
    OPENED,
    ORDINARY,
    OVER,
    PART,
    PASSED,
    PREV,
    QUEUED,
    RESERVE,
    RESERVING,
    ROW,
    ROW_COUNTERS,
    ROW_EVICTED,
    ROW_NONCE,
    ROW_SINCE,
    SINCE,
    SLOT,
    SLOT_SHIFT,
    STATE,
    TAIL,
    TICKET,
    TURN_SHIFT,
    USED,
    VER,
    VERSION,
    WAITING_COUNT,
    Geometry,
    with_state,
)
from .repair import rebuild
from .sanity import lasting_damage

DONE: Final = 1
STALE: Final = 0
BUSY: Final = -1
#: `enqueue` only: as many wait as may.
FULL: Final = 2

#: After so many sections that committed nothing the table itself is looked at: some 10 ms of trying.
MANY_MISSES: Final = 2000

#: What the mutex of a process that has left the pool answers: nothing of it can commit any more.
LEFT: Final = errno.ECANCELED

_EOWNERDEAD: Final = errno.EOWNERDEAD
_HELD: Final = (errno.EBUSY, errno.EDEADLK)


class Mutex(Protocol):
    """trylock, unlock and consistent as operators; each gives an errno, 0 for success."""

    def __neg__(self) -> int: ...
    def __pos__(self) -> int: ...
    def __invert__(self) -> int: ...


class Claim:
    """What a section claims or gives. A lease is one, with a `word` that is 0 when it is not in force."""

    __slots__ = ("word",)

    def __init__(self) -> None:
        self.word = 0


class NoLease(Claim):
    """Stands in where no user's lease is concerned."""

    __slots__ = ()


class Table:
    """One process's view of the slot table, storing as one row.

    Args:
        words: The 64-bit words.
        marks: The 32-bit marks: a slot's key tag while it is IDLE, else 0; then the cells' kicks.
        mutex: The robust process-shared mutex.
        geometry: How many of each there are.
        row: The row this process stores as.
        find: find(tag, start, stop) gives the first slot in that range whose mark is `tag`, or -1.
    """

    __slots__ = (
        "_marks", "_misses", "_progress", "_words", "cell_base", "find", "geometry", "kick_base", "marks", "mutex",
        "row", "row_at", "slot_base", "words",
    )  # fmt: skip

    def __init__(
        self,
        words: memoryview[int],
        marks: memoryview[int],
        mutex: Mutex,
        geometry: Geometry,
        row: int,
        find: Callable[[int, int, int], int],
    ) -> None:
        self.words = self._words = words
        self.marks = self._marks = marks
        self._misses = 0
        self._progress: tuple[int, ...] = ()
        self.mutex = mutex
        self.find = find
        self.geometry = geometry
        self.slot_base = geometry.slot_base
        self.cell_base = geometry.cell_base
        self.kick_base = geometry.slots
        self.row = row
        self.row_at = HEADER + ROW * row

    # --- places -------------------------------------------------------------------------------------------------------

    def slot_at(self, index: int) -> int:
        return self.slot_base + SLOT * index

    def slot_index(self, at: int) -> int:
        return (at - self.slot_base) // SLOT

    def cell_at(self, index: int) -> int:
        return self.cell_base + CELL * index

    def cell_index(self, at: int) -> int:
        return (at - self.cell_base) // CELL

    def kick_index(self, cell_at: int) -> int:
        """Where a cell's kick lies among the marks."""
        return self.geometry.slots + (cell_at - self.cell_base) // CELL

    def counter(self, index: int) -> int:
        return self.row_at + ROW_COUNTERS + index

    # --- entering failed ----------------------------------------------------------------------------------------------

    def missed(self, rc: int) -> int:
        """Why a section committed nothing: STALE or BUSY. Repairs, or marks for repair, where a holder died."""
        if rc == 0:
            if self.words[DIRTY]:
                self.repair()
            else:
                self._misses = self._misses + 1
                if self._misses % MANY_MISSES == 0:
                    self._look()
            return STALE
        if rc in _HELD:
            return BUSY
        if rc == _EOWNERDEAD:
            self.repair()
            return STALE
        if rc == LEFT:
            raise PoolStopped("this process has left the pool")
        raise PoolBroken(
            f"the pool's mutex cannot be recovered ({errno.errorcode.get(rc, rc)}); every process must attach anew"
        )

    def _look(self) -> None:
        """So many sections did not come off. Others were faster, or what was searched cannot be: then it is mended.

        Raises:
            PoolBroken: Nothing can be found, and yet nothing moves.
        """
        w = self.words
        if lasting_damage(w, self.marks, self.geometry):
            self.suspect()
            return
        progress = (w[VER], w[GATE], w[TICKET], w[HEAD], w[USED])
        stands, self._progress = progress == self._progress, progress
        if stands:
            raise PoolBroken(f"the pool's shared memory is damaged: nothing can be done any more (at {progress})")

    def suspect(self) -> None:
        """Something in the table cannot be: have everything rebuilt, by this process or by whoever comes next."""
        for _ in range(3):  # a section that is being carried out takes the mark away as it ends
            self.words[DIRTY] = self.row
            self.repair()

    def repair(self) -> int:
        """Rebuild everything derived if a section was left half done; DONE when nothing is left to repair."""
        w = self.words
        mutex = self.mutex
        me = self.row
        rc = -mutex
        if rc == 0:
            try:
                if w[DIRTY]:
                    rebuild(w, self.marks, self.geometry)
                    w[DIRTY] = 0
            finally:
                +mutex
            return DONE
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return BUSY

    # --- taking -------------------------------------------------------------------------------------------------------

    def take_idle(self, at: int, seen: int, new: int, gate: int, lease: Claim, counter: int, now: int) -> int:
        """IDLE -> LEASED: one's own or, by takeover, another process's."""
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = at - self.slot_base >> SLOT_SHIFT
        since = at + SINCE
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and w[GATE] == gate and not w[DIRTY]:
                    w[DIRTY] = me
                    w[since] = now
                    lease.word = new
                    w[at] = new
                    marks[mark] = 0
                    w[counter] = w[counter] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def take_idle_counted(
        self,
        at: int,
        seen: int,
        new: int,
        gate: int,
        first: int,
        waits: int,
        most: int,
        lease: Claim,
        counter: int,
        now: int,
        keyed: int = 0,
    ) -> int:
        """IDLE -> LEASED, as `take_idle`, in a pool with a reserve or a limit per key.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            new: Its word as it is to be.
            gate: GATE as it was searched.
            first: The head of the queue as it was searched; 0: nobody waited.
            waits: Its word.
            most: Fewer slots than so many must be in use, which are neither free nor idle.
            lease: Gets `new`.
            counter: What is counted.
            now: When the lease began.
            keyed: KEYED as it was searched, where others wait who may not have it for their keys; else 0.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = at - self.slot_base >> SLOT_SHIFT
        since = at + SINCE
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if (
                    w[at] == seen
                    and w[GATE] == gate
                    and not w[DIRTY]
                    and w[HEAD] == first
                    and (first == 0 or w[first] == waits)
                    and w[USED] - w[IDLE_COUNT] < most
                    and (keyed == 0 or w[KEYED] == keyed)
                ):
                    w[DIRTY] = me
                    w[since] = now
                    lease.word = new
                    w[at] = new
                    marks[mark] = 0
                    w[IDLE_COUNT] = w[IDLE_COUNT] - 1
                    w[counter] = w[counter] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def take_free(
        self,
        at: int,
        seen: int,
        new: int,
        gate: int,
        lease: Claim,
        key: int,
        counter: int,
        now: int,
        first: int = 0,
        waits: int = 0,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        """FREE -> OPENING, or -> LEASED for a bare permit, below the cap with nobody waiting.

        `at` must be the head of the list of free slots or, where that is empty, the first slot never used. In a pool
        with a reserve or a limit per key, `most` is not 0, and `first`, `waits` and `most` are verified as in
        `take_idle_counted`. With a limit per key, `keyed` is KEYED as it was when the key was below it.
        """
        w = self._words
        mutex = self.mutex
        me = self.row
        index = (at - self.slot_base) // SLOT
        top = index + 1
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and w[GATE] == gate and not w[DIRTY] and w[USED] < w[MAX]:
                    if (
                        (w[FREE_SLOT] == at or (w[FREE_SLOT] == 0 and w[HIGH] == index))
                        and (keyed == 0 or w[KEYED] == keyed)
                        and (
                            most == 0
                            or (
                                w[HEAD] == first
                                and (first == 0 or w[first] == waits)
                                and w[USED] - w[IDLE_COUNT] < most
                            )
                        )
                    ):
                        w[DIRTY] = me
                        w[at + KEY] = key
                        w[at + SINCE] = now
                        w[at + OPENED] = 0
                        w[at + VERSION] = 0
                        lease.word = new
                        w[at] = new
                        if w[FREE_SLOT] == at:
                            w[FREE_SLOT] = w[at + NEXT_FREE]
                        else:
                            w[HIGH] = top
                        w[USED] = w[USED] + 1
                        if keyed:
                            w[KEYED] = keyed + 1
                        w[counter] = w[counter] + 1
                        w[DIRTY] = 0
                        done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def take_grant(
        self, at: int, seen: int, new: int, cell: int, lease: Claim, key: int, counter: int, now: int
    ) -> int:
        """GRANTED -> LEASED (a connection) or OPENING (a bare permit), by the cell it was granted to."""
        w = self._words
        mutex = self.mutex
        me = self.row
        owned = CELL_OWNED | me << CELL_ROW_SHIFT
        bare = seen & BARE
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and w[cell + GRANT] == at and not w[DIRTY]:
                    w[DIRTY] = me
                    w[at + KEY] = key
                    w[at + SINCE] = now
                    if bare:
                        w[at + OPENED] = 0
                    lease.word = new
                    w[at] = new
                    w[cell] = owned
                    w[cell + GRANT] = 0
                    w[counter] = w[counter] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    # --- holding ------------------------------------------------------------------------------------------------------

    def swap(self, at: int, seen: int, new: int, lease: Claim, expected: int, bump: int, now: int) -> int:
        """A slot's word changes and its place in lists does not: doomed, adopted.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            new: Its word as it is to be.
            lease: Gets `new`, if its word is `expected`.
            expected: The lease's word before.
            bump: 1 where somebody who decided to wait might now decide otherwise, else 0.
            now: When the new state began.
        """
        w = self._words
        mutex = self.mutex
        me = self.row
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and lease.word == expected and not w[DIRTY]:
                    w[DIRTY] = me
                    w[at + SINCE] = now
                    if expected:
                        lease.word = new
                    w[at] = new
                    w[VER] = w[VER] + bump
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def connected(self, at: int, seen: int, new: int, lease: Claim, expected: int, counter: int, now: int) -> int:
        """OPENING -> LEASED: the connection is there, and counted as opened.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            new: Its word as it is to be.
            lease: Gets `new`, if its word is `expected`.
            expected: The lease's word before.
            counter: Where connections opened are counted.
            now: When it was opened.
        """
        w = self._words
        mutex = self.mutex
        me = self.row
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and lease.word == expected and not w[DIRTY]:
                    w[DIRTY] = me
                    w[at + SINCE] = now
                    lease.word = new
                    w[at] = new
                    w[at + OPENED] = now
                    w[counter] = w[counter] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def reopen(
        self, at: int, seen: int, new: int, lease: Claim, expected: int, reason: int, counter: int, now: int
    ) -> int:
        """LEASED -> OPENING: its connection was closed to the end by its holder; another is opened on the same permit.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            new: Its word as it is to be.
            lease: Gets `new`, if its word is `expected`.
            expected: The lease's word before.
            reason: Where the close is counted by its reason.
            counter: Where connections are counted that their holders closed to the end.
            now: When the opening begins.
        """
        w = self._words
        mutex = self.mutex
        me = self.row
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and lease.word == expected and not w[DIRTY]:
                    w[DIRTY] = me
                    w[at + SINCE] = now
                    lease.word = new
                    w[at] = new
                    if w[at + OPENED]:
                        w[at + OPENED] = 0
                        w[reason] = w[reason] + 1
                        w[counter] = w[counter] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    # --- giving back --------------------------------------------------------------------------------------------------

    def put_idle(self, at: int, seen: int, new: int, gate: int, tag: int, now: int) -> int:
        """LEASED -> IDLE: clean, not doomed, within the limits; nobody waits who may have it."""
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = at - self.slot_base >> SLOT_SHIFT
        since = at + SINCE
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and w[GATE] == gate and not w[DIRTY]:
                    w[DIRTY] = me
                    w[since] = now
                    w[at] = new
                    marks[mark] = tag
                    w[VER] = w[VER] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def put_idle_counted(
        self,
        at: int,
        seen: int,
        new: int,
        gate: int,
        first: int,
        waits: int,
        most: int,
        tag: int,
        now: int,
        keyed: int = 0,
    ) -> int:
        """LEASED -> IDLE, as `put_idle`, in a pool with a reserve or a limit per key.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            new: Its word as it is to be.
            gate: GATE as it was searched.
            first: The head of the queue as it was searched, of normal priority, who may not have it.
            waits: Its word.
            most: More slots than so many are in use, which is why; 0: nobody waits who may have it anyway, and `first`
                and `waits` are not verified.
            tag: The key's tag.
            now: When it became idle.
            keyed: KEYED as it was when none of those who wait might have it, for their keys; 0: nobody waits.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = at - self.slot_base >> SLOT_SHIFT
        since = at + SINCE
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if (
                    w[at] == seen
                    and w[GATE] == gate
                    and not w[DIRTY]
                    and (most == 0 or (w[HEAD] == first and w[first] == waits and w[USED] - w[IDLE_COUNT] > most))
                    and (keyed == 0 or w[KEYED] == keyed)
                ):
                    w[DIRTY] = me
                    w[since] = now
                    w[at] = new
                    marks[mark] = tag
                    w[IDLE_COUNT] = w[IDLE_COUNT] + 1
                    if keyed:
                        w[KEYED] = keyed + 1
                    w[VER] = w[VER] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def hand(
        self,
        at: int,
        seen: int,
        new: int,
        gate: int,
        cell: int,
        cell_word: int,
        old_cell: int,
        now: int,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        """A slot that is in use, idle, closed or granted -> GRANTED to a waiting cell, which leaves the queue.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            new: Its word as it is to be: GRANTED, the holder the cell's number, BARE without a connection.
            gate: GATE as it was searched. With its OVER flag set, only a lease may be handed on, with its connection,
                and only where nothing is to be closed.
            cell: The waiting cell.
            cell_word: Its word as it was searched.
            old_cell: The cell that loses a grant it did not take, and stalls; 0 for none.
            now: When the grant was given.
            most: In a pool with a reserve, for normal priority: fewer slots must be in use; 0: not verified.
            keyed: In a pool with a limit per key: KEYED as it was searched; else 0.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = (at - self.slot_base) // SLOT
        idle = seen & STATE == IDLE and gate & RESERVING
        key = self._words[cell + CELL_KEY] if new & BARE else 0
        kick = self.kick_base + (cell - self.cell_base) // CELL
        if cell_word & 15 != CELL_WAITING:  # it left, or a section that unlinked it was left half done
            return self.missed(0)
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if (
                    w[at] == seen
                    and w[cell] == cell_word
                    and w[cell + GRANT] == 0
                    and w[GATE] == gate
                    and not w[DIRTY]
                    and (most == 0 or w[USED] - w[IDLE_COUNT] < most)
                    and (keyed == 0 or w[KEYED] == keyed)
                ):
                    w[DIRTY] = me
                    w[at + SINCE] = now
                    w[at] = new
                    if key:
                        w[at + KEY] = key
                    if keyed:
                        w[KEYED] = keyed + 1
                    if old_cell:
                        w[old_cell] = w[old_cell] & -16 | CELL_STALLED
                        w[old_cell + GRANT] = 0
                    marks[mark] = 0
                    if idle:
                        w[IDLE_COUNT] = w[IDLE_COUNT] - 1
                    n = w[cell + NEXT]
                    p = w[cell + PREV]
                    if p:
                        w[p + NEXT] = n
                    else:
                        w[HEAD] = n
                    if n:
                        w[n + PREV] = p
                    else:
                        w[TAIL] = p
                    if w[HEAD] == 0:
                        w[GATE] = w[GATE] & -2
                    w[WAITING_COUNT] = w[WAITING_COUNT] - 1
                    w[cell + GRANT] = at
                    marks[kick] = marks[kick] + 1 & MASK32
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def hand_free(
        self,
        at: int,
        seen: int,
        new: int,
        gate: int,
        cell: int,
        cell_word: int,
        now: int,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        """FREE -> GRANTED, bare, to a waiting cell: after a limit was raised, a pool resumed, a table repaired.

        `most` and `keyed` as in `hand`.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        index = (at - self.slot_base) // SLOT
        top = index + 1
        key = self._words[cell + CELL_KEY]
        kick = self.kick_base + (cell - self.cell_base) // CELL
        if cell_word & 15 != CELL_WAITING:  # it left, or a section that unlinked it was left half done
            return self.missed(0)
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and w[cell] == cell_word and w[cell + GRANT] == 0 and w[GATE] == gate and not w[DIRTY]:
                    if (
                        w[USED] < w[MAX]
                        and (w[FREE_SLOT] == at or (w[FREE_SLOT] == 0 and w[HIGH] == index))
                        and (most == 0 or w[USED] - w[IDLE_COUNT] < most)
                        and (keyed == 0 or w[KEYED] == keyed)
                    ):
                        w[DIRTY] = me
                        w[at + KEY] = key
                        w[at + SINCE] = now
                        w[at + OPENED] = 0
                        w[at + VERSION] = 0
                        w[at] = new
                        if keyed:
                            w[KEYED] = keyed + 1
                        if w[FREE_SLOT] == at:
                            w[FREE_SLOT] = w[at + NEXT_FREE]
                        else:
                            w[HIGH] = top
                        w[USED] = w[USED] + 1
                        n = w[cell + NEXT]
                        p = w[cell + PREV]
                        if p:
                            w[p + NEXT] = n
                        else:
                            w[HEAD] = n
                        if n:
                            w[n + PREV] = p
                        else:
                            w[TAIL] = p
                        if w[HEAD] == 0:
                            w[GATE] = w[GATE] & -2
                        w[WAITING_COUNT] = w[WAITING_COUNT] - 1
                        w[cell + GRANT] = at
                        marks[kick] = marks[kick] + 1 & MASK32
                        w[DIRTY] = 0
                        done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def free(
        self,
        at: int,
        seen: int,
        gate: int,
        old_cell: int,
        first: int = 0,
        waits: int = 0,
        most: int = 0,
        keyed: int = 0,
    ) -> int:
        """A slot without a connection -> FREE: nobody waits, or the cap was lowered below what is in use.

        The caller has checked that `gate` says one of the two; or `most` or `keyed` is not 0, and those who wait may
        not have it for the reserve or for their keys: verified as in `put_idle_counted`. `old_cell` loses its grant, as
        in `hand`.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = (at - self.slot_base) // SLOT
        new = seen & ~(STATE | HOLDER | 0xF0)
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if (
                    w[at] == seen
                    and w[GATE] == gate
                    and not w[DIRTY]
                    and (most == 0 or (w[HEAD] == first and w[first] == waits and w[USED] - w[IDLE_COUNT] > most))
                    and (keyed == 0 or w[KEYED] == keyed)
                ):
                    w[DIRTY] = me
                    w[at] = new
                    if keyed:
                        w[KEYED] = keyed + 1
                    if old_cell:
                        w[old_cell] = w[old_cell] & -16 | CELL_STALLED
                        w[old_cell + GRANT] = 0
                    marks[mark] = 0
                    w[at + NEXT_FREE] = w[FREE_SLOT]
                    w[FREE_SLOT] = at
                    w[USED] = w[USED] - 1
                    if w[USED] <= w[MAX]:
                        w[GATE] = w[GATE] & ~OVER
                    w[VER] = w[VER] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def close(self, at: int, seen: int, since: int, old_cell: int, counter: int, now: int, ver: int = 0) -> int:
        """Any slot with a connection -> CLOSING; the arbiter closes it to the end. The slot counts until then.

        Args:
            at: The slot.
            seen: Its word as it was searched.
            since: SINCE as it was searched: the same word may have been leased and idle again.
            old_cell: The cell that loses its grant, and stalls; 0 for none.
            counter: Where the close is counted by its reason, unless no connection was opened there.
            now: When the closing began.
            ver: VER as it was when more slots than the limit were counted, not counting those that are closing; 0: it
                is closed in any case. Every close raises VER, so that no two close the same surplus.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        mark = (at - self.slot_base) // SLOT
        new = with_state(seen, 5)
        idle = seen & STATE == IDLE
        if old_cell:
            new = new & ~HOLDER | me << HOLDER_SHIFT
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and w[at + SINCE] == since and not w[DIRTY] and (ver == 0 or w[VER] == ver):
                    w[DIRTY] = me
                    w[VER] = w[VER] + 1
                    w[at + SINCE] = now
                    w[at] = new
                    if old_cell:
                        w[old_cell] = w[old_cell] & -16 | CELL_STALLED
                        w[old_cell + GRANT] = 0
                    marks[mark] = 0
                    if idle and w[GATE] & RESERVING:
                        w[IDLE_COUNT] = w[IDLE_COUNT] - 1
                    w[at + CAUSE] = counter
                    if w[at + OPENED]:
                        w[counter] = w[counter] + 1
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def claim_cell(self, cell: int) -> int:
        """A free cell -> owned by this row. `cell` must be the first free one, or the first never used."""
        w = self._words
        mutex = self.mutex
        me = self.row
        owned = CELL_OWNED | me << CELL_ROW_SHIFT
        index = (cell - self.cell_base) // CELL
        top = index + 1
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[cell] == 0 and not w[DIRTY]:
                    if w[FREE_CELL] == cell or (w[FREE_CELL] == 0 and w[CELL_HIGH] == index):
                        w[DIRTY] = me
                        w[cell] = owned
                        if w[FREE_CELL] == cell:
                            w[FREE_CELL] = w[cell + NEXT]
                        else:
                            w[CELL_HIGH] = top
                        w[cell + GRANT] = 0
                        w[cell + NEXT] = 0
                        w[cell + PREV] = 0
                        w[DIRTY] = 0
                        done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def enqueue(
        self,
        cell: int,
        key: int,
        gate: int,
        ver: int,
        evict: int,
        evict_seen: int,
        deadline: int,
        counter: int,
        now: int,
        keyed: int = 0,
        evicted: int = 0,
    ) -> int:
        """An owned cell joins the end of the queue with normal priority.

        In the same go another key's idle connection is closed for it.

        Verified by VER: nothing has become usable since the search that found nothing. FULL if it would join, but
        MAX_WAITING wait already; a cell that rejoins may make them one more.

        Args:
            cell: A cell of this row in which nobody waits.
            key: What it waits for.
            gate: GATE as it was searched.
            ver: VER as it was searched.
            evict: An idle slot that goes CLOSING for its permit; 0 for none.
            evict_seen: Its word as it was searched.
            deadline: When it gives up, monotonic ns; 0: never.
            counter: What is counted.
            now: Monotonic ns.
            keyed: In a pool with a limit per key: KEYED as it was searched; else 0.
            evicted: Where the eviction is counted; 0: in this row.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        owned = CELL_OWNED | me << CELL_ROW_SHIFT
        waiting = ORDINARY | PART | CELL_WAITING | me << CELL_ROW_SHIFT
        place = evict or self.slot_base
        mark = (place - self.slot_base) // SLOT
        closing = with_state(evict_seen, 5)
        queued = gate | QUEUED
        evicted = evicted or self.row_at + ROW_EVICTED
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                # If somebody was before it when it decided to wait, somebody still is: else it has to look again.
                if w[VER] == ver and (w[GATE] == gate or w[GATE] == queued) and w[cell] == owned and not w[DIRTY]:
                    if w[WAITING_COUNT] >= w[MAX_WAITING]:
                        done = FULL
                    elif (evict == 0 or w[place] == evict_seen) and (keyed == 0 or w[KEYED] == keyed):
                        w[DIRTY] = me
                        if keyed:
                            w[KEYED] = keyed + 1
                        ticket = w[TICKET]
                        tail = w[TAIL]
                        w[cell + CELL_KEY] = key
                        w[cell + CELL_DEADLINE] = deadline
                        w[cell + CELL_SINCE] = now
                        if evict:
                            w[place + SINCE] = now
                            w[place] = closing
                            marks[mark] = 0
                            if gate & RESERVING:
                                w[IDLE_COUNT] = w[IDLE_COUNT] - 1
                            w[place + CAUSE] = evicted
                            w[evicted] = w[evicted] + 1
                        w[cell + PASSED] = 0
                        w[cell] = waiting | ticket << NUMBER_SHIFT
                        w[TICKET] = ticket + 1
                        w[cell + NEXT] = 0
                        w[cell + PREV] = tail
                        if tail:
                            w[tail + NEXT] = cell
                        else:
                            w[HEAD] = cell
                        w[TAIL] = cell
                        w[GATE] = queued
                        w[WAITING_COUNT] = w[WAITING_COUNT] + 1
                        w[counter] = w[counter] + 1
                        w[DIRTY] = 0
                        done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def enqueue_high(
        self,
        cell: int,
        key: int,
        gate: int,
        ver: int,
        word: int,
        after: int,
        after_word: int,
        before: int,
        before_word: int,
        passed: int,
        ticket: int,
        evict: int,
        evict_seen: int,
        deadline: int,
        counter: int,
        now: int,
        keyed: int = 0,
        evicted: int = 0,
    ) -> int:
        """An owned cell joins the queue with high priority, between two cells; else as `enqueue`.

        Args:
            cell: A cell of this row in which nobody waits.
            key: What it waits for.
            gate: GATE as it was searched.
            ver: VER as it was searched.
            word: The cell's word as it is to be.
            after: The cell behind which it joins; 0: at the head.
            after_word: Its word as it was searched.
            before: The cell before which it joins; 0: at the end.
            before_word: Its word as it was searched.
            passed: How many had taken a turn before that one, as it was searched.
            ticket: The next ticket, if this one takes it; 0: it takes a turn before `before`.
            evict: An idle slot that goes CLOSING for its permit; 0 for none.
            evict_seen: Its word as it was searched.
            deadline: When it gives up, monotonic ns; 0: never.
            counter: What is counted.
            now: Monotonic ns.
            keyed: In a pool with a limit per key: KEYED as it was searched; else 0.
            evicted: Where the eviction is counted; 0: in this row.
        """
        w = self._words
        marks = self._marks
        mutex = self.mutex
        me = self.row
        owned = CELL_OWNED | me << CELL_ROW_SHIFT
        place = evict or self.slot_base
        mark = (place - self.slot_base) // SLOT
        closing = with_state(evict_seen, 5)
        queued = gate | QUEUED
        evicted = evicted or self.row_at + ROW_EVICTED
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[VER] == ver and (w[GATE] == gate or w[GATE] == queued) and w[cell] == owned and not w[DIRTY]:
                    if w[WAITING_COUNT] >= w[MAX_WAITING]:
                        done = FULL
                    elif (
                        (evict == 0 or w[place] == evict_seen)
                        and (keyed == 0 or w[KEYED] == keyed)
                        and (ticket == 0 or w[TICKET] == ticket)
                        and (w[after] == after_word and w[after + NEXT] == before if after else w[HEAD] == before)
                        and (
                            w[before] == before_word and w[before + PREV] == after and w[before + PASSED] == passed
                            if before
                            else w[TAIL] == after
                        )
                    ):
                        w[DIRTY] = me
                        if keyed:
                            w[KEYED] = keyed + 1
                        w[cell + CELL_KEY] = key
                        w[cell + CELL_DEADLINE] = deadline
                        w[cell + CELL_SINCE] = now
                        if evict:
                            w[place + SINCE] = now
                            w[place] = closing
                            marks[mark] = 0
                            if gate & RESERVING:
                                w[IDLE_COUNT] = w[IDLE_COUNT] - 1
                            w[place + CAUSE] = evicted
                            w[evicted] = w[evicted] + 1
                        if ticket:
                            w[TICKET] = ticket + 1
                        else:
                            w[before + PASSED] = passed + 1
                        w[cell] = word
                        w[cell + NEXT] = before
                        w[cell + PREV] = after
                        if after:
                            w[after + NEXT] = cell
                        else:
                            w[HEAD] = cell
                        if before:
                            w[before + PREV] = cell
                        else:
                            w[TAIL] = cell
                        w[GATE] = queued
                        w[WAITING_COUNT] = w[WAITING_COUNT] + 1
                        w[counter] = w[counter] + 1
                        w[DIRTY] = 0
                        done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def rejoin(self, cell: int, seen: int, after: int, before: int, ver: int, gate: int) -> int:
        """A stalled cell returns to its place in the queue, between the cells `after` and `before` (0: none).

        It has had its turn once, so nobody passes it any more: who waits with high priority may stand behind it.
        """
        w = self._words
        mutex = self.mutex
        me = self.row
        waiting = with_state(seen, CELL_WAITING)
        turn = seen >> TURN_SHIFT
        gate = gate | QUEUED
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[cell] == seen and w[VER] == ver and w[GATE] | 1 == gate and not w[DIRTY]:
                    if (
                        w[after + NEXT] == before and w[after] & 15 == CELL_WAITING and w[after] >> TURN_SHIFT < turn
                        if after
                        else w[HEAD] == before
                    ) and (
                        w[before + PREV] == after and w[before] & 15 == CELL_WAITING and w[before] >> TURN_SHIFT > turn
                        if before
                        else w[TAIL] == after
                    ):
                        w[DIRTY] = me
                        w[KEYED] = w[KEYED] + 1
                        w[cell + PASSED] = MOST_PASSED
                        w[cell] = waiting
                        w[cell + NEXT] = before
                        w[cell + PREV] = after
                        if after:
                            w[after + NEXT] = cell
                        else:
                            w[HEAD] = cell
                        if before:
                            w[before + PREV] = cell
                        else:
                            w[TAIL] = cell
                        w[GATE] = gate
                        w[WAITING_COUNT] = w[WAITING_COUNT] + 1
                        w[DIRTY] = 0
                        done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def leave(self, cell: int, seen: int, new: int) -> int:
        """A cell without a grant, waiting or not, -> owned and empty again, or FREE after its process's death."""
        w = self._words
        mutex = self.mutex
        me = self.row
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[cell] == seen and w[cell + GRANT] == 0 and not w[DIRTY]:
                    w[DIRTY] = me
                    w[cell] = new
                    if seen & 15 == CELL_WAITING:
                        n = w[cell + NEXT]
                        p = w[cell + PREV]
                        if p:
                            w[p + NEXT] = n
                        else:
                            w[HEAD] = n
                        if n:
                            w[n + PREV] = p
                        else:
                            w[TAIL] = p
                        if w[HEAD] == 0:
                            w[GATE] = w[GATE] & -2
                        w[WAITING_COUNT] = w[WAITING_COUNT] - 1
                        w[VER] = w[VER] + 1
                    if new == 0:
                        w[cell + NEXT] = w[FREE_CELL]
                        w[FREE_CELL] = cell
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    # --- counting by key ----------------------------------------------------------------------------------------------

    def claim_line(self, line: int, key: int, word: int) -> int:
        """A free line -> `word`, for what its row counts of a key."""
        w = self._words
        mutex = self.mutex
        me = self.row
        top = (line - self.geometry.line_base) // LINE + 1
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[line] == 0 and not w[DIRTY]:
                    w[DIRTY] = me
                    w[line + LINE_KEY] = key
                    if w[LINE_HIGH] < top:
                        w[LINE_HIGH] = top
                    w[line] = word
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    # --- the arbiter's ------------------------------------------------------------------------------------------------

    def set_row(self, row: int, seen: int, new: int, nonce: int, now: int) -> int:
        """A row's word changes: FREE -> LIVE -> DEAD -> FREE."""
        w = self._words
        mutex = self.mutex
        me = self.row
        at = HEADER + ROW * row
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if w[at] == seen and not w[DIRTY]:
                    w[DIRTY] = me
                    w[at + ROW_NONCE] = nonce
                    w[at + ROW_SINCE] = now
                    w[at] = new
                    w[DIRTY] = 0
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        return done or self.missed(rc)

    def set_limit(self, maximum: int, flags: int, reserve: int = 0, per_key: int = 0) -> int:
        """Set the limits and the flags PAUSED and STOPPED; whatever was decided before is decided again.

        With a reserve or a limit per key it leaves the table to be repaired, and repairs it: that counts what is idle
        and sets RESERVING. The same after very many tickets: that numbers those who wait anew.
        """
        w = self._words
        mutex = self.mutex
        me = self.row
        unmade = me if reserve or per_key or self._words[TICKET] >= MANY_TICKETS else 0
        done = 0
        rc = -mutex
        if rc == 0:
            try:
                if not w[DIRTY]:
                    w[DIRTY] = me
                    w[MAX] = maximum
                    w[RESERVE] = reserve
                    w[MAX_PER_KEY] = per_key
                    w[KEYED] = w[KEYED] + 1
                    w[IDLE_COUNT] = 0
                    w[GATE] = (w[GATE] & -32) + EPOCH | w[GATE] & QUEUED | (w[USED] > maximum) * OVER | flags
                    w[VER] = w[VER] + 1
                    w[DIRTY] = unmade
                    done = 1
            finally:
                +mutex
        elif rc == _EOWNERDEAD:
            try:
                w[DIRTY] = w[DIRTY] or me
                ~mutex
            finally:
                +mutex
        if done:
            self.missed(0)
        return done or self.missed(rc)
