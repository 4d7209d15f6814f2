"""Django, Celery and gunicorn over PostgreSQL and Redis.

The server has room for the cap, so whoever goes beyond it is refused and the server's log says so. Its rows belong to
tenants, whom a setting and the search path tell apart.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.combinations.clients import DEADLINE, Asked, AtOnce, Clients, Question, not_right
from tests.combinations.harm import kill, kill_the_arbiter, numbers, wait_at_rest
from tests.stress.looking import looking
from tests.support import privileges
from tests.support.postgres import CLIENTS, Postgres, too_many
from tests.support.redises import RedisServer
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.system.servers import Gunicorn, Server

CAP, TENANTS, WAITING = 3, 6, 3
WORKERS, THREADS = 2, CAP + WAITING + 2
#: Each thread that waits for a task's result keeps a connection, that of a worker that is about to end, too.
RESULTS = 2 * WORKERS * THREADS + 16
#: The looking one, and the one that asks in between.
JUDGES, RESERVED = 2, 3

#: What psycopg says of a session that was ended in the midst of a query.
ENDED = re.compile("terminating connection|server closed the connection|connection is closed|the connection is lost")
HELD = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
TABLES = """
CREATE ROLE shop LOGIN;
CREATE TABLE note (
    id bigserial PRIMARY KEY, tenant text NOT NULL DEFAULT current_setting('shop.tenant'), text text NOT NULL
);
ALTER TABLE note ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON note USING (tenant = current_setting('shop.tenant'));
GRANT ALL ON note, note_id_seq TO shop;
"""
TENANT = """
CREATE SCHEMA {0};
CREATE TABLE {0}.owner AS SELECT '{0}' AS name;
GRANT USAGE ON SCHEMA {0} TO shop;
GRANT SELECT ON {0}.owner TO shop;
"""

Ask = Callable[..., Any]


@pytest.fixture
def postgres(nothing_left_behind: None) -> Iterator[Postgres]:
    """One with room for the cap and two judges, and the shop's tables."""
    server = Postgres(
        max_connections=str(CAP + JUDGES + RESERVED), superuser_reserved_connections=str(RESERVED), log_connections="on"
    )
    try:
        server.begin()
        server.ask(TABLES + "".join(TENANT.format(f"t{number}") for number in range(TENANTS)))
        yield server
    finally:
        server.end()


class Judge:
    """What PostgreSQL and Redis say, asked all the time."""

    def __init__(self, postgres: Postgres, redis: RedisServer, ask: Ask) -> None:
        self.postgres, self.redis, self.ask = postgres, redis, ask
        self.most = self.most_results = 0

    @property
    def sessions(self) -> list[int]:
        return [row[0] for row in self.ask(CLIENTS)]

    @property
    def opened(self) -> int:
        """How many sessions there have been."""
        return self.postgres.log().count("connection authorized: user=shop")

    @property
    def refused(self) -> list[str]:
        return too_many(self.postgres.log())

    def held(self) -> int:
        """How many requests wait until we let go."""
        return int(self.ask(HELD)[0][0])

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Requests that are asked to wait do so until the block's end."""
        self.ask("SELECT pg_advisory_lock(1)")
        try:
            yield
        finally:
            self.ask("SELECT pg_advisory_unlock(1)")


@pytest.fixture
def judge(postgres: Postgres, redis_server: RedisServer) -> Iterator[Judge]:
    with postgres.judge() as ask, postgres.judge() as also, redis_server.judge() as redis:
        wait_until(
            lambda: ask("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")[0][0] == JUDGES,
            what="nobody else is there",
        )
        judge = Judge(postgres, redis_server, ask)

        def look() -> None:
            judge.most = max(judge.most, len(also(CLIENTS)))
            clients: Any = redis.client_list()
            judge.most_results = max(judge.most_results, sum(client["db"] == "2" for client in clients))

        with looking(look):
            yield judge


class Shop(Gunicorn):
    """gunicorn, as another user where there is root; and Celery's worker, once it is asked for."""

    def __init__(self, directory: Path, scope: Scope, judge: Judge, lease: str) -> None:
        self.another = privileges.may_become_another()
        print("gunicorn becomes another user" if self.another else "no root: gunicorn stays who it is")
        if self.another:
            privileges.give(scope.directory)
        self.directory, self.scope = directory, scope
        self.env = {
            "SHOP_LEASE": lease, "SHOP_CAP": str(CAP), "SHOP_POSTGRES": str(judge.postgres.port),
            "SHOP_REDIS": str(judge.redis.port), "SHOP_RESULTS": str(RESULTS), "SHAREDPOOL_SHOP_CLOSE_TIMEOUT": "5",
            "HOME": "/",
        }  # fmt: skip
        user = f"--user={privileges.UID}", f"--group={privileges.UID}"
        super().__init__(
            directory, scope, None, "--worker-class", "gthread", "--threads", str(THREADS),
            *(user if self.another else ()), app="tests.combinations.shop.wsgi", workers=WORKERS,
            before=privileges.with_open_ways() if self.another else (), **self.env,
        )  # fmt: skip


class Celery(Server):
    """A worker with two processes, by the same user."""

    def __init__(self, shop: Shop) -> None:
        directory = shop.directory / "celery"
        directory.mkdir()
        before = privileges.as_another() if shop.another else []
        super().__init__(
            directory, shop.scope, None, *before, sys.executable, "-m", "celery", "-A", "tests.combinations.shop.tasks",
            "worker", "--concurrency", "2", "--without-gossip", "--without-mingle", "--without-heartbeat",
            "--loglevel", "info", workers=2, **shop.env,
        )  # fmt: skip

    def wait_serving(self) -> None:
        wait_until(lambda: "ready." in self.log or self.first.poll() is not None, DEADLINE, "it is ready")
        assert self.first.poll() is None, self.log


