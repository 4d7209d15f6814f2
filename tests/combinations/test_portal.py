"""Flask, uWSGI, requests and redis-py. The other HTTP server says 103, too much and too late, and lets users log in."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.combinations.awkward import Awkward
from tests.combinations.clients import DEADLINE, AtOnce, Clients, Question, not_right
from tests.combinations.harm import kill, kill_the_arbiter, wait_at_rest
from tests.stress.looking import looking
from tests.support.redises import RedisServer
from tests.support.scope import Scope
from tests.system.test_servers_uwsgi import UWSGI, Uwsgi

CAP, CLIENTS, WORKERS, THREADS = 3, 8, 3, 3
KINDS = "plain", "hints", "surplus", "late", "mail"
HARM = ["worker"] * 3 + ["arbiter"] * 2 + ["new workers"]

pytestmark = pytest.mark.skipif(UWSGI is None, reason="binary uwsgi is missing")


@pytest.fixture
def awkward(nothing_left_behind: None) -> Iterator[Awkward]:
    with Awkward() as server:
        yield server


class Portal(Uwsgi):
    def __init__(self, directory: Path, scope: Scope, awkward: Awkward, redis: RedisServer) -> None:
        self.scope = scope
        super().__init__(
            directory, scope, None, "--module", "tests.combinations.portal:app", "--threads", str(THREADS),
            "--harakiri", str(2 * int(DEADLINE)),
            PORTAL_HTTP=awkward.url, PORTAL_REDIS=str(redis.port), PORTAL_CAP=str(CAP),
            SHAREDPOOL_API_CLOSE_TIMEOUT="5", SHAREDPOOL_CACHE_CLOSE_TIMEOUT="5",
        )  # fmt: skip


def question(kind: str, user: str, text: str) -> Question:
    """What a user asks, and what only that one may be told."""
    path = f"/{kind}/{user}/{text}"
    if kind == "late":
        return path, f"204  {user}:{text}"
    return path, f"200 {path} as {user if kind == 'mail' else None} {user}:{text}"


def asking(client: int, chance: random.Random) -> Iterator[Question]:
    """A client's questions, without an end."""
    return (question(chance.choice(KINDS), f"u{client}", str(number)) for number in itertools.count())


def test_no_answer_login_or_connection_is_anybody_elses_whatever_the_other_server_sends_and_who_is_killed(
    directory: Path, scope: Scope, awkward: Awkward, redis_server: RedisServer, seeded: random.Random
) -> None:
    most = [0]
    with redis_server.judge(alone=True) as redis:

        def of_the_cache() -> int:
            clients: Any = redis.client_list()
            return sum(client["db"] == "1" for client in clients)

        def look() -> None:
            most[0] = max(most[0], of_the_cache())

        with looking(look), Portal(directory, scope, awkward, redis_server) as portal:
            clients = in_chaos(portal, awkward, seeded)
            again = [question(kind, "u", f"{kind}{turn}") for kind in KINDS for turn in range(3)]
            with AtOnce(portal.get, again) as at_the_end:
                at_the_end.begin()
            wait_at_rest(portal.get, "api", lambda: awkward.open)
            wait_at_rest(portal.get, "cache", of_the_cache)
    print(f"{awkward.accepted} connections, {len(awkward.served)} requests; peaks {awkward.peak} and {most[0]}")
    assert not_right(at_the_end.asked) == []
    astray = [each for each in awkward.served if each.login != each.sender]
    assert astray == []
    assert clients.wrong == []
    assert clients.failed == []
    assert len(clients.cut) <= (HARM.count("worker") + HARM.count("new workers")) * CLIENTS
    assert awkward.peak <= CAP
    assert most[0] <= CAP


def in_chaos(portal: Portal, awkward: Awkward, chance: random.Random) -> Clients:
    with Clients(portal.get, [asking(client, random.Random(chance.random())) for client in range(CLIENTS)]) as clients:
        clients.wait_more(40)
        for what in chance.sample(HARM, len(HARM)):
            print(what)
            if what == "worker":
                kill(chance.choice(sorted(portal.workers())))
            elif what == "arbiter":
                kill_the_arbiter(portal.scope)
            else:
                portal.new_workers()
            clients.wait_more(20)
    print(f"in chaos: {clients}")
    return clients
