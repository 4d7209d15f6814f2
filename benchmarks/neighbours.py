"""Row 5: what a process with a busy interpreter lock does to another, idle one on the same pool.

The busy process has four threads that compute in pure Python and four that check out and in without pause. Measured
are the pairs of an otherwise idle process, and how long a waiter there takes to wake when the busy process gives
it the only permit.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
from array import array
from collections.abc import Iterator
from typing import Any

from benchmarks import servers
from benchmarks.harness import Actor, Limit, Missing, Row, library, micro, milli, missing_row, quantile, say

CAP = 16
THREADS = 4
PAIRS = "neighbours"
BATON = "baton"
PATIENCE = 120.0  # no time-out may end a measurement early


def baton() -> Any:
    return library().permit(BATON, max_connections=1, checkout_timeout=PATIENCE)


@contextlib.contextmanager
def noting_commits() -> Iterator[list[int]]:
    """The moments at which this thread begins the section that commits a grant."""
    from sharedpool.table import Table

    hand, thread, moments = Table.hand, threading.get_ident(), []

    def noting(self: Any, *arguments: Any) -> int:
        if threading.get_ident() == thread:
            moments.append(time.monotonic_ns())
        return hand(self, *arguments)

    Table.hand = noting  # type: ignore[method-assign,assignment]
    try:
        yield moments
    finally:
        Table.hand = hand  # type: ignore[method-assign]


class Busy:
    """The process with the neighbours; between `hold` and `give` it has the permit, while everything else runs on."""

    def __init__(self, port: int) -> None:
        self.pool = library().attach(PAIRS, max_connections=CAP)
        self.port = port
        self.stopping = False
        self.threads: list[threading.Thread] = []
        self.pairs_done = 0
        self.held: Any = None

    def start(self) -> None:
        self.stopping = False
        for target in (self._compute, self._pool):
            self.threads += [threading.Thread(target=target, daemon=True) for _ in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> int:
        """Pairs that the pool threads did since the start; without any, nothing was beside the idle process."""
        self.stopping = True
        for thread in self.threads:
            thread.join()
        self.threads.clear()
        return self.pairs_done

    def _compute(self) -> None:
        n = 0
        while not self.stopping:
            n += 1

    def _pool(self) -> None:
        while not self.stopping:
            with self.pool.connection(servers.HOST, self.port, checkout_timeout=PATIENCE):
                pass
            self.pairs_done += 1

    def hold(self) -> None:
        self.held = baton()
        self.held.__enter__()

    def give(self) -> int:
        """Gives the permit back as soon as somebody queues for it.

        Returns:
            The system-wide monotonic clock just before the section that commits the grant, in ns.
        """
        pool = library().attach(BATON)
        servers.wait_until(lambda: pool.stats().waiting == 1, PATIENCE, "the other process waits for the permit")
        with noting_commits() as commits:
            self.held.__exit__(None, None, None)
        assert len(commits) == 1, commits
        return commits[0]


class Idle:
    """The otherwise idle process."""

    def __init__(self, port: int) -> None:
        self.pool = library().attach(PAIRS, max_connections=CAP)
        self.port = port

    def latencies(self, pairs: int) -> bytes:
        """Seconds of each pair."""
        checkout, checkin, host, port = self.pool.checkout, self.pool.checkin, servers.HOST, self.port
        clock, values = time.perf_counter, array("d", bytes(8 * pairs))
        gc.collect()
        before = clock()
        for i in range(pairs):
            checkin(checkout(host, port))
            after = clock()
            values[i] = after - before
            before = after
        return values.tobytes()

    def take(self) -> int:
        """Queues for the permit; gives the clock at the moment it was granted, in ns."""
        with baton():
            return time.monotonic_ns()


def pair_run(idle: Actor, pairs: int) -> tuple[float, float]:
    """(p50, p99.9) in seconds."""
    values = array("d")
    values.frombytes(idle.call("latencies", pairs))
    return quantile(values, 0.5), quantile(values, 0.999)


def wake(busy: Actor, idle: Actor) -> float:
    """Seconds from the busy process's checkin to the waiter's return."""
    busy.call("hold")
    idle.send("take")
    given: int = busy.call("give")
    taken: int = idle.result()
    return (taken - given) / 1e9


def _measure(pairs: int, rounds: int, wakes: int) -> tuple[list[float], list[float], list[float], list[float]]:
    with servers.scope(), servers.echo() as (port,), Actor(Busy, port) as busy, Actor(Idle, port) as idle:
        alone, beside, wakes_alone, wakes_beside = [], [], [], []
        pair_run(idle, pairs // 4)  # warm-up
        for _ in range(rounds):
            alone.append(pair_run(idle, pairs))
            wakes_alone += [wake(busy, idle) for _ in range(wakes // rounds)]
            busy.call("start")
            beside.append(pair_run(idle, pairs))
            wakes_beside += [wake(busy, idle) for _ in range(wakes // rounds)]
            assert busy.call("stop") > 0, "the neighbours never got a lease"
        say(f"  alone:  p50 {micro(statistics.median(p50 for p50, _ in alone))}")
        say(f"  beside: p50 {micro(statistics.median(p50 for p50, _ in beside))}")
        return [tail for _, tail in alone], [tail for _, tail in beside], wakes_alone, wakes_beside


def rows(quick: bool) -> list[Row]:
    what = "warm pair beside 4 CPU-bound and 4 pool threads, p99.9"
    grant = "grant by that process, commit to having it, p90"
    try:
        alone, beside, wakes_alone, wakes_beside = _measure(*((20_000, 3, 30) if quick else (100_000, 5, 200)))
    except Missing as exc:
        return [missing_row("neighbours", text, str(exc)) for text in (what, grant)]
    tails = ", ".join(f"p{q * 100:g} {milli(quantile(wakes_beside, q))}" for q in (0.5, 0.9, 0.99))
    return [
        Row(
            "neighbours",
            what,
            [value * 1e3 for value in beside],
            "ms",
            Limit("<=", 1.0, 0.1),
            peer=f"alone {milli(statistics.median(alone))}",
        ),
        Row(
            "neighbours",
            grant,
            [quantile(wakes_beside, 0.9) * 1e3],
            "ms",
            Limit("<=", 0.5, 0.15),
            ours=tails,
            peer=f"idle granter {milli(quantile(wakes_alone, 0.9))}",
            note="upper bound: from before the section to the return of the checkout",
        ),
    ]
