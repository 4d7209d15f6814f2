"""The same eight processes over TLS: through sharedpool, with urllib3's own pools, over a TLS socket each, and through
HAProxy, which then is the one that speaks TLS.

Connections under TLS do not move: on a cap of 8 each process has its own, on a cap of 4 only the permits go over.
Ours, and the clients of HAProxy, send prepared bytes as the raw peers do; or they are urllib3's, where
`sharedpool.integrations.urllib3` is there. BENCH_HTTPS_CLIENT chooses: "raw" or "urllib3".
"""

from __future__ import annotations

import importlib.util
import os
import socket
import ssl
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.harness import Actor, Limit, Missing, Row, interleave, library, missing_row, need, paired_ratios, say
from benchmarks.throughput import REQUEST, WORKERS, Client, Run, describe, plain, read_reply, request, together

CAP4, CAP8, URLLIB3, SOCKETS, PROXY = "https cap 4", "https cap 8", "urllib3", "TLS sockets", "HAProxy with TLS"


def client_kind() -> str:
    """How ours, and the clients of HAProxy, make their requests."""
    found = importlib.util.find_spec("sharedpool.integrations.urllib3") is not None
    return os.environ.get("BENCH_HTTPS_CLIENT") or ("urllib3" if found else "raw")


class TlsClient(Client):
    """One of the eight."""

    def prepare_shared(self, way: str, cap: int, port: int, authority: str) -> None:
        """A shared pool, by the chosen kind of client."""
        if client_kind() == "urllib3":
            shared = need("sharedpool.integrations.urllib3")
            name = way.replace(" ", "")
            manager = shared.SharedPoolManager(name, max_connections=cap, ca_certs=authority)
            self.pools[way] = library().attach(name)
            self._by_urllib3(way, manager, f"https://{servers.HOST}:{port}/")
            return
        from sharedpool.drivers.tls import TlsDriver

        driver = TlsDriver(cafile=authority)
        pool = library().attach(way.replace(" ", ""), max_connections=cap)
        with pool.connection(servers.HOST, port, driver) as sock:
            sock.sendall(REQUEST)
            size = len(read_reply(sock))
        self.pools[way] = pool
        self.loops[way] = lambda end: leased(pool, port, driver, size, end)

    def prepare_urllib3(self, way: str, port: int, authority: str | None) -> None:
        """A pool of this process alone, over TLS if there is an authority."""
        urllib3 = need("urllib3")
        given = {"ca_certs": authority} if authority else {}
        scheme = "https" if authority else "http"
        self._by_urllib3(way, urllib3.PoolManager(maxsize=1, block=True, **given), f"{scheme}://{servers.HOST}:{port}/")

    def _by_urllib3(self, way: str, manager: Any, url: str) -> None:
        assert manager.request("GET", url).data == servers.BODY
        self.loops[way] = lambda end: by_urllib3(manager, url, end)

    def prepare_sockets(self, way: str, port: int, authority: str) -> None:
        """One TLS socket, and nothing around it."""
        context = ssl.create_default_context(cafile=authority)
        sock = context.wrap_socket(servers.connect(port), server_hostname=servers.HOST)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(REQUEST)
        size = len(read_reply(sock))
        self.loops[way] = lambda end: plain(sock, size, end)


def leased(pool: Any, port: int, driver: Any, size: int, end: float) -> array[float]:
    """Latencies in seconds, each from before the checkout to after the checkin."""
    return _timed(lambda: _exchange(pool, port, driver, size), end)


def _exchange(pool: Any, port: int, driver: Any, size: int) -> None:
    lease = pool.checkout(servers.HOST, port, driver)
    request(lease.conn, size)
    pool.checkin(lease)


def by_urllib3(manager: Any, url: str, end: float) -> array[float]:
    """The same for whole requests of urllib3."""
    return _timed(lambda: manager.request("GET", url), end)


def _timed(act: Callable[[], object], end: float) -> array[float]:
    clock, latencies = time.monotonic, array("d")
    before = clock()
    while before < end:
        act()
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


def _prepare(stack: ExitStack, clients: list[Actor], lost: dict[str, str]) -> dict[str, servers.Nginx]:
    certificate, authority = stack.enter_context(servers.certificates())
    backends: dict[str, servers.Nginx] = {}
    for way in (CAP8, CAP4, URLLIB3, SOCKETS, PROXY):
        backend = stack.enter_context(servers.nginx(certificate))
        try:
            for method, *arguments in [_preparation(stack, way, backend.port, authority)]:
                for client in clients:
                    client.call(method, way, *arguments)
            backends[way] = backend
        except Missing as exc:
            lost[way] = str(exc)
    return backends


def _preparation(stack: ExitStack, way: str, port: int, authority: Path) -> tuple[Any, ...]:
    if way in (CAP4, CAP8):
        return "prepare_shared", int(way[-1]), port, str(authority)
    if way == URLLIB3:
        return "prepare_urllib3", port, str(authority)
    if way == SOCKETS:
        return "prepare_sockets", port, str(authority)
    front = stack.enter_context(servers.haproxy(port, 4, authority))
    return ("prepare_urllib3", front, None) if client_kind() == "urllib3" else ("prepare_plain", front)


def _measure(seconds: float, rounds: int, lost: dict[str, str]) -> tuple[dict[str, list[Run]], dict[str, int]]:
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        clients = [stack.enter_context(Actor(TlsClient, forked=True)) for _ in range(WORKERS)]
        backends = _prepare(stack, clients, lost)
        for way in backends:
            together(clients, way, seconds / 4)  # warm-up
        ways = {way: (lambda way=way: together(clients, way, seconds)) for way in backends}
        runs: dict[str, list[Run]] = interleave(rounds, ways)
        for way in (CAP4, CAP8):
            if way in backends:
                say(f"  {way}: {clients[0].call('stats', way)}")
        return runs, {way: backend.accepted() for way, backend in backends.items()}


def rows(quick: bool) -> list[Row]:
    lost: dict[str, str] = {}
    try:
        runs, accepted = _measure(*((1.0, 3) if quick else (2.0, 7)), lost)
    except Missing as exc:
        return [missing_row("https", "8 processes on one nginx over TLS", str(exc))]
    for way, results in runs.items():
        say(f"  {way}: {describe(results)}, {accepted[way]} connections accepted")
    must = Limit(">=", 0.9, 1.0)
    by = client_kind()
    return [
        _rate(f"8 on cap 8 ({by}) / urllib3's own pools", CAP8, URLLIB3, must, runs, lost),
        _rate(f"8 on cap 8 ({by}) / 8 plain TLS sockets", CAP8, SOCKETS, None, runs, lost),
        _rate(f"8 on cap 4 ({by}) / urllib3's own pools", CAP4, URLLIB3, None, runs, lost),
        _rate(f"8 on cap 4 ({by}) / HAProxy on cap 4, TLS behind it", CAP4, PROXY, None, runs, lost),
    ]


def _rate(
    what: str, way: str, peer: str, limit: Limit | None, runs: dict[str, list[Run]], lost: dict[str, str]
) -> Row:  # fmt: skip
    if way not in runs or peer not in runs:
        return missing_row("https", what, lost.get(way) or lost[peer])
    ratios = paired_ratios([run.rate for run in runs[way]], [run.rate for run in runs[peer]])
    return Row("https", what, ratios, "x", limit, describe(runs[way]), describe(runs[peer]))
