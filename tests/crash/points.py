"""Counts the boundary calls of this process, and ends it, or raises, at the k-th. Only ever installed in a victim.

A boundary call is whatever others can see: a store into the shared words, trylock and unlock, a message, a close, a
shutdown, a connect, a dup. The process is ended just before it; after the last one it was ended before the next.
Nothing of the library knows of this: the objects through which it reaches the outside are replaced in this process.
The library has to run as it is written (SHAREDPOOL_SPEED=pure).
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import sharedpool.fdpass
import sharedpool.held
import sharedpool.segment
from sharedpool.native import Call


class SoftTimeLimitExceeded(Exception):
    """As Celery's: raised by a signal handler, wherever the program is."""


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _exit() -> None:
    raise SystemExit("by a signal handler")


def _time_out() -> None:
    raise SoftTimeLimitExceeded


def _execute() -> None:
    os.execv("/bin/sleep", ["sleep", "60"])


#: The ways to end.
WAYS: dict[str, Callable[[], None]] = {"kill": _kill, "exit": _exit, "time out": _time_out, "exec": _execute}


class Counter:
    """Counts down to the point at which this process ends; armed or not."""

    def __init__(self) -> None:
        self.count = 0
        self._left = 0
        self._act: Callable[[], None] | None = None
        self._raises = False
        self.inside = False
        self.last = ""

    def arm(self, k: int, way: str) -> None:
        """From now on count, and act at the k-th; 0: only count."""
        self.count, self._left, self._act = 0, k, WAYS[way]
        self._raises = way in ("exit", "time out")
        self._thread = threading.get_ident()

    def disarm(self) -> int:
        """Gives how many there were."""
        self._act = None
        return self.count

    def point(self, what: str) -> None:
        """A boundary call is about to be made."""
        if self._act is None:
            return
        # Handlers of signals run in the main thread, and between the calls of a section they cannot.
        if self._raises and (self.inside or threading.get_ident() != self._thread):
            return
        self.count += 1
        if self.count == self._left:
            act, self._act = self._act, None
            self.last = what
            act()


counter = Counter()


class Words:
    """Shared words whose stores are counted."""

    def __init__(self, words: Any, what: str) -> None:
        self._words, self._what = words, what

    def __getitem__(self, place: Any) -> Any:
        return self._words[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        counter.point(self._what)
        self._words[place] = value

    def __len__(self) -> int:
        return len(self._words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._words, name)


def _counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        counter.point(what)
        return function(*arguments, **options)

    return call


def _mutex(real: Call) -> Call:
    def trylock() -> int:
        counter.point("trylock")
        code = -real
        counter.inside = code == 0
        return code

    def unlock() -> int:
        counter.point("unlock")
        code = +real
        counter.inside = False
        counter.point("after unlock")
        return code

    return Call(trylock, unlock, _counted("consistent", lambda: ~real))


class Gate(sharedpool.held.Gate):
    """Parking and unparking, counted."""

    __slots__ = ()

    def __init__(self, real: int, number: int, dead: int) -> None:
        super().__init__(real, number, dead)
        self.__pos__ = _counted("dup3", self.__pos__)  # type: ignore[method-assign]
        self.__neg__ = _counted("dup3", self.__neg__)  # type: ignore[method-assign]


def install() -> None:
    """Replace what leads to the outside, in this process, for everything that is made from now on."""
    real_map = sharedpool.segment._map

    def mapped(*arguments: Any) -> Any:
        segment = real_map(*arguments)
        words: Any = Words(segment.words, "store")
        marks: Any = Words(segment.marks, "store")
        segment.words, segment.marks, segment.mutex = words, marks, _mutex(segment.mutex)
        return segment

    module: Any = sharedpool.segment
    real_waker = module.waker

    def waker(address: int) -> Call:
        call = real_waker(address)
        return Call(_counted("wake", lambda: -call))

    module._map, module.waker = mapped, waker
    for owner, names in (
        (sharedpool.fdpass, ("send", "receive")),
        (os, ("close", "dup")),
        (socket.socket, ("connect", "shutdown", "close", "setblocking")),
    ):
        for name in names:
            setattr(owner, name, _counted(name, getattr(owner, name)))
    held: Any = sharedpool.held
    held.Gate = Gate
