"""Waiting under gevent: a greenlet waits, not its thread. Loaded only in a process that gevent has patched.

Everything else needs nothing: sockets, threads and sleeps are gevent's there. Only the queue's futex would stop all
greenlets, so a thread of the system's own sleeps on it for all of them (`watching`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import gevent.event

from .native import original
from .watching import Watch


def start_thread(run: Callable[[], None]) -> None:
    """Start a thread that is none of gevent's."""
    original("_thread", "start_new_thread")(run, ())


class _Place:
    """A greenlet's place in the queue."""

    __slots__ = ("_event", "_loop", "cell", "kick", "rung", "seen")

    def __init__(self, cell: int, kick: int, seen: int) -> None:
        self.cell = cell
        self.kick = kick
        self.seen = seen
        self.rung = False
        self._event = gevent.event.Event()
        self._loop: Any = gevent.get_hub().loop

    def rest(self, seconds: float) -> None:
        """Until rung, or until the time is over."""
        self._event.wait(seconds)

    def ring(self) -> None:
        """Let the greenlet look, from whatever thread."""
        self._loop.run_callback_threadsafe(self._event.set)

    def lost(self) -> bool:
        """A greenlet that ends leaves the queue by itself."""
        return False

    def leave(self) -> bool:
        """Nothing: see `lost`."""
        return True


class Pause:
    """In the place of a thread's sleep: `pause(waiter, kick, nanoseconds)`.

    Args:
        watch: Who rings.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, waiter: Any, kick: int, nanoseconds: int) -> None:
        place = _Place(waiter.cell, waiter.kick, kick)
        try:
            self._watch.add(place)
            place.rest(nanoseconds / 1e9)
        finally:
            self._watch.remove(place)
