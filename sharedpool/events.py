"""What a process does with what the arbiter tells it unasked: log records, and leases that it seems to have forgotten.

Called by the event thread. Nothing raised by a hook or by the logging of the application may reach it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FrameType
from typing import Any, Final

#: Where a lease was taken: the code and the instruction in it. The line is looked up when somebody asks for it.
Place = tuple[CodeType, int]

_LIBRARY: Final = os.path.dirname(__file__) + os.sep


class _Ours(dict[str, bool]):
    """Whether a file is this library's, remembered: looking it up in a dict takes a quarter of comparing prefixes."""

    def __missing__(self, file: str) -> bool:
        self[file] = file.startswith(_LIBRARY)
        return self[file]


OURS: Final = _Ours()


@dataclasses.dataclass(frozen=True, slots=True)
class Abandoned:
    """A lease of this process that has lasted longer than lease_timeout.

    Attributes:
        pool: The pool's name.
        thread: The thread that took it, by its ident; 0 if that is no longer known.
        thread_name: Its name.
        seconds: For how long it has been held.
        where: The line of code that took it; or, where that was not noted, the one at which that thread is now.
        noted: Whether `where` is the line that took it.
        reclaimed: Whether its connection has been taken away.
    """

    pool: str
    thread: int
    thread_name: str
    seconds: float
    where: str
    noted: bool
    reclaimed: bool


Hook = Callable[[Abandoned], object]


def where_taken(frame: FrameType | None) -> Place | None:
    """The caller's place in the application: the first frame from here on outwards that is not this library's.

    It keeps no frame, and so nothing that lives in one. 0.1 us.
    """
    while frame is not None:
        code = frame.f_code
        if not OURS[code.co_filename]:
            return code, frame.f_lasti
        frame = frame.f_back
    return None


def line_of(place: Place) -> str:
    """A place for people: `/app/views.py:31 in show`."""
    code, instruction = place
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            line = number
    return f"{code.co_filename}:{line} in {code.co_qualname}"


def where_now(thread: int) -> str:
    """The line of the application at which a thread is now."""
    place = where_taken(sys._current_frames().get(thread))
    return "a thread that has ended" if place is None else line_of(place)


def abandoned(pool: str, thread: int, place: Place | None, facts: Mapping[str, Any]) -> Abandoned:
    """What is known of a lease that lasts too long."""
    names = {each.ident: each.name for each in threading.enumerate()}
    return Abandoned(
        pool=pool, thread=thread, thread_name=names.get(thread, "ended"), seconds=float(facts.get("seconds") or 0),
        where=where_now(thread) if place is None else line_of(place), noted=place is not None,
        reclaimed=bool(facts.get("reclaimed")),
    )  # fmt: skip


def report(found: Abandoned, hooks: Iterable[Hook]) -> None:
    """Log it and call the hooks; one that raises is logged and does not keep the others from being called."""
    log = logging.getLogger(f"sharedpool.pool.{found.pool}")
    _say(
        log, logging.WARNING, "pool %r: abandoned: thread %r (%d) has held a lease for %.1f s, %s %s%s", found.pool,
        found.thread_name, found.thread, found.seconds, "taken at" if found.noted else "and is now at", found.where,
        "; its connection has been taken away" if found.reclaimed else "",
    )  # fmt: skip
    for hook in list(hooks):
        try:
            hook(found)
        except Exception as error:  # noqa: BLE001 - the user's code, in our thread
            _say(log, logging.ERROR, "pool %r: an on_abandoned hook failed", found.pool, error=error)


def log_again(facts: Mapping[str, Any]) -> None:
    """A record of the arbiter's, in this process's logging."""
    name, level = str(facts.get("logger")), facts.get("level")
    if name.partition(".")[0] == "sharedpool" and isinstance(level, int):
        _say(logging.getLogger(name), level, "%s", facts.get("text"))


def _say(log: logging.Logger, level: int, text: str, *values: Any, error: Exception | None = None) -> None:
    """Log something; a filter of the application's may raise, and must not end the thread that closes connections."""
    try:
        log.log(level, text, *values, exc_info=error)
    except Exception:  # noqa: BLE001
        traceback.print_exc()
