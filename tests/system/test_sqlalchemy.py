"""SQLAlchemy engines over a shared pool, on a real PostgreSQL: pg_stat_activity says whether the cap holds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import QueuePool, create_engine, event, exc, text

from sharedpool import OptionError
from sharedpool.integrations.sqlalchemy import AsyncSharedQueuePool, SharedQueuePool, options
from tests.support import alchemy
from tests.support.postgres import Postgres
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import ForkServer, Harness, Worker

MOVING = ["psycopg", "psycopg2"]
LIBRARIES = [*MOVING, "pg8000"]


@pytest.fixture(scope="session")
def fork_server_with_sqlalchemy(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded SQLAlchemy, too: that takes a process half a second."""
    server = ForkServer("tests.support.alchemy")
    yield server
    server.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_sqlalchemy: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_sqlalchemy)
    yield harness
    harness.close()


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=MOVING)
def moving(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def url(postgres: Postgres, library: str = "psycopg", user: str = "app:secret") -> str:
    query = "" if library == "pg8000" else "?sslmode=disable"
    return f"postgresql+{library}://{user}@127.0.0.1:{postgres.port}/postgres{query}"


def engines(workers: list[Worker], postgres: Postgres, library: str = "psycopg", cap: int = 1, **given: Any) -> None:
    for worker in workers:
        worker.call(alchemy.make, url(postgres, library), pool_size=cap, **given)


class Watch:
    """How many sessions there were at most, as the server says, while the block ran."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._stop = threading.Event()
        self.peak = 0

    def _look(self) -> None:
        import psycopg

        with psycopg.connect(f"{self._postgres.local} application_name=judge", autocommit=True) as conn:
            while not self._stop.is_set():
                row = conn.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
                    " AND application_name <> 'judge'"
                ).fetchone()
                assert row is not None
                self.peak = max(self.peak, row[0])

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


# --- the cap, and moving ----------------------------------------------------------------------------------------------


def test_four_processes_with_threads_have_no_more_sessions_than_the_cap(
    three: list[Worker], postgres: Postgres, library: str
) -> None:
    engines(three, postgres, library, cap=3, steal_after=0.02, **({"reset": "never"} if library == "psycopg" else {}))
    with Watch(postgres) as watch:
        number = 5 if library == "pg8000" else 40
        done = [worker.begin(alchemy.load, "SELECT 1", number, threads=3) for worker in three]
        errors = [error for pending in done for error in pending.result(60)]
    assert not errors, "\n".join(errors)
    assert watch.peak <= 3
    assert int(three[0].call(alchemy.on_pool, "checkedout")) == 0


def test_a_session_serves_processes_in_turn(two: list[Worker], postgres: Postgres, moving: str) -> None:
    engines(two, postgres, moving)
    assert len({worker.call(alchemy.query) for worker in (*two, *two)}) == 1
    assert len(postgres.backends()) == 1


def test_two_libraries_share_sessions(two: list[Worker], postgres: Postgres) -> None:
    engines(two[:1], postgres, "psycopg")
    engines(two[1:], postgres, "psycopg2")
    assert len({worker.call(alchemy.query) for worker in (*two, *two)}) == 1


@pytest.mark.parametrize("given", [{"library": "pg8000"}, {"library": "psycopg", "move": False}])
def test_what_does_not_move_is_closed_for_the_next_process(
    two: list[Worker], postgres: Postgres, given: dict[str, Any]
) -> None:
    engines(two, postgres, **given, steal_after=0.02)
    pids = [two[i // 2 % 2].call(alchemy.query) for i in range(6)]
    assert (pids[0], pids[2], pids[4]) == (pids[1], pids[3], pids[5])
    assert len(set(pids)) == 3
    wait_until(lambda: len(postgres.backends()) == 1)


@pytest.mark.parametrize("moving", ["psycopg2"])
def test_what_one_process_left_in_a_session_is_gone_in_another(
    two: list[Worker], postgres: Postgres, moving: str
) -> None:
    engines(two, postgres, moving)
    two[0].call(alchemy.execute, "CREATE TEMP TABLE mine (x int)")
    assert two[0].call(alchemy.query, "SELECT to_regclass('mine')::text") == "mine"
    assert two[1].call(alchemy.query, "SELECT to_regclass('mine')::text") is None


@pytest.mark.parametrize("reset", ["handoff", "always"])
def test_what_a_user_leaves_in_a_session_is_there_in_the_same_process_unless_it_is_always_reset(
    worker: Worker, postgres: Postgres, library: str, reset: str
) -> None:
    """With QueuePool it is, too; what does not move has no resets."""
    if library in MOVING or reset == "handoff":
        engines([worker], postgres, library, reset=reset)
        worker.call(alchemy.execute, "SELECT set_config('app.tenant', 'a', false)")
        found = worker.call(alchemy.query, "SELECT current_setting('app.tenant', true)")
        assert (found or "") == ("" if reset == "always" else "a")


def test_a_process_killed_in_a_query_leaves_its_permit_to_the_next(two: list[Worker], postgres: Postgres) -> None:
    engines(two, postgres)
    two[0].begin(alchemy.query, "SELECT pg_sleep(600)")
    wait_until(lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))
    os.kill(two[0].pid, signal.SIGKILL)
    two[1].call(alchemy.query)
    assert len(postgres.backends()) == 1


# --- events -----------------------------------------------------------------------------------------------------------


def test_connect_listeners_run_in_every_process_and_after_each_reset(
    two: list[Worker], postgres: Postgres, moving: str
) -> None:
    one, other = two
    engines(two, postgres, moving, listen="SET TimeZone = 'Asia/Tokyo'")
    zone = "SHOW TimeZone"
    assert one.call(alchemy.query, zone) == "Asia/Tokyo"
    assert one.call(alchemy.events)[:2] == ["first_connect", "connect"]
    assert [one.call(alchemy.query, zone) for _ in range(5)] == ["Asia/Tokyo"] * 5
    assert "connect" not in one.call(alchemy.events), "what a listener has set is how the session stays"
    assert other.call(alchemy.query, zone) == "Asia/Tokyo"
    assert other.call(alchemy.events)[:2] == ["first_connect", "connect"]
    assert one.call(alchemy.query, zone) == "Asia/Tokyo"
    assert one.call(alchemy.events)[:1] == ["connect"], "the other process has used it"


@pytest.mark.parametrize("moving", ["psycopg2"])
def test_without_resets_they_run_once_in_every_process(two: list[Worker], postgres: Postgres, moving: str) -> None:
    engines(two, postgres, moving, reset="never", listen="SET my.own = 'here'")
    for worker in two:
        assert worker.call(alchemy.query, "SHOW my.own") == "here"
        assert "connect" in worker.call(alchemy.events)
    for worker in (*two, *two):
        assert worker.call(alchemy.query, "SHOW my.own") == "here"
    assert all("connect" not in worker.call(alchemy.events) for worker in two)


def test_what_a_user_set_is_set_back_and_the_listeners_run_again(worker: Worker, postgres: Postgres) -> None:
    engines([worker], postgres, listen="SET TimeZone = 'Asia/Tokyo'")
    worker.call(alchemy.execute, "SET TimeZone = 'Europe/Oslo'")
    assert worker.call(alchemy.query, "SHOW TimeZone") == "Asia/Tokyo"


def scenes(state: State, label: str) -> list[list[str]]:
    """What events there are for what users do."""
    engine, seen = state.things[label], []

    def scene() -> None:
        seen.append(alchemy.events(state, label))

    alchemy.query(state, label=label)
    scene()
    alchemy.query(state, label=label)
    scene()
    with pytest.raises(exc.ProgrammingError):
        alchemy.query(state, "SELECT nothing", label=label)
    scene()
    with engine.connect() as connection:
        connection.scalar(text("SELECT 1"))
        connection.invalidate()
        connection.rollback()
        connection.scalar(text("SELECT 1"))
    scene()
    with engine.connect() as connection:
        connection.connection.invalidate(soft=True)
    alchemy.query(state, label=label)
    scene()
    with engine.connect() as connection:
        connection.detach()
    scene()
    raw = engine.raw_connection()
    raw.close()
    scene()
    engine.dispose()
    alchemy.query(state, label=label)
    scene()
    return seen


@pytest.mark.parametrize("library", ["psycopg", "pg8000"])
def test_events_are_those_of_a_queue_pool(worker: Worker, postgres: Postgres, library: str) -> None:
    engines([worker], postgres, library, cap=3)
    worker.call(alchemy.make, url(postgres, library), "plain", poolclass=QueuePool)
    expected = worker.call(scenes, "plain")
    got = worker.call(scenes, "engine")
    expected[-1].remove("close")  # which dispose() says of a session that stays open for other processes
    assert got == expected


@pytest.mark.parametrize("moving", ["psycopg"])
def test_a_ping_failure_brings_a_new_session(two: list[Worker], postgres: Postgres, moving: str) -> None:
    engines(two, postgres, moving, pool_pre_ping=True)
    first = two[0].call(alchemy.query)
    postgres.ask("SELECT pg_terminate_backend(%s)", first)
    assert two[0].call(alchemy.query) != first
    two[1].call(alchemy.query)
    postgres.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> 'judge'")
    assert two[0].call(alchemy.query) not in (first, None)


def ping_event(state: State) -> list[Any]:
    """A listener that finds the first connection bad."""
    engine = state.things["engine"]
    pids: list[int] = []

    @event.listens_for(engine, "checkout")
    def refuse(dbapi_connection: Any, record: Any, proxy: Any) -> None:
        pids.append(dbapi_connection.info.backend_pid)
        if len(pids) == 1:
            raise exc.DisconnectionError("no good")

    return [alchemy.query(state), *pids]


def test_a_listener_that_finds_a_connection_bad_gets_a_new_one(worker: Worker, postgres: Postgres) -> None:
    engines([worker], postgres, cap=2)
    old = worker.call(alchemy.query)
    used, first, second = worker.call(ping_event)
    assert first == old
    assert used == second != first
    assert len(postgres.backends()) == 1


# --- users' ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["psycopg", "pg8000"])
def test_who_waits_too_long_gets_sqlalchemys_timeout(two: list[Worker], postgres: Postgres, library: str) -> None:
    engines(two, postgres, library, pool_timeout=0.2)
    two[0].call(alchemy.hold)
    error = two[1].fails(exc.TimeoutError, alchemy.query)
    assert error.code == "3o7r"
    assert "max=1 leased=1" in str(error)
    assert f"of process {two[0].pid}" in str(error)


@pytest.mark.parametrize("moving", ["psycopg2"])
def test_a_server_that_is_not_there_is_an_operational_error(worker: Worker, postgres: Postgres, moving: str) -> None:
    worker.call(alchemy.make, f"postgresql+{moving}://app@127.0.0.1:1/postgres")
    for _ in range(2):
        assert "refused" in str(worker.fails(exc.OperationalError, alchemy.query))
    worker.call(alchemy.make, url(postgres, moving, user="nobody-there"), "other")
    worker.fails(exc.OperationalError, alchemy.query, label="other")


def test_a_stopped_pool_is_an_operational_error(worker: Worker, postgres: Postgres) -> None:
    engines([worker], postgres)
    worker.call(alchemy.hold)
    worker.call(stop_pool)
    worker.call(alchemy.give_back)
    assert "was stopped" in str(worker.fails(exc.OperationalError, alchemy.query))
    worker.call(alchemy.dispose)
    worker.call(alchemy.query)


def stop_pool(state: State) -> None:
    import sharedpool

    sharedpool.stop_pool(state.things["engine"].pool.shared_name)


def test_a_transaction_left_open_is_rolled_back_or_ends_with_its_session(
    two: list[Worker], postgres: Postgres, moving: str
) -> None:
    engines(two, postgres, moving)
    two[0].call(alchemy.execute, "CREATE TABLE IF NOT EXISTS left_open (x int); TRUNCATE left_open")
    pid = two[0].call(alchemy.query, "INSERT INTO left_open VALUES (1) RETURNING pg_backend_pid()")
    assert two[1].call(alchemy.query, "SELECT count(*) FROM left_open") == 0
    assert two[1].call(alchemy.query) == pid
    for worker in two:
        worker.call(alchemy.dispose)
        worker.call(alchemy.make, url(postgres, moving), "engine", pool_size=1, pool_reset_on_return=None)
    assert two[0].call(leave_open) == pid
    assert two[1].call(alchemy.query) != pid, "closed, not lent"


def leave_open(state: State) -> int:
    raw = state.things["engine"].raw_connection()
    cursor = raw.cursor()
    cursor.execute("SELECT pg_backend_pid()")
    found = int(cursor.fetchone()[0])
    raw.close()
    return found


def test_a_collected_connection_is_closed_and_its_permit_comes_back(worker: Worker, postgres: Postgres) -> None:
    engines([worker], postgres)
    pid = worker.call(alchemy.hold)
    worker.call(alchemy.forget)
    assert worker.call(alchemy.query) != pid
    assert worker.call(dropped) == 1


def dropped(state: State) -> int:
    return int(state.things["engine"].pool.shared_stats().dropped)


@pytest.mark.parametrize("library", ["psycopg", "pg8000"])
def test_a_detached_connection_keeps_its_permit_until_it_is_closed(
    two: list[Worker], postgres: Postgres, library: str
) -> None:
    engines(two, postgres, library)
    two[0].call(alchemy.hold)
    two[0].call(alchemy.on_connection, "detach")
    waits = two[1].begin(alchemy.query)
    wait_until(lambda: two[0].call(waiting) == 1)
    assert len(postgres.backends()) == 1
    two[0].call(alchemy.give_back)
    waits.result()
    wait_until(lambda: len(postgres.backends()) == 1)


def waiting(state: State) -> int:
    return int(state.things["engine"].pool.shared_stats().waiting)


@pytest.mark.parametrize("library", ["psycopg", "pg8000"])
def test_dispose_is_this_processs_affair(two: list[Worker], postgres: Postgres, library: str) -> None:
    engines(two, postgres, library, cap=2)
    kept = two[0].call(alchemy.hold)
    other = two[1].call(alchemy.hold)
    two[0].call(alchemy.dispose)
    assert two[0].call(alchemy.ask) == kept
    two[0].call(alchemy.give_back)
    assert two[1].call(alchemy.ask) == other
    if library == "pg8000":
        wait_until(lambda: postgres.backends() == [other])
    else:
        assert sorted(postgres.backends()) == sorted([kept, other])
    two[0].call(alchemy.query)


def test_a_drain_closes_the_idle_sessions_of_all_processes(two: list[Worker], postgres: Postgres) -> None:
    engines(two, postgres, cap=3)
    held = two[0].call(alchemy.hold)
    two[0].call(alchemy.hold, name="second")
    two[1].call(alchemy.query)
    two[0].call(alchemy.give_back, "second")
    assert two[1].call(alchemy.on_pool, "drain") == 3
    wait_until(lambda: postgres.backends() == [held])
    two[0].call(alchemy.give_back)
    wait_until(lambda: postgres.backends() == [])


def test_the_status_is_about_all_processes(two: list[Worker], postgres: Postgres) -> None:
    engines(two, postgres, cap=7)
    two[0].call(alchemy.hold)
    two[0].call(alchemy.hold, name="second")
    two[0].call(alchemy.give_back, "second")
    status = two[1].call(alchemy.on_pool, "status")
    assert status.startswith(
        "Pool size: 7  Connections in pool: 1 Current Overflow: 0 Current Checked out connections: 1"
    )
    numbers = [two[1].call(alchemy.on_pool, name) for name in ("size", "checkedin", "checkedout", "overflow")]
    assert numbers == [7, 1, 1, 0]


def test_after_a_fork_each_process_goes_on_by_itself(worker: Worker, postgres: Postgres, moving: str) -> None:
    engines([worker], postgres, moving, cap=3)
    held = worker.call(alchemy.hold)
    child = worker.fork()
    assert child.call(alchemy.query) != held
    child.fails(exc.StatementError, alchemy.ask)
    child.call(alchemy.forget)
    assert worker.call(alchemy.ask) == held
    worker.call(alchemy.give_back)
    assert worker.call(alchemy.query) == held
    assert child.call(alchemy.query) in postgres.backends()


@pytest.mark.parametrize("moving", ["psycopg2"])
def test_an_isolation_level_is_set_back(worker: Worker, postgres: Postgres, moving: str) -> None:
    engines([worker], postgres, moving)
    assert worker.call(autocommits, "AUTOCOMMIT")
    assert not worker.call(autocommits, None)


def autocommits(state: State, level: str | None) -> bool:
    engine = state.things["engine"]
    with engine.connect() as connection:
        if level:
            connection.execution_options(isolation_level=level)
        connection.scalar(text("SELECT 1"))
        return bool(connection.connection.driver_connection.autocommit)


def test_an_old_connection_is_closed_once_nobody_leases_it(worker: Worker, postgres: Postgres) -> None:
    engines([worker], postgres, pool_recycle=1)
    first = worker.call(alchemy.query)
    wait_until(lambda: postgres.backends() == [])
    assert worker.call(alchemy.query) != first


# --- how engines connect ----------------------------------------------------------------------------------------------


def with_token(state: State, address: str, password: str) -> Any:
    """A listener that gives the password anew for each connection, as tokens are."""
    alchemy.make(state, address, pool_size=2)
    engine = state.things["engine"]
    asked = state.things["asked"] = []

    @event.listens_for(engine, "do_connect")
    def give_password(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
        asked.append(len(asked))
        cparams["password"] = f"{password}{len(asked)}"

    return alchemy.query(state)


@pytest.mark.parametrize("moving", ["psycopg2"])
def test_listeners_may_change_what_a_connection_is_made_with(
    two: list[Worker], postgres: Postgres, moving: str
) -> None:
    address = url(postgres, moving, user="app")
    first = two[0].call(with_token, address, "a")
    assert two[1].call(with_token, address, "b") == first, "passwords are no part of the key"


def databases(state: State, address: str, *names: str) -> list[Any]:
    """Where two connections at once lead, if a listener says these names in turn."""
    alchemy.make(state, address, pool_size=2)
    engine = state.things["engine"]
    state.things["name"] = names[0]

    @event.listens_for(engine, "do_connect")
    def choose_database(dialect: Any, record: Any, cargs: Any, cparams: dict[str, Any]) -> None:
        cparams["dbname"] = state.things["name"]

    found = []
    with contextlib.ExitStack() as stack:
        for name in names:
            state.things["name"] = name
            connection = stack.enter_context(engine.connect())
            found.append(connection.scalar(text("SELECT current_database()")))
    return found


@pytest.mark.parametrize("moving", ["psycopg", "psycopg2"])
def test_a_session_that_a_listener_has_led_elsewhere_is_nobody_elses(
    two: list[Worker], postgres: Postgres, moving: str
) -> None:
    address = url(postgres, moving, user="app")
    assert two[0].call(databases, address, "postgres", "template1") == ["postgres", "template1"]
    assert two[1].call(databases, address, "postgres", "postgres") == ["postgres", "postgres"]


def own_creator(state: State, conninfo: str, **given: Any) -> Any:
    import psycopg

    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo), poolclass=SharedQueuePool, **given
    )
    state.things["engine"] = engine
    with engine.connect() as connection:
        return connection.scalar(text("SELECT pg_backend_pid()"))


def test_a_creator_of_ones_own_needs_a_name_and_does_not_move(two: list[Worker], postgres: Postgres) -> None:
    assert "shared_name" in str(two[0].fails(exc.ArgumentError, own_creator, postgres.conninfo))
    pids = [worker.call(own_creator, postgres.conninfo, shared_name="mine", pool_size=1) for worker in two]
    assert len(set(pids)) == 2
    wait_until(lambda: postgres.backends() == pids[1:])


def test_labels_do_not_split_the_cap_and_psycopgs_pool_is_under_it_too(postgres: Postgres) -> None:
    from sharedpool.postgres import ConnectionPool

    names = {
        create_engine(
            f"postgresql+{library}://app:{word}@127.0.0.1:{postgres.port}/postgres?application_name={word}",
            poolclass=SharedQueuePool, pool_size=2,
        ).pool.shared_name  # type: ignore[attr-defined]
        for library in MOVING
        for word in ("web-1", "web-2")
    }  # fmt: skip
    assert names == {ConnectionPool(f"{postgres.conninfo} application_name=x", open=False, min_size=0, max_size=2).name}


def test_two_files_of_sqlite_are_two_pools(tmp_path: Path) -> None:
    engines = [create_engine(f"sqlite:///{tmp_path}/{name}", poolclass=SharedQueuePool) for name in ("a", "b", "a")]
    one, other, again = (engine.pool.shared_name for engine in engines)  # type: ignore[attr-defined]
    assert one == again
    assert one != other


def test_an_engine_that_does_not_say_where_it_leads_needs_a_name() -> None:
    given: dict[str, Any] = {"poolclass": SharedQueuePool, "connect_args": {"dsn": object()}}
    engine = create_engine("postgresql+pg8000://app@x/y", **given)
    with pytest.raises(exc.ArgumentError, match=r"needs shared_name=.*dsn is an object"):
        engine.connect()


def make_one(**given: Any) -> SharedQueuePool:
    pool = create_engine("postgresql+psycopg://app@127.0.0.1/x", poolclass=SharedQueuePool, **given).pool
    assert isinstance(pool, SharedQueuePool)
    return pool


def test_an_overflow_is_added_to_the_cap_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="pool_size=5 and max_overflow=10 are a cap of 15") as warned:
        pool = make_one(pool_size=5, max_overflow=10)
    assert warned[0].filename.endswith("langhelpers.py") or warned[0].filename == __file__
    assert pool._given["max_connections"] == 15


@pytest.mark.parametrize(
    "given",
    [{"max_overflow": -1}, {"max_overflow": 3}, {"pool_size": 0}, {"pool_size": "5"}, {"idle_timeout": -1}],
)
def test_wrong_arguments_are_refused_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(exc.ArgumentError):
        make_one(**given)


def test_a_wrong_reset_is_refused() -> None:
    with pytest.raises(OptionError, match="reset"):
        make_one(reset="sometimes").status()


@pytest.mark.parametrize("driver", ["pg8000", "a creator"])
def test_resets_that_nobody_would_do_are_refused(driver: str) -> None:
    if driver == "pg8000":
        engine = create_engine("postgresql+pg8000://app@127.0.0.1/x", **options(reset="always"))
    else:
        given = {"creator": lambda: None, **options(reset="always", shared_name="x")}
        engine = create_engine("postgresql+psycopg://app@127.0.0.1/x", **given)
    with pytest.raises(OptionError, match="reset"):
        engine.connect()


def test_an_asyncio_engine_needs_the_other_class() -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    with pytest.raises(exc.ArgumentError, match="SharedQueuePool"):
        create_async_engine("postgresql+asyncpg://app@127.0.0.1/x", poolclass=SharedQueuePool)
    with pytest.raises(exc.ArgumentError, match="AsyncSharedQueuePool"):
        create_engine("postgresql+psycopg://app@127.0.0.1/x", poolclass=AsyncSharedQueuePool)


def test_options_are_the_keywords_of_create_engine() -> None:
    pool = create_engine(
        "postgresql+psycopg://app@127.0.0.1/x", **options(20, shared_name="db", idle_timeout=None)
    ).pool
    assert isinstance(pool, SharedQueuePool)
    assert pool._given == {"max_connections": 20, "idle_timeout": None}
    assert pool.timeout() == 30.0


# --- asyncio ----------------------------------------------------------------------------------------------------------


def make_async(state: State, address: str, **given: Any) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    loop = state.things["loop"] = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="loop").start()
    state.things["engine"] = create_async_engine(address, poolclass=AsyncSharedQueuePool, **given)


def in_loop(state: State, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, state.things["loop"]).result(30)


async def ask_once(engine: Any) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar())


def ask_async(state: State, number: int = 1) -> list[int]:
    """So many tasks at once; the sessions they had."""
    engine = state.things["engine"]

    async def everybody() -> list[int]:
        return list(await asyncio.gather(*(ask_once(engine) for _ in range(number))))

    return list(in_loop(state, everybody()))


def hold_async(state: State) -> int:
    engine = state.things["engine"]

    async def hold() -> int:
        connection = state.things["held"] = await engine.connect()
        return int((await connection.execute(text("SELECT pg_backend_pid()"))).scalar())

    return int(in_loop(state, hold()))


def give_back_async(state: State) -> None:
    in_loop(state, state.things.pop("held").close())


def wait_and_tick(state: State) -> int:
    """How often another task ran while one waited in vain."""
    engine, ticks = state.things["engine"], 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async def wait() -> None:
        ticking = asyncio.create_task(tick())
        try:
            with pytest.raises(exc.TimeoutError):
                await ask_once(engine)
            waiting = asyncio.create_task(ask_once(engine))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        finally:
            ticking.cancel()

    in_loop(state, wait())
    return ticks


def lose_async(state: State) -> None:
    """Forget a connection; SQLAlchemy complains of it."""
    import warnings

    async def lose() -> None:
        connection = await state.things["engine"].connect()
        await connection.execute(text("SELECT 1"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_loop(state, lose())
        gc.collect()


def dispose_async(state: State) -> None:
    in_loop(state, state.things["engine"].dispose())


@pytest.fixture(params=["asyncpg", "psycopg"])
def aiolib(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_tasks_of_two_processes_share_the_cap(two: list[Worker], postgres: Postgres, aiolib: str) -> None:
    for worker in two:
        worker.call(make_async, url(postgres, aiolib).partition("?")[0], pool_size=3, steal_after=0.05)
    done = [worker.begin(ask_async, 100) for worker in two]
    peak = 0
    while not all(pending.done for pending in done):
        peak = max(peak, len(postgres.backends()))
    assert [len(pending.result()) for pending in done] == [100, 100]
    assert peak <= 3
    assert len(two[0].call(ask_async, 20)) == 20
    wait_until(lambda: len(postgres.backends()) <= 3)


def break_off_async(state: State, number: int) -> None:
    """So many tasks, one after the other, whose time is over in the midst of a query."""

    async def sleep() -> None:
        async with state.things["engine"].connect() as connection:
            await connection.execute(text("SELECT pg_sleep(60)"))

    async def each() -> None:
        for _ in range(number):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sleep(), 0.2)

    in_loop(state, each())


def loop_for_each(state: State, number: int) -> list[int]:
    """So many loops, each of which ends with a session of its own left idle; the sessions."""
    return [asyncio.run(ask_once(state.things["engine"])) for _ in range(number)]


def loop_ends_in_a_query(state: State) -> None:
    """A loop that is closed while a task of it waits for the server."""
    loop = asyncio.new_event_loop()

    async def sleep() -> None:
        async with state.things["engine"].connect() as connection:
            await connection.execute(text("SELECT pg_sleep(60)"))

    task = loop.create_task(sleep())
    loop.run_until_complete(asyncio.wait([task], timeout=0.5))
    loop.close()
    state.things.setdefault("left", []).append(task)  # not collected: nothing closes it by chance


def test_a_task_broken_off_in_its_query_leaves_nothing_at_work(worker: Worker, postgres: Postgres, aiolib: str) -> None:
    worker.call(make_async, url(postgres, aiolib).partition("?")[0], pool_size=2)
    with Watch(postgres) as watch:
        worker.call(break_off_async, 6)
    assert watch.peak <= 2
    wait_until(lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%%pg_sleep%%' AND state='active'"
                                    " AND application_name <> 'judge'") == [])  # fmt: skip
    assert worker.call(alchemy.on_pool, "shared_stats").closed_unconfirmed == 0


def test_what_ended_loops_leave_counts_until_the_server_has_closed_it(
    two: list[Worker], postgres: Postgres, aiolib: str
) -> None:
    for worker in two:
        worker.call(make_async, url(postgres, aiolib).partition("?")[0], pool_size=2, steal_after=0.02)
    with Watch(postgres) as watch:
        done = [worker.begin(loop_for_each, 10) for worker in two]
        for pending in done:
            assert len(pending.result(60)) == 10
        two[0].call(loop_ends_in_a_query)
        two[0].kill()
        two[1].call(loop_for_each, 3)
    assert watch.peak <= 2


@pytest.mark.parametrize("aiolib", ["asyncpg"])
def test_killed_in_a_query_its_session_is_cancelled_though_it_cannot_move(
    two: list[Worker], postgres: Postgres, aiolib: str
) -> None:
    for worker in two:
        worker.call(make_async, url(postgres, aiolib).partition("?")[0], pool_size=1)
    pid = two[0].call(ask_async)
    two[0].begin(break_off_async, 1)
    two[0].begin(alchemy.make, url(postgres))
    wait_until(lambda: postgres.ask("SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'", pid[0]))
    two[0].kill()
    with Watch(postgres) as watch:
        assert two[1].call(ask_async) != pid
    assert watch.peak == 1


def set_up_async(state: State, schema: str) -> None:
    """Connect listeners that set the session up, and note that they ran; a time zone that is another's each time."""
    state.things["heard"] = heard = []
    engine = state.things["engine"].sync_engine

    def connect(connection: Any, _: Any) -> None:
        heard.append("connect")
        cursor = connection.cursor()
        cursor.execute(f"SET search_path = {schema}")
        cursor.close()
        connection.commit()

    event.listen(engine, "connect", connect)
    event.listen(engine, "checkout", lambda *_: heard.append("checkout"))


def look_around_async(state: State) -> tuple[int, str, str, list[str]]:
    """The session, its search path and time zone, which this then changes, and what the listeners heard."""

    async def look() -> Any:
        async with state.things["engine"].connect() as connection:
            query = "SELECT pg_backend_pid(), current_setting('search_path'), current_setting('TimeZone')"
            found = (await connection.execute(text(query))).one()
            await connection.execute(text("SET TimeZone = 'Asia/Tokyo'"))
            await connection.commit()
            return found

    heard = state.things["heard"]
    heard.clear()
    return (*in_loop(state, look()), list(heard))


def moves(state: State) -> dict[str, int]:
    return dict(state.things["engine"].pool.sessions_that_stay())


def test_sessions_of_psycopg_move_between_loops_of_processes(two: list[Worker], postgres: Postgres) -> None:
    for number, worker in enumerate(two):
        worker.call(make_async, url(postgres, "psycopg"), pool_size=1, pool_pre_ping=True)
        worker.call(set_up_async, f"mine{number}")
    found = [two[i % 2].call(look_around_async) for i in (0, 0, 1, 0, 1)]
    assert len({pid for pid, *_ in found}) == 1
    assert [path for _, path, *_ in found] == ["mine0", "mine0", "mine1", "mine0", "mine1"]
    assert {zone for _, _, zone, _ in found} == {"UTC"}  # set back at the checkin
    assert all(heard == ["connect", "checkout"] for *_, heard in found)  # it was set back each time
    kept = two[0].call(hold_async)
    assert two[0].call(moves) == {}
    two[0].call(give_back_async)
    assert two[1].call(ask_async, 20) == [kept] * 20
    two[1].call(make_async, url(postgres, "psycopg") + "&target_session_attrs=read-write", pool_size=1)
    assert two[1].call(ask_async) != [kept]
    assert two[1].call(moves) == {"hosts": 1}


@pytest.mark.parametrize("aiolib", ["asyncpg"])
def test_who_waits_does_not_block_the_loop_and_may_be_cancelled(
    two: list[Worker], postgres: Postgres, aiolib: str
) -> None:
    for worker in two:
        worker.call(make_async, url(postgres, aiolib).partition("?")[0], pool_size=1, pool_timeout=3, steal_after=0.02)
    kept = two[0].call(hold_async)
    assert two[1].call(wait_and_tick) > 5
    two[0].call(give_back_async)
    assert two[0].call(ask_async) == [kept]
    wait_until(lambda: two[1].begin(ask_async).result() != [kept])


def test_what_a_task_forgets_is_closed_and_dispose_closes_the_rest(
    worker: Worker, postgres: Postgres, aiolib: str
) -> None:
    worker.call(make_async, url(postgres, aiolib).partition("?")[0], pool_size=1, pool_pre_ping=True)
    worker.call(lose_async)
    worker.call(ask_async)
    worker.call(dispose_async)
    if aiolib == "psycopg":  # what moves is left for other processes
        worker.call(alchemy.on_pool, "drain", "engine", 10)
    wait_until(lambda: postgres.backends() == [])
    worker.call(ask_async)
