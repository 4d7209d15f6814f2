"""Django requests of 8 workers: an engine of sharedpool's, and Django's own through pgbouncer in transaction mode.

A request asks for one thing, does something else for 20 ms, then asks for another and changes two in a transaction.
Over pgbouncer connections are persistent, as Django's users have them there. Sessions are not reset (`reset="never"`),
because pgbouncer does not either; other rows show what the default costs, a reset before each lease. Then one worker's
statements by themselves, also against a pgbouncer that resets after each transaction. Then takeovers, at the level of
Django and of SQLAlchemy, against a fresh connection at the same level.
"""

from __future__ import annotations

import io
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

from benchmarks import servers
from benchmarks.harness import (
    Actor,
    Limit,
    Missing,
    Row,
    interleave,
    micro,
    missing_row,
    need,
    paired_ratios,
    quantile,
    say,
)
from benchmarks.postgres import bouncer, server
from benchmarks.throughput import Run, describe, together

GROUP = "django"
OUTSIDE = 0.020
SHARED, RESET, REQUEST, BOUNCER, FRESH = "transaction", "transaction, reset", "request", "pgbouncer", "fresh"
HANDOFF, RESETTING = "transaction, reset at a handoff", "pgbouncer, reset always"
OURS = (SHARED, HANDOFF, RESET, REQUEST)
WORKERS, CAP = 8, 4


class Urls:
    """Stands for the module of a project's URLs."""

    def __init__(self, outside: float) -> None:
        need("django")
        from django.db import connections, transaction
        from django.http import HttpRequest, HttpResponse
        from django.urls import path

        def page(_: HttpRequest, alias: str) -> HttpResponse:
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT x FROM things WHERE id = %s", [1])
                cursor.fetchone()
                time.sleep(outside)
                cursor.execute("SELECT x FROM things WHERE id = %s", [2])
                cursor.fetchone()
            with transaction.atomic(using=alias), connections[alias].cursor() as cursor:
                cursor.execute("UPDATE things SET x = x + 1 WHERE id = %s", [abs(hash(cursor)) % 1000])
                cursor.execute("SELECT count(*) FROM things WHERE id < %s", [3])
                cursor.fetchone()
            return HttpResponse("good")

        self.urlpatterns = [path("<str:alias>", page)]


class Client:
    """One of the workers."""

    def __init__(self, port: int, through: int, resetting: int, outside: float) -> None:
        need("django")
        import django
        from django.conf import settings

        def database(engine: str, at: int, pool: Any = None, **given: Any) -> dict[str, Any]:
            options = {"sslmode": "disable", **({} if pool is None else {"pool": pool})}
            return {
                "ENGINE": engine, "NAME": "postgres", "USER": "app", "HOST": "127.0.0.1", "PORT": str(at),
                "OPTIONS": options, **given,
            }  # fmt: skip

        def shared(name: str, **given: Any) -> dict[str, Any]:
            return database("sharedpool.django.postgresql", port, {"max_size": CAP, "name": name, **given})

        plain = "django.db.backends.postgresql"
        settings.configure(
            DATABASES={
                "default": database(plain, port),
                SHARED: shared("dj", lease="transaction", reset="never"),
                RESET: shared("dj-reset", lease="transaction"),
                HANDOFF: shared("dj-handoff", lease="transaction", reset="handoff"),
                REQUEST: shared("dj-request", reset="never"),
                BOUNCER: database(plain, through, CONN_MAX_AGE=None, DISABLE_SERVER_SIDE_CURSORS=True),
                RESETTING: database(plain, resetting, CONN_MAX_AGE=None, DISABLE_SERVER_SIDE_CURSORS=True),
                "take": shared("dj-take", max_size=1),
                "take-never": shared("dj-take-never", max_size=1, reset="never"),
            },
            ROOT_URLCONF=Urls(outside), SECRET_KEY="bench", ALLOWED_HOSTS=["*"], USE_TZ=True,
        )  # fmt: skip
        django.setup()
        from django.core.handlers.wsgi import WSGIHandler
        from django.db import connections

        self.handler = WSGIHandler()
        self.connections = connections
        self.engines: dict[str, Any] = {}

    def request(self, alias: str) -> None:
        environ = {
            "REQUEST_METHOD": "GET", "PATH_INFO": f"/{alias}", "SERVER_NAME": "x", "SERVER_PORT": "80",
            "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
        }  # fmt: skip
        response = self.handler(environ, lambda *_: None)
        assert b"".join(response) == b"good"
        response.close()

    def run(self, way: str, start: float, seconds: float) -> bytes:
        time.sleep(max(0.0, start - time.monotonic()))
        latencies = array("d")
        before = time.monotonic()
        while before < start + seconds:
            self.request(way)
            after = time.monotonic()
            latencies.append(after - before)
            before = after
        return latencies.tobytes()

    def statements(self, alias: str, block: bool, number: int) -> float:
        """Seconds for a SELECT, on average; each outside of a transaction, or in one of its own."""
        from django.db import transaction

        connection = self.connections[alias]
        began = time.perf_counter()
        for _ in range(number):
            with transaction.atomic(using=alias) if block else nullcontext(), connection.cursor() as cursor:
                cursor.execute("SELECT x FROM things WHERE id = %s", [1])
                cursor.fetchone()
        took = (time.perf_counter() - began) / number
        if not alias.startswith(BOUNCER):
            connection.close()
        return took

    def connect_django(self, alias: str) -> float:
        """Seconds until this process has a session, and its end."""
        connection = self.connections[alias]
        began = time.perf_counter()
        connection.ensure_connection()
        took = time.perf_counter() - began
        connection.close()
        return took

    def prepare_sqlalchemy(self, url: str) -> None:
        alchemy = need("sqlalchemy")
        from sharedpool.integrations.sqlalchemy import SharedQueuePool

        for reset in ("handoff", "never"):
            self.engines[reset] = alchemy.create_engine(
                url, poolclass=SharedQueuePool, pool_size=1, shared_name=f"sa-{reset}", reset=reset
            )
        self.engines[FRESH] = alchemy.create_engine(url, poolclass=alchemy.NullPool)

    def connect_sqlalchemy(self, name: str) -> float:
        began = time.perf_counter()
        connection = self.engines[name].connect()
        took = time.perf_counter() - began
        connection.close()
        return took


