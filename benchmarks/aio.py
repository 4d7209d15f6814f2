"""asyncio: a warm pair against httpcore's pool, and how fast a thousand waiting tasks are served."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import statistics
import threading
import time
from contextlib import ExitStack
from typing import Any

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
    need,
    paired_ratios,
    say,
)

CAP = 4
WAITERS = 1_000
PAIR = "warm pair of coroutines / httpcore AsyncConnectionPool"


class Ours:
    """A pool with one warm connection, leased and given back by one task."""

    def __init__(self, port: int) -> None:
        library()
        self.loop = asyncio.new_event_loop()
        self.pool = need("sharedpool.aio").attach("pairs", max_connections=10)
        self.port = port
        self.block(1)

    def block(self, pairs: int) -> float:
        return self.loop.run_until_complete(self._block(pairs))

    async def _block(self, pairs: int) -> float:
        checkout, port = self.pool.checkout, self.port
        gc.collect()
        start = time.perf_counter()
        for _ in range(pairs):
            (await checkout(servers.HOST, port)).checkin()
        return (time.perf_counter() - start) / pairs

    def check(self) -> None:
        async def talk() -> None:
            async with self.pool.connection(servers.HOST, self.port) as conn:
                await self.loop.sock_sendall(conn, b"alive")
                assert await self.loop.sock_recv(conn, 16) == b"alive"

        self.loop.run_until_complete(talk())
        stats = self.pool.stats()
        assert (stats.in_use, stats.idle, stats.opens) == (0, 1, 1), stats


class Httpcore:
    """What its pool does for a request on an idle connection before and after the request itself, and no more."""

    def __init__(self) -> None:
        need("anyio")
        self.httpcore = need("httpcore")
        self.requests = need("httpcore._async.connection_pool", "httpcore").AsyncPoolRequest
        self.loop = asyncio.new_event_loop()
        self.url = f"http://{servers.HOST}:{_http_server()}/"
        self.pool = self.httpcore.AsyncConnectionPool(max_connections=10)
        self.check()

    def block(self, pairs: int) -> float:
        return self.loop.run_until_complete(self._block(pairs))

    async def _block(self, pairs: int) -> float:
        pool: Any = self.pool
        request, wrap = self.httpcore.Request("GET", self.url), self.requests
        gc.collect()
        start = time.perf_counter()
        for _ in range(pairs):
            waiting = wrap(request)
            with pool._optional_thread_lock:
                pool._requests.append(waiting)
                closing = pool._assign_requests_to_connections()
            await pool._close_connections(closing)
            await waiting.wait_for_connection(timeout=None)
            with pool._optional_thread_lock:
                pool._requests.remove(waiting)
                closing = pool._assign_requests_to_connections()
            await pool._close_connections(closing)
        return (time.perf_counter() - start) / pairs

    def check(self) -> None:
        assert self.loop.run_until_complete(self.pool.request("GET", self.url)).status == 200
        (connection,) = self.pool.connections
        assert connection.is_idle()


def _http_server() -> int:
    """Answers whatever comes, on connections that stay open; in a thread that ends with this process."""
    listener = socket.create_server((servers.HOST, 0))

    def serve(conn: socket.socket) -> None:
        while conn.recv(65536):
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


class Crowd:
    """Tasks that lease, let the loop go round once, and give back."""

    def __init__(self, port: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.pool = need("sharedpool.aio").attach("crowd", max_connections=CAP)
        self.port = port
        self.run(CAP, 1)

    def run(self, tasks: int, rounds: int) -> float:
        """Seconds for all of them."""
        return self.loop.run_until_complete(self._run(tasks, rounds))

    async def _run(self, tasks: int, rounds: int) -> float:
        async def one() -> None:
            for _ in range(rounds):
                async with self.pool.connection(servers.HOST, self.port, checkout_timeout=None):
                    await asyncio.sleep(0)

        start = time.perf_counter()
        await asyncio.gather(*[one() for _ in range(tasks)])
        return time.perf_counter() - start

    def threads(self) -> int:
        return len(os.listdir("/proc/self/task"))


def rows(quick: bool) -> list[Row]:
    return [_pair(*((5_000, 5) if quick else (20_000, 15))), *_crowds(5 if quick else 15)]


def _pair(pairs: int, rounds: int) -> Row:
    try:
        with ExitStack() as stack:
            stack.enter_context(servers.scope())
            (port,) = stack.enter_context(servers.echo())
            actors = {
                "ours": stack.enter_context(Actor(Ours, port)),
                "theirs": stack.enter_context(Actor(Httpcore)),
            }
            for actor in actors.values():
                actor.call("block", pairs // 4)
            runs = {name: (lambda actor=actor: actor.call("block", pairs)) for name, actor in actors.items()}
            times: dict[str, list[float]] = interleave(rounds, runs)
            for actor in actors.values():
                actor.call("check")
    except Missing as exc:
        return missing_row("aio", PAIR, str(exc))
    ours, theirs = (micro(statistics.median(times[name])) for name in ("ours", "theirs"))
    return Row("aio", PAIR, paired_ratios(times["ours"], times["theirs"]), "x", Limit("<=", 1.0, 0.7), ours, theirs)


def _crowds(rounds: int) -> list[Row]:
    turns = 10
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        (port,) = stack.enter_context(servers.echo())
        one, other = (stack.enter_context(Actor(Crowd, port)) for _ in range(2))
        alone = [WAITERS * turns / one.call("run", WAITERS, turns) for _ in range(rounds)]
        threads = one.call("threads")
        together = []
        for _ in range(rounds):
            start = time.perf_counter()
            for actor in (one, other):
                actor.send("run", WAITERS // 2, turns)
            for actor in (one, other):
                actor.result()
            together.append(WAITERS * turns / (time.perf_counter() - start))
    say(f"  {threads} threads in the process of {WAITERS} waiting tasks")
    return [
        Row("aio", f"{WAITERS} tasks of one process on a cap of {CAP}", alone, "/s", note=f"{threads} threads"),
        Row("aio", "the same, half of them in another process", together, "/s", note="handoffs"),
    ]
