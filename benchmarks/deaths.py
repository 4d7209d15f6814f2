"""Row 7: how long after the SIGKILL of a worker that holds every lease a waiter elsewhere has one of its own."""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import Any

from benchmarks import servers
from benchmarks.harness import Actor, Limit, Missing, Row, library, milli, missing_row, quantile, say

CAP = 4
POOL = "deaths"
PATIENCE = 60.0


def attach() -> Any:
    return library().attach(POOL, max_connections=CAP)


class Nursery:
    """Forks the workers that will be killed; it never attaches itself, and reaps them."""

    def __init__(self, port: int) -> None:
        self.pool = attach()
        self.port = port

    def worker(self) -> int:
        """A new process that holds all leases by the time this returns."""
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._hold_all(tell)
        os.close(tell)
        ready = os.read(told, 1) == b"."
        os.close(told)
        assert ready, "the worker could not get all leases"
        return pid

    def _hold_all(self, tell: int) -> None:
        try:
            leases = [self.pool.checkout(servers.HOST, self.port, checkout_timeout=PATIENCE) for _ in range(CAP)]
            os.write(tell, b".")
            while leases:
                signal.pause()
        finally:
            os._exit(1)

    def reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, status


class Waiter:
    def __init__(self, port: int) -> None:
        self.pool = attach()
        self.port = port

    def wait(self) -> int:
        """Queues, and gives the clock when the lease is here, in ns; the connection must be alive."""
        with self.pool.connection(servers.HOST, self.port, checkout_timeout=PATIENCE) as conn:
            now = time.monotonic_ns()
            conn.sendall(b"alive")
            assert conn.recv(16) == b"alive"
        return now


class Observer:
    """Looks at the pool from a third process, so that neither of the two is disturbed."""

    def __init__(self) -> None:
        self.pool = attach()

    def until_waiting(self, count: int) -> None:
        servers.wait_until(lambda: self.pool.stats().waiting == count, PATIENCE, f"{count} waiting")


def kill_once(nursery: Actor, waiter: Actor, observer: Actor) -> float:
    """Seconds from the kill to the new lease."""
    pid = nursery.call("worker")
    waiter.send("wait")
    observer.call("until_waiting", 1)
    start = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    taken: int = waiter.result()
    nursery.call("reap", pid)
    return (taken - start) / 1e9


def rows(quick: bool) -> list[Row]:
    what, kills = "SIGKILL of the holder of all leases to a new lease, p99", 25 if quick else 100
    try:
        with (
            servers.scope(),
            servers.echo() as (port,),
            Actor(Nursery, port) as nursery,
            Actor(Waiter, port) as waiter,
            Actor(Observer) as observer,
        ):
            times = [kill_once(nursery, waiter, observer) for _ in range(kills)]
    except Missing as exc:
        return [missing_row("deaths", what, str(exc))]
    p50 = milli(statistics.median(times))
    say(f"  {kills} kills: p50 {p50}, max {milli(max(times))}")
    return [Row("deaths", what, [quantile(times, 0.99) * 1e3], "ms", Limit("<=", 20.0, 5.0), f"p50 {p50}")]
