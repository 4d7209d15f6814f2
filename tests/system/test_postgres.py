"""PostgreSQL sessions that move between processes: what goes with them, what does not, and who may cancel what."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import commands, sessions
from tests.support.postgres import Postgres
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
