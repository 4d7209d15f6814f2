"""For tests: local mode, no lease left, no permit left; a scope of their own, an arbiter driven step by step, a clock
that only moves when told to.

Shipped, so that drivers and integrations outside this package can be tested the same way. Nothing in the library
imports this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from . import control, inspection, local, options, view
from .arbiter import Arbiter
from .attachment import Attachment
from .errors import PoolNotFound, PoolTimeout
from .invariants import check, violations
from .layout import FREE_SLOT, GATE, HIGH, IDLE, KEY, LEASED, MAX_PER_KEY, RESERVING, opening_word, tag_of, with_state
from .lease import Lease
from .lines import COUNTS, Lines
from .local import LocalPool
from .pool import Permit, Pool, close_all, mode
from .served import ServedPool
from .table import DONE, NoLease, Table

__all__ = [
    "FakeClock",
    "SteppedArbiter",
    "SteppedWorker",
    "assert_no_leases",
    "check",
    "exhausted",
    "local_mode",
    "scope",
    "violations",
]

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


@contextlib.contextmanager
def local_mode() -> Iterator[None]:
    """Local mode for the block: pools of this process only, new in it and gone after it, whatever it leaves behind.

    Handles that this process has attached are detached before and after it, those made at import, too; each attaches
    anew at its next use. Leases that are left in the block end with it: their connections are closed.
    """
    _start_anew()
    with scope("local"):
        try:
            yield
        finally:
            _start_anew()


def _start_anew() -> None:
    close_all()
    local.forget_all()


@dataclasses.dataclass(frozen=True, slots=True)
class _Lease:
    """A lease in force, for a message: where it leads, for how many seconds, and who has it."""

    where: str
    age: float
    pid: int
    thread: int

    def __str__(self) -> str:
        who = f"process {self.pid}"
        if self.pid == os.getpid():
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            who += f" (this one), thread {names.get(self.thread, 'that has ended')!r}"
        return f"{self.where} for {self.age:.2f} s by {who}"


def assert_no_leases(pool: Pool[Any] | Permit, wait: float = 0.0) -> None:
    """Every lease of the pool has been given back, by this process and by all others of its scope.

    Args:
        pool: The handle of a pool, or a permit.
        wait: So many seconds the leases have for coming back.

    Raises:
        AssertionError: Some are in force; it names where each leads, its age, and its process and thread.
    """
    handle = pool.pool if isinstance(pool, Permit) else pool
    limit = time.monotonic() + wait
    while found := _leases_of(handle):
        if time.monotonic() >= limit:
            listed = "".join(f"\n  {lease}" for lease in found)
            raise AssertionError(f"pool {handle.name!r} has {len(found)} leases in force:{listed}")
        time.sleep(0.005)


def _leases_of(pool: Pool[Any]) -> list[_Lease]:
    attached = pool.attached
    if isinstance(attached, LocalPool):
        return _local_leases(attached)
    if isinstance(attached, Attachment):
        return _shared_leases(attached)
    if mode() == "local":  # nobody else could have any
        return []
    try:
        found = inspection.ask(inspection.directory(pool.app), "leases", pool.name)
    except PoolNotFound:
        return []
    return [_Lease(lease["key"], lease["age"], lease["pid"], 0) for lease in found]


def _local_leases(pool: LocalPool) -> list[_Lease]:
    pool.stats()  # which looks after forgotten leases
    now, leased = time.monotonic(), [slot for slot in list(pool.slots) if slot.state == "in_use"]
    return [_Lease(slot.route.where, now - slot.since, os.getpid(), slot.thread) for slot in leased]


def _shared_leases(attached: Attachment) -> list[_Lease]:
    attached.tidy()  # ends what was forgotten
    w, now = attached.words, time.monotonic_ns()
    names = {route.key: route.where for route in list(attached.routes.values())}
    found = []
    for lease in view.leases(w, attached.segment.geometry):
        at = attached.table.slot_at(lease.index)
        entry = attached.entries.get(at)
        thread = attached.permits.get(at, 0) if entry is None else entry.thread
        key = w[at + KEY]
        found.append(_Lease(names.get(key, f"#{key:016x}"), (now - lease.since) / 1e9, lease.pid, thread))
    return found


@contextlib.contextmanager
def exhausted(pool: Pool[Any] | Permit, wait: float = 5.0) -> Iterator[None]:
    """All of the pool's cap is taken for the block, so that a checkout in it has to wait: PoolTimeout, TooManyWaiting.

    Takes permits, and opens no connection. Idle connections are closed for it, as for every waiter.

    Args:
        pool: The handle of a pool, or a permit.
        wait: So many seconds taking the whole cap may last.

    Raises:
        AssertionError: It could not be taken in this time.
    """
    handle = pool.pool if isinstance(pool, Permit) else pool
    limit = time.monotonic() + wait
    taken: list[Lease[Any]] = []
    try:
        while not _all_leased(handle):
            left = limit - time.monotonic()
            if left <= 0:
                raise AssertionError(f"pool {handle.name!r} could not be exhausted in {wait} s: {handle.stats()}")
            with contextlib.suppress(PoolTimeout):  # somebody's lease came in between: look again
                name = f"exhausted-{len(taken)}"  # keys of their own: a limit per key does not stop it
                taken.append(handle.checkout(name, 0, "permit", checkout_timeout=min(left, 0.1)))
        yield
    finally:
        for lease in taken:
            if lease.in_force:
                lease.checkin()


def _all_leased(pool: Pool[Any]) -> bool:
    stats = pool.stats()
    return stats.in_use >= stats.max_connections


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
        self.lines = Lines(self.table)
        self._ends: dict[int, socket.socket] = {}

    def open(self, key: int = 1) -> int:
        """Open a connection (one end of a socket pair, registered with the arbiter) and lease it; gives its place.

        Raises:
            AssertionError: The cap is reached, or somebody waits.
        """
        w, lease = self.table.words, NoLease()
        at = w[FREE_SLOT] or self.table.slot_at(w[HIGH])
        new = opening_word(w[at], self.table.row)
        attempts = self.lines.place(key) + COUNTS["attempts"]
        gate, now = w[GATE], self._arbiter.clock()
        keyed = view.keyed(w, gate)
        full = keyed and view.count_keys(w, self._pool.segment.geometry).get(key, 0) >= w[MAX_PER_KEY]
        assert not full, "the key has as many as it may"
        done = self.table.take_free(at, w[at], new, gate, lease, key, attempts, now, 0, 0, 0, keyed)
        assert done == DONE, "the cap is reached, or somebody waits"
        ours, theirs = socket.socketpair()
        if at in self._ends:
            self._ends[at].close()
        self._ends[at] = theirs
        self._pool.register(self.table.row, self.table.slot_index(at), new >> 24 & 0xFFF_FFFF, ours)
        w, seen = self.table.words, new
        opened = self.lines.place(key) + COUNTS["opened"]
        done = self.table.connected(at, seen, with_state(seen, LEASED), NoLease(), 0, opened, self._arbiter.clock())
        assert done == DONE
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
