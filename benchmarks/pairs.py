"""Rows 1 and 2: a warm checkout and checkin by one thread, ours against four pools that people use.

Every contestant has one live connection in its pool and does nothing but take it and give it back. What each does
in between is its own: urllib3 and sharedpool poll the socket, redis-py polls it, psycopg_pool reads the
transaction state, SQLAlchemy rolls back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
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
    time_pairs,
)

CAP = 10
OURS = "sharedpool checkout+checkin"
WITH = "sharedpool with connection()"
URLLIB3 = ("urllib3 block=False", "urllib3 block=True")
OTHERS = ("psycopg_pool", "SQLAlchemy over a stub", "SQLAlchemy over psycopg", "redis-py")


class Contestant:
    """A pool with one warm connection. `block` times pairs, `check` proves what was timed is alive and the only one."""

    def pair(self, items: Iterable[None]) -> None:
        raise NotImplementedError

    def block(self, pairs: int) -> float:
        return time_pairs(pairs, self.pair)

    def check(self) -> None:
        raise NotImplementedError


class Ours(Contestant):
    def __init__(self, port: int) -> None:
        self.pool = library().attach("pairs", max_connections=CAP)
        self.port = port
        self.block(1)

    def pair(self, items: Iterable[None]) -> None:
        checkout, checkin, host, port = self.pool.checkout, self.pool.checkin, servers.HOST, self.port
        for _ in items:
            checkin(checkout(host, port))

    def check(self) -> None:
        with self.pool.connection(servers.HOST, self.port) as conn:
            conn.sendall(b"alive")
            assert conn.recv(16) == b"alive"
            stats = self.pool.stats()
            assert (stats.in_use, stats.idle, stats.opens) == (1, 0, 1), stats


class OursWith(Ours):
    """The form that users write; shown without a limit."""

    def pair(self, items: Iterable[None]) -> None:
        connection, host, port = self.pool.connection, servers.HOST, self.port
        for _ in items:
            with connection(host, port):
                pass


class Urllib3(Contestant):
    def __init__(self, port: int, block: bool) -> None:
        urllib3 = need("urllib3")
        self.pool = urllib3.HTTPConnectionPool(servers.HOST, port, maxsize=CAP, block=block)
        conn = self.pool._get_conn()
        conn.connect()
        self.pool._put_conn(conn)

    def pair(self, items: Iterable[None]) -> None:
        get, put = self.pool._get_conn, self.pool._put_conn
        for _ in items:
            put(get())

    def check(self) -> None:
        conn = self.pool._get_conn()
        conn.sock.sendall(b"alive")
        assert conn.sock.recv(16) == b"alive"
        assert self.pool.num_connections <= CAP


class PsycopgPool(Contestant):
    def __init__(self, conninfo: str) -> None:
        need("psycopg")
        self.pool = need("psycopg_pool").ConnectionPool(conninfo, min_size=1, max_size=CAP, open=True)
        self.pool.wait()

    def pair(self, items: Iterable[None]) -> None:
        get, put = self.pool.getconn, self.pool.putconn
        for _ in items:
            put(get())

    def check(self) -> None:
        with self.pool.connection() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        assert self.pool.get_stats()["connections_num"] == 1

    def close(self) -> None:
        self.pool.close()


class StubConnection:
    """The cheapest DBAPI connection there can be: what is left is the pool's own time."""

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass


class SqlAlchemy(Contestant):
    def __init__(self, conninfo: str | None) -> None:
        queue_pool = need("sqlalchemy.pool", "sqlalchemy").QueuePool
        self.opened = 0
        self.connect: Callable[[], Any] = StubConnection
        if conninfo is not None:
            psycopg = need("psycopg")
            self.connect = lambda: psycopg.connect(conninfo)
        self.pool = queue_pool(self._open, pool_size=CAP, max_overflow=0)
        self.block(1)

    def _open(self) -> Any:
        self.opened += 1
        return self.connect()

    def pair(self, items: Iterable[None]) -> None:
        connect = self.pool.connect
        for _ in items:
            connect().close()

    def check(self) -> None:
        assert self.opened == 1

    def close(self) -> None:
        self.pool.dispose()


