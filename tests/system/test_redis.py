"""redis-py over a shared pool, on a real server: its CLIENT LIST and its counters say what there was."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from redis.maint_notifications import MaintNotificationsConfig

from sharedpool import OptionError
from sharedpool.integrations.redis import SharedConnectionPool
from sharedpool.integrations.redis import asyncio as asynchronous
from tests.support import commands, redises
from tests.support.redises import RedisServer
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, ForkServer, Harness, Worker, clean_environment

HANDSHAKE = ("hello", "auth", "select", "client|setname", "client|setinfo")


@pytest.fixture(scope="session")
def redis_server(fork_server: ForkServer) -> Iterator[RedisServer]:
    """A real server, one for the whole session; with TLS, too."""
    server = RedisServer(tls=True)
    try:
        yield server.begin()
    finally:
        server.end()


@pytest.fixture
def server(redis_server: RedisServer, nothing_left_behind: None) -> RedisServer:
    """The session's server, without anybody connected."""
    redis_server.wait_until_alone()
    return redis_server


@pytest.fixture(scope="session")
def peopled_server(fork_server: ForkServer) -> Iterator[RedisServer]:
    """One with users of its own."""
    server = RedisServer()
    try:
        yield server.begin()
    finally:
        server.end()


@pytest.fixture
def people(peopled_server: RedisServer, nothing_left_behind: None) -> RedisServer:
    """The same, without anybody connected."""
    peopled_server.wait_until_alone()
    with peopled_server.judge() as judge:
        for who, password in (("alice", "a"), ("bob", "b")):
            judge.acl_setuser(
                who, enabled=True, reset=True, passwords=[f"+{password}"], categories=["+@all"], keys=["*"],
                channels=["*"],
            )  # fmt: skip
    return peopled_server


@pytest.fixture
def renaming(nothing_left_behind: None) -> Iterator[RedisServer]:
    """A server that calls SELECT otherwise."""
    server = RedisServer(more=["--rename-command", "SELECT", "PICKDB"])
    try:
        yield server.begin()
    finally:
        server.end()


