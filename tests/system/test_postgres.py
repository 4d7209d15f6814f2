"""PostgreSQL sessions that move between processes: what goes with them, what does not, and who may cancel what."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands, sessions
from tests.support.detour import Detour
from tests.support.postgres import CLIENTS, Postgres, private_directory
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

KINDS = ["psycopg3", "psycopg2"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(workers: list[Worker], kind: str, postgres: Postgres, cap: int = 1, **options: Any) -> list[Worker]:
    """Workers with a pool of one session."""
    workers[0].attach(max_connections=cap, max_foreign=8)
    for worker in workers:
        worker.call(sessions.make, kind, postgres.conninfo, **options)
    return workers


def backend_of(worker: Worker) -> int:
    return int(worker.call(sessions.query, "SELECT pg_backend_pid()")[0])


# --- moving -----------------------------------------------------------------------------------------------------------


def test_one_session_serves_processes_in_turn(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    assert len({backend_of(worker) for worker in (one, other, one, other, other, one)}) == 1
    stats = one.stats()
    assert (stats.opens, stats.takeovers, stats.reuses) == (1, 4, 1)
    assert len(postgres.backends()) == 1


def test_what_one_process_left_in_a_session_is_gone_in_another(
    two: list[Worker], kind: str, postgres: Postgres
) -> None:
    one, other = pair(two, kind, postgres)
    one.call(sessions.query, "CREATE TEMP TABLE mine (x int)")
    assert one.call(sessions.query, "SELECT to_regclass('mine')::text") == ("mine",), "its own use keeps it"
    assert other.call(sessions.query, "SELECT to_regclass('mine')::text") == (None,)
    one.call(sessions.query, "DECLARE mine CURSOR WITH HOLD FOR SELECT 1")
    one.call(sessions.query, "SELECT pg_advisory_lock(7)")
    left = "SELECT (SELECT count(*) FROM pg_cursors WHERE is_holdable), (SELECT count(*) FROM pg_locks"
    left += " WHERE locktype = 'advisory')"
    assert (one.call(sessions.query, left), other.call(sessions.query, left)) == ((1, 1), (0, 0))
    other.call(sessions.query, "SET search_path = nowhere")
    assert one.call(sessions.query, "SHOW search_path") == ('"$user", public',)


def test_without_resets_it_stays(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres, reset="never")
    one.call(sessions.query, "CREATE TEMP TABLE mine AS SELECT 42 AS x")
    assert other.call(sessions.query, "SELECT x FROM mine") == (42,)


def test_with_resets_always_its_own_use_begins_anew_too(worker: Worker, kind: str, postgres: Postgres) -> None:
    pair([worker], kind, postgres, reset="always")
    worker.call(sessions.query, "CREATE TEMP TABLE mine (x int)")
    assert worker.call(sessions.query, "SELECT to_regclass('mine')::text") == (None,)


def test_a_waiter_in_another_process_gets_it_reset(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    pid = one.call(sessions.lease)
    one.call(sessions.sql, "CREATE TEMP TABLE mine (x int)")
    waiting = other.begin(sessions.query, "SELECT pg_backend_pid(), to_regclass('mine')::text")
    one.wait_stats(waiting=1)
    one.checkin("a")
    assert waiting.result() == (pid, None)


def test_both_libraries_share_sessions(two: list[Worker], postgres: Postgres) -> None:
    one, other = two
    one.attach(max_connections=1)
    one.call(sessions.make, "psycopg3", postgres.conninfo)
    other.call(sessions.make, "psycopg2", postgres.conninfo)
    assert len({backend_of(worker) for worker in (one, other, one, other)}) == 1


def test_a_session_that_a_callable_has_led_elsewhere_is_nobody_elses(
    two: list[Worker], kind: str, postgres: Postgres
) -> None:
    one, other = two
    one.attach(max_connections=2)
    one.call(sessions.make_changing, kind, postgres.conninfo)
    other.call(sessions.make, kind, postgres.conninfo)
    where = "SELECT current_database()::text"
    one.call(sessions.lease, "a")
    one.call(sessions.set_database, "template1")
    one.call(sessions.lease, "b")
    assert [one.call(sessions.sql, where, name=name) for name in "ab"] == [("postgres",), ("template1",)]
    for name in "ab":
        one.checkin(name)
    for name in "ab":
        other.call(sessions.lease, name)
    assert [other.call(sessions.sql, where, name=name) for name in "ab"] == [("postgres",), ("postgres",)]
    assert one.call(sessions.staying) == {"changed": 1}


def test_by_a_unix_socket_it_moves_too(two: list[Worker], kind: str, postgres: Postgres) -> None:
    two[0].attach(max_connections=1)
    for worker in two:
        worker.call(sessions.make, kind, postgres.local)
    assert len({backend_of(worker) for worker in (*two, *two)}) == 1
    two[1].call(sessions.lease)
    assert two[1].call(sessions.read, "info.host") == str(postgres.directory)


@pytest.mark.parametrize("implementation", ["binary", "python"])
def test_each_implementation_of_psycopg_takes_sessions_over(
    harness: Harness, worker: Worker, postgres: Postgres, implementation: str
) -> None:
    other = harness.execute(PSYCOPG_IMPL=implementation)
    one, other = pair([worker, other], "psycopg3", postgres)
    assert len({backend_of(each) for each in (one, other, one, other)}) == 1
    assert backend_of(other) == other.call(sessions.lease)


def test_a_dead_ones_idle_session_serves_the_others(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    pid = backend_of(one)
    one.kill()
    assert backend_of(other) == pid


def test_an_adoption_that_fails_anywhere_harms_neither_session_nor_permit(
    two: list[Worker], postgres: Postgres
) -> None:
    one, other = pair(two, "psycopg3", postgres)
    pid, again, last = (backend_of(worker) for worker in (one, other, one))
    assert pid == again == last
    descriptors = other.call(sessions.let_go_of_all)
    sql = "SELECT pg_backend_pid()"
    for place, after in [
        ("Psycopg3Driver.prepare", False), ("Psycopg3Driver.prepare", True), ("wire.hear", True), ("wire.tell", True),
        ("Session.of", False), ("lay_over", False), ("lay_over", True),
    ]:  # fmt: skip
        assert other.call(sessions.query_with_fault, sql, place, after, KeyboardInterrupt) == "KeyboardInterrupt", place
        assert backend_of(one) == pid, place
    for place in ("wire.hear", "wire.Door.accept"):  # what fails ahead is made later
        assert other.call(sessions.query_with_fault, sql, place, False, OSError) == (pid,), place
        assert backend_of(one) == pid, place
    wait_until(lambda: other.call(sessions.let_go_of_all) == descriptors)
    stats = one.stats()
    assert (stats.used, stats.idle, stats.opens) == (1, 1, 1)


def test_a_class_that_uses_its_connection_when_it_is_made_gets_one_that_is_there(
    two: list[Worker], postgres: Postgres
) -> None:
    two[0].attach(max_connections=1)
    for worker in two:
        worker.call(sessions.make_with_own_class, postgres.conninfo)
    assert backend_of(two[0]) == backend_of(two[1])
    assert two[1].call(sessions.query, "SHOW application_name") == ("asked",)


def test_move_false_keeps_sessions_where_they_are(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres, cap=2, move=False)
    assert backend_of(one) != backend_of(other)
    assert backend_of(one) == backend_of(one)
    assert one.stat("takeovers") == 0


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["handoff", "never"])
def test_an_encoding_that_was_changed_is_back_for_everybody(
    two: list[Worker], kind: str, postgres: Postgres, reset: str
) -> None:
    one, other = pair(two, kind, postgres, reset=reset)
    text = "Grüße"
    for worker in (one, other, other, one, other, one):
        assert worker.call(sessions.query, "SELECT %s::text, %s::text", (text, "x")) == (text, "x")
        worker.call(sessions.query, "SET client_encoding TO 'LATIN1'")
        assert worker.call(sessions.query, "SHOW client_encoding") == ("UTF8",)
    assert one.stats().opens == 1


@pytest.mark.parametrize("reset", ["handoff", "never", "always"])
def test_what_configure_sets_is_there_in_every_lease(
    two: list[Worker], kind: str, postgres: Postgres, reset: str
) -> None:
    one, other = pair(two, kind, postgres, reset=reset, settings="SET TimeZone = 'Asia/Tokyo'")
    for worker in (one, other, one, one, other, other):
        worker.call(sessions.lease)
        shown = worker.call(sessions.sql, "SHOW TimeZone")
        assert shown == ("Asia/Tokyo",)
        if kind == "psycopg3":
            assert str(worker.call(sessions.read, "info.timezone")) == "Asia/Tokyo"
        worker.call(sessions.sql, "SET TimeZone = 'Europe/Rome'")
        worker.checkin("a")
    assert one.stats().opens == 1


def test_processes_that_configure_differently_know_their_own_settings(two: list[Worker], postgres: Postgres) -> None:
    one, other = two
    one.attach(max_connections=1)
    one.call(sessions.make, "psycopg3", postgres.conninfo, settings="SET TimeZone = 'Asia/Tokyo'")
    other.call(sessions.make, "psycopg3", postgres.conninfo)
    for worker, zone in ((one, "Asia/Tokyo"), (other, "UTC")) * 3:
        worker.call(sessions.lease)
        assert str(worker.call(sessions.read, "info.timezone")) == zone
        assert worker.call(sessions.sql, "SHOW TimeZone") == (zone,)
        worker.checkin("a")
    assert one.stats().opens == 1


def test_what_configure_leaves_open_is_an_error(worker: Worker, kind: str, postgres: Postgres) -> None:
    pair([worker], kind, postgres, settings="BEGIN")
    error = worker.fails(ConnectionError, sessions.lease)
    assert "BEGIN" in str(error) or "transaction" in str(error) or "INTRANS" in str(error)
    worker.wait_stats(in_use=0)
    postgres.wait_until_alone()


@pytest.mark.parametrize("reset", ["handoff", "never"])
def test_prepared_statements_of_processes_do_not_collide(two: list[Worker], postgres: Postgres, reset: str) -> None:
    one, other = pair(two, "psycopg3", postgres, reset=reset, kwargs={"prepare_threshold": 0})
    for round_ in range(4):
        for worker in (one, other):
            for query in ("SELECT %s::int + 1", "SELECT %s::int + 2"):
                found = worker.call(sessions.query, query, (round_,))
                assert found == (round_ + int(query[-1]),)
    one.call(sessions.lease)
    one.call(sessions.sql, "SELECT 1", commit=False)
    one.call(sessions.call, "rollback")  # psycopg forgets what it had prepared
    one.checkin("a")
    for worker in (other, one, other):
        assert worker.call(sessions.query, "SELECT %s::int + 1", (1,)) == (2,)
    assert one.stats().opens == 1


# --- what does not go on ----------------------------------------------------------------------------------------------


def test_an_open_transaction_ends_with_its_session(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    pid = one.call(sessions.lease)
    one.call(sessions.sql, "CREATE TABLE half_done (x int)", commit=False)
    one.checkin("a")
    assert other.call(sessions.query, "SELECT pg_backend_pid() = %s, to_regclass('half_done')::text", (pid,)) == (
        False,
        None,
    )
    assert one.stat("discards") == 1


def test_a_copy_given_back_in_its_midst_ends_with_its_session(two: list[Worker], postgres: Postgres) -> None:
    one, other = pair(two, "psycopg3", postgres)
    pid = one.call(sessions.lease)
    one.call(sessions.copy_and_leave_off)
    assert backend_of(other) != pid


def test_nobody_hears_what_another_process_listens_to(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    one.call(sessions.query, "LISTEN news")
    other.call(sessions.lease)
    assert other.call(sessions.sql, "SELECT count(*) FROM pg_listening_channels()") == (0,)
    postgres.ask("NOTIFY news")
    assert other.call(sessions.sql, "SELECT 1") == (1,)
    if kind == "psycopg2":
        assert other.call(sessions.read, "notifies") == []
    other.checkin("a")


def test_a_listener_that_heard_something_is_set_back_at_its_checkin(
    worker: Worker, kind: str, postgres: Postgres
) -> None:
    pair([worker], kind, postgres)
    pid = worker.call(sessions.lease)
    worker.call(sessions.sql, "LISTEN news")
    postgres.ask("NOTIFY news")
    worker.call(sessions.sql, "SELECT pg_sleep(0.01)")
    worker.checkin("a")
    assert worker.call(sessions.query, "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_listening_channels())") == (
        pid,
        0,
    )


def test_what_its_user_closed_is_opened_anew(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    pid = one.call(sessions.lease)
    one.call(sessions.call, "close")
    one.checkin("a")
    assert backend_of(other) != pid
    assert len(postgres.backends()) == 1


def test_an_object_used_after_its_lease_harms_nobody(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    one.call(sessions.lease)
    one.call(sessions.kept_object)
    one.checkin("a")
    pid = other.call(sessions.lease)
    other.call(sessions.sql, "CREATE TEMP TABLE mine AS SELECT 1 AS x")
    sleeping = other.begin(sessions.sql, "SELECT pg_sleep(0.2), 7", thread="sleeper")
    one.call(sessions.cancel_stale)
    assert "Error" in one.call(sessions.use_stale, "DROP TABLE mine")
    assert sleeping.result()[1] == 7
    assert other.call(sessions.sql, "SELECT x FROM mine") == (1,)
    other.checkin("a")
    assert backend_of(one) == pid or one.stat("opens") == 2, "its own stale use may have cost this object, no more"


def test_a_fork_inside_a_lease_leaves_it_to_the_parent(worker: Worker, kind: str, postgres: Postgres) -> None:
    pair([worker], kind, postgres)
    pid = worker.call(sessions.lease)
    child = worker.fork()
    child.fails(Exception, commands.checkin, "a")
    child.begin(commands.leave)
    child.wait_dead()
    assert worker.call(sessions.sql, "SELECT pg_backend_pid()") == (pid,)
    worker.checkin("a")
    assert backend_of(worker) == pid


def close_in_child(state: State) -> str:
    """Fork, and close the child's copies of the leased object and of those that are idle."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            state.leases["a"].conn.close()
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    return str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_closes_its_copies_ends_no_session_of_its_parent(
    worker: Worker, kind: str, postgres: Postgres
) -> None:
    pair([worker], kind, postgres, cap=2)
    pid = worker.call(sessions.lease)
    assert worker.call(close_in_child) == "0"
    assert worker.call(sessions.sql, "SELECT pg_backend_pid()") == (pid,)
    worker.checkin("a")
    assert worker.call(close_in_child) == "0"
    assert backend_of(worker) == pid