def _requests(clients: list[Actor], ways: list[str], seconds: float, rounds: int) -> dict[str, list[Run]]:
    for way in ways:
        together(clients, way, seconds / 4)
    return interleave(rounds, {way: (lambda way=way: together(clients, way, seconds)) for way in ways})


def _takeovers(clients: list[Actor], method: str, fresh: str, ways: dict[str, str], rounds: int) -> list[Row]:
    one, other = clients[:2]
    times: dict[str, list[float]] = {name: [] for name in (fresh, *ways)}
    for name in (fresh, *ways):
        for client in (one, other):
            client.call(method, name)
    for _ in range(rounds):
        for name in (fresh, *ways):
            one.call(method, name)
            times[name].append(other.call(method, name))
    connect = quantile(times[fresh], 0.5)
    return [
        Row(GROUP, text, [took / connect for took in times[name]], "x", None,
            micro(quantile(times[name], 0.5)), micro(connect))
        for name, text in ways.items()
    ]  # fmt: skip


def _statements(client: Actor, block: bool, number: int, rounds: int) -> list[Row]:
    """What one worker's SELECT takes, where nobody else asks."""
    ways = (SHARED, HANDOFF, RESET, REQUEST, RESETTING, BOUNCER)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways:
        client.call("statements", way, block, number // 4)
    for _ in range(rounds):
        for way in ways:
            times[way].append(client.call("statements", way, block, number))
    what = "a SELECT in a transaction of its own" if block else "a SELECT"
    peer = quantile(times[BOUNCER], 0.5)
    return [
        Row(GROUP, f"{what}, {way} / pgbouncer", [took / peer for took in times[way]], "x", None,
            micro(quantile(times[way], 0.5)), micro(peer))
        for way in ways if way != BOUNCER
    ]  # fmt: skip


def rows(quick: bool) -> list[Row]:
    seconds, rounds = (1.5, 3) if quick else (3.0, 5)
    with ExitStack() as stack:
        try:
            need("psycopg")
            postgres = stack.enter_context(server())
            through = stack.enter_context(bouncer(postgres))
            always = stack.enter_context(
                bouncer(postgres, server_reset_query="DISCARD ALL", server_reset_query_always="1")
            )
            stack.enter_context(servers.scope())
            postgres.ask("CREATE TABLE things AS SELECT id, 0 AS x FROM generate_series(0, 1000) AS id")
            postgres.ask("ALTER TABLE things ADD PRIMARY KEY (id)")
            port, resetting = (int(text.partition("port=")[2].split()[0]) for text in (through, always))
            made: Callable[[], Actor] = lambda: Actor(Client, postgres.port, port, resetting, OUTSIDE)  # noqa: E731
            clients = [stack.enter_context(made()) for _ in range(WORKERS)]
            runs = _requests(clients, [*OURS, BOUNCER], seconds, rounds)
            said = [
                row
                for block in (False, True)
                for row in _statements(clients[0], block, 200 if quick else 1000, 3 if quick else 7)
            ]
            for client in clients[:2]:
                client.call("prepare_sqlalchemy", f"postgresql+psycopg://app@127.0.0.1:{postgres.port}/postgres")
            taken = _takeovers(
                clients, "connect_django", "default",
                {"take-never": "Django: takeover, reset=never / connect", "take": "Django: takeover / connect"},
                20 if quick else 60,
            )  # fmt: skip
            taken += _takeovers(
                clients, "connect_sqlalchemy", FRESH,
                {"never": "SQLAlchemy: takeover, reset=never / connect", "handoff": "SQLAlchemy: takeover / connect"},
                20 if quick else 60,
            )  # fmt: skip
        except Missing as exc:
            return [missing_row(GROUP, "Django, PostgreSQL and pgbouncer", str(exc))]
    for way, results in runs.items():
        say(f"  {way}: {describe(results)}")
    return [_against(way, runs, Limit(">=", 1.0, 1.2) if way == SHARED else None) for way in OURS] + said + taken


def _against(way: str, runs: dict[str, list[Run]], limit: Limit | None) -> Row:
    ratios = paired_ratios([run.rate for run in runs[way]], [run.rate for run in runs[BOUNCER]])
    what = f"20 ms outside SQL, 8 on cap 4, lease={way} / pgbouncer"
    return Row(GROUP, what, ratios, "x", limit, describe(runs[way]), describe(runs[BOUNCER]))
