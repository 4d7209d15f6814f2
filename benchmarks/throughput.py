"""Rows 3 and 4: eight client processes and one nginx.

Three ways to the same kind of backend take turns: through sharedpool (in strict and in sticky order), through HAProxy
with the same cap, and over a plain socket each. All send the same prepared bytes and take the reply in one recv where
it comes whole. Each way has eight processes and an nginx of its own, so that what it accepted proves its cap: with no
more than `cap` connections ever accepted, there were never more at a time.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
    number,
    paired_ratios,
    quantile,
    say,
)

WORKERS = 8
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
CAP4, STICKY, CAP8, PROXY, PLAIN = "cap 4", "cap 4, sticky order", "cap 8", "HAProxy", "plain sockets"
#: Our ways: the cap, and the order.
POOLS = {CAP4: (4, "auto"), STICKY: (4, "sticky"), CAP8: (8, "auto")}


def read_reply(sock: Any) -> bytes:
    """One whole reply, by its Content-Length; used where its size isn't known yet or it came in pieces."""
    data: bytes = sock.recv(4096)
    while b"\r\n\r\n" not in data:
        data += _more(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += _more(sock)
    assert head.startswith(b"HTTP/1.1 200"), head
    assert body == servers.BODY, body
    return head + b"\r\n\r\n" + body


def _more(sock: Any) -> bytes:
    piece: bytes = sock.recv(4096)
    if not piece:
        raise ConnectionError("closed in the middle of a reply")
    return piece


def request(sock: Any, size: int) -> None:
    """One GET; `size` is that of a whole reply."""
    sock.sendall(REQUEST)
    got = len(sock.recv(4096))
    while got < size:
        got += len(_more(sock))


class Client:
    """One of the eight. `prepare_*` makes a way usable and warm; `run` drives it and gives back its latencies."""

    def __init__(self) -> None:
        self.loops: dict[str, Callable[[float], array[float]]] = {}
        self.pools: dict[str, Any] = {}

    def prepare_pool(self, way: str, port: int) -> None:
        cap, order = POOLS[way]
        pool = library().attach(f"{order}{cap}", max_connections=cap, order=order)
        with pool.connection(servers.HOST, port) as sock:
            sock.sendall(REQUEST)
            size = len(read_reply(sock))
        self.pools[way] = pool
        self.loops[way] = lambda end: pooled(pool, port, size, end)

    def prepare_plain(self, way: str, port: int) -> None:
        sock = servers.connect(port)
        sock.sendall(REQUEST)
        size = len(read_reply(sock))
        self.loops[way] = lambda end: plain(sock, size, end)

    def run(self, way: str, start: float, seconds: float) -> bytes:
        time.sleep(max(0.0, start - time.monotonic()))
        return self.loops[way](start + seconds).tobytes()

    def stats(self, way: str) -> Any:
        return self.pools[way].stats()


def pooled(pool: Any, port: int, size: int, end: float) -> array[float]:
    """Latencies in seconds, each from before the checkout to after the checkin."""
    host, clock, latencies = servers.HOST, time.monotonic, array("d")
    before = clock()
    while before < end:
        lease = pool.checkout(host, port)
        request(lease.conn, size)
        pool.checkin(lease)
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


def plain(sock: Any, size: int, end: float) -> array[float]:
    clock, latencies = time.monotonic, array("d")
    before = clock()
    while before < end:
        request(sock, size)
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one way: requests per second, latencies in seconds (two quantiles, the longest), slowest worker over
    fastest.
    """

    rate: float
    p50: float
    p99: float
    fairness: float
    most: float


def crew(stack: ExitStack, kind: Callable[[], Any], count: int = WORKERS) -> list[Actor]:
    """Client processes for one way. Each way has its own, as an application would: what runs in a process leaves its
    mark on where the kernel puts it, and who it talks to, for the next.
    """
    return [stack.enter_context(Actor(kind, forked=True)) for _ in range(count)]


def together(clients: list[Actor], way: str, seconds: float) -> Run:
    """All clients start at the same moment, far enough away for the last one to have got its command."""
    start = time.monotonic() + 0.1
    for client in clients:
        client.send("run", way, start, seconds)
    latencies = array("d")
    counts = []
    for client in clients:
        own = array("d")
        own.frombytes(client.result())
        counts.append(len(own))
        latencies.extend(own)
    ordered = sorted(latencies)
    p50, p99 = quantile(ordered, 0.5), quantile(ordered, 0.99)
    return Run(len(ordered) / seconds, p50, p99, min(counts) / max(counts), ordered[-1])


def _prepare(stack: ExitStack, crews: dict[str, list[Actor]], lost: dict[str, str]) -> dict[str, servers.Nginx]:
    backends: dict[str, servers.Nginx] = {}
    for way in (*POOLS, PROXY, PLAIN):
        backend = stack.enter_context(servers.nginx())
        crews[way] = crew(stack, Client)
        try:
            port = stack.enter_context(servers.haproxy(backend.port, 4)) if way == PROXY else backend.port
            for client in crews[way]:
                client.call("prepare_pool" if way in POOLS else "prepare_plain", way, port)
            backends[way] = backend
        except Missing as exc:
            lost[way] = str(exc)
    return backends


def _measure(seconds: float, rounds: int, lost: dict[str, str]) -> tuple[dict[str, list[Run]], dict[str, int]]:
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        crews: dict[str, list[Actor]] = {}
        backends = _prepare(stack, crews, lost)
        for way in backends:
            together(crews[way], way, seconds / 4)  # warm-up
        ways = {way: (lambda way=way: together(crews[way], way, seconds)) for way in backends}
        runs: dict[str, list[Run]] = interleave(rounds, ways)
        for way in POOLS:
            if way in backends:
                say(f"  {way}: {crews[way][0].call('stats', way)}")
        return runs, {way: backend.accepted() for way, backend in backends.items()}


def rows(quick: bool) -> list[Row]:
    lost: dict[str, str] = {}
    try:
        runs, accepted = _measure(*((1.0, 3) if quick else (2.0, 7)), lost)
    except Missing as exc:  # no nginx, no figures
        return [missing_row("throughput", "8 processes on one nginx", str(exc))]
    for way, results in runs.items():
        say(f"  {way}: {describe(results)}, fairness {fairness(results):.3f}, {accepted[way]} connections accepted")
    return [
        _rate("8 on cap 4 / HAProxy, throughput", CAP4, PROXY, Limit(">=", 1.2, 1.5), runs, lost),
        _tail("8 on cap 4 / HAProxy, p99", CAP4, PROXY, runs, lost),
        _rate("8 on cap 4 / HAProxy, in sticky order, throughput", STICKY, PROXY, Limit(">=", 1.2, 1.5), runs, lost),
        _tail("8 on cap 4 / HAProxy, in sticky order, p99", STICKY, PROXY, runs, lost),
        _cap("8 on cap 4, in sticky order, connections that nginx saw", STICKY, 4, accepted, lost),
        _fairness("8 on cap 4, slowest / fastest worker", runs, lost),
        _cap("8 on cap 4, connections that nginx saw", CAP4, 4, accepted, lost),
        _rate("8 on cap 8 / 8 plain sockets, throughput", CAP8, PLAIN, Limit(">=", 0.85, 0.95), runs, lost),
        _cap("8 on cap 8, connections that nginx saw", CAP8, 8, accepted, lost),
    ]


def _median(results: list[Run], figure: str) -> float:
    values: list[float] = [getattr(result, figure) for result in results]
    return statistics.median(values)


def fairness(results: list[Run]) -> float:
    return _median(results, "fairness")


def describe(results: list[Run]) -> str:
    rate = number(_median(results, "rate"), "/s")
    return f"{rate}, p50 {milli(_median(results, 'p50'))}, p99 {milli(_median(results, 'p99'))}"


def _rate(what: str, way: str, peer: str, limit: Limit, runs: dict[str, list[Run]], lost: dict[str, str]) -> Row:
    sides = [describe(runs[name]) if name in runs else "" for name in (way, peer)]
    if way not in runs or peer not in runs:
        return Row("throughput", what, ours=sides[0], peer=sides[1], note=lost.get(way) or lost[peer])
    ratios = paired_ratios([run.rate for run in runs[way]], [run.rate for run in runs[peer]])
    return Row("throughput", what, ratios, "x", limit, *sides)


def _tail(what: str, way: str, peer: str, runs: dict[str, list[Run]], lost: dict[str, str]) -> Row:
    if way not in runs or peer not in runs:
        return missing_row("throughput", what, lost.get(way) or lost[peer])
    ratios = paired_ratios([run.p99 for run in runs[way]], [run.p99 for run in runs[peer]])
    sides = [milli(_median(runs[name], "p99")) for name in (way, peer)]
    return Row("throughput", what, ratios, "x", Limit("<=", 1.0, 1.0), *sides)


def _fairness(what: str, runs: dict[str, list[Run]], lost: dict[str, str]) -> Row:
    theirs = f"HAProxy {fairness(runs[PROXY]):.3f}" if PROXY in runs else ""
    if CAP4 not in runs:
        return Row("throughput", what, peer=theirs, note=lost[CAP4])
    values = [run.fairness for run in runs[CAP4]]
    return Row("throughput", what, values, "", Limit(">=", 0.9, 0.97), peer=theirs)


def _cap(what: str, way: str, cap: int, accepted: dict[str, int], lost: dict[str, str]) -> Row:
    """Fewer is fine; one more than the cap, over all runs, would be a broken promise or a needless reconnect."""
    if way not in accepted:
        return missing_row("throughput", what, lost[way])
    theirs = "".join(f"{name} {accepted[name]}" for name in (PROXY,) if way == CAP4 and name in accepted)
    return Row("throughput", what, [accepted[way]], "", Limit("<=", cap, cap), peer=theirs)
