"""PostgreSQL: the same client processes through sharedpool, through pgbouncer, and over a psycopg connection each.

pgbouncer is in transaction mode with a pool of 4. Statements are the same everywhere and never prepared, because this
pgbouncer cannot; sessions are not reset (`reset="never"`), because pgbouncer does not either. Every lease is one query,
or one transaction of three. The server is the judge of the cap: it is looked at between the runs.
"""

from __future__ import annotations

import os
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    milli,
    missing_row,
    need,
    paired_ratios,
    say,
)
from benchmarks.throughput import Run, crew, describe, together

GROUP = "postgres"
SHARED, STICKY, BOUNCER, PLAIN = "sharedpool", "sticky order", "pgbouncer", "psycopg"
TOKEN = "psycopg, and a token from a pipe for each lease"
ONE, THREE = "SELECT 1", "BEGIN, 3 queries, COMMIT"


class Client:
    """One of the client processes."""

    def __init__(self) -> None:
        self.loops: dict[str, Callable[[float], array[float]]] = {}
        self.pools: dict[str, Any] = {}

    def prepare_shared(self, way: str, conninfo: str, cap: int, three: bool, reset: str, order: str = "auto") -> None:
        pool = library().attach(way.replace(" ", "").replace(",", "")[:60], max_connections=cap, order=order)
        driver = need("sharedpool.postgres.psycopg3", "psycopg").Psycopg3Driver(
            conninfo, {"autocommit": True, "prepare_threshold": None}, reset=reset
        )
        self.loops[way] = lambda end: leased(pool, driver, _work(three), end)
        self.pools[way] = (pool, driver)

    def prepare_own(self, way: str, conninfo: str, three: bool) -> None:
        conn = need("psycopg").connect(conninfo, autocommit=True, prepare_threshold=None)
        self.loops[way] = lambda end: owned(conn, _work(three), end)

    def prepare_token(self, way: str, conninfo: str, three: bool, path: str) -> None:
        conn = need("psycopg").connect(conninfo, autocommit=True, prepare_threshold=None)
        pipe = os.open(path, os.O_RDWR)
        self.loops[way] = lambda end: in_turn(conn, pipe, _work(three), end)

    def run(self, way: str, start: float, seconds: float) -> bytes:
        time.sleep(max(0.0, start - time.monotonic()))
        return self.loops[way](start + seconds).tobytes()

    # takeovers

    def use(self, way: str, known: str = "session") -> float:
        """Seconds until this process has the one session, from the checkout to the lease.

        What it knows before: the session; only the "pool", with other sessions of it; or not even its "driver".
        """
        pool, driver = self.pools[way]
        if known == "pool":
            for entry in list(pool.attached.entries.values()):
                assert pool.attached._let_go_of(entry)
        elif known == "driver":
            driver = type(driver)(driver._conninfo, driver._kwargs, reset=driver._reset)
        start = time.perf_counter()
        lease = pool.checkout("", 0, driver)
        took = time.perf_counter() - start
        assert lease.conn.execute("SELECT 1").fetchone() == (1,)
        lease.checkin()
        return took

    def connect(self, conninfo: str) -> float:
        start = time.perf_counter()
        conn = need("psycopg").connect(conninfo, autocommit=True)
        took = time.perf_counter() - start
        conn.close()
        return took

    def takeovers(self, way: str) -> int:
        return int(self.pools[way][0].stats().takeovers)


def _work(three: bool) -> Callable[[Any], None]:
    def one_query(conn: Any) -> None:
        conn.execute("SELECT 1").fetchone()

    def three_queries(conn: Any) -> None:
        with conn.transaction():
            for _ in range(3):
                conn.execute("SELECT 1").fetchone()

    return three_queries if three else one_query


def leased(pool: Any, driver: Any, work: Callable[[Any], None], end: float) -> array[float]:
    """Latencies in seconds, each from before the checkout to after the checkin."""
    clock, latencies = time.monotonic, array("d")
    before = clock()
    while before < end:
        lease = pool.checkout("", 0, driver)
        work(lease.conn)
        lease.checkin()
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


def owned(conn: Any, work: Callable[[Any], None], end: float) -> array[float]:
    clock, latencies = time.monotonic, array("d")
    before = clock()
    while before < end:
        work(conn)
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


