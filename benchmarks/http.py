"""requests and urllib3 over sharedpool: eight client processes and one nginx, and gunicorn whose workers come and go.

Each way has an nginx of its own, so that what it accepted is what that way opened.
"""

from __future__ import annotations

import http.client
import os
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import servers
from benchmarks.harness import (
    Limit,
    Missing,
    Row,
    interleave,
    milli,
    missing_row,
    need,
    number,
    paired_ratios,
    say,
)
from benchmarks.throughput import WORKERS, Client, Run, crew, describe, together

SESSION, ADAPTER = "requests.Session", "SharedPoolAdapter"
PROXY, MANAGER = "urllib3, HAProxy", "SharedPoolManager"
STICKY = "SharedPoolManager, sticky order"
PLAIN = "urllib3, 8 connections"


class HttpClient(Client):
    """One of the eight, with an HTTP library."""

    def prepare(self, way: str, port: int) -> None:
        """Make a way usable, with a first request."""
        ask = _makers[way](f"http://{servers.HOST}:{port}/")
        assert ask() == servers.BODY
        self.loops[way] = lambda end: _loop(ask, end)


def _session(url: str) -> Callable[[], bytes]:
    session = need("requests").Session()
    session.trust_env = False  # who reads the environment for each request times that
    return lambda: session.get(url).content  # type: ignore[no-any-return]


def _adapter(url: str) -> Callable[[], bytes]:
    session = need("requests").Session()
    session.trust_env = False
    session.mount("http://", need("sharedpool.integrations.requests").SharedPoolAdapter("r8", max_connections=8))
    return lambda: session.get(url).content  # type: ignore[no-any-return]


def _plain(url: str) -> Callable[[], bytes]:
    manager = need("urllib3").PoolManager()
    return lambda: manager.request("GET", url).data  # type: ignore[no-any-return]


def _manager(url: str, order: str = "auto") -> Callable[[], bytes]:
    manager = need("sharedpool.integrations.urllib3").SharedPoolManager(
        f"u4{order}", max_connections=4, checkout_timeout=60, order=order
    )
    return lambda: manager.request("GET", url).data  # type: ignore[no-any-return]


def _sticky(url: str) -> Callable[[], bytes]:
    return _manager(url, "sticky")


_makers = {
    SESSION: _session, ADAPTER: _adapter, PROXY: _plain, PLAIN: _plain, MANAGER: _manager, STICKY: _sticky,
}  # fmt: skip


def _loop(ask: Callable[[], bytes], end: float) -> array[float]:
    clock, latencies = time.monotonic, array("d")
    before = clock()
    while before < end:
        ask()
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


def _measure(seconds: float, rounds: int) -> tuple[dict[str, list[Run]], dict[str, int], str]:
    lost = ""
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        backends, crews = {}, {}
        for way in _makers:
            backend = stack.enter_context(servers.nginx())
            crews[way] = crew(stack, HttpClient)
            try:
                port = stack.enter_context(servers.haproxy(backend.port, 4)) if way == PROXY else backend.port
                for client in crews[way]:
                    client.call("prepare", way, port)
                backends[way] = backend
            except Missing as exc:
                lost = str(exc)
        for way in backends:
            together(crews[way], way, seconds / 4)  # warm-up
        ways = {way: (lambda way=way: together(crews[way], way, seconds)) for way in backends}
        runs: dict[str, list[Run]] = interleave(rounds, ways)
        return runs, {way: backend.accepted() for way, backend in backends.items()}, lost


# --- workers that come and go -----------------------------------------------------------------------------------------


@contextmanager
def _gunicorn(url: str, shared: str) -> Iterator[int]:
    """Eight workers, each of which ends after 50 requests."""
    need("gunicorn")
    port = servers.free_port()
    command = [sys.executable, "-m", "gunicorn", "--workers", str(WORKERS), "--max-requests", "50", "--log-level"]
    command += ["error", "--no-control-socket", "--bind", f"{servers.HOST}:{port}", "benchmarks.http_app:app"]
    env = {"BENCH_URL": url, "BENCH_SHARED": shared, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        with servers.temp_dir() as directory, servers.running(command, port, directory):
            yield port
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _ask(port: int, requests: int) -> None:
    """So many answers; who meets a worker that is just leaving asks again."""
    while requests:
        connection = http.client.HTTPConnection(servers.HOST, port, timeout=30)
        try:
            connection.request("GET", "/")
            requests -= connection.getresponse().read() == servers.BODY
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()


def _recycling(requests: int, shared: str) -> int:
    """Connections that nginx saw for so many requests."""
    with servers.scope(), servers.nginx() as backend:
        with _gunicorn(f"http://{servers.HOST}:{backend.port}/", shared) as port:
            askers = [threading.Thread(target=_ask, args=(port, requests // WORKERS)) for _ in range(WORKERS)]
            for asker in askers:
                asker.start()
            for asker in askers:
                asker.join()
        return backend.accepted()


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(quick: bool) -> list[Row]:
    try:
        runs, accepted, lost = _measure(1.0 if quick else 2.0, 3 if quick else 9)
    except Missing as exc:
        return [missing_row("http", "8 processes on one nginx", str(exc))]
    for way, results in runs.items():
        say(f"  {way}: {describe(results)}, {accepted[way]} connections accepted")
    found = [
        _rate("requests, 8 on cap 8 / plain Sessions", ADAPTER, SESSION, Limit(">=", 0.9, 1.0), runs, lost),
        _rate("urllib3, 8 on cap 4 / HAProxy, throughput", MANAGER, PROXY, Limit(">=", 1.1, 1.3), runs, lost),
        _rate("urllib3, 8 on cap 4 / HAProxy, in sticky order", STICKY, PROXY, Limit(">=", 1.1, 1.3), runs, lost),
        _tail("urllib3, 8 on cap 4 / HAProxy, p99", MANAGER, PROXY, runs, lost),
        _tail("urllib3, 8 on cap 4 / HAProxy, in sticky order, p99", STICKY, PROXY, runs, lost),
        _rate("urllib3, 8 on cap 4 / 8 connections", MANAGER, PLAIN, None, runs, lost),
        Row("http", "urllib3, 8 on cap 4, connections that nginx saw",
            [max(accepted[MANAGER], accepted[STICKY])], "", Limit("<=", 4, 4)),
    ]  # fmt: skip
    count = 10_000  # also if it is to be quick: the first eight connections are ours in any case
    what = f"gunicorn, workers of 50 requests: connections for {count:,}"
    try:
        ours, theirs = _recycling(count, "yes"), _recycling(count, "")
    except Missing as exc:
        return [*found, missing_row("http", what, str(exc))]
    return [*found, Row("http", what, [ours / theirs], "x", Limit("<=", 0.05, 0.04), str(ours), str(theirs))]


def _rate(what: str, way: str, peer: str, limit: Limit | None, runs: dict[str, list[Run]], lost: str) -> Row:
    if way not in runs or peer not in runs:
        return missing_row("http", what, lost)
    ratios = paired_ratios([run.rate for run in runs[way]], [run.rate for run in runs[peer]])
    sides = [number(statistics.median(run.rate for run in runs[name]), "/s") for name in (way, peer)]
    return Row("http", what, ratios, "x", limit, *sides)


def _tail(what: str, way: str, peer: str, runs: dict[str, list[Run]], lost: str) -> Row:
    if way not in runs or peer not in runs:
        return missing_row("http", what, lost)
    tails = [[run.p99 for run in runs[name]] for name in (way, peer)]
    return Row("http", what, paired_ratios(*tails), "x", None, *(milli(statistics.median(side)) for side in tails))
