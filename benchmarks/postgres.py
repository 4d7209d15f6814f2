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
from benchmarks.throughput import Run, describe, together

GROUP = "postgres"
SHARED, BOUNCER, PLAIN = "sharedpool", "pgbouncer", "psycopg"
ONE, THREE = "SELECT 1", "BEGIN, 3 queries, COMMIT"


class Client:
    """One of the client processes."""

    def __init__(self) -> None:
        self.loops: dict[str, Callable[[float], array[float]]] = {}
        self.pools: dict[str, Any] = {}

    def prepare_shared(self, way: str, conninfo: str, cap: int, three: bool, reset: str) -> None:
        pool = library().attach(way.replace(" ", "").replace(",", "")[:60], max_connections=cap)
        driver = need("sharedpool.postgres.psycopg3", "psycopg").Psycopg3Driver(
            conninfo, {"autocommit": True, "prepare_threshold": None}, reset=reset
        )
        self.loops[way] = lambda end: leased(pool, driver, _work(three), end)
        self.pools[way] = (pool, driver)

    def prepare_own(self, way: str, conninfo: str, three: bool) -> None:
        conn = need("psycopg").connect(conninfo, autocommit=True, prepare_threshold=None)
        self.loops[way] = lambda end: owned(conn, _work(three), end)

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


@contextmanager
def server() -> Iterator[Any]:
    """PostgreSQL, stopped at the end."""
    support = need("tests.support.postgres", "the tests (a source tree)")
    try:
        running = support.Postgres()
    except support.Missing as exc:
        raise Missing(str(exc)) from exc
    try:
        yield running.begin()
    finally:
        running.end()


@contextmanager
def bouncer(postgres: Any) -> Iterator[str]:
    """The connection string of pgbouncer in transaction mode with a pool of 4."""
    support = need("tests.support.postgres")
    try:
        running = support.PgBouncer(postgres)
    except support.Missing as exc:
        raise Missing(str(exc)) from exc
    try:
        yield running.begin().conninfo
    finally:
        running.end()


def _compare(
    postgres: Any, through: str, workers: int, cap: int, three: bool, plain: bool, seconds: float, rounds: int
) -> tuple[dict[str, list[Run]], int]:
    """The runs of every way, and how many sessions of sharedpool's the server had at most between them."""
    most = 0
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        clients = [stack.enter_context(Actor(Client, forked=True)) for _ in range(workers)]
        name = f"pg{workers}x{cap}{'t' if three else ''}"
        for client in clients:
            client.call("prepare_shared", name, f"{postgres.conninfo} application_name=ours", cap, three, "never")
            client.call("prepare_own", BOUNCER, through, three)
            if plain:
                client.call("prepare_own", PLAIN, postgres.conninfo, three)
        ways = {SHARED: name, BOUNCER: BOUNCER} | ({PLAIN: PLAIN} if plain else {})

        def run(way: str) -> Run:
            nonlocal most
            found = together(clients, ways[way], seconds)
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ours'"
            most = max(most, int(postgres.ask(query)[0][0]))
            return found

        for way in ways:
            together(clients, ways[way], seconds / 4)  # warm-up
        return interleave(rounds, {way: (lambda way=way: run(way)) for way in ways}), most


def _rate(what: str, peer: str, limit: Limit, runs: dict[str, list[Run]]) -> Row:
    ratios = paired_ratios([run.rate for run in runs[SHARED]], [run.rate for run in runs[peer]])
    return Row(GROUP, what, ratios, "x", limit, describe(runs[SHARED]), describe(runs[peer]))


def _tail(what: str, peer: str, runs: dict[str, list[Run]]) -> Row:
    ratios = paired_ratios([run.p99 for run in runs[SHARED]], [run.p99 for run in runs[peer]])
    sides = [milli(statistics.median(run.p99 for run in runs[way])) for way in (SHARED, peer)]
    return Row(GROUP, what, ratios, "x", Limit("<=", 1.0, 1.0), *sides)


def _takeovers(postgres: Any, rounds: int) -> list[Row]:
    """Two processes and one session, in turn; against a connection of one's own."""
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        one, other = (stack.enter_context(Actor(Client, forked=True)) for _ in range(2))
        for client in (one, other):
            for reset in ("never", "handoff"):
                client.call("prepare_shared", f"take-{reset}", postgres.conninfo, 1, False, reset)
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            times.setdefault("connect", []).append(other.call("connect", postgres.conninfo))
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
        "never pool": "takeover by a process that never had the session / connect",
        "never driver": "the same, and it is the first of its driver there",
        "never session": "takeover by one that had it before / connect",
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
            one, most = _compare(postgres, through, 8, 4, False, False, seconds, rounds)
            three, also = _compare(postgres, through, 8, 4, True, False, seconds, rounds)
            two, _ = _compare(postgres, through, 2, 2, False, True, seconds, rounds)
            taken = _takeovers(postgres, 20 if quick else 60)
    except Missing as exc:
        return [missing_row(GROUP, "PostgreSQL and pgbouncer", str(exc))]
    for name, runs in ((ONE, one), (THREE, three), ("2 on 2", two)):
        for way, results in runs.items():
            say(f"  {name}, {way}: {describe(results)}")
    return [
        _rate(f"8 on cap 4, {ONE} / pgbouncer, throughput", BOUNCER, Limit(">=", 1.2, 1.5), one),
        _tail(f"8 on cap 4, {ONE} / pgbouncer, p99", BOUNCER, one),
        _rate(f"8 on cap 4, {THREE} / pgbouncer", BOUNCER, Limit(">=", 1.5, 2.0), three),
        _tail("the same, p99", BOUNCER, three),
        Row(GROUP, "8 on cap 4, sessions at the server", [max(most, also)], "", Limit("<=", 4, 4)),
        _rate(f"2 on cap 2, {ONE} / pgbouncer", BOUNCER, Limit(">=", 2.0, 2.5), two),
        _rate(f"2 on cap 2, {ONE} / psycopg", PLAIN, Limit(">=", 0.9, 0.97), two),
        *taken,
    ]