def in_turn(conn: Any, pipe: int, work: Callable[[Any], None], end: float) -> array[float]:
    """The least that an order over processes costs: who waits is woken by who gives back, and nothing else is done."""
    clock, latencies = time.monotonic, array("d")
    before = clock()
    while before < end:
        token = os.read(pipe, 1)
        work(conn)
        os.write(pipe, token)
        after = clock()
        latencies.append(after - before)
        before = after
    return latencies


@contextmanager
def server(**settings: str) -> Iterator[Any]:
    """PostgreSQL, stopped at the end."""
    support = need("tests.support.postgres", "the tests (a source tree)")
    try:
        running = support.Postgres(**settings)
    except support.Missing as exc:
        raise Missing(str(exc)) from exc
    try:
        yield running.begin()
    finally:
        running.end()


@contextmanager
def bouncer(postgres: Any, **settings: str) -> Iterator[str]:
    """The connection string of pgbouncer in transaction mode with a pool of 4."""
    support = need("tests.support.postgres")
    try:
        running = support.PgBouncer(postgres, **settings)
    except support.Missing as exc:
        raise Missing(str(exc)) from exc
    try:
        yield running.begin().conninfo
    finally:
        running.end()


def _compare(
    postgres: Any, through: str, workers: int, cap: int, three: bool, seconds: float, rounds: int
) -> tuple[dict[str, list[Run]], int]:
    """The runs of every way, and how many sessions of sharedpool's the server had at most between them."""
    most = 0
    name = f"pg{workers}x{cap}{'t' if three else ''}"
    ways = {SHARED: name, BOUNCER: BOUNCER, PLAIN: PLAIN} | (
        {STICKY: f"{name}s", TOKEN: TOKEN} if workers > cap else {}
    )
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        crews = {way: crew(stack, Client, workers) for way in ways}
        for client in crews[SHARED]:
            client.call("prepare_shared", name, f"{postgres.conninfo} application_name=ours", cap, three, "never")
        for client in crews[BOUNCER]:
            client.call("prepare_own", BOUNCER, through, three)
        for client in crews[PLAIN]:
            client.call("prepare_own", PLAIN, postgres.conninfo, three)
        if workers > cap:
            path = str(stack.enter_context(servers.temp_dir()) / "tokens")
            os.mkfifo(path)
            tokens = os.open(path, os.O_RDWR)
            stack.callback(os.close, tokens)
            os.write(tokens, b"x" * cap)
            for client in crews[TOKEN]:
                client.call("prepare_token", TOKEN, postgres.conninfo, three, path)
            sticky = f"{postgres.conninfo} application_name=sticky"
            for client in crews[STICKY]:
                client.call("prepare_shared", f"{name}s", sticky, cap, three, "never", "sticky")

        def run(way: str) -> Run:
            nonlocal most
            found = together(crews[way], ways[way], seconds)
            for own in ("ours", "sticky"):
                query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{own}'"
                most = max(most, int(postgres.ask(query)[0][0]))
            return found

        for way in ways:
            together(crews[way], ways[way], seconds / 4)  # warm-up
        return interleave(rounds, {way: (lambda way=way: run(way)) for way in ways}), most


def _rate(what: str, peer: str, limit: Limit | None, runs: dict[str, list[Run]], ours: str = SHARED) -> Row:
    ratios = paired_ratios([run.rate for run in runs[ours]], [run.rate for run in runs[peer]])
    return Row(GROUP, what, ratios, "x", limit, describe(runs[ours]), describe(runs[peer]))


def _tail(what: str, peer: str, runs: dict[str, list[Run]], ours: str = SHARED) -> Row:
    ratios = paired_ratios([run.p99 for run in runs[ours]], [run.p99 for run in runs[peer]])
    sides = [milli(statistics.median(run.p99 for run in runs[way])) for way in (ours, peer)]
    return Row(GROUP, what, ratios, "x", Limit("<=", 1.0, 1.0), *sides)


