"""What a process wants to be told: callbacks by event. A callback's error is logged, and nothing is lost by it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from .errors import OptionError

EVENTS: Final = ("open", "close", "checkout", "checkin", "wait", "abandoned")

Callback = Callable[..., object]


class Hooks:
    """The callbacks of one process for one pool.

    Args:
        name: The pool's name; errors of callbacks are logged on `sharedpool.pool.NAME`.
    """

    __slots__ = ("_callbacks", "log")

    def __init__(self, name: str) -> None:
        self.log = logging.getLogger(f"sharedpool.pool.{name}")
        self._callbacks: dict[str, list[Callback]] = {event: [] for event in EVENTS}

    def of(self, event: str) -> list[Callback]:
        """The callbacks of an event; always the same list, so that whoever has it need only look whether it is empty.

        Raises:
            OptionError: There is no such event.
        """
        found = self._callbacks.get(event)
        if found is None:
            known = ", ".join(EVENTS)
            raise OptionError(
                f"option 'event' has the value {event!r} (from the call); allowed is one of {known}",
                option="event", value=event, source="the call", allowed=EVENTS,
            )  # fmt: skip
        return found

    def tell(self, event: str, *facts: Any) -> None:
        """Call everybody who asked for an event."""
        for callback in tuple(self._callbacks[event]):
            try:
                callback(*facts)
            except Exception:
                self.log.exception("a callback of on_%s failed: %r", event, callback)
