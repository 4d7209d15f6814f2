"""What policies cost: handoffs in a long queue, a lowered limit, noting leases; and the command's answer."""

from __future__ import annotations

import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.harness import (
    Actor,
    Limit,
    Missing,
    Row,
    interleave,
    library,
    milli,
    missing_row,
    paired_ratios,
    say,
    time_pairs,
)

GROUP = "policies"
PROCESSES = 20


class Crowd:
    """One process with many threads that each want one permit."""

    def __init__(self, pool: str) -> None:
        threading.stack_size(256 * 1024)
        self.permit = library().permit(pool, max_connections=1, checkout_timeout=None)
        self.pool = self.permit.pool
        self.threads: list[threading.Thread] = []

    def queue(self, count: int) -> None:
        """That many threads begin to wait."""
        self.threads = [threading.Thread(target=self._once) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _once(self) -> None:
        with self.permit:
            pass

    def join(self) -> float:
        """The clock when the last one has had its turn."""
        for thread in self.threads:
            thread.join()
        return time.monotonic()

    def waiting(self) -> int:
        waiting: int = self.pool.stats().waiting
        return waiting


class Holder:
    """Holds the one permit until it lets the queue go."""

    def __init__(self, pool: str) -> None:
        self.permit = library().permit(pool, max_connections=1, checkout_timeout=None)

    def hold(self) -> None:
        self.permit.__enter__()

    def let_go(self) -> float:
        start = time.monotonic()
        self.permit.__exit__(None, None, None)
        return start


def _per_handoff(holder: Actor, crowds: list[Actor], waiters: int) -> float:
    """Seconds per handoff while a queue of so many empties."""
    holder.call("hold")
    each = max(1, waiters // len(crowds))
    used = crowds[: waiters // each]
    for crowd in used:
        crowd.call("queue", each)
    servers.wait_until(lambda: crowds[0].call("waiting") == waiters, 120.0, f"{waiters} waiting")
    start = holder.call("let_go")
    for crowd in used:
        crowd.send("join")
    return (max(crowd.result() for crowd in used) - start) / waiters


def _queue(quick: bool) -> list[Row]:
    many, few = (2_000, 10) if quick else (10_000, 10)
    with servers.scope(), ExitStack() as stack:
        holder = stack.enter_context(Actor(Holder, "queue"))
        crowds = [stack.enter_context(Actor(Crowd, "queue", forked=True)) for _ in range(PROCESSES)]
        times = interleave(
            3 if quick else 5,
            {
                "many": lambda: _per_handoff(holder, crowds, many),
                "few": lambda: statistics.median(_per_handoff(holder, crowds, few) for _ in range(20)),
            },
        )
    say(f"  per handoff: {few} waiters {milli(statistics.median(times['few']))}, {many} {milli(min(times['many']))}")
    ratios = paired_ratios(times["many"], times["few"])
    return [Row(GROUP, f"time per handoff, {many:,} waiters against {few}", ratios, "x", Limit("<=", 1.5, 1.1))]


class Backend:
    """Accepts connections and knows how many are open."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server((servers.HOST, 0), backlog=256)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.open = 0

    def until(self, count: int, seconds: float = 5.0) -> float:
        """The clock when exactly so many are open."""
        limit = time.monotonic() + seconds
        while self.open != count:
            assert time.monotonic() < limit, f"{self.open} are open, not {count}"
            for key, _ in self.selector.select(0.01):
                self._serve(key.fileobj)
        return time.monotonic()

    def _serve(self, sock: Any) -> None:
        if sock is self.listener:
            with suppress(BlockingIOError):
                while True:
                    conn, _ = sock.accept()
                    self.selector.register(conn, selectors.EVENT_READ)
                    self.open += 1
        elif not sock.recv(65536):
            self.selector.unregister(sock)
            sock.close()
            self.open -= 1


def _lowered(quick: bool) -> list[Row]:
    times = []
    sharedpool = library()
    for _ in range(5 if quick else 20):
        with servers.scope():
            backend = Backend()
            host, port = backend.listener.getsockname()
            pool = sharedpool.attach("limit", max_connections=50)
            for lease in [pool.checkout(host, port) for _ in range(50)]:
                lease.checkin()
            backend.until(50)
            start = time.monotonic()
            sharedpool.set_max_connections("limit", 5)
            times.append((backend.until(5) - start) * 1e3)
            pool.close()
    return [Row(GROUP, "limit 50 -> 5 with 50 idle: until the back end sees 5", times, "ms", Limit("<=", 100.0, 20.0))]


class Pairs:
    """Warm pairs on a pool with these options."""

    def __init__(self, name: str, port: int, **options: Any) -> None:
        self.pool = library().attach(name, max_connections=1, **options)
        self.port = port
        self.run(100)

    def run(self, pairs: int) -> float:
        return time_pairs(pairs, self._loop)

    def _loop(self, items: Any) -> None:
        checkout, host, port = self.pool.checkout, servers.HOST, self.port
        for _ in items:
            checkout(host, port).checkin()


def _noting(quick: bool) -> list[Row]:
    with servers.scope(), servers.echo() as (port,):
        plain, noting = Pairs("plain", port), Pairs("noting", port, lease_timeout=60.0)
        times = interleave(
            20 if quick else 60, {"plain": lambda: plain.run(5_000), "noting": lambda: noting.run(5_000)}
        )
        plain.pool.close()
        noting.pool.close()
    extra = [(b - a) * 1e6 for a, b in zip(times["plain"], times["noting"], strict=True)]
    return [Row(GROUP, "leak detection, per pair", [statistics.median(extra)], "us", Limit("<=", 0.3, 0.2))]


def _status(quick: bool) -> list[Row]:
    program = shutil.which("sharedpool", path=str(Path(sys.executable).parent))
    if program is None:
        raise Missing("the command sharedpool (the extra cli)")
    times = []
    with servers.scope():
        sharedpool = library()
        sharedpool.start_pool("status", max_connections=5)
        pool = sharedpool.attach("status").open()
        for _ in range(5 if quick else 15):
            start = time.monotonic()
            subprocess.run([program, "status"], check=True, stdout=subprocess.DEVNULL)
            times.append(time.monotonic() - start)
        pool.close()
    return [Row(GROUP, "sharedpool status, with the interpreter's start", times, "s", Limit("<=", 0.5, 0.3))]


def rows(quick: bool) -> list[Row]:
    found: list[Row] = []
    for measure in (_queue, _lowered, _noting, _status):
        try:
            found += measure(quick)
        except Missing as exc:
            found.append(missing_row(GROUP, measure.__name__.strip("_"), str(exc)))
    return found
