"""What the arbiter logs, kept until a worker's logging can have it. Bounded in number, size and rate; never blocks."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

#: Records kept while nobody can have them.
ROOM: Final = 200
#: Records shipped in a second: the event channel has more important things to carry.
_RATE: Final = 50
#: Characters of one record: a traceback fits, and a message of escapes only is not too long.
_LONGEST: Final = 4_000
_POOLS: Final = "sharedpool.pool."


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """One record: its logger's name, its level, its text with what was raised."""

    logger: str
    level: int
    text: str

    @property
    def pool(self) -> str | None:
        """The pool that it is about, by its logger."""
        return self.logger[len(_POOLS) :] if self.logger.startswith(_POOLS) else None


class Records(logging.Handler):
    """Takes what is logged, from whatever thread; the arbiter's loop takes it from here.

    What is beyond the bounds is dropped and counted, and the next record that is shipped is followed by their number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self._waiting: deque[Kept] = deque()
        self._counting = threading.Lock()
        self._second = 0
        self._taken = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, or count it as dropped."""
        try:
            text = self.format(record)[:_LONGEST]
        except Exception:  # noqa: BLE001 - as every handler does: a wrong log call must not harm who made it
            self.handleError(record)
            return
        self.keep(Kept(record.name, record.levelno, text))

    def keep(self, record: Kept) -> None:
        """Keep it (again, if nobody could have it)."""
        with self._counting:
            if len(self._waiting) >= ROOM:
                self.dropped += 1
            else:
                self._waiting.append(record)

    def take(self) -> Iterator[Kept]:
        """What may be shipped now."""
        for _ in range(len(self._waiting)):
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._taken = second, 0
            if self._taken >= _RATE:
                return
            self._taken += 1
            yield self._waiting.popleft()
        if self.dropped and not self._waiting:
            with self._counting:
                number, self.dropped = self.dropped, 0
            yield Kept("sharedpool.arbiter", logging.WARNING, f"{number} records of the arbiter were dropped")