class Redis(Contestant):
    def __init__(self, port: int) -> None:
        redis = need("redis")
        self.pool = redis.BlockingConnectionPool(host=servers.HOST, port=port, max_connections=CAP)
        self.block(1)

    def pair(self, items: Iterable[None]) -> None:
        get, release = self.pool.get_connection, self.pool.release
        for _ in items:
            release(get())

    def check(self) -> None:
        conn = self.pool.get_connection()
        conn.send_command("PING")
        assert conn.read_response() in (b"PONG", "PONG")
        self.pool.release(conn)

    def close(self) -> None:
        self.pool.disconnect()


Entry = tuple[Callable[..., Contestant], tuple[object, ...]]


def _entries(stack: ExitStack, lost: dict[str, str]) -> dict[str, Entry]:
    """Starts the servers; what cannot run is named in `lost` instead."""
    (port,) = stack.enter_context(servers.echo())
    entries: dict[str, Entry] = {OURS: (Ours, (port,)), WITH: (OursWith, (port,))}
    entries |= {URLLIB3[0]: (Urllib3, (port, False)), URLLIB3[1]: (Urllib3, (port, True))}
    entries[OTHERS[1]] = (SqlAlchemy, (None,))
    try:
        conninfo = stack.enter_context(servers.postgres())
        entries |= {OTHERS[0]: (PsycopgPool, (conninfo,)), OTHERS[2]: (SqlAlchemy, (conninfo,))}
    except Missing as exc:
        lost |= {OTHERS[0]: str(exc), OTHERS[2]: str(exc)}
    try:
        entries[OTHERS[3]] = (Redis, (stack.enter_context(servers.redis()),))
    except Missing as exc:
        lost[OTHERS[3]] = str(exc)
    return entries


def _measure(pairs: int, rounds: int, lost: dict[str, str]) -> dict[str, list[float]]:
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        actors: dict[str, Actor] = {}
        for name, (factory, args) in _entries(stack, lost).items():
            try:
                actors[name] = stack.enter_context(Actor(factory, *args))
                actors[name].call("block", pairs // 4)  # warm-up
            except Missing as exc:
                lost[name] = str(exc)
        runs = {name: (lambda actor=actor: actor.call("block", pairs)) for name, actor in actors.items()}
        times: dict[str, list[float]] = interleave(rounds, runs)
        for actor in actors.values():
            actor.call("check")
        return times


def rows(quick: bool) -> list[Row]:
    lost: dict[str, str] = {}
    times = _measure(*((5_000, 5) if quick else (20_000, 15)), lost)
    for name, values in times.items():
        say(f"  {name}: {micro(statistics.median(values))}")
    return [
        *_informational(times, lost),
        _against("warm pair / urllib3 (the faster mode)", URLLIB3, Limit("<=", 1.0, 0.7), times, lost),
        *(_against(f"warm pair / {name}", (name,), Limit("<=", 1.0, 0.5), times, lost) for name in OTHERS),
    ]


def _against(
    what: str, peers: tuple[str, ...], limit: Limit, times: dict[str, list[float]], lost: dict[str, str]
) -> Row:
    present = [name for name in peers if name in times]
    if not present:
        return missing_row("pairs", what, lost[peers[0]])
    peer = min(present, key=lambda name: statistics.median(times[name]))
    theirs = micro(statistics.median(times[peer]))
    if OURS not in times:
        return Row("pairs", what, peer=theirs, note=lost[OURS])
    ratios = paired_ratios(times[OURS], times[peer])
    return Row("pairs", what, ratios, "x", limit, micro(statistics.median(times[OURS])), theirs, peer)


def _informational(times: dict[str, list[float]], lost: dict[str, str]) -> list[Row]:
    if WITH not in times:
        return [missing_row("pairs", "with pool.connection(): pass", lost[WITH])]
    return [Row("pairs", "with pool.connection(): pass", [t * 1e6 for t in times[WITH]], "µs", note="no limit")]
