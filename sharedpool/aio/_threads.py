"""What takes its time has a thread while it lasts; who waits for it is a task."""

from __future__ import annotations

import asyncio
import threading
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..lease import Lease

if TYPE_CHECKING:
    from ..warming import Opening

T = TypeVar("T")


class NoThread(RuntimeError):
    """A thread could not be started; its cause says why."""


async def in_thread(
    work: Callable[[], T],
    *,
    undo: Callable[[T], object] | None = None,
    stop: Callable[[Callable[[], bool]], object] | None = None,
) -> T:
    """Do something that takes its time in a thread of its own.

    Args:
        work: What to do.
        undo: Called with its result, in whatever thread, if nobody waits for that any more.
        stop: Called when nobody waits any more and it is not done yet, with a function that tells whether it is.

    Raises:
        NoThread: It has not been begun.
    """
    job = _Job(work, undo, get_running_loop())
    try:
        threading.Thread(target=job.run, name="sharedpool-aio", daemon=True).start()
    except RuntimeError as error:
        raise NoThread from error
    try:
        return await job.future
    except BaseException:
        job.abandon(stop)
        raise


class _Job(Generic[T]):
    """Work in a thread, and who waits for it on a loop."""

    __slots__ = ("_gone", "_lock", "_loop", "_over", "_result", "_undo", "_work", "future")

    def __init__(
        self, work: Callable[[], T], undo: Callable[[T], object] | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._work = work
        self._undo = undo
        self._loop = loop
        self._lock = threading.Lock()
        self._gone = self._over = False
        self._result: deque[T] = deque()
        self.future: asyncio.Future[T] = loop.create_future()

    def run(self) -> None:
        """In the thread."""
        error: BaseException | None = None
        try:
            result = self._work()
            self._result.append(result)
        except BaseException as failed:  # noqa: BLE001 - told to who waits
            error = failed
        with self._lock:
            self._over = True
            gone = self._gone
        try:
            if not gone:
                self._loop.call_soon_threadsafe(self._tell, error)
        except RuntimeError:  # the loop was closed
            gone = True
        if gone:
            self._take_back()

    def _tell(self, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(self._result[0])
        else:
            self.future.set_exception(error)

    def over(self) -> bool:
        """Whether the thread has come to its end."""
        return self._over

    def abandon(self, stop: Callable[[Callable[[], bool]], object] | None) -> None:
        """Nobody waits any more, or what was waited for has failed."""
        with self._lock:
            self._gone = True
        if not self._over and stop is not None:
            stop(self.over)
        self._take_back()

    def _take_back(self) -> None:
        """Undo it, once: whoever comes first of the thread and the task."""
        try:
            result = self._result.pop()
        except IndexError:
            return
        if self._undo is not None:
            self._undo(result)


def give_back(lease: Lease[Any] | None, opening: Opening | None = None) -> None:
    """Nobody wants it any more."""
    if lease is not None and lease.in_force:
        if opening is not None and opening.broken:
            lease.discard()
        else:
            lease.checkin()
