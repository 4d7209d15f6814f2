"""What a coroutine does where its process has no connection at hand: takes over, opens, or waits in the queue."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable
from threading import get_ident
from time import monotonic_ns
from typing import Any, Final

from .. import held
from ..attachment import Attachment, limit_of
from ..errors import SharedPoolError
from ..lease import Lease
from ..table import BUSY, DONE
from ..waiting import JOINED, OutOfTime, Waiter
from ..warming import Opening
from ..watching import Watch
from ._threads import NoThread, give_back, in_thread

#: Between two tries for a busy mutex, s.
_AGAIN: Final = 0.0005
#: Without a limit, and beyond the deadline, a busy mutex is tried so long, ns.
_PATIENCE: Final = 50_000_000
#: A timer is set for what is sooner than this, ns.
_SOON: Final = 3_600_000_000_000

#: What a word that led out of the memory, or does not fit into one, raises.
DAMAGE: Final = (IndexError, ValueError, OverflowError)

# From now on a thread that runs a loop does not sleep for the mutex.
held.running_loop = asyncio._get_running_loop


async def take_slowly(
    attached: Attachment, route: Any, lease: Lease[Any] | None, patience: float | None, connect: float
) -> Lease[Any]:
    """A lease by takeover, opening, or after waiting; `lease` has a connection that has ended, and may be renewed."""
    limit = limit_of(patience)
    refused: set[int] = set()
    counter, idle = route.reuses, 0
    while True:
        if lease is None:
            lease = attached.blank()
            try:
                counter, idle = await _acquire(attached, route, lease, limit, refused)
            except OutOfTime:
                raise attached.timed_out(route) from None
            except DAMAGE as error:
                raise attached.damaged(error) from error
            if attached.equip(route, lease, counter, idle):
                return lease
        found = await _furnish(attached, route, lease, limit, connect, refused, counter, idle)
        if found is not None:
            return found
        lease = None


async def _acquire(
    attached: Attachment, route: Any, lease: Lease[Any], limit: int, refused: set[int]
) -> tuple[int, int]:
    """Get a slot into the lease; as Attachment._acquire, and the loop goes on meanwhile."""
    line: list[Waiter] = []
    place: _Place | None = None
    give_up = (limit or monotonic_ns()) + _PATIENCE
    try:
        while True:
            try:
                result, counter, idle = attached.attempt(route, lease, limit, refused, line)
            except OutOfTime:
                if monotonic_ns() >= limit:
                    raise
                result, counter, idle = BUSY, 0, 0  # no cell was to be had
            if line and place is None:
                place = _Place(attached, line[0])
            if result == JOINED and place is not None:
                await _wait(attached, route, lease, limit, place)
                result = DONE
            if result == DONE:
                return counter, idle
            if result == BUSY:
                if monotonic_ns() >= give_up:
                    raise OutOfTime
                await asyncio.sleep(_AGAIN)
    finally:
        if line:
            (place or _Place(attached, line[0])).end()


async def _wait(attached: Attachment, route: Any, lease: Lease[Any], limit: int, place: _Place) -> None:
    """Wait in the queue until the lease has been given a slot.

    Raises:
        OutOfTime, PoolStopped.
    """
    room, waiter = attached.room, place.waiter
    began = monotonic_ns()
    try:
        while True:
            place.rung = False
            place.seen = room.marks[place.kick]  # before looking: a grant after this changes it
            now = monotonic_ns()
            result = room.look(waiter, route, lease, limit, now)
            if result == DONE:
                return
            if result == JOINED:
                await place.rest(room.nap(waiter, route, limit - now, now) if route.sticky else limit - now)
            elif result == BUSY:
                if now >= limit + _PATIENCE:
                    raise OutOfTime
                await asyncio.sleep(_AGAIN)
    finally:
        place.end()
        room.waited(monotonic_ns() - began)


class _Place:
    """A task's place in the queue; rung from whatever thread."""

    __slots__ = ("_attached", "_future", "_here", "_loop", "_watch", "cell", "kick", "rung", "seen", "waiter")

    def __init__(self, attached: Attachment, waiter: Waiter) -> None:
        self._attached = attached
        self.waiter = waiter
        self._watch: Watch = attached.watching()
        self._loop = get_running_loop()
        self._future: asyncio.Future[None] | None = None
        self._here = deque([waiter])  # whoever pops it leaves the queue
        self.cell: int = waiter.cell
        self.kick: int = waiter.kick
        self.seen = 0
        self.rung = False

    async def rest(self, nanoseconds: int) -> None:
        """Until rung, or until the time is over."""
        self._future = self._loop.create_future()
        self._watch.add(self)
        timer = self._loop.call_later(nanoseconds / 1e9, self._wake) if nanoseconds < _SOON else None
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def ring(self) -> None:
        """Let the task look."""
        if asyncio._get_running_loop() is self._loop:
            self._wake()
        else:
            with contextlib.suppress(RuntimeError):  # its loop was closed, and will be noticed as lost
                self._loop.call_soon_threadsafe(self._wake)

    def lost(self) -> bool:
        """Whether the loop was closed with the task in it."""
        return self._loop.is_closed()

    def leave(self) -> bool:
        """Leave the queue, whatever was granted is passed on; False: the mutex was busy."""
        try:
            waiter = self._here.pop()
        except IndexError:
            return True
        try:
            left = self._attached.room.leave(waiter, 0)
        except (SharedPoolError, *DAMAGE):  # this process has left the pool, or the place is no longer one
            return True
        if not left:
            self._here.append(waiter)
        return bool(left)

    def end(self) -> None:
        """The task needs it no more; what cannot be done at once, the watching thread does."""
        self._watch.remove(self)
        if not self.leave():
            self._watch.later(self.leave)


async def _furnish(
    attached: Attachment, route: Any, lease: Lease[Any], limit: int, connect: float, refused: set[int],
    counter: int, idle: int,
) -> Lease[Any] | None:  # fmt: skip
    opening = Opening()
    work = functools.partial(attached.furnish, route, lease, limit, connect, refused, counter, idle, opening)
    undo = functools.partial(give_back, opening=opening)
    stop = functools.partial(_break_off, attached, opening)
    try:
        found: Lease[Any] | None = await in_thread(work, undo=undo, stop=stop)
        if found is not None and found._entry is not None:
            found._entry.thread = get_ident()
        return found
    except NoThread as error:
        attached.unwanted(route, lease)
        raise error.__cause__ or error from None


def _break_off(attached: Attachment, opening: Opening, over: Callable[[], bool]) -> None:
    """Nobody wants what is being opened: again and again, because before it connects it cannot be broken off."""

    def again() -> bool:
        opening.break_off()
        return over()

    if not again():
        attached.watching().later(again)