@pytest.fixture(scope="session")
def fork_server_with_redis(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded redis-py, too."""
    forks = ForkServer("tests.support.redises")
    yield forks
    forks.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_redis: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_redis)
    yield harness
    harness.close()


def url(server: RedisServer, **query: Any) -> str:
    asked = "&".join(f"{name}={value}" for name, value in {"pool": "cache", "max_connections": 1, **query}.items())
    return f"redis://127.0.0.1:{server.port}/0?{asked}"


# --- moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
def test_another_process_goes_on_with_a_connection_and_greets_nobody(
    two: list[Worker], server: RedisServer, protocol: int
) -> None:
    one, other = two
    text = (
        f"redis://app:secret@127.0.0.1:{server.port}/3?pool=cache&max_connections=1&client_name=web&protocol={protocol}"
    )
    for worker in two:
        worker.call(redises.make, text)
        worker.call(redises.make_async, text)
    first = one.call(redises.who)
    before = server.numbers()
    one.call(redises.ask, "SET", "k", "1")
    assert other.call(redises.who) == first
    info = other.call(redises.ask, "CLIENT INFO")
    info = info.decode() if isinstance(info, bytes) else info
    for part in ("name=web", "db=3", "user=app", f"resp={protocol}"):
        assert part in str(info).replace("'", "").replace(": ", "="), "the state of the handshake"
    assert other.call(redises.who, label="a") == first, "asyncio's and the threads' are the same ones"
    assert one.call(redises.who, label="a") == first
    assert one.call(redises.who) == first
    after = server.numbers()
    assert after["received"] == before["received"] + 1, "the judge's own"
    judges = {"hello": 1, "client|setinfo": 2, "auth": 0}
    for name in HANDSHAKE:
        assert after.get(name, 0) - before.get(name, 0) <= judges.get(name, 0), name
    os.kill(one.pid, signal.SIGKILL)
    assert other.call(redises.who) == first, "a dead one's connection serves the others"


def test_by_a_unix_socket_and_to_another_database_are_other_keys_of_the_same_cap(
    two: list[Worker], server: RedisServer
) -> None:
    one, other = two
    local = f"unix://{server.path}?pool=cache&max_connections=1"
    one.call(redises.make, local)
    other.call(redises.make, local)
    other.call(redises.make, local + "&db=2", "second")
    first = one.call(redises.who)
    assert other.call(redises.who) == first
    assert other.call(redises.who, "second") != first
    assert len(server.clients()) == 1, "evicted for the other key"


def test_what_a_user_leaves_changed_is_closed_and_everything_else_stays(worker: Worker, server: RedisServer) -> None:
    worker.call(redises.make, url(server))
    known = worker.call(redises.who)
    worker.call(redises.transaction, False)
    worker.call(redises.transaction, True)
    worker.call(redises.leave_off, ("ECHO", "x"), ("LPOP",), read=2)
    assert worker.call(redises.who) == known, "nothing of this changes a session"
    changes: list[dict[str, Any]] = [
        {"sent": [("SELECT", "1")], "read": 1},
        {"sent": [("MULTI",)], "read": 1},
        {"sent": [("WATCH", "k")], "read": 1},
        {"sent": [("SUBSCRIBE", "c")], "read": 1},
        {"sent": [("CLIENT", "REPLY", "SKIP")]},
        {"sent": [("CLIENT", "TRACKING", "ON", "BCAST")], "read": 1},
        {"sent": [("BLPOP", "nothing", "0.05")]},
        {"raw": b"PING\r\n"},
    ]
    for change in changes:
        worker.call(redises.leave_off, *change.get("sent", ()), raw=change.get("raw", b""), read=change.get("read", 0))
        found = worker.call(redises.who)
        assert found != known, change
        known = found
        assert b"off" in worker.call(redises.ask, "CLIENT", "TRACKINGINFO")[b"flags"]
    closes = worker.call(redises.stats).closes
    assert closes["unclean"] == len(changes)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_a_connection_lost_in_a_lease_is_another_lease_and_never_a_second_connection(
    worker: Worker, server: RedisServer
) -> None:
    worker.call(redises.make, url(server), retries=1)
    first = worker.call(redises.hold)
    with server.judge() as judge:
        judge.client_kill_filter(_id=str(first))
    wait_until(lambda: not server.clients())
    worker.fails(redis.ConnectionError, redises.talk, "GET", "k")
    second = worker.call(redises.talk, "CLIENT", "ID")
    assert second != first, "redis-py connects again by itself: with a new lease"
    assert worker.call(redises.stats).in_use == 1
    assert len(server.clients()) == 1
    worker.call(redises.let_go)
    assert worker.call(redises.who) == second
    with server.judge() as judge:
        judge.client_kill_filter(_id=str(second))
    assert worker.call(redises.who) not in (first, second), "one that ended while it was idle is not lent"
    numbers = worker.call(redises.stats)
    assert (numbers.in_use, numbers.waiting, numbers.used) == (0, 0, 1)


def test_who_listens_has_a_connection_of_his_own_until_he_stops(two: list[Worker], server: RedisServer) -> None:
    one, other = two
    for worker in two:
        worker.call(redises.make, url(server, max_connections=2))
        worker.call(redises.alone)
    listening = one.call(redises.subscribe, "news")
    others = {one.call(redises.who), other.call(redises.who)}
    assert listening not in others
    assert len(others) == 1
    other.call(redises.ask, "PUBLISH", "news", "first")
    assert one.call(redises.heard) == b"first"
    with server.judge() as judge:
        judge.client_kill_filter(_id=str(listening))
    hears = one.begin(redises.heard, thread="hears")
    wait_until(lambda: any(client["sub"] == "1" for client in server.clients()), what="it has subscribed again")
    other.call(redises.ask, "PUBLISH", "news", "second")
    assert hears.result() == b"second"
    assert len(server.clients()) == 2
    one.call(redises.stop_listening)
    wait_until(lambda: len(server.clients()) == 1)
    assert one.call(redises.who) == other.call(redises.who)


def test_with_no_connection_to_spare_nobody_is_refused_nor_gets_anothers_answer_while_workers_are_killed(
    harness: Harness, directory: Path
) -> None:
    server = RedisServer(maxclients="4").begin()  # three, and the judge
    try:
        evidence = directory / "evidence"

        def answers() -> list[str]:
            lines = [
                line for path in directory.glob("evidence-*") for line in path.read_text().splitlines(keepends=True)
            ]
            return [line.strip() for line in lines if line.endswith("\n")]

        for turn in range(1, 4):
            workers = harness.start_many(3)
            busy = []
            for worker in workers:
                worker.call(redises.make, url(server, max_connections=3, timeout=30))
                for thread in ("a", "b"):
                    busy.append(worker.begin(redises.work, 600, f"{evidence}-{worker.pid}{thread}", thread=thread))
            wait_until(lambda: len(list(directory.glob("evidence-*"))) == 6 * turn)  # noqa: B023 - called at once
            wait_until(lambda: len(answers()) > 100 * turn - 50)  # noqa: B023 - called at once
            os.kill(workers[0].pid, signal.SIGKILL)
            wait_until(lambda: len(answers()) > 100 * turn)  # noqa: B023
            for worker in workers[1:]:
                worker.call(commands.tell_to_stop)
            for pending in busy[2:]:
                pending.result()
        assert set(answers()) == {"."}
        assert server.numbers()["rejected"] == 0
        assert len(server.clients()) <= 3
    finally:
        for worker in harness.workers:
            worker.kill()
        server.end()


# --- errors -----------------------------------------------------------------------------------------------------------


def remote_ports(pid: int) -> set[int]:
    """Where a process has connections to."""
    return {found.raddr.port for found in psutil.Process(pid).net_connections("tcp4") if found.raddr}


def test_errors_are_those_of_redis_py(worker: Worker, server: RedisServer, scope: Scope) -> None:
    worker.call(redises.make, url(server, timeout=0.05))
    worker.call(redises.hold)
    exhausted = worker.fails(redis.exceptions.MaxConnectionsError, redises.who)
    assert "max=1 leased=1" in str(exhausted)
    worker.call(redises.let_go)
    wrong = f"redis://app:wrong@127.0.0.1:{server.port}/0?pool=cache"
    worker.call(redises.make, wrong, "wrong")
    worker.fails(redis.AuthenticationError, redises.who, "wrong")
    worker.call(redises.make, url(server).replace("/0?", "/99?"), "no-db")
    worker.fails(redis.ResponseError, redises.who, "no-db")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        worker.call(redises.make, f"redis://127.0.0.1:{port}/0?pool=cache", "refused")
        assert "Connection refused" in str(worker.fails(redis.ConnectionError, redises.who, "refused"))
        silent.listen()
        worker.call(redises.make, f"redis://127.0.0.1:{port}/0?pool=cache&socket_connect_timeout=0.1", "silent")
        worker.fails(redis.TimeoutError, redises.who, "silent")
        worker.call(redises.make, f"redis://127.0.0.1:{port}/0?pool=cache&socket_connect_timeout=30", "patient")
        greets = worker.begin(redises.who, "patient", thread="greets")
        wait_until(lambda: port in remote_ports(scope.arbiter()), what="the arbiter can end it before it is greeted")
    greets.error(redis.ConnectionError)
    assert worker.call(redises.who), "no permit was lost"
    assert worker.call(redises.stats).in_use == 0
    numbers = worker.call(redises.stats)
    assert "secret" not in repr(numbers)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache_config": object(), "protocol": 3}, "CLIENT TRACKING"),
        (
            {"maint_notifications_config": MaintNotificationsConfig(enabled=True)},
            "maintenance",
        ),
        ({"max_connections": 0}, "max_connections"),
        ({"connection_class": dict}, "connection_class"),
        ({"timeout": "soon"}, "checkout_timeout"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        SharedConnectionPool("cache", **given)


def test_a_key_names_who_and_where_and_no_password() -> None:
    pool = SharedConnectionPool.from_url("redis://me:hidden@Cache.example:7/2?pool=x&client_name=web")
    assert pool._transport.host == "me@cache.example:7/2?protocol=3&name=web"
    assert "hidden" not in repr(pool)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"provider": ["alice", "a"]}, {"provider": ["bob", "b"]}),
        ({"provider": ["alice", "a"]}, {"provider": ["own"]}),
        ({"provider": ["own"]}, {}),
        ({"username": "alice", "password": "a"}, {"username": "bob", "password": "b"}),
        ({"username": "alice", "password": "a"}, {}),
        ({"login": "alice"}, {"login": "bob"}),
        ({"login": "alice"}, {"login": "alice"}),
        ({"login": "partial alice"}, {"login": "partial bob"}),
        ({"login": "method alice"}, {"login": "method bob"}),
        ({"login": "object alice"}, {"login": "object bob"}),
        ({"login": "lambda alice"}, {"login": "lambda bob"}),
        ({"login": "alice"}, {}),
        ({"login": "module"}, {}),
        ({"of_class": "alice"}, {"of_class": "bob"}),
        ({"of_class": "module"}, {}),
        ({"client_name": "web"}, {"client_name": "jobs"}),
        ({"db": 1}, {"db": 2}),
        ({"protocol": 2}, {"protocol": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_who_greets_a_server_otherwise_never_meets_the_others_connection(
    two: list[Worker], people: RedisServer, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Each sees itself as the server sees it, alone and after the other, in two processes and in one."""
    given = [one, other]
    for worker in two:
        for i in (0, 1):
            worker.call(redises.make_as, people.port, f"c{i}", **given[i])
    alone = [two[0].call(redises.seen, f"c{i}") for i in (0, 1)]
    for _ in range(2):
        for worker in two:
            assert [worker.call(redises.seen, f"c{i}") for i in (0, 1)] == alone
    assert len(people.clients()) <= 1


@pytest.mark.parametrize(
    "given",
    [
        {"provider": ["alice", "a"]}, {"provider": ["own"]}, {"username": "alice", "password": "a"},
        {"login": "module"},
        {"login": "alice", "session_label": "tenant-a"}, {"of_class": "module"}, {"protocol": 2},
    ],
    ids=str,
)  # fmt: skip
def test_who_greets_a_server_alike_shares_connections(
    two: list[Worker], people: RedisServer, given: dict[str, Any]
) -> None:
    for worker in two:
        worker.call(redises.make_as, people.port, **given)
    assert len({worker.call(redises.who) for worker in (*two, *two)}) == 1


def test_a_password_may_change_and_the_user_may_not(two: list[Worker], people: RedisServer) -> None:
    for worker in two:
        worker.call(redises.make_as, people.port, provider=["alice", "a"])
    first = two[0].call(redises.who)
    with people.judge() as judge:
        judge.acl_setuser("alice", enabled=True, passwords=["+new"], categories=["+@all"], keys=["*"])
    two[1].call(redises.name_credentials, "alice", "new")
    assert two[1].call(redises.who) == first
    two[1].call(redises.drain)
    assert two[1].call(redises.seen)["user"] == "alice", "opened anew, with the new password"
    two[1].call(redises.drain)
    two[1].call(redises.name_credentials, "bob", "b")
    two[1].fails(OptionError, redises.who)
    two[1].call(redises.name_credentials, "alice", "new")
    assert two[1].call(redises.seen)["user"] == "alice"


def test_a_provider_is_asked_at_the_first_lease_and_not_before(worker: Worker, people: RedisServer) -> None:
    worker.call(redises.make_as, people.port, provider=["alice", "a"])
    assert worker.call(redises.times_asked) == 0
    worker.call(redises.who)
    assert worker.call(redises.times_asked) == 2, "for the key, and for the connection"


def test_tasks_with_providers_get_connections_of_their_own(two: list[Worker], people: RedisServer) -> None:
    two[0].call(redises.make_as, people.port, provider=["alice", "a"])
    for label, who in (("r", ["alice", "a"]), ("b", ["bob", "b"])):
        two[1].call(redises.make_as, people.port, label, asynchronously=True, provider=who)
    first = two[0].call(redises.who)
    assert two[1].call(redises.who) == first
    assert two[1].call(redises.ask, "ACL WHOAMI", label="b") == "bob"
    assert two[1].call(redises.ask, "ACL WHOAMI") == "alice"


def test_a_path_is_what_it_was_when_the_pool_was_made(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    pool = SharedConnectionPool("cache", connection_class=redis.UnixDomainSocketConnection, path="redis.sock")
    abstract = SharedConnectionPool("cache", connection_class=redis.UnixDomainSocketConnection, path="\0redis")
    monkeypatch.chdir("/")
    assert pool._transport.host.split("?")[0] == f"{directory}/redis.sock/0"
    assert pool._transport._arguments["path"] == f"{directory}/redis.sock"
    assert abstract._transport._arguments["path"] == "\0redis"


def test_an_asynchronous_class_with_a_handshake_of_its_own_is_refused() -> None:
    class Tenant(redis.asyncio.Connection):
        async def on_connect(self) -> None:
            """Log in as a tenant."""

    with pytest.raises(OptionError, match="on_connect"):
        asynchronous.SharedConnectionPool("cache", connection_class=Tenant)


def test_a_command_of_another_name_changes_nobody_elses_database(two: list[Worker], renaming: RedisServer) -> None:
    for worker in two:
        worker.call(redises.make_as, renaming.port)
    first = two[0].call(redises.who)
    assert two[0].call(redises.ask, "pickdb", 3) == b"OK"
    assert two[1].call(redises.ask, "CLIENT INFO")["db"] == 0
    assert two[1].call(redises.who) != first


# --- asyncio, TLS, forks ----------------------------------------------------------------------------------------------


def test_tasks_share_the_cap_with_threads_and_what_is_cancelled_loses_nothing(
    two: list[Worker], server: RedisServer
) -> None:
    one, other = two
    one.call(redises.make_async, url(server, max_connections=2))
    other.call(redises.make, url(server, max_connections=2))
    for _ in range(5):
        found = one.call(redises.many_at_once, 60)
        assert found == [f"t{i}" for i in range(60) if i % 3]
        assert len(server.clients()) <= 2
    assert one.call(redises.listen_async, "news") == b"hello"
    assert other.call(redises.who)
    numbers = other.call(redises.stats)
    assert (numbers.in_use, numbers.granted, numbers.waiting) == (0, 0, 0)


@pytest.mark.parametrize("make", [redises.make, redises.make_async])
def test_under_tls_a_connection_stays_and_its_permit_goes_over(
    two: list[Worker], server: RedisServer, make: Callable[..., None]
) -> None:
    one, other = two
    text = f"rediss://app:secret@127.0.0.1:{server.tls_port}/1?pool=cache&max_connections=1&ssl_ca_certs={server.certificate}"
    for worker in two:
        worker.call(make, text, "r")
    first = one.call(redises.who)
    assert one.call(redises.who) == first
    assert one.call(redises.ask, "ECHO", "x") == b"x"
    second = other.call(redises.who)
    assert second != first
    assert other.call(redises.who) == second
    assert len(server.clients()) == 1
    assert other.call(redises.stats).takeovers == 0
    if make is redises.make_async:
        assert other.call(redises.many_at_once, 30, "r") == [f"t{i}" for i in range(30) if i % 3]
    other.call(redises.ask, "SELECT", "0")
    assert other.call(redises.ask, "CLIENT INFO")["db"] == 1
    with server.judge() as judge:
        judge.client_kill_filter(_type="normal", skipme=True, user="app")
    assert other.call(redises.who) not in (first, second)
    assert len(server.clients()) == 1


def test_a_forked_child_goes_on_by_itself_and_what_was_lent_stays_its_parents(
    worker: Worker, server: RedisServer
) -> None:
    worker.call(redises.make, url(server, max_connections=2))
    held = worker.call(redises.hold)
    child = worker.fork()
    child.fails(redis.ConnectionError, redises.talk, "CLIENT", "ID")
    child.call(redises.let_go)
    assert child.call(redises.who) != held
    assert worker.call(redises.talk, "CLIENT", "ID") == held
    worker.call(redises.let_go)
    child.call(redises.close_pool)
    assert worker.call(redises.who)


# --- who uses it ------------------------------------------------------------------------------------------------------

DJANGO = """
import django, json, os, sys
from django.conf import settings
settings.configure(CACHES={"default": {
    "BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": sys.argv[1], "OPTIONS": {
        "pool_class": "sharedpool.integrations.redis.SharedConnectionPool", "pool": "cache", "max_connections": 1}}})
django.setup()
from django.core.cache import cache
found = [cache.add("n", 1), cache.incr("n"), cache.get("n"), cache.get_many(["n", "m"])]
cache.set_many({"m": [1, 2]}, timeout=60)
pool = cache._cache._get_connection_pool(write=True)
print(json.dumps([found, cache.get("m"), cache._cache.get_client().client_id(), type(pool).__name__]))
"""
CELERY = """
import json, sys
from celery import Celery
app = Celery(backend="sharedpool.integrations.redis.celery:SharedBackend+" + sys.argv[1])
if sys.argv[2] == "put":
    app.backend.store_result("task-1", {"x": 1}, "SUCCESS")
    found = None
else:
    found = app.AsyncResult("task-1").get(timeout=20)
pool = app.backend.client.connection_pool
print(json.dumps([found, app.backend.client.client_id(), type(pool).__name__, pool.shared_stats().max_connections]))
"""


def run(scope: Scope, program: str, *arguments: str) -> Any:
    """What a program of its own process prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=clean_environment(scope.env),
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_djangos_cache_and_celerys_results_share_one_connection_over_processes(
    scope: Scope, worker: Worker, server: RedisServer
) -> None:
    where = f"redis://127.0.0.1:{server.port}/5"
    worker.call(redises.make, where + "?pool=cache&max_connections=1")
    mine = worker.call(redises.who)
    results: list[Any] = [None, None]
    celery = where + "?pool=cache&max_connections=1"

    def django() -> None:
        results[0] = run(scope, DJANGO, where)

    thread = threading.Thread(target=django)
    thread.start()
    results[1] = run(scope, CELERY, celery, "put")
    thread.join()
    assert results[0] == [[True, 2, 2, {"n": 2}], [1, 2], mine, "SharedConnectionPool"]
    assert results[1] == [None, mine, "SharedConnectionPool", 1]
    two = celery.replace("=1", "=2")  # who waits for a result listens on one
    found, _, kind, cap = run(scope, CELERY, two, "get")
    assert (found, kind, cap) == ({"x": 1}, "SharedConnectionPool", 2)
    assert len(server.clients()) <= 2
