"""PostgreSQL as it is set up elsewhere: passwords, TLS, pgbouncer, and no connection to spare."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import commands, sessions
from tests.support.postgres import CLIENTS, PgBouncer, Postgres, too_many
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.test_postgres import backend_of, kind

__all__ = ["kind"]


# --- passwords --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(fork_server: object) -> Iterator[Postgres]:
    """Asks for a password over TCP, by SCRAM."""
    server = Postgres(auth="scram-sha-256").begin()
    server.ask("CREATE USER plain PASSWORD 'secret'")
    yield server
    server.end()


def as_plain(server: Postgres) -> str:
    return server.conninfo.replace("user=app", "user=plain")


def test_a_session_opened_with_a_password_moves_without_asking_for_it(
    two: list[Worker], kind: str, guarded: Postgres
) -> None:
    one, other = two
    one.attach(max_connections=1)
    one.call(sessions.make, kind, f"{as_plain(guarded)} password=secret")
    other.call(sessions.make, kind, as_plain(guarded))
    assert backend_of(one) == backend_of(other)


def test_a_password_file_is_read(worker: Worker, kind: str, guarded: Postgres, directory: Path) -> None:
    path = directory / "pass"
    path.write_text(f"127.0.0.1:{guarded.port}:postgres:plain:secret\n")
    path.chmod(0o600)
    worker.attach(max_connections=1)
    worker.call(sessions.make, kind, f"{as_plain(guarded)} passfile={path}")
    assert backend_of(worker)


def test_a_wrong_password_says_so(worker: Worker, kind: str, guarded: Postgres) -> None:
    worker.attach(max_connections=1)
    worker.call(sessions.make, kind, f"{as_plain(guarded)} password=wrong")
    assert 'password authentication failed for user "plain"' in str(worker.fails(ConnectionError, sessions.lease))


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(fork_server: object) -> Iterator[Postgres]:
    """Speaks TLS, with a certificate that it has signed itself."""
    server = Postgres.with_tls()
    yield server.begin()
    server.end()


@pytest.mark.parametrize("mode", ["require", "prefer"])
def test_under_tls_each_process_keeps_its_session_and_says_why_once(
    two: list[Worker], kind: str, secure: Postgres, mode: str
) -> None:
    one, other = two
    one.attach(max_connections=2)
    for worker in two:
        worker.call(commands.collect_log)
        worker.call(sessions.make, kind, secure.conninfo.replace("disable", mode))
    pids = {backend_of(one), backend_of(other)}
    assert {backend_of(one), backend_of(other)} == pids
    assert len(pids) == 2
    assert secure.ask("SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE pid = ANY(%s)",
                      list(pids)) == [(True,)]  # fmt: skip
    one.call(sessions.lease, "x")
    for worker in two:
        said = [text for text in worker.call(commands.log, "WARNING") if "stay in the process" in text]
        assert len(said) == 1
        assert "TLS" in said[0]
    assert [worker.call(sessions.staying) for worker in two] == [{"tls": 1}, {"tls": 1}]


def test_under_tls_a_query_broken_off_is_cancelled_before_its_permit_goes_on(
    worker: Worker, kind: str, secure: Postgres
) -> None:
    worker.attach(max_connections=1, close_timeout=30)
    worker.call(sessions.make, kind, secure.conninfo.replace("disable", "require"))
    for _ in range(3):
        pid = worker.call(sessions.lease)
        worker.begin(sessions.try_sql, "SELECT pg_sleep(60)", thread="sleeper")
        wait_until(lambda: secure.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", pid))  # noqa: B023
        worker.call(commands.discard, "a")
        assert worker.call(sessions.query, "SELECT pg_backend_pid()")[0] != pid
        assert len(secure.backends()) == 1
    stats = worker.stats()
    assert stats.closed_unconfirmed == 0


def test_under_tls_a_cap_that_is_reached_is_held(two: list[Worker], kind: str, secure: Postgres) -> None:
    secure.wait_until_alone()
    one, other = two
    one.attach(max_connections=1)
    for worker in two:
        worker.call(sessions.make, kind, secure.conninfo.replace("disable", "require"))
    for worker in (one, other, one, other):
        assert backend_of(worker)
        assert len(secure.backends()) == 1


def test_allow_takes_tls_where_the_server_insists(worker: Worker, kind: str, secure: Postgres) -> None:
    hba = secure.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("local all all trust\nhostssl all all 127.0.0.1/32 trust\n")
    secure.ask("SELECT pg_reload_conf()")
    try:
        worker.attach(max_connections=1)
        worker.call(sessions.make, kind, secure.conninfo.replace("disable", "allow"))
        assert backend_of(worker)
    finally:
        hba.write_text(before)
        secure.ask("SELECT pg_reload_conf()")


# --- pgbouncer --------------------------------------------------------------------------------------------------------


def test_sessions_move_through_pgbouncer_too(two: list[Worker], kind: str, postgres: Postgres) -> None:
    bouncer = PgBouncer(postgres).begin()
    try:
        one, other = two
        one.attach(max_connections=1)
        for worker in two:
            worker.call(sessions.make, kind, bouncer.conninfo)
        for worker in (one, other, one, other):
            assert worker.call(sessions.query, "SELECT 41 + %s::int", (1,)) == (42,)
        assert (one.stat("opens"), one.stat("takeovers")) == (1, 3)
        other.call(sessions.lease)
        sleeping = other.begin(sessions.try_sql, "SELECT pg_sleep(30)", thread="sleeper")
        wait_until(lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30)%%'"))
        other.call(sessions.call, "cancel")
        assert "QueryCanceled" in sleeping.result()
    finally:
        bouncer.end()


# --- the cap ----------------------------------------------------------------------------------------------------------


AT_WORK = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'plain' AND state = 'active'"


def test_with_no_connection_to_spare_nobody_is_refused_while_workers_are_killed(
    harness: Harness, kind: str, seeded: random.Random
) -> None:
    cap, reserved = 4, 3
    server = Postgres(max_connections=str(cap + 1 + reserved), superuser_reserved_connections=str(reserved))
    try:
        server.begin()
        server.ask("CREATE USER plain")
        server.wait_until_alone()
        workers = harness.start_many(8)
        for worker in workers:
            worker.attach(max_connections=cap)
            worker.call(sessions.make, kind, as_plain(server))
        with server.judge() as ask:  # the one beyond the cap
            query = "SELECT pg_sleep(0.02)"
            working = {worker: worker.begin(sessions.work, 600.0, query=query, thread="work") for worker in workers}
            for _ in range(6):
                victim = seeded.choice(list(working))
                wait_until(lambda: ask(AT_WORK)[0][0] >= 2)
                victim.signal(signal.SIGKILL)
                victim.wait_dead()
                del working[victim]
                assert len(ask(CLIENTS)) <= cap
            for worker in working:
                worker.call(commands.tell_to_stop)
            errors = [error for pending in working.values() for error in pending.result()]
        assert errors == []
        assert too_many(server.log()) == []
    finally:
        server.end()


def open_in_vain(state: State, times: int) -> list[str]:
    errors = []
    for _ in range(times):
        try:
            sessions.lease(state)
        except ConnectionError as error:
            errors.append(str(error))
    assert len(errors) == times
    return errors


def test_the_permit_of_an_opening_that_failed_goes_on_when_the_server_has_closed(harness: Harness, kind: str) -> None:
    server = Postgres(max_connections="5", superuser_reserved_connections="3")
    try:
        server.begin()
        server.ask("CREATE USER plain")
        server.wait_until_alone()
        workers = harness.start_many(3)
        with server.judge():  # room for one more
            for worker in workers:
                worker.attach(max_connections=1)
                worker.call(sessions.make, kind, as_plain(server), settings="SELECT 1 / 0")
            opening = [worker.begin(open_in_vain, 4) for worker in workers]
            errors = [error for pending in opening for error in pending.result()]
        assert {error for error in errors if "division by zero" not in error} == set()
        assert too_many(server.log()) == []
    finally:
        server.end()
