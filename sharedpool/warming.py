"""Keeps connections of named keys open, in the background. Decides when; the attachment opens them.

Never takes a permit that anybody waits for, never closes anything for one, and lets go of an opening under way as soon
as somebody queues.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
import weakref
from typing import Final, Protocol

from .errors import SharedPoolError
from .held import Route

#: Whether connections are missing is looked at so often, s.
_EVERY: Final = 0.25
#: After a failure, no sooner than this, doubled with each further one, s.
_AFTER_FAILURE: Final = 0.5
_LONGEST_BREAK: Final = 30.0
#: Whether somebody queues is looked at so often while a connection is being opened, s.
_WATCH: Final = 0.005


class Opening:
    """A connection that is being opened, and may be broken off.

    Attributes:
        begun: Whether a permit was there.
        broken: Whether it was broken off.
        failed: Whether it came to nothing.
    """

    __slots__ = ("_lock", "_sock", "begun", "broken", "failed")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self.begun = self.broken = self.failed = False

    def begin(self, sock: socket.socket) -> None:
        """This socket is about to be connected."""
        with self._lock:
            self.begun = True
            self._sock = sock

    def end(self) -> None:
        """It is connected: it can no longer be broken off."""
        with self._lock:
            self._sock = None

    def break_off(self) -> None:
        """Whoever connects the socket is told that it was reset."""
        with self._lock:
            if self._sock is not None:
                self.broken = True
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)


class Warms(Protocol):
    """What a Warmer needs of an attachment."""

    inert: bool

    def missing(self, route: Route, count: int | None) -> int: ...
    def crowded(self) -> bool: ...
    def has_room(self) -> bool: ...
    def warm(self, route: Route, count: int | None, connect_timeout: float, opening: Opening) -> None: ...


class _Named:
    """A key that is to be kept warm: how, how often in a row it failed, and when to try again."""

    __slots__ = ("again", "count", "failures", "seconds")

    def __init__(self, count: int | None, seconds: float) -> None:
        self.count = count
        self.seconds = seconds
        self.failures = 0
        self.again = 0.0


class Warmer:
    """The keys that one process has named, and the thread that looks after them.

    Args:
        attached: Opens connections; when it has gone, the thread ends.
        pool: The pool's name.
    """

    def __init__(self, attached: Warms, pool: str) -> None:
        self._attached = weakref.ref(attached)
        self._pool = pool
        self._named: dict[Route, _Named] = {}
        self._bell = threading.Event()
        self._ended = False
        self._random = random.Random(os.getpid())
        threading.Thread(target=self._run, name=f"sharedpool-{pool}-warm", daemon=True).start()

    def name(self, route: Route, count: int | None, connect_timeout: float) -> None:
        """Keep so many connections of a key; 0: no longer."""
        if count == 0:
            self._named.pop(route, None)
        else:
            self._named[route] = _Named(count, connect_timeout)
            self._bell.set()

    def stop(self) -> None:
        """End; what is being opened is broken off."""
        self._ended = True
        self._bell.set()

    def _run(self) -> None:
        while not self._ended:
            self._bell.clear()
            attached = self._attached()
            if attached is None or attached.inert:
                return
            soon = False
            for route, named in list(self._named.items()):
                soon |= self._look_after(attached, route, named)
            del attached
            # Two processes that gave way to each other must not do it for ever.
            self._bell.wait(self._random.uniform(0.002, 0.02) if soon else _EVERY)

    def _look_after(self, attached: Warms, route: Route, named: _Named) -> bool:
        """Open what is missing; whether to come again soon."""
        for _ in range(max(0, attached.missing(route, named.count))):
            if self._ended or not attached.has_room() or time.monotonic() < named.again:
                return False
            if attached.missing(route, named.count) <= 0:
                return False
            opening = self._open(attached, route, named)
            if opening.broken:
                return False
            if opening.failed:
                named.failures += 1
                wait = min(_LONGEST_BREAK, _AFTER_FAILURE * 2 ** (named.failures - 1))
                named.again = time.monotonic() + wait
                return False
            named.failures = 0
            if not opening.begun:  # no permit, or another process was faster
                return attached.missing(route, named.count) > 0 and attached.has_room()
        return False

    def _open(self, attached: Warms, route: Route, named: _Named) -> Opening:
        """Open one in a thread of its own, and break it off if somebody queues meanwhile."""
        opening = Opening()

        def attempt() -> None:
            try:
                attached.warm(route, named.count, named.seconds, opening)
            except (SharedPoolError, OSError):
                opening.failed = True

        thread = threading.Thread(target=attempt, name=f"sharedpool-{self._pool}-warming", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_WATCH)
            if self._ended or attached.crowded():
                opening.break_off()  # again and again: a socket that does not connect yet has nothing to break off
        return opening
