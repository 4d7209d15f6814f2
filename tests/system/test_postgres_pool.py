"""sharedpool.postgres.ConnectionPool, used as psycopg_pool's users use theirs."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import psycopg_pool
import pytest
from psycopg.rows import dict_row

import sharedpool
from sharedpool import OptionError
from sharedpool.postgres import ConnectionPool
from tests.support import commands
from tests.support.postgres import Postgres
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Worker

Said = Callable[[], str]


def in_a_worker(body: Callable[..., None]) -> Callable[[Worker, Postgres], None]:
    """Runs a test's body in a worker: whoever attaches keeps the segment mapped until it ends.

    A body's second argument, if it has one, gives what was logged.
    """

    def test(worker: Worker, postgres: Postgres) -> None:
        worker.call(run, body.__name__, postgres)

    _bodies[body.__name__] = body
    return test


_bodies: dict[str, Callable[..., None]] = {}


def run(state: State, name: str, postgres: Postgres) -> None:
    commands.collect_log(state)
    body = _bodies[name]
    if len(inspect.signature(body).parameters) > 1:
        body(postgres, lambda: "\n".join(commands.log(state, "WARNING")))
    else:
        body(postgres)


def make(state: State, conninfo: str, **options: Any) -> None:
    state.things["pool"] = ConnectionPool(conninfo, **options)


def ask(state: State, query: str) -> Any:
    with state.things["pool"].connection() as conn:
        return conn.execute(query).fetchone()


def take(state: State, name: str = "a") -> int:
    state.things[name] = state.things["pool"].getconn()
    return int(state.things[name].info.backend_pid)


def put(state: State, name: str = "a") -> None:
    state.things["pool"].putconn(state.things.pop(name))


def sizes(state: State) -> dict[str, int]:
    return dict(state.things["pool"].get_stats())


# --- over processes ---------------------------------------------------------------------------------------------------


def test_max_size_is_the_cap_of_all_processes(three: list[Worker], postgres: Postgres) -> None:
    for worker in three:
        worker.call(make, postgres.conninfo, min_size=1, max_size=2)
    for worker in three * 2:
        worker.call(ask, "SELECT 1")
    three[0].call(take)
    three[1].call(take)
    waiting = three[2].begin(ask, "SELECT 7")
    wait_until(lambda: three[0].call(sizes).get("requests_waiting") == 1)
    assert len(postgres.backends()) == 2
    three[0].call(put)
    assert waiting.result() == (7,)
    assert three[2].call(sizes)["requests_queued"] == 1
    assert three[1].call(sizes)["pool_size"] == 2


def test_labels_of_processes_do_not_split_the_cap(three: list[Worker], postgres: Postgres) -> None:
    for worker in three:
        label = f"application_name=web-{worker.pid} options='-c statement_timeout={worker.pid}s'"
        worker.call(make, f"{postgres.conninfo} {label}", min_size=0, max_size=2, timeout=10)
    three[0].call(take)
    three[1].call(take)
    waiting = three[2].begin(ask, "SELECT current_setting('application_name')")
    wait_until(lambda: three[0].call(sizes).get("requests_waiting") == 1)
    assert len(postgres.backends()) == 2
    three[0].call(put)
    assert waiting.result() == (f"web-{three[2].pid}",), "a session with another's label is not lent"
    assert len(postgres.backends()) <= 2


def test_min_size_is_there_before_it_is_asked_for(two: list[Worker], postgres: Postgres) -> None:
    two[0].call(make, postgres.conninfo, min_size=3, max_size=5)
    two[0].call(ask, "SELECT 1")
    wait_until(lambda: len(postgres.backends()) == 3)
    two[1].call(make, postgres.conninfo, min_size=3, max_size=5)
    assert two[1].call(ask, "SELECT 1") == (1,)
    assert len(postgres.backends()) == 3


def test_a_name_is_made_of_the_string_without_its_password(postgres: Postgres) -> None:
    names = {ConnectionPool(f"{postgres.conninfo} password={word}", open=False, max_size=4).name for word in ("a", "b")}
    assert len(names) == 1
    assert names.pop().startswith(f"app@127.0.0.1:{postgres.port}_postgres-")
    assert ConnectionPool("host=other", name="db", open=False, max_size=4).name == "db"


@pytest.mark.parametrize(
    "given",
    [
        {"max_size": "5"}, {"min_size": "0", "max_size": 5}, {"max_size": 2.5}, {"max_size": True}, {"timeout": "5"},
        {"timeout": None}, {"max_waiting": "1"}, {"max_waiting": -1}, {"max_lifetime": "60"}, {"max_idle": -1},
        {"reconnect_timeout": float("nan")},
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_named(given: dict[str, Any]) -> None:
    name, value = next(iter(given.items()))
    with pytest.raises(sharedpool.OptionError) as raised:
        ConnectionPool("host=x", open=False, **{"max_size": 5, "min_size": 0, **given})
    assert f"option '{name}' has the value {value!r}" in str(raised.value)
    assert "allowed is" in str(raised.value)


@pytest.mark.parametrize("value", [None, float("inf")])
def test_no_limit_of_a_life_is_no_limit(two: list[Worker], postgres: Postgres, value: float | None) -> None:
    two[0].call(make, postgres.conninfo, min_size=0, max_size=1, max_lifetime=value, max_idle=value)
    two[0].call(ask, "SELECT 1")
    options = two[0].call(options_in_force)
    assert (options["max_lifetime"], options["idle_timeout"]) == (None, None)


def options_in_force(state: State) -> dict[str, Any]:
    options: dict[str, Any] = state.things["pool"]._shared.attached.welcome["options"]
    return options


# --- in one process ---------------------------------------------------------------------------------------------------


@in_a_worker
def test_a_block_commits_and_after_an_error_rolls_back(postgres: Postgres) -> None:
    with ConnectionPool(postgres.conninfo, max_size=4, open=False) as pool:
        with pool.connection() as conn:
            conn.execute("CREATE TABLE IF NOT EXISTS kept (x int)")
        with pytest.raises(ZeroDivisionError), pool.connection() as conn:
            conn.execute("INSERT INTO kept VALUES (1)")
            raise ZeroDivisionError
        with pool.connection() as conn:
            assert conn.execute("SELECT count(*) FROM kept").fetchone() == (0,)
            conn.execute("DROP TABLE kept")
        assert pool.get_stats()["requests_num"] == 3


@in_a_worker
def test_keywords_make_connections_as_psycopg_does(postgres: Postgres) -> None:
    class Own(psycopg.Connection[Any]):
        pass

    kwargs = {"autocommit": True, "row_factory": dict_row, "prepare_threshold": None, "application_name": "shop"}
    pool = ConnectionPool(postgres.conninfo, kwargs=kwargs, connection_class=Own, max_size=2, min_size=0)
    with pool, pool.connection() as conn:
        assert isinstance(conn, Own)
        assert type(conn).__name__ == "Own"
        assert conn.autocommit
        assert conn.prepare_threshold is None
        assert conn.execute("SHOW application_name").fetchone() == {"application_name": "shop"}


@in_a_worker
def test_strings_and_keywords_that_can_be_called_are_asked_at_each_opening(postgres: Postgres) -> None:
    asked: list[str] = []

    def conninfo() -> str:
        asked.append("conninfo")
        return postgres.conninfo

    def kwargs() -> dict[str, Any]:
        asked.append("kwargs")
        return {"password": f"token-{len(asked)}"}

    with ConnectionPool(conninfo, kwargs=kwargs, min_size=0, max_size=2) as pool:
        before = len(asked)
        with pool.connection(), pool.connection():
            pass
        assert len(asked) - before == 4
        with pool.connection():
            pass
        assert len(asked) - before == 4


@in_a_worker
def test_it_raises_what_psycopg_pool_raises(postgres: Postgres) -> None:
    pool = ConnectionPool(postgres.conninfo, min_size=0, max_size=1, open=False)
    with pytest.raises(psycopg_pool.PoolClosed, match="not open yet"):
        pool.getconn()
    pool.open()
    conn = pool.getconn()
    with pytest.raises(psycopg_pool.PoolTimeout, match=r"couldn't get a connection after 0.05 sec"):
        pool.getconn(timeout=0.05)
    with psycopg.connect(postgres.conninfo) as stranger, pytest.raises(ValueError, match="doesn't come from any pool"):
        pool.putconn(stranger)
    pool.putconn(conn)
    with pytest.raises(ValueError, match="doesn't come from any pool"):
        pool.putconn(conn)
    assert pool.get_stats()["requests_errors"] == 1
    pool.close()
    with pytest.raises(psycopg_pool.PoolClosed, match="already closed"):
        pool.getconn()
    with pytest.raises(psycopg_pool.PoolClosed):
        pool.open()


@in_a_worker
def test_too_many_waiting_are_refused(postgres: Postgres) -> None:
    with ConnectionPool(postgres.conninfo, min_size=0, max_size=1, max_waiting=1) as pool:
        conn = pool.getconn()
        waiting = threading.Thread(target=lambda: pool.putconn(pool.getconn()))
        waiting.start()
        wait_until(lambda: pool.get_stats().get("requests_waiting") == 1)
        with pytest.raises(psycopg_pool.TooManyRequests):
            pool.getconn()
        pool.putconn(conn)
        waiting.join()


@in_a_worker
def test_a_server_that_is_not_there_is_tried_again_until_the_time_is_over(postgres: Postgres) -> None:
    failed: list[Any] = []
    with ConnectionPool(
        "host=127.0.0.1 port=1 user=app", min_size=0, max_size=1, reconnect_timeout=0.0, reconnect_failed=failed.append
    ) as pool:
        with pytest.raises(psycopg_pool.PoolTimeout, match="Connection refused"):
            pool.getconn(timeout=2.2)  # tried at 0.0, 0.1, 0.3, 0.7 and 1.5 s; each has 0.6 s at least
        assert pool.get_stats()["connections_errors"] >= 2
        assert failed
        assert failed[0] is pool


@in_a_worker
def test_a_server_that_comes_back_in_time_serves(postgres: Postgres) -> None:
    where = ["host=127.0.0.1 port=1 user=app dbname=postgres sslmode=disable"]
    with ConnectionPool(lambda: where[0], min_size=0, max_size=1) as pool:
        pool.driver.resolve()
        threading.Timer(0.3, lambda: where.__setitem__(0, postgres.conninfo)).start()
        with pool.connection(timeout=20) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)


@in_a_worker
def test_its_stats_say_why_sessions_stay(postgres: Postgres) -> None:
    services = postgres.directory / "services"
    services.write_text(f"[shop]\nport={postgres.port}\n")
    os.environ["PGSERVICEFILE"] = str(services)
    for more, why in (
        ("", ""), ("target_session_attrs=read-write", "hosts"), ("host=127.0.0.1,127.0.0.1", "hosts"),
        ("service=shop", "service"),
    ):  # fmt: skip
        found = {f"sessions_stay_{why}": 1} if why else {}
        with ConnectionPool(f"{postgres.conninfo} {more}", min_size=0, max_size=2) as pool:
            for _ in range(2):
                with pool.connection() as conn:
                    assert conn.execute("SELECT 1").fetchone() == (1,)
            assert {name: n for name, n in pool.get_stats().items() if name.startswith("sessions_")} == found


@in_a_worker
def test_callbacks_are_called_when_psycopg_pool_calls_them(postgres: Postgres) -> None:
    called: list[str] = []

    def configure(conn: Any) -> None:
        called.append("configure")
        conn.execute("SET TimeZone = 'Asia/Tokyo'")
        conn.commit()

    def reset(conn: Any) -> None:
        called.append("reset")

    def check(conn: Any) -> None:
        called.append("check")
        if called.count("check") == 2:
            raise psycopg.OperationalError("no good")

    with ConnectionPool(
        postgres.conninfo, min_size=0, max_size=1, configure=configure, check=check, reset=reset
    ) as pool:
        with pool.connection() as conn:
            first = conn.info.backend_pid
        assert called == ["configure", "check", "reset"]
        with pool.connection() as conn:
            assert conn.info.backend_pid != first
            assert conn.execute("SHOW TimeZone").fetchone() == ("Asia/Tokyo",)
        assert called[3:] == ["check", "configure", "check", "reset"]


@in_a_worker
def test_what_a_reset_callback_refuses_is_closed(postgres: Postgres, said: Said) -> None:
    def reset(conn: Any) -> None:
        conn.execute("SELECT 1")

    with ConnectionPool(postgres.conninfo, min_size=0, max_size=1, reset=reset) as pool:
        with pool.connection() as conn:
            first = conn.info.backend_pid
        assert "left in status INTRANS by reset function" in said()
        with pool.connection() as conn:
            assert conn.info.backend_pid != first
        assert pool.get_stats()["returns_bad"] == 2


@in_a_worker
def test_a_transaction_left_open_is_rolled_back(postgres: Postgres, said: Said) -> None:
    with ConnectionPool(postgres.conninfo, min_size=0, max_size=1) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        conn.execute("CREATE TABLE not_kept (x int)")
        pool.putconn(conn)
        assert "rolling back returned connection" in said()
        with pool.connection() as conn:
            assert conn.info.backend_pid == pid
            assert conn.execute("SELECT to_regclass('not_kept')").fetchone() == (None,)


@in_a_worker
def test_closing_a_connection_gives_it_back_where_that_is_wanted(postgres: Postgres) -> None:
    with ConnectionPool(postgres.conninfo, min_size=0, max_size=1, close_returns=True) as pool:
        conn = pool.getconn()
        pid = conn.info.backend_pid
        conn.close()
        with pool.connection() as conn:
            assert conn.info.backend_pid == pid


@in_a_worker
def test_a_closed_pool_ends_what_comes_back_and_leaves_the_shared_one(postgres: Postgres) -> None:
    pool = ConnectionPool(postgres.conninfo, min_size=0, max_size=2)
    conn = pool.getconn()
    pool.close()
    assert conn.execute("SELECT 1").fetchone() == (1,)
    pool.putconn(conn)
    assert pool.closed
    postgres.wait_until_alone()


@in_a_worker
def test_the_order_of_waiting_is_the_shared_pools(postgres: Postgres) -> None:
    with pytest.raises(OptionError, match=r"'order'.*'lifo'"):
        ConnectionPool(postgres.conninfo, min_size=0, max_size=1, order="lifo")
    with ConnectionPool(postgres.conninfo, min_size=0, max_size=1, order="sticky") as pool, pool.connection():
        assert sharedpool.attach(pool.name).open().attached.welcome["options"]["order"] == "sticky"


@in_a_worker
def test_sizes_change_for_all(postgres: Postgres) -> None:
    with ConnectionPool(postgres.conninfo, min_size=1, max_size=4) as pool:
        pool.wait()
        pool.resize(2, 3)
        wait_until(lambda: pool.get_stats()["pool_size"] == 2)
        assert (pool.min_size, pool.max_size, pool.get_stats()["pool_max"]) == (2, 3, 3)
        with pytest.raises(ValueError, match="max_size must be greater"):
            pool.resize(4, 3)


@in_a_worker
def test_check_finds_what_does_not_work_and_drain_closes_all(postgres: Postgres) -> None:
    with ConnectionPool(postgres.conninfo, min_size=2, max_size=4) as pool:
        pool.wait()
        pids = set(postgres.backends())
        pool.check()
        assert set(postgres.backends()) == pids
        pool.drain()
        wait_until(lambda: not pids & set(postgres.backends()))
        with pool.connection() as conn:
            ConnectionPool.check_connection(conn)


@in_a_worker
def test_counters_begin_again_when_they_are_popped(postgres: Postgres) -> None:
    with ConnectionPool(postgres.conninfo, min_size=0, max_size=1) as pool:
        for _ in range(3):
            with pool.connection():
                pass
        assert pool.pop_stats()["requests_num"] == 3
        assert "requests_num" not in pool.get_stats()
        with pool.connection():
            pass
        assert pool.get_stats()["requests_num"] == 1


@in_a_worker
def test_an_open_that_waits_in_vain_says_so(postgres: Postgres) -> None:
    began = time.monotonic()
    with pytest.raises(psycopg_pool.PoolTimeout, match="incomplete after 0.2 sec"):
        ConnectionPool("host=127.0.0.1 port=1", min_size=1, open=False).open(wait=True, timeout=0.2)
    assert time.monotonic() - began < 20


def test_a_forked_child_has_a_pool_of_its_own_process(worker: Worker, postgres: Postgres) -> None:
    worker.call(make, postgres.conninfo, min_size=0, max_size=2)
    pid = worker.call(take)
    child = worker.fork()
    assert child.call(ask, "SELECT pg_backend_pid()") != (pid,)
    child.call(put)  # the parent's lease: nothing happens to it
    worker.call(put)
    assert worker.call(ask, "SELECT pg_backend_pid()") in [(number,) for number in postgres.backends()]
