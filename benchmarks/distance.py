"""PostgreSQL that is not next door: under TLS, and a millisecond away; against pgbouncer beside the application.

Under TLS a session stays in the process that opened it, so where more processes want one than may have one the permit
goes over, and the session is opened anew, with a password (SCRAM) and a handshake. pgbouncer's clients speak without
TLS, its way to the server with it. Statements and `reset` are as in `benchmarks/postgres.py`. The delay is that of a
relay, half of it each way, and of both contestants' way to the server.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks import servers
from benchmarks.delay import delayed
from benchmarks.harness import (
    Limit,
    Missing,
    Row,
    interleave,
    micro,
    milli,
    missing_row,
    need,
    paired_ratios,
    say,
)
from benchmarks.postgres import BOUNCER, PLAIN, SHARED, Client
from benchmarks.throughput import WORKERS, Run, crew, describe, together

GROUP = "distance"
ROUND_TRIP = 0.001


class Counted(Client):
    """One of the client processes, which also says what was counted."""

    def opened(self, way: str) -> int:
        """Connections that were opened, by all processes together."""
        return int(self.pools[way][0].stats().opened)


@dataclass(slots=True)
class Found:
    """What one comparison gave.

    Attributes:
        runs: Of each way.
        effort: Processor time of clients, server and pgbouncer for one lease, s, by way; load does not touch it as it
            does the rate.
        opened: Sessions opened for each second of the pool's runs.
        most: Sessions of the pool at the server.
    """

    runs: dict[str, list[Run]]
    effort: dict[str, list[float]]
    opened: list[float]
    most: int = 0


def compare(
    name: str, postgres: Any, to: str, bouncer: Any, cap: int, seconds: float, rounds: int, order: str = "auto",
    *, plain: bool = False,
) -> Found:  # fmt: skip
    """Both ways in turn; with `plain` also as many clients as the cap allows, with a connection each and no pool."""
    found = Found({}, {SHARED: [], BOUNCER: [], PLAIN: []}, [])
    with ExitStack() as stack:
        stack.enter_context(servers.scope())
        ways = {SHARED: name, BOUNCER: BOUNCER} | ({PLAIN: PLAIN} if plain else {})
        crews = {way: crew(stack, Counted, cap if way == PLAIN else WORKERS) for way in ways}
        for client in crews[SHARED]:
            client.call("prepare_shared", name, f"{to} application_name={name}", cap, False, "never", order)
        for client in crews[BOUNCER]:
            client.call("prepare_own", BOUNCER, bouncer.conninfo, False)
        for client in crews.get(PLAIN, ()):
            client.call("prepare_own", PLAIN, to, False)
        ours = crews[SHARED][0]
        pids = [postgres.process.pid, bouncer.process.pid, *(client.pid for each in crews.values() for client in each)]

        def run(way: str) -> Run:
            before, opened = sum(map(_busy, pids)), ours.call("opened", name)
            done = together(crews[way], ways[way], seconds)
            found.effort[way].append((sum(map(_busy, pids)) - before) / (done.rate * seconds))
            if way == SHARED:
                found.opened.append((ours.call("opened", name) - opened) / seconds)
                query = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'"
                found.most = max(found.most, int(postgres.ask(query)[0][0]))
            return done

        for way, clients in crews.items():
            together(clients, ways[way], seconds / 2)  # warm-up
        found.runs = interleave(rounds, {way: (lambda way=way: run(way)) for way in ways})
    return found


def _busy(pid: int) -> float:
    """Seconds of the processor that a process and its children have had, those that have ended, too."""
    process = need("psutil").Process(pid)
    times = [process.cpu_times()]
    for child in process.children():
        with contextlib.suppress(need("psutil").NoSuchProcess):
            times.append(child.cpu_times())
    ended: float = times[0].children_user + times[0].children_system
    for each in times:
        ended += each.user + each.system
    return ended


def _rows(what: str, limit: Limit, cap: int, found: Found) -> list[Row]:
    runs = found.runs
    for way, results in runs.items():
        say(f"  {what}, {way}: {describe(results)}")
    ratios = paired_ratios([run.rate for run in runs[SHARED]], [run.rate for run in runs[BOUNCER]])
    tails = [[run.p99 for run in runs[way]] for way in (SHARED, BOUNCER)]
    most = []
    if PLAIN in runs:
        bound = paired_ratios([run.rate for run in runs[PLAIN]], [run.rate for run in runs[BOUNCER]])
        text = f"{what}: {cap} clients with a connection each and no pool / pgbouncer"
        most = [Row(GROUP, text, bound, "x", None, describe(runs[PLAIN]), describe(runs[BOUNCER]))]
    return [
        *most,
        Row(GROUP, f"{what} / pgbouncer, throughput", ratios, "x", limit,
            describe(runs[SHARED]), describe(runs[BOUNCER])),
        Row(GROUP, f"{what} / pgbouncer, p99", paired_ratios(*tails), "x", None,
            *(milli(statistics.median(side)) for side in tails)),
        Row(GROUP, f"{what} / pgbouncer, processor time of a lease",
            paired_ratios(found.effort[SHARED], found.effort[BOUNCER]), "x", None,
            *(micro(statistics.median(found.effort[way])) for way in (SHARED, BOUNCER))),
        Row(GROUP, f"{what}, sessions opened", found.opened, "/s"),
        Row(GROUP, f"{what}, sessions at the server", [found.most], "", Limit("<=", cap, cap)),
    ]  # fmt: skip


def _under_tls(seconds: float, rounds: int) -> list[Row]:
    support = need("tests.support.postgres", "the tests (a source tree)")
    with ExitStack() as stack:
        server = support.Postgres.with_tls(auth="scram-sha-256")
        stack.callback(server.end)
        server.begin()
        server.ask("CREATE USER plain PASSWORD 'secret'")
        login = "user=plain password=secret"
        to = f"host={servers.HOST} port={server.port} {login} dbname=postgres sslmode=require"
        rows: list[Row] = []
        for cap, limit in ((4, Limit(">=", 0.5, 1.0)), (8, Limit(">=", 1.0, 2.0))):
            with ExitStack() as inner:
                bouncer = support.PgBouncer(
                    server, login=login, server_tls_sslmode="require", default_pool_size=str(cap)
                )
                inner.callback(bouncer.end)
                bouncer.begin()
                found = compare(f"tls{cap}", server, to, bouncer, cap, seconds, rounds)
                tls = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'plain'"
                assert server.ask(tls) == [(True,)]  # pgbouncer's are still there
                rows += _rows(f"TLS, {WORKERS} on cap {cap}", limit, cap, found)
        return rows


def _far_away(seconds: float, rounds: int) -> list[Row]:
    support = need("tests.support.postgres", "the tests (a source tree)")
    with ExitStack() as stack:
        server = support.Postgres()
        stack.callback(server.end)
        server.begin()
        port = stack.enter_context(delayed(server.port, ROUND_TRIP / 2))
        to = f"host={servers.HOST} port={port} user=app dbname=postgres sslmode=disable"
        bouncer = support.PgBouncer(server, port=port)
        stack.callback(bouncer.end)
        bouncer.begin()
        trips = [_trip(conninfo) for conninfo in (server.conninfo, to)]
        limit, rows = Limit(">=", 1.0, 1.0), []
        for order, what in (("auto", ""), ("sticky", ", in sticky order")):
            found = compare(f"far{order}", server, to, bouncer, 4, seconds, rounds, order, plain=True)
            rows += _rows(f"1 ms away, {WORKERS} on cap 4{what}", limit, 4, found)
    return [
        Row(GROUP, "SELECT 1 with the delay; without", [trips[1] * 1e3], "ms", None, milli(trips[1]), milli(trips[0])),
        *rows,
    ]


def _trip(conninfo: str) -> float:
    """Seconds of one query, the shortest of 50."""
    with need("psycopg").connect(conninfo, autocommit=True, prepare_threshold=None) as conn:
        times = []
        for _ in range(50):
            before = time.perf_counter()
            conn.execute("SELECT 1").fetchone()
            times.append(time.perf_counter() - before)
    return min(times)


def rows(quick: bool) -> list[Row]:
    seconds, rounds = (1.0, 3) if quick else (2.0, 7)
    os.environ.pop("PGOPTIONS", None)
    found = []
    for what, measure in (("TLS to the server", _under_tls), ("a millisecond to the server", _far_away)):
        try:
            found += measure(seconds, rounds)
        except (Missing, need("tests.support.postgres", "the tests").Missing) as exc:
            found.append(missing_row(GROUP, what, str(exc)))
    return found
