"""What the users of a chaos run note down, in a file that all of them map: it outlives whoever is killed."""

from __future__ import annotations

import mmap
from collections import Counter
from pathlib import Path

#: How a user's attempt ended.
OUTCOMES = (
    "done", "discarded", "closed", "leaked", "given up", "left unread", "failed inside", "kept",
    "timed out", "refused", "stopped", "no arbiter", "lease taken away", "ended by the remote", "spoiled", "forked",
)  # fmt: skip

BEGAN, LIMIT, CROSSED, UNEXPECTED, FIRST = range(5)
_WIDTH = FIRST + len(OUTCOMES)
_STOP = 0


class Board:
    """A row of numbers for every thread of every worker; each has one writer at a time.

    BEGAN and LIMIT are those of the call under way, monotonic ns; BEGAN is 0 between calls.
    """

    def __init__(self, path: Path, workers: int, threads: int) -> None:
        self.workers, self.threads = workers, threads
        size = 8 * (1 + workers * threads * _WIDTH)
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)
        self.words = memoryview(self._memory).cast("Q")

    def row(self, worker: int, thread: int) -> int:
        return 1 + (worker * self.threads + thread) * _WIDTH

    @property
    def stopped(self) -> bool:
        return bool(self.words[_STOP])

    def stop(self, flag: bool = True) -> None:
        """Tell all users to come to an end."""
        self.words[_STOP] = flag

    def clear(self, worker: int) -> None:
        """A worker's threads are no longer in any call: it is dead."""
        for thread in range(self.threads):
            self.words[self.row(worker, thread) + BEGAN] = 0

    def overdue(self, worker: int, now: int) -> list[int]:
        """For every thread of a worker that is in a call past its limit: by how much, ns."""
        found = []
        for thread in range(self.threads):
            row = self.row(worker, thread)
            began, limit = self.words[row + BEGAN], self.words[row + LIMIT]
            if began and now > limit:
                found.append(now - limit)
        return found

    def total(self, place: int) -> int:
        return sum(self.words[self.row(w, t) + place] for w in range(self.workers) for t in range(self.threads))

    def outcomes(self) -> Counter[str]:
        counts = {name: self.total(FIRST + index) for index, name in enumerate(OUTCOMES)}
        return Counter({name: count for name, count in counts.items() if count})

    def close(self) -> None:
        self.words.release()
        self._memory.close()
