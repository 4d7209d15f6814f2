"""Deaths: how long after the SIGKILL of a worker that holds every lease a waiter elsewhere has one of its own; how long
after the arbiter's death a connection can be opened again; and whether anybody else's request fails while workers die.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import statistics
import time
from contextlib import ExitStack
from typing import Any

from benchmarks import servers
from benchmarks.harness import Actor, Limit, Missing, Row, library, milli, missing_row, quantile, say

CAP = 4
POOL = "deaths"
PATIENCE = 60.0
WORKERS = 8


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


class Opener:
    """Opens a connection of its own each time, which needs an arbiter."""

    def __init__(self, port: int) -> None:
        self.pool = attach()
        self.port = port

    def arbiter(self) -> int:
        """Its pid, once nothing of the last round is left."""
        servers.wait_until(lambda: self.pool.stats().connections == 0, PATIENCE, "no connections")
        pid: int = library().ping()["pid"]
        return pid

    def open(self) -> int:
        """Gives the clock when the lease is here, in ns."""
        lease = self.pool.checkout(servers.HOST, self.port, checkout_timeout=PATIENCE, connect_timeout=PATIENCE)
        now = time.monotonic_ns()
        lease.discard()
        return now


class Spinner:
    """A busy process."""

    def spin(self) -> None:
        while True:
            pass


def succeed_once(opener: Actor) -> float:
    """Seconds from the SIGKILL of the arbiter to a lease that only its successor could make possible."""
    pid = opener.call("arbiter")
    process = os.pidfd_open(pid)
    start = time.monotonic_ns()
    os.kill(pid, signal.SIGKILL)
    select.select([process], [], [])  # a message to it while it dies would be taken for delivered
    os.close(process)
    opened: int = opener.call("open")
    return (opened - start) / 1e9


def successions(kills: int, busy: int) -> list[float]:
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        (port,) = stack.enter_context(servers.echo())
        opener = stack.enter_context(Actor(Opener, port))
        for _ in range(busy):
            spinner = Actor(Spinner)
            stack.callback(os.kill, spinner.pid, signal.SIGKILL)
            spinner.send("spin")
        return [succeed_once(opener) for _ in range(kills)]


class Herd:
    """Workers that make requests without an end; one of them is killed every half second."""

    def __init__(self, port: int) -> None:
        self.pool = attach()
        self.port = port
        self.counts = memoryview(mmap.mmap(-1, 16 * WORKERS)).cast("Q")  # requests done and failed, of each worker

    def run(self, seconds: float) -> tuple[int, int, int]:
        """How many requests were done, how many failed, and how many workers were killed."""
        pids = [self._worker(index) for index in range(WORKERS)]
        kills, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.5)
            index = kills % WORKERS
            self._kill(pids[index])
            pids[index] = self._worker(index)
            kills += 1
        for pid in pids:
            self._kill(pid)
        return sum(self.counts[::2]), sum(self.counts[1::2]), kills

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def _worker(self, index: int) -> int:
        pid = os.fork()
        if pid == 0:
            while True:
                self._request(2 * index)
        return pid

    def _request(self, at: int) -> None:
        try:
            with self.pool.connection(servers.HOST, self.port, checkout_timeout=PATIENCE) as conn:
                conn.sendall(b"alive")
                assert conn.recv(16) == b"alive"
            self.counts[at] += 1
        except BaseException:  # noqa: BLE001 - whatever it is, it counts
            self.counts[at + 1] += 1


def holder_of_all(quick: bool) -> Row:
    what, kills = "SIGKILL of the holder of all leases to a new lease, p99", 25 if quick else 200
    with (
        servers.scope(),
        servers.echo() as (port,),
        Actor(Nursery, port) as nursery,
        Actor(Waiter, port) as waiter,
        Actor(Observer) as observer,
    ):
        times = [kill_once(nursery, waiter, observer) for _ in range(kills)]
    return _row(what, times, Limit("<=", 20.0, 5.0))


def arbiter(quick: bool, busy: int, limit: Limit) -> Row:
    what = f"SIGKILL of the arbiter to a connection opened by its successor, {busy or 'no'} busy processes, p99"
    return _row(what, successions(10 if quick else 50, busy), limit)


def herd(quick: bool) -> Row:
    seconds = 10 if quick else 60
    with servers.scope(), servers.echo() as (port,), Actor(Herd, port) as workers:
        done, failed, kills = workers.call("run", seconds)
    assert done > kills, "they did nothing"
    what = f"a worker killed every 0.5 s for {seconds} s: failed requests of others"
    return Row("deaths", what, [failed], "", Limit("<=", 0, 0), f"{done} done", note=f"{kills} kills")


def _row(what: str, times: list[float], limit: Limit) -> Row:
    p50 = milli(statistics.median(times))
    say(f"  {len(times)} kills: p50 {p50}, max {milli(max(times))}")
    return Row("deaths", what, [quantile(times, 0.99) * 1e3], "ms", limit, f"p50 {p50}")


def rows(quick: bool) -> list[Row]:
    try:
        return [
            holder_of_all(quick),
            arbiter(quick, 0, Limit("<=", 500.0, 250.0)),
            arbiter(quick, 8, Limit("<=", 2000.0, 1000.0)),
            herd(quick),
        ]
    except Missing as exc:
        return [missing_row("deaths", "all", str(exc))]