# --- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "cancel_safe"])
def test_a_session_taken_over_can_be_cancelled_from_another_thread(
    two: list[Worker], kind: str, postgres: Postgres, how: str
) -> None:
    if kind == "psycopg2" and how == "cancel_safe":
        how = "cancel"
    one, other = pair(two, kind, postgres)
    pid = backend_of(one)
    assert other.call(sessions.lease) == pid
    sleeping = other.begin(sessions.try_sql, "SELECT pg_sleep(600)", thread="sleeper")
    wait_until(lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", pid))
    other.call(sessions.call, how)
    assert "QueryCanceled" in sleeping.result()


@pytest.mark.parametrize("in_time", [True, False])
@pytest.mark.parametrize(  # of what stays in psycopg2, libpq's way keeps the interpreter lock: no checkin is meanwhile
    ("kind", "move"), [("psycopg3", True), ("psycopg3", False), ("psycopg2", True)]
)
def test_a_cancel_under_way_at_the_checkin_never_reaches_the_next_user(
    two: list[Worker], kind: str, postgres: Postgres, move: bool, in_time: bool
) -> None:
    one, other = two
    how = "cancel" if kind == "psycopg2" else "cancel_safe"
    with Detour(postgres.port) as detour:
        one.attach(max_connections=1, steal_after=0)
        for worker in two:
            worker.call(sessions.make, kind, f"{postgres.conninfo} port={detour.port}", move=move)
        pid = one.call(sessions.lease)
        cancelling = one.begin(sessions.call, how, thread="canceller")
        assert detour.kept.acquire(timeout=40)
        checkin = one.begin(commands.checkin, "a")
        if in_time:
            detour.let_through()
        checkin.result()
        sleeping = other.begin(sessions.query, "SELECT pg_backend_pid(), pg_sleep(1)")
        wait_until(
            lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s", "%1)")
        )
        detour.let_through()
        assert (sleeping.result()[0] == pid) == (move and in_time)
        cancelling.result()
        assert one.stats().closes["unclean"] == (0 if in_time else 1)


