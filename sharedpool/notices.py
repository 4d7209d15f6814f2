"""Who in this process wants to hear what is said to a pool, and telling them. It knows no pool and no connection."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

Callback = Callable[[Any], object]
#: The callbacks of one handle, by a key of their own: the same one may be there twice.
Callbacks = dict[object, Callback]


class Notices:
    """The callbacks of all handles of one process on one pool.

    Args:
        pool: The pool's name; what callbacks raise is logged as `sharedpool.pool.NAME`.
    """

    def __init__(self, pool: str) -> None:
        self._log = logging.getLogger(f"sharedpool.pool.{pool}")
        self._lock = threading.Lock()
        self._handles: tuple[Callbacks, ...] = ()

    def join(self, callbacks: Callbacks) -> None:
        """From now on the callbacks in this dict are told, whatever is put into it later."""
        with self._lock:
            self._handles = (*self._handles, callbacks)

    def part(self, callbacks: Callbacks) -> None:
        """They are told no more."""
        with self._lock:
            self._handles = tuple(known for known in self._handles if known is not callbacks)

    def tell(self, message: Any) -> None:
        """Call every callback with the message; what one raises is logged, and the next one is called."""
        for callbacks in self._handles:
            for callback in list(callbacks.values()):
                try:
                    callback(message)
                except BaseException:  # noqa: BLE001 - SystemExit, too, would end the thread that reads the events
                    self._log.exception("an on_notify callback failed: %r", callback)