def _against_bouncer(text: str, limit: Limit, runs: dict[str, list[Run]]) -> list[Row]:
    """Strict order, sticky order, and what bounds them: no limit at all, and the least that strict order costs."""
    what = f"8 on cap 4, {text} / pgbouncer"
    return [
        _rate(f"{what}, throughput", BOUNCER, limit, runs),
        _tail(f"{what}, p99", BOUNCER, runs),
        _rate(f"{what}, in sticky order, throughput", BOUNCER, limit, runs, STICKY),
        _tail(f"{what}, in sticky order, p99", BOUNCER, runs, STICKY),
        Row(GROUP, "the longest in sticky order / in strict order",
            paired_ratios([run.most for run in runs[STICKY]], [run.most for run in runs[SHARED]]), "x", None,
            milli(statistics.median(run.most for run in runs[STICKY])),
            milli(statistics.median(run.most for run in runs[SHARED]))),
        _rate("8 connections, no limit / pgbouncer", BOUNCER, None, runs, PLAIN),
        _rate("8 connections, a token from a pipe for each lease / pgbouncer", BOUNCER, None, runs, TOKEN),
    ]  # fmt: skip


def _takeovers(conninfo: str, login: str, rounds: int) -> list[Row]:
    """Two processes and one session, in turn; against a connection of one's own, which logs in in this way."""
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        one, other = (stack.enter_context(Actor(Client, forked=True)) for _ in range(2))
        for client in (one, other):
            for reset in ("never", "handoff"):
                client.call("prepare_shared", f"take-{reset}", conninfo, 1, False, reset)
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            times.setdefault("connect", []).append(other.call("connect", conninfo))
            for reset in ("never", "handoff"):
                for known in (
                    "driver",
                    "session",
                    "pool",
                    "session",
                ):  # after a new driver the old one's has to be made
                    one.call("use", f"take-{reset}")
                    took = other.call("use", f"take-{reset}", known)
                    times.setdefault(f"{reset} {known}", []).append(took)
                times[f"{reset} session"].pop(-2)  # after another driver's object its own had to be made
        assert other.call("takeovers", "take-never") >= rounds
    connect = times.pop("connect")
    limits = {"never pool": Limit("<=", 0.1, 0.1), "never session": Limit("<=", 0.02, 0.02)}
    texts = {
        "never pool": f"takeover by a process that never had the session / connect, {login}",
        "never driver": "the same, and it is the first of its driver there",
        "never session": f"takeover by one that had it before / connect, {login}",
        "handoff pool": "the first, with DISCARD ALL / connect",
        "handoff session": "the last, with DISCARD ALL / connect",
    }
    return [
        Row(GROUP, text, _against(times[name], connect), "x", limits.get(name),
            micro(statistics.median(times[name])), micro(statistics.median(connect)))
        for name, text in texts.items()
    ]  # fmt: skip


def _against(times: list[float], connect: list[float]) -> list[float]:
    middle = statistics.median(connect)
    return [took / middle for took in times]


def rows(quick: bool) -> list[Row]:
    seconds, rounds = (0.7, 3) if quick else (1.5, 7)
    os.environ.pop("PGOPTIONS", None)
    try:
        with server() as postgres, bouncer(postgres) as through:
            one, most = _compare(postgres, through, 8, 4, False, seconds, rounds)
            three, also = _compare(postgres, through, 8, 4, True, seconds, rounds)
            two, _ = _compare(postgres, through, 2, 2, False, seconds, rounds)
            taken = _takeovers(postgres.conninfo, "no password", 20 if quick else 60)
        with server(auth="scram-sha-256") as postgres:
            postgres.ask("CREATE USER scram PASSWORD 'secret'")
            to = f"host={servers.HOST} port={postgres.port} user=scram password=secret dbname=postgres"
            taken += _takeovers(to, "SCRAM", 20 if quick else 60)
    except Missing as exc:
        return [missing_row(GROUP, "PostgreSQL and pgbouncer", str(exc))]
    for name, runs in ((ONE, one), (THREE, three), ("2 on 2", two)):
        for way, results in runs.items():
            say(f"  {name}, {way}: {describe(results)}")
    return [
        *_against_bouncer(ONE, Limit(">=", 1.2, 1.5), one),
        *_against_bouncer(THREE, Limit(">=", 1.5, 2.0), three),
        Row(GROUP, "8 on cap 4, sessions at the server", [max(most, also)], "", Limit("<=", 4, 4)),
        _rate(f"2 on cap 2, {ONE} / pgbouncer", BOUNCER, Limit(">=", 2.0, 2.5), two),
        _rate(f"2 on cap 2, {ONE} / psycopg", PLAIN, Limit(">=", 0.9, 0.97), two),
        *taken,
    ]