def write(kind: str, tenant: int, text: str, more: str = "") -> Question:
    """A note of a tenant's, and what only that one may see."""
    name = f"t{tenant % TENANTS}"
    return f"/{kind}/{name}/{text}{more}", f"['{name}'] ['{name}'] ['{text}']"


def writing(label: str, client: int) -> Iterator[Question]:
    """Notes without an end, of one tenant after the other; every other client's by a task."""
    kind = "task" if client % 2 else "write"
    return (write(kind, client + number, f"{label}{client}x{number}") for number in itertools.count())


@pytest.mark.parametrize("lease", ["request", "transaction"])
def test_a_shop_keeps_the_cap_and_its_tenants_apart_whatever_is_killed(
    directory: Path, scope: Scope, judge: Judge, lease: str, seeded: random.Random
) -> None:
    with Shop(directory, scope, judge, lease) as shop:
        asked = the_arbiter_is_killed_while_the_web_workers_hold_the_cap(shop, judge)
        with Celery(shop) as celery:
            asked += its_tasks_use_the_sessions_that_are_there(shop, judge)
            asked += everything_is_killed(shop, celery, judge, seeded)
            asked += everything_comes_back(shop, celery, judge)
        print(f"peak {judge.most}, of results {judge.most_results}; {judge.opened} sessions opened")
    notes = dict(judge.ask("SELECT text, string_agg(DISTINCT tenant, ' ') FROM note GROUP BY text"))
    for each in asked:
        _, _, tenant, text = each.path.partition("?")[0].split("/")
        assert notes.get(text) == tenant or (text not in notes and not each.is_right), each
    assert judge.most <= CAP
    assert judge.most_results <= RESULTS
    assert judge.refused == []


def the_arbiter_is_killed_while_the_web_workers_hold_the_cap(shop: Shop, judge: Judge) -> list[Asked]:
    first = AtOnce(shop.get, [write("write", number, f"held{number}", "?hold") for number in range(CAP)])
    others = AtOnce(shop.get, [write("write", number, f"more{number}") for number in range(WAITING)])
    with first, others, judge.holding():
        first.begin()
        wait_until(lambda: judge.held() == CAP, DEADLINE, "the cap is in use")
        kill_the_arbiter(shop.scope)
        others.begin()
        wait_until(
            lambda: judge.refused or numbers(shop.get, "shop").get("waiting") == WAITING,
            DEADLINE,
            "all others wait their turn",
        )
    assert judge.refused == []
    assert not_right(first.asked + others.asked) == []
    return first.asked + others.asked


def its_tasks_use_the_sessions_that_are_there(shop: Shop, judge: Judge) -> list[Asked]:
    """A session ends for nobody's task."""
    before = judge.opened
    with Clients(shop.get, [writing("calm", client) for client in range(TENANTS)]) as clients:
        clients.wait_more(40, "/task/")
    assert not_right(clients.asked) == []
    assert judge.opened - before <= CAP
    return clients.asked


def everything_is_killed(shop: Shop, celery: Celery, judge: Judge, chance: random.Random) -> list[Asked]:
    done = dict.fromkeys(("worker", "child", "session", "new workers"), 0)
    harm = ["worker", "worker", "child", "child", "arbiter", "arbiter", "sessions", "sessions", "new workers"]
    chance.shuffle(harm)
    with Clients(shop.get, [writing("wild", client) for client in range(TENANTS)]) as clients:
        for what in harm:
            print(what)
            if what == "worker":
                kill(chance.choice(sorted(shop.workers())))
            elif what == "child":
                kill(chance.choice(sorted(celery.workers())))
            elif what == "arbiter":
                kill_the_arbiter(shop.scope)
            elif what == "new workers":
                shop.new_workers()
            else:
                done["session"] += sum(
                    judge.ask("SELECT pg_terminate_backend(%s)", each)[0][0] for each in judge.sessions
                )
            done[what] = done.get(what, 0) + 1
            clients.wait_more(10, "/write/")
            clients.wait_more(10, "/task/")
    print(f"in chaos: {clients}")
    # What a killed worker was serving has no answer, a task of a killed process and a session in use end in an error.
    lost = [asked for asked in clients.failed if "WorkerLostError" in asked.text]
    ended = [
        asked for asked in clients.failed if asked.text.startswith("OperationalError: ") and ENDED.search(asked.text)
    ]
    assert clients.wrong == []
    assert len(clients.cut) <= (done["worker"] + done["new workers"]) * TENANTS, clients
    assert len(lost) <= done["child"], clients
    assert len(ended) <= done["session"], clients
    assert len(lost) + len(ended) == len(clients.failed), clients
    return clients.asked


def everything_comes_back(shop: Shop, celery: Celery, judge: Judge) -> list[Asked]:
    wait_until(lambda: len(shop.workers()) == WORKERS and len(celery.workers()) == 2, DEADLINE, "all are there again")
    again = [write(kind, number, f"again{number}") for number, kind in enumerate(["write", "task"] * 6)]
    with AtOnce(shop.get, again) as clients:
        clients.begin()
    assert not_right(clients.asked) == []
    wait_at_rest(shop.get, "shop", lambda: len(judge.sessions))
    assert judge.ask("SELECT DISTINCT state FROM pg_stat_activity WHERE usename = 'shop'") in ([], [("idle",)])
    return clients.asked
