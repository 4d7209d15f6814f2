"""Row 6: a warm pair must not notice how much there is besides it.

Small and large run side by side in pools of one scope, each timed in a process of its own, in turns.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice

from benchmarks import servers
from benchmarks.harness import (
    Actor,
    Limit,
    Missing,
    Row,
    interleave,
    library,
    micro,
    missing_row,
    paired_ratios,
    say,
    time_pairs,
)

LIMIT = Limit("<=", 1.3, 1.1)
MANY = 1000
FEW = 10
CROWD = 64


class Timer:
    """One process with warm connections in one pool."""

    def __init__(self, name: str, cap: int, ports: list[int], each: int) -> None:
        """Opens `each` connections to every port, all at once, and gives them back."""
        servers.raise_nofile()
        self.pool = library().attach(name, max_connections=cap)
        self.ports = ports
        leases = [self.pool.checkout(servers.HOST, port) for port in ports for _ in range(each)]
        for lease in leases:
            self.pool.checkin(lease)
        idle = self.pool.stats().idle
        assert idle == len(leases), f"{idle} of {len(leases)} connections are idle"

    def one_key(self, pairs: int) -> float:
        """Seconds per pair, always the same key."""
        return time_pairs(pairs, self._same)

    def all_keys(self, pairs: int) -> float:
        """Seconds per pair, each key in its turn: every pair finds its connection cold in the processor's caches."""
        return time_pairs(pairs, self._turns)

    def _same(self, items: Iterable[None]) -> None:
        checkout, checkin, host, port = self.pool.checkout, self.pool.checkin, servers.HOST, self.ports[0]
        for _ in items:
            checkin(checkout(host, port))

    def _turns(self, items: Iterable[None]) -> None:
        checkout, checkin, host = self.pool.checkout, self.pool.checkin, servers.HOST
        for _, port in zip(items, cycle(self.ports), strict=False):
            checkin(checkout(host, port))

    def processes(self) -> int:
        """How many processes are attached to the pool."""
        count: int = self.pool.stats().processes
        return count


class Crowd:
    """Attached processes that rest: forked before anything is attached, each attaches by a lease of its own."""

    def __init__(self, name: str, cap: int, port: int, count: int) -> None:
        self.pool = library().attach(name, max_connections=cap)
        self.gates: list[int] = []
        self.children: list[int] = []
        for _ in range(count):
            self._fork(port)

    def _fork(self, port: int) -> None:
        gate, hold = os.pipe()
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            for fd in (*self.gates, hold, told):
                os.close(fd)
            self._rest(port, gate, tell)
        os.close(gate)
        os.close(tell)
        self.gates.append(hold)
        self.children.append(pid)
        attached = os.read(told, 1) == b"."
        os.close(told)
        assert attached, "a process of the crowd could not attach"

    def _rest(self, port: int, gate: int, tell: int) -> None:
        try:
            with self.pool.connection(servers.HOST, port):
                pass
            os.write(tell, b".")
            os.read(gate, 1)  # until the crowd is closed
        finally:
            os._exit(0)

    def close(self) -> None:
        for gate in self.gates:
            os.close(gate)
        for pid in self.children:
            os.waitpid(pid, 0)


@dataclass(frozen=True, slots=True)
class Case:
    what: str
    small: Actor
    large: Actor
    method: str
    limit: Limit | None = LIMIT
    note: str = ""


def _cases(stack: ExitStack) -> list[Case]:
    ports = stack.enter_context(servers.echo(MANY))

    def timer(name: str, cap: int, count: int, each: int) -> Actor:
        return stack.enter_context(Actor(Timer, name, cap, list(islice(ports, count)), each))

    few, many = timer("few", FEW, 1, FEW), timer("many", MANY, 1, MANY)
    one, keys = timer("onekey", MANY, 1, 1), timer("keys", MANY, MANY, 1)
    pair, crowd = timer("two", 2 * CROWD, 1, 1), timer("crowd", 2 * CROWD, 1, 1)
    stack.enter_context(Actor(Crowd, "two", 2 * CROWD, ports[0], 1))
    stack.enter_context(Actor(Crowd, "crowd", 2 * CROWD, ports[0], CROWD - 1))
    attached = pair.call("processes"), crowd.call("processes")
    assert attached == (2, CROWD), f"attached are {attached}"
    return [
        Case(f"warm pair, {MANY} connections / {FEW}", few, many, "one_key"),
        Case(f"warm pair, {MANY} keys / 1", one, keys, "one_key"),
        Case(f"warm pair, {MANY} keys in turn / 1", one, keys, "all_keys", None, "no limit: cold caches"),
        Case(f"warm pair, {CROWD} processes / 2", pair, crowd, "one_key"),
    ]


def rows(quick: bool) -> list[Row]:
    pairs, rounds = (4_000, 5) if quick else (15_000, 11)
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        try:
            return [_row(case, pairs, rounds) for case in _cases(stack)]
        except Missing as exc:
            return [missing_row("scale", "warm pair, many / few", str(exc))]


def _row(case: Case, pairs: int, rounds: int) -> Row:
    sides = {
        "small": lambda: float(case.small.call(case.method, pairs)),
        "large": lambda: float(case.large.call(case.method, pairs)),
    }
    times = interleave(rounds, sides)
    small, large = (micro(statistics.median(times[side])) for side in sides)
    say(f"  {case.what}: {large} / {small}")
    return Row(
        "scale", case.what, paired_ratios(times["large"], times["small"]), "x", case.limit, large, small, case.note
    )
