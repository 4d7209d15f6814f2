"""Redis: GET by 8 processes through sharedpool on a cap of 4, over a connection each, and through twemproxy.

All three speak RESP2 with the same parser, because twemproxy knows no other, and to the same server. twemproxy has 4
connections to it, over which it sends what its clients say one after the other. HAProxy can only pass bytes on: with a
cap of 4, 8 clients that keep their connections would leave 4 of them waiting for ever. Every lease is one GET.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks import servers
from benchmarks.harness import Limit, Missing, Row, interleave, milli, missing_row, need, paired_ratios, say
from benchmarks.throughput import Run, crew, describe, together

GROUP = "redis"
SHARED, STICKY, OWN, PROXY = "sharedpool", "sharedpool, sticky order", "redis-py", "twemproxy"
CAP = 4
#: What each of ours is: the option, which is also the pool's name and, at the server, its connections'.
ORDERS = {SHARED: "auto", STICKY: "sticky"}

_TWEMPROXY = """
bench:
  listen: {host}:{port}
  redis: true
  hash: fnv1a_64
  distribution: modula
  timeout: 5000
  preconnect: true
  server_connections: {cap}
  servers:
   - {host}:{backend}:1
"""


@contextmanager
def twemproxy(backend: int) -> Iterator[int]:
    """A port behind which there are 4 connections to the server."""
    binary = servers.program("nutcracker")
    with servers.temp_dir() as directory:
        port, stats = servers.free_port(), servers.free_port()
        config = directory / "nutcracker.yml"
        config.write_text(_TWEMPROXY.format(host=servers.HOST, port=port, backend=backend, cap=CAP))
        argv = [
            binary,
            "-c",
            str(config),
            "-s",
            str(stats),
            "-a",
            servers.HOST,
            "-p",
            str(directory / "pid"),
            "-m",
            "512",
        ]
        with servers.running(argv, port, directory):
            yield port


class Client:
    """One of the client processes."""

    def __init__(self) -> None:
        self.clients: dict[str, Any] = {}

    def prepare_shared(self, way: str, port: int) -> None:
        package = need("sharedpool.integrations.redis", "redis")
        pool = package.SharedConnectionPool(
            ORDERS[way], order=ORDERS[way], max_connections=CAP, host=servers.HOST, port=port, protocol=2,
            client_name=ORDERS[way], driver_info=None,
        )  # fmt: skip
        self._prepare(way, pool)

    def prepare_own(self, way: str, port: int) -> None:
        kind = need("redis").BlockingConnectionPool
        self._prepare(way, kind(max_connections=1, host=servers.HOST, port=port, protocol=2, driver_info=None))

    def _prepare(self, way: str, pool: Any) -> None:
        client = self.clients[way] = need("redis").Redis(connection_pool=pool)
        assert client.get("key") == servers.BODY

    def run(self, way: str, start: float, seconds: float) -> bytes:
        get, clock, latencies = self.clients[way].get, time.monotonic, array("d")
        time.sleep(max(0.0, start - clock()))
        before = clock()
        while before < start + seconds:
            assert get("key") is not None
            after = clock()
            latencies.append(after - before)
            before = after
        return latencies.tobytes()


def rows(quick: bool) -> list[Row]:
    seconds, rounds = (0.7, 3) if quick else (1.5, 7)
    os.environ.pop("REDIS_URL", None)
    lost = ""
    with ExitStack() as stack:
        try:
            port = stack.enter_context(servers.redis())
        except Missing as exc:
            return [missing_row(GROUP, "GET by 8 processes", str(exc))]
        judge = need("redis").Redis(port=port)
        judge.set("key", servers.BODY)
        stack.enter_context(servers.scope())
        ways = [*ORDERS, OWN]
        try:
            through = stack.enter_context(twemproxy(port))
            ways.append(PROXY)
        except Missing as exc:
            lost = str(exc)
        crews = {way: crew(stack, Client) for way in ways}
        for way, clients in crews.items():
            for client in clients:
                if way in ORDERS:
                    client.call("prepare_shared", way, port)
                else:
                    client.call("prepare_own", way, through if way == PROXY else port)
            together(clients, way, seconds / 4)
        runs: dict[str, list[Run]] = interleave(
            rounds, {way: (lambda way=way: together(crews[way], way, seconds)) for way in ways}
        )
        names = [client["name"] for client in judge.client_list()]
        most = max(names.count(name) for name in ORDERS.values())
        judge.close()
    for way, results in runs.items():
        say(f"  {way}: {describe(results)}")
    found = []
    for ours, order in ((SHARED, ""), (STICKY, ", in sticky order")):
        what = f"8 on cap {CAP}, GET{order}"
        found.append(_rate(f"{what} / redis-py with 8 connections", ours, OWN, Limit(">=", 0.7, 0.85), runs))
        found.append(_tail("the same, p99", ours, OWN, runs))
        if lost:
            found.append(missing_row(GROUP, f"{what} / twemproxy", lost))
        else:
            found.append(_rate(f"{what} / twemproxy", ours, PROXY, Limit(">=", 1.0, 1.2), runs))
            found.append(_tail("the same, p99", ours, PROXY, runs))
    longest = [[run.most for run in runs[way]] for way in (STICKY, SHARED)]
    return [
        *found,
        Row(GROUP, "the longest in sticky order / in strict order", paired_ratios(*longest), "x", None,
            *(milli(sorted(side)[len(side) // 2]) for side in longest)),
        Row(GROUP, f"8 on cap {CAP}, connections at the server", [most], "", Limit("<=", CAP, CAP)),
    ]  # fmt: skip


def _rate(what: str, ours: str, peer: str, limit: Limit, runs: dict[str, list[Run]]) -> Row:
    ratios = paired_ratios([run.rate for run in runs[ours]], [run.rate for run in runs[peer]])
    return Row(GROUP, what, ratios, "x", limit, describe(runs[ours]), describe(runs[peer]))


def _tail(what: str, ours: str, peer: str, runs: dict[str, list[Run]]) -> Row:
    ratios = paired_ratios([run.p99 for run in runs[ours]], [run.p99 for run in runs[peer]])
    sides = [milli(sorted(run.p99 for run in runs[way])[len(runs[way]) // 2]) for way in (ours, peer)]
    return Row(GROUP, what, ratios, "x", None, *sides)
