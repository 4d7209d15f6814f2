"""For tests: a scope of their own, an arbiter that is driven step by step, a clock that only moves when told to.

Shipped, so that drivers and integrations outside this package can be tested the same way. Nothing in the library
imports this module.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any, Final

from . import control, options
from .arbiter import Arbiter
from .invariants import check, violations
from .layout import FREE_SLOT, GATE, HIGH, IDLE, LEASED, OPENING, RESERVING, opening_word, tag_of, with_state
from .served import ServedPool
from .table import DONE, NoLease, Table

__all__ = ["FakeClock", "SteppedArbiter", "SteppedWorker", "check", "scope", "violations"]

_VARIABLES: Final = ("SHAREDPOOL_DIR", "SHAREDPOOL_APP", "SHAREDPOOL_MODE")


@contextlib.contextmanager
def scope(mode: str = "shared") -> Iterator[str]:
    """A runtime directory of one's own for the block; its arbiter is stopped and everything removed at the end.

    Args:
        mode: "shared", or "local" for no arbiter at all.
    """
    kept = {name: os.environ.get(name) for name in _VARIABLES}
    with tempfile.TemporaryDirectory(prefix="sharedpool-test-") as directory:
        for name in _VARIABLES:
            os.environ.pop(name, None)
        os.environ["SHAREDPOOL_DIR"] = directory
        os.environ["SHAREDPOOL_MODE"] = mode
        try:
            yield directory
        finally:
            control.stop()
            for name, value in kept.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class FakeClock:
    """Monotonic nanoseconds that stand still until `advance`."""

    def __init__(self, now: int = 1_000_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.now += int(seconds * 1e9)


class SteppedWorker:
    """A process that exists only in the table: a row of its own, in the hands of a test.

    Args:
        arbiter: The arbiter it is attached to.
        pool: The pool it is attached to.
        pid: The pid in its row.
    """

    def __init__(self, arbiter: SteppedArbiter, pool: ServedPool, pid: int) -> None:
        self._arbiter = arbiter
        self._pool = pool
        row = pool.claim_row(pid, 1, arbiter.clock())
        assert row is not None
        self.table: Table = pool.segment.table(row)
        self._ends: dict[int, socket.socket] = {}

    def open(self, key: int = 1) -> int:
        """Open a connection (one end of a socket pair, registered with the arbiter) and lease it; gives its place.

        Raises:
            AssertionError: The cap is reached, or somebody waits.
        """
        w, lease = self.table.words, NoLease()
        at = w[FREE_SLOT] or self.table.slot_at(w[HIGH])
        new = opening_word(w[at], self.table.row)
        done = self.table.take_free(at, w[at], new, w[GATE], lease, key, self.table.counter(3), self._arbiter.clock())
        assert done == DONE, "the cap is reached, or somebody waits"
        ours, theirs = socket.socketpair()
        self._ends[at] = theirs
        self._pool.register(self.table.row, self.table.slot_index(at), new >> 24 & 0xFFF_FFFF, ours)
        self._change(at, OPENING, LEASED)
        return at

    def leave_idle(self, at: int) -> None:
        """Check a connection in, where nobody waits."""
        w = self.table.words
        tag, gate, now = tag_of(w[at + 1]), w[GATE], self._arbiter.clock()
        if gate & RESERVING:
            done = self.table.put_idle_counted(at, w[at], with_state(w[at], IDLE), gate, 0, 0, 0, tag, now)
        else:
            done = self.table.put_idle(at, w[at], with_state(w[at], IDLE), gate, tag, now)
        assert done == DONE, "somebody waits, or the limit was lowered"

    def peer(self, at: int) -> socket.socket:
        """The remote's end of a connection."""
        return self._ends[at]

    def close(self) -> None:
        """Close the remotes' ends."""
        for end in self._ends.values():
            end.close()

    def die(self) -> None:
        """The process has gone."""
        self._pool.reap(self.table.row, self._arbiter.clock())

    def _change(self, at: int, old: int, new: int) -> None:
        w = self.table.words
        assert w[at] & 15 == old
        assert self.table.swap(at, w[at], with_state(w[at], new), NoLease(), 0, 0, self._arbiter.clock()) == DONE


class SteppedArbiter(Arbiter):
    """An arbiter in this process, without a socket: it does one turn at a time, and time passes when told to."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self._workers: list[SteppedWorker] = []
        super().__init__(None, b"", 3600.0, self.clock)

    def pool(self, name: str = "default", **given: Any) -> ServedPool:
        """Declare a pool."""
        pool, _ = self.declare(name, options.given(name, given, {}), os.getpid())
        return pool

    def worker(self, pool: ServedPool, pid: int = 1) -> SteppedWorker:
        """Attach a process that exists only in the table."""
        worker = SteppedWorker(self, pool, pid)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """Close every connection, the remotes' ends too."""
        for worker in self._workers:
            worker.close()
        super().close()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and do what is due then."""
        self.clock.advance(seconds)
        self.step(0)
