"""Looks after those that wait in the queue without a thread of their own: one thread for all of a process and pool.

It only rings: who waits takes what was granted by himself, on his own thread. It sleeps on its waiters' cells, as a
waiting thread does on its own, so that whoever grants something need not know the difference.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from .errors import NotSupported
from .native import ManySleeper, Sleeper, waker
from .segment import Segment

#: All waiters are looked at so often, whatever wakes this thread or does not, ns.
_EVERY: Final = 20_000_000
#: ... without FUTEX_WAITV, ns.
_WITHOUT: Final = 1_000_000
#: With nobody waiting, ns.
_AT_REST: Final = 1_000_000_000
#: So many cells are slept on, beside the word that this thread is woken by.
_CELLS: Final = ManySleeper.MOST - 1


class Place(Protocol):
    """A place in the queue, and how its waiter is rung.

    Attributes:
        cell: The cell's place in the table.
        kick: Its kick's index among the marks.
        seen: The kick as it was before its waiter last looked.
        rung: Whether it was rung since.
    """

    cell: int
    kick: int
    seen: int
    rung: bool

    def ring(self) -> None:
        """Let the waiter look; from whatever thread, and must not fail or wait."""
        ...

    def lost(self) -> bool:
        """Whether nobody can be rung there any more."""
        ...

    def leave(self) -> bool:
        """Leave the queue for whoever waited there; False: it found the mutex busy."""
        ...


class Wakers(Protocol):
    """Where givers of this process look up how a cell is woken."""

    _wakers: dict[int, Any]


class _Bell:
    """`-bell` wakes whoever of this process waits in a cell, straight: its thread is spared."""

    __slots__ = ("_cell", "_places")

    def __init__(self, places: dict[int, Place], cell: int) -> None:
        self._places = places
        self._cell = cell

    def __neg__(self) -> int:
        place = self._places.get(self._cell)
        if place is not None:
            place.rung = True
            place.ring()
        return 0


class Watch:
    """The waiters without a thread of one process and pool.

    Everything here is done without a lock, by single operations on dicts and deques, because a ring may come from a
    finalizer, a signal handler, or in the midst of any other call.

    Args:
        attached: When it has gone or is inert, the thread ends.
        segment: For the kicks.
        wakers: Are told how waiters are woken from within this process.
        pool: The pool's name.
        start: Starts a thread that runs a function.
    """

    def __init__(
        self, attached: Any, segment: Segment, wakers: Wakers, pool: str, start: Callable[[Any], object] | None = None
    ) -> None:
        self._attached = weakref.ref(attached)
        self._segment = segment
        self._marks = segment.marks
        self._wakers = wakers._wakers
        self._pool = pool
        self._places: dict[int, Place] = {}
        self._cells: dict[int, int] = {}
        self._armed: frozenset[int] | None = frozenset()
        self._later: deque[Callable[[], bool]] = deque()
        self._word = ctypes.c_uint(0)
        self._wake = waker(ctypes.addressof(self._word))
        self._started = self._ended = False
        self._start = start or self._start_thread

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: Place) -> None:
        """Ring a place when something happens to it, until `remove`."""
        cell = place.cell
        if cell not in self._cells:
            self._cells[cell] = place.kick
            self._wakers[cell] = _Bell(self._places, cell)
        first = not self._places
        self._places[cell] = place
        if not self._started:
            self._begin()
        elif self._has_to_know(cell, first):
            self._rouse()
        if self._marks[place.kick] != place.seen or self._ended:  # before it was known here
            place.ring()

    def _begin(self) -> None:
        self._started = True
        try:
            self._start(self._run)
        except BaseException:
            self._started = False
            raise

    def _has_to_know(self, cell: int, first: bool) -> bool:
        """Whether the thread does not sleep on a cell, and could: be it instead of many in which nobody waits."""
        armed = self._armed
        if armed is None:  # it looks again and again, while anybody waits
            return first
        return cell not in armed and (len(armed) < _CELLS or sum(one in self._places for one in armed) < _CELLS // 2)

    def remove(self, place: Place) -> None:
        """Nothing of a place any more."""
        if self._places.get(place.cell) is place:
            self._places.pop(place.cell, None)

    def later(self, work: Callable[[], bool]) -> None:
        """Have something done by this thread, again and again until it gives True."""
        self._later.append(work)
        if self._started:
            self._rouse()
        else:
            self._begin()

    def stop(self) -> None:
        """End; everybody is rung once more."""
        self._ended = True
        self._rouse()
        for place in list(self._places.values()):
            place.ring()

    def _rouse(self) -> None:
        self._word.value = self._word.value + 1 & 0xFFFF_FFFF
        -self._wake  # noqa: B018 - an operator applied for its effect

    def _start_thread(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name=f"sharedpool-{self._pool}-wait", daemon=True).start()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        sleep = self._sleep_on_cells()
        while True:
            word = self._word.value
            if self._over():
                return
            self._look()
            nap = _EVERY if self._places or self._later else _AT_REST
            sleep(word, nap)

    def _over(self) -> bool:
        attached = self._attached()
        return self._ended or attached is None or attached.inert

    def _look(self) -> None:
        """Ring whoever was kicked, and do what was left over."""
        marks = self._marks
        for place in list(self._places.values()):
            if marks[place.kick] != place.seen and not place.rung:
                place.rung = True
                place.ring()
            elif place.lost():
                self.remove(place)
                self._later.append(place.leave)
        for _ in range(len(self._later)):
            work = self._later.popleft()
            if not work():
                self._later.append(work)

    def _sleep_on_cells(self) -> Callable[[int, int], None]:
        """How this thread sleeps: (its own word's value, ns at most)."""
        own = ctypes.addressof(self._word)
        try:
            many = ManySleeper()
        except NotSupported:
            alone = Sleeper(own)
            self._armed = None
            return lambda word, nap: alone.sleep(word, _WITHOUT if nap < _AT_REST else nap)
        marks = self._marks
        address = self._segment.marks_address

        def sleep(word: int, nap: int) -> None:
            cells = self._choose()
            kicks = [self._cells[cell] for cell in cells]
            values = [marks[kick] for kick in kicks]
            self._armed = frozenset(cells)
            for cell, value in zip(cells, values, strict=True):
                place = self._places.get(cell)
                if place is not None and not place.rung and place.seen != value:
                    return  # between the look and now
            words = [(own, word), *((address + 4 * kick, value) for kick, value in zip(kicks, values, strict=True))]
            woken = many.sleep(words, nap)
            if woken > 0:
                self._ring(cells[woken - 1])

        return sleep

    def _ring(self, cell: int) -> None:
        place = self._places.get(cell)
        if place is not None and not place.rung:
            place.rung = True
            place.ring()

    def _choose(self) -> list[int]:
        """The cells to sleep on: those that have waited longest; and where there is room, those that will be used."""
        places, cells = list(self._places), list(self._cells)
        chosen = places[:_CELLS]
        if len(chosen) < _CELLS and len(chosen) < len(cells):
            known = set(chosen)
            chosen += [cell for cell in cells if cell not in known][: _CELLS - len(chosen)]
        return chosen
