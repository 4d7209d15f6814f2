"""Connections on which a login has begun. Each is kept for the next request of its user, and for a short time only.

NTLM and Negotiate log a connection in, and need several requests on it. Meanwhile nobody else may have it, so its lease
goes on. Only the thread or the task that sent the last request finds it again, for the same address, and for a request
that goes on with a login.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final

from .exchange import KEPT, End, logs_in

#: A second exception would hide the first; and nobody is there to catch it.
_HARMLESS: Final = Exception


class _Kept:
    """One of them.

    Args:
        thing: What is kept.
        give_up: Ends it.
    """

    __slots__ = ("_give_up", "_mine", "_thing", "timer")

    def __init__(self, thing: Any, give_up: Callable[[], None]) -> None:
        self._thing = thing
        self._give_up = give_up
        self._mine = [True]
        self.timer: threading.Timer | None = None

    def take(self) -> Any:
        """What is kept, for the first who asks; None for all others."""
        try:
            self._mine.pop()
        except IndexError:
            return None
        if self.timer is not None:
            self.timer.cancel()
        return self._thing

    def end(self) -> None:
        """Give it up, unless somebody has taken it."""
        if self.take() is not None:
            with contextlib.suppress(_HARMLESS):
                self._give_up()


class Logins:
    """What one session, pool object or transport keeps.

    Args:
        busy: Whether somebody waits for a connection. Then none is kept that has only been offered a login.

    Threads may share it. What a forked child inherits is its parent's: the leases say so.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._kept: dict[tuple[Hashable, Hashable], _Kept] = {}

    def keep(self, where: Hashable, end: End, thing: Any, give_up: Callable[[], None]) -> bool:
        """Keep a connection for its user's next request; False: it is to be closed now.

        Args:
            where: Its address.
            end: How its last exchange ended.
            thing: What `take` gives.
            give_up: Closes it. Called by a thread of its own if nobody has taken it in time.
        """
        seconds = KEPT.get(end)
        if seconds is None or (end is End.OFFERED and self._busy()):
            return False
        kept = _Kept(thing, give_up)
        key = where, _owner()
        timer = kept.timer = threading.Timer(seconds, self._too_late, (key, kept))
        timer.name, timer.daemon = "sharedpool-login", True
        try:
            timer.start()
        except RuntimeError:  # no more threads
            return False
        before, self._kept[key] = self._kept.get(key), kept
        if before is not None:
            before.end()
        return True

    def take(self, where: Hashable, fields: Iterable[tuple[str, str]]) -> Any:
        """What was kept for this thread or task and this address, or None.

        Args:
            where: The address.
            fields: The request's. One without a login may be of another user, whom the same thread serves.
        """
        if not self._kept or not logs_in(fields):
            return None
        kept = self._kept.pop((where, _owner()), None)
        return None if kept is None else kept.take()

    def clear(self) -> None:
        """Give all of them up."""
        kept, self._kept = self._kept, {}
        for each in kept.values():
            each.end()

    def _too_late(self, key: tuple[Hashable, Hashable], kept: _Kept) -> None:
        if self._kept.get(key) is kept:
            self._kept.pop(key, None)
        kept.end()


def _owner() -> Hashable:
    """The task that runs, else the thread: the object, because the number of one that has ended is given again."""
    if asyncio._get_running_loop() is not None:
        task = asyncio.current_task()
        if task is not None:
            return task
    return threading.current_thread()