def test_a_cancel_begun_after_the_checkin_asks_nobody(two: list[Worker], kind: str, postgres: Postgres) -> None:
    with Detour(postgres.port) as detour:
        two[0].attach(max_connections=1)
        for worker in two:
            worker.call(sessions.make, kind, f"{postgres.conninfo} port={detour.port}")
        two[0].call(sessions.lease)
        two[0].call(sessions.kept_object)
        two[0].call(commands.checkin, "a")
        assert two[1].call(sessions.lease)
        two[0].call(sessions.cancel_stale)
        assert not detour.kept.acquire(blocking=False)


def test_killed_in_the_midst_of_a_query_its_backend_goes_at_once(
    two: list[Worker], kind: str, postgres: Postgres
) -> None:
    one, other = pair(two, kind, postgres)
    pid = one.call(sessions.lease)
    one.begin(sessions.sql, "SELECT pg_sleep(600)")
    wait_until(lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", pid))
    one.kill()
    assert backend_of(other) != pid  # without the CancelRequest it waited for ten minutes
    assert len(postgres.backends()) == 1


@pytest.fixture(params=["a symbolic link", "another mount", "abstract"])
def elsewhere(request: pytest.FixtureRequest, directory: Path) -> Iterator[tuple[Postgres, str]]:
    """A server, and the connection string of a Unix socket that is not where the server believes it to be."""
    there = private_directory("sp-pg-socket-")
    place = f"@{there.name}" if request.param == "abstract" else str(directory / "place")
    server = Postgres(socket_at=place if request.param == "abstract" else str(there))
    try:
        server.begin()
        if request.param == "a symbolic link":
            there.rename(place)
            there.symlink_to(place)  # for the server's lock file
        elif request.param == "another mount":  # as for a container in which the same volume is elsewhere
            there.rename(place)
        yield server, f"host={place} port={server.port} user=app dbname=postgres"
    finally:
        server.end()
        there.unlink() if there.is_symlink() else shutil.rmtree(there, ignore_errors=True)


def test_by_a_path_that_the_server_does_not_know_it_is_cancelled_all_the_same(
    two: list[Worker], kind: str, elsewhere: tuple[Postgres, str]
) -> None:
    server, conninfo = elsewhere
    two[0].attach(max_connections=1)
    for worker in two:
        worker.call(sessions.make, kind, conninfo)
    pid = backend_of(two[0])
    assert two[1].call(sessions.lease) == pid, "it has moved"
    sleeping = two[1].begin(sessions.try_sql, "SELECT pg_sleep(30)", thread="sleeper")
    wait_until(lambda: server.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", pid))
    two[1].call(sessions.call, "cancel")
    assert "QueryCanceled" in sleeping.result()
    two[1].call(sessions.call, "rollback")
    two[1].begin(sessions.try_sql, "SELECT pg_sleep(30)", thread="sleeper")
    wait_until(lambda: server.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", pid))
    two[1].kill()
    assert backend_of(two[0]) != pid
    assert len(server.ask(CLIENTS)) == 1


# --- what a connection says of itself ---------------------------------------------------------------------------------


def test_a_session_taken_over_names_its_server(two: list[Worker], kind: str, postgres: Postgres) -> None:
    one, other = pair(two, kind, postgres)
    backend_of(one)
    for worker in (one, other):
        worker.call(sessions.lease)
        assert worker.call(sessions.read, "info.host") == "127.0.0.1"
        assert worker.call(sessions.read, "info.port") == postgres.port
        shown = str(worker.call(sessions.read, "dsn" if kind == "psycopg2" else "info.dsn"))
        assert f"port={postgres.port}" in shown
        assert "sharedpool" not in shown
        given = worker.call(sessions.read, "get_dsn_parameters" if kind == "psycopg2" else "info.get_parameters")
        assert given["host"] == "127.0.0.1"
        assert "sharedpool" not in str(given)
        if kind == "psycopg3":
            assert worker.call(sessions.read, "info.hostaddr") == "127.0.0.1"
        worker.checkin("a")


def test_an_error_at_the_start_names_the_server(worker: Worker, kind: str, postgres: Postgres) -> None:
    worker.attach(max_connections=1)
    worker.call(sessions.make, kind, postgres.conninfo.replace("dbname=postgres", "dbname=nowhere"))
    error = worker.fails(ConnectionError, sessions.lease)
    assert f'connection to server at "127.0.0.1", port {postgres.port} failed' in str(error)
    assert 'database "nowhere" does not exist' in str(error)
    worker.wait_stats(in_use=0)


# --- what sticks to a session -----------------------------------------------------------------------------------------

POLICY = "SELECT string_agg(v, ',') FROM secrets WHERE tenant = current_setting('app.tenant', true)"
LOCKS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
#: By name: what a user does, and what the next one asks.
STUCK = {
    "role": ("SET ROLE cashier", "SELECT current_user::text"),
    "session authorization": ("SET SESSION AUTHORIZATION cashier", "SELECT session_user::text"),
    "setting of a policy": ("SELECT set_config('app.tenant', 'a', false)", POLICY),
    "search path": ("SET search_path = pg_catalog", "SHOW search_path"),
    "temporary table": (
        "CREATE TEMP TABLE secrets AS SELECT 'shadow'::text AS v",
        "SELECT to_regclass('pg_temp.secrets')::text",
    ),
    "temporary function": (
        "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "SELECT to_regproc('pg_temp.f')::text",
    ),
    "advisory lock": ("SELECT pg_advisory_lock(7)::text", LOCKS),
    "shared advisory lock": ("SELECT pg_advisory_lock_shared(8)::text", LOCKS),
    "LISTEN": ("LISTEN news", "SELECT count(*) FROM pg_listening_channels()"),
    "cursor WITH HOLD": (
        "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE is_holdable",
    ),
    "PREPARE": ("PREPARE mine AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements WHERE from_sql"),
    "sequences": ("SELECT nextval('numbers')", "SELECT lastval()"),
    "application_name": ("SET application_name = 'alice'", "SHOW application_name"),
    "client_encoding": ("SET client_encoding = 'LATIN1'", "SHOW client_encoding"),
    "TimeZone": ("SET TimeZone = 'Asia/Tokyo'", "SHOW TimeZone"),
    "statement_timeout": ("SET statement_timeout = '12min'", "SHOW statement_timeout"),
    "row_security": ("SET row_security = off", "SHOW row_security"),
    "transaction characteristics": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "SHOW transaction_read_only",
    ),
    "isolation": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SHOW transaction_isolation",
    ),
    "dblink": ("SELECT dblink_connect('mine', '{local}')", "SELECT dblink_get_connections()::text"),
    "dblink without a name": (
        "SELECT dblink_connect('{local}')",
        "SELECT u FROM dblink('SELECT current_user::text') AS t(u text)",
    ),
}


#: What no server reports to its client, so that nothing but a reset takes it away.
UNREPORTED = [
    "role", "setting of a policy", "temporary table", "advisory lock", "LISTEN", "cursor WITH HOLD", "PREPARE",
    "sequences", "statement_timeout", "row_security", "dblink",
]  # fmt: skip


@pytest.fixture
def sticky(postgres: Postgres) -> Postgres:
    """A server with what is needed to leave something in a session."""
    for text in (
        "DROP ROLE IF EXISTS cashier", "CREATE ROLE cashier", "DROP TABLE IF EXISTS secrets",
        "CREATE TABLE secrets AS SELECT t AS tenant, 'secret of ' || t AS v FROM unnest(ARRAY['a', 'b']) AS t",
        "CREATE SEQUENCE IF NOT EXISTS numbers", "CREATE EXTENSION IF NOT EXISTS dblink",
    ):  # fmt: skip
        postgres.ask(text)
    return postgres


def leaves(worker: Worker, name: str, postgres: Postgres) -> None:
    left = worker.call(sessions.try_query, STUCK[name][0].format(local=postgres.local))
    assert left.startswith(("(", "None")), left


@pytest.mark.parametrize("how", ["always, one process", "handoff, two processes"])
def test_nothing_sticks_to_a_session_for_its_next_user(
    two: list[Worker], kind: str, sticky: Postgres, how: str
) -> None:
    reset, _, processes = how.partition(", ")
    one, other = pair(two, kind, sticky, reset=reset)
    other = one if processes == "one process" else other
    wrong = []
    for name, (_, ask) in STUCK.items():
        fresh = other.call(sessions.try_query, ask)
        leaves(one, name, sticky)
        found = other.call(sessions.try_query, ask)
        if found != fresh:
            wrong.append((name, fresh, found))
    assert wrong == []
    assert one.stats().opens == 1, "it was set back, and not replaced"
    assert len(sticky.backends()) == 1, "what dblink had open has ended"


def test_in_its_own_process_a_session_comes_back_as_it_was_left(worker: Worker, kind: str, sticky: Postgres) -> None:
    pair([worker], kind, sticky)
    for name in UNREPORTED:
        fresh = worker.call(sessions.try_query, STUCK[name][1])
        leaves(worker, name, sticky)
        assert worker.call(sessions.try_query, STUCK[name][1]) != fresh, name
        worker.call(commands.library, "drain", "default", wait=20)


def test_how_transactions_begin_is_set_back_with_the_session(worker: Worker, kind: str, postgres: Postgres) -> None:
    """The libraries keep in their objects what their users have chosen."""
    pair([worker], kind, postgres, reset="always")
    asked = "SELECT current_setting('transaction_read_only'), current_setting('transaction_isolation')"
    fresh = worker.call(sessions.query, asked)
    worker.call(sessions.lease)
    for attribute, value in ({"read_only": True} if kind == "psycopg3" else {"readonly": True}).items():
        worker.call(sessions.put, attribute, value)
    worker.call(sessions.put, "isolation_level", 4 if kind == "psycopg3" else "SERIALIZABLE")
    assert worker.call(sessions.sql, asked) == ("on", "serializable")
    worker.call(commands.checkin, "a")
    assert worker.call(sessions.query, asked) == fresh


def test_where_dblink_cannot_be_ended_the_session_ends(two: list[Worker], kind: str, sticky: Postgres) -> None:
    sticky.ask("DROP ROLE IF EXISTS clerk")
    sticky.ask("CREATE ROLE clerk LOGIN")
    sticky.ask("REVOKE EXECUTE ON FUNCTION dblink_disconnect() FROM PUBLIC")
    try:
        two[0].attach(max_connections=1, max_foreign=8)
        for worker in two:
            worker.call(sessions.make, kind, sticky.conninfo.replace("user=app", "user=clerk"))
        first = backend_of(two[0])
        assert backend_of(two[1]) != first
        assert len(sticky.backends()) == 1
    finally:
        sticky.ask("GRANT EXECUTE ON FUNCTION dblink_disconnect() TO PUBLIC")
        sticky.ask("DROP EXTENSION dblink")


def test_a_server_that_cannot_set_back_is_told_of_once(worker: Worker, kind: str, harness: Harness) -> None:
    """Some servers know no DISCARD ALL; here something else of a reset is missing."""
    server = Postgres(log_min_messages="fatal").begin()
    try:
        pair([worker], kind, server, reset="always")
        worker.call(commands.collect_log)
        server.ask("CREATE EXTENSION dblink")
        server.ask("ALTER EXTENSION dblink DROP FUNCTION dblink_get_connections()")
        server.ask("DROP FUNCTION dblink_get_connections()")
        assert len({backend_of(worker) for _ in range(3)}) == 3, "each lease has a session of its own"
        said = [line for line in worker.call(commands.log, "WARNING") if "could not be set back" in line]
        assert len(said) == 1
        assert "reset='never'" in said[0]
    finally:
        server.end()


@pytest.mark.parametrize("reset", ["handoff", "never"])
def test_a_transaction_that_was_prepared_is_nothing_to_the_next_user(
    worker: Worker, kind: str, harness: Harness, reset: str
) -> None:
    server = Postgres(max_prepared_transactions="2").begin()
    try:
        pair([worker], kind, server, reset=reset)
        server.ask("CREATE TABLE t (x int)")
        worker.call(sessions.lease)
        worker.call(sessions.call, "tpc_begin", "mine")
        worker.call(sessions.sql, "INSERT INTO t VALUES (1)", commit=False)
        worker.call(sessions.call, "tpc_prepare")
        worker.call(commands.checkin, "a")
        worker.call(sessions.query, "INSERT INTO t VALUES (2)")
        assert server.ask("SELECT gid FROM pg_prepared_xacts") == [("mine",)]
        assert server.ask("SELECT x FROM t") == [(2,)]
        server.ask("ROLLBACK PREPARED 'mine'")
    finally:
        server.end()
