"""sharedpool.postgres.AsyncConnectionPool, used as psycopg_pool's users use theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import psycopg_pool
import pytest

from sharedpool import OptionError
from sharedpool.postgres import AsyncConnectionPool
from tests.support import sessions
from tests.support.postgres import Postgres
from tests.support.state import State
from tests.support.workers import Worker

Body = Callable[[Postgres], Coroutine[Any, Any, None]]
_bodies: dict[str, Body] = {}


def in_a_worker(body: Body) -> Callable[[Worker, Postgres], None]:
    """Runs a test's body on a loop of a worker."""

    def test(worker: Worker, postgres: Postgres) -> None:
        worker.call(run, body.__name__, postgres)

    _bodies[body.__name__] = body
    return test


def run(state: State, name: str, postgres: Postgres) -> None:
    asyncio.run(_bodies[name](postgres))


@in_a_worker
async def test_a_block_commits_and_after_an_error_rolls_back(postgres: Postgres) -> None:
    async with AsyncConnectionPool(postgres.conninfo, min_size=1, max_size=4, open=False) as pool:
        async with pool.connection() as conn:
            assert isinstance(conn, psycopg.AsyncConnection)
            await conn.execute("CREATE TABLE IF NOT EXISTS kept_async (x int)")
        with pytest.raises(ZeroDivisionError):
            async with pool.connection() as conn:
                await conn.execute("INSERT INTO kept_async VALUES (1)")
                raise ZeroDivisionError
        async with pool.connection() as conn:
            assert await (await conn.execute("SELECT count(*) FROM kept_async")).fetchone() == (0,)
            await conn.execute("DROP TABLE kept_async")
        assert pool.get_stats()["requests_num"] == 3


@in_a_worker
async def test_tasks_wait_in_turn_and_the_cap_holds(postgres: Postgres) -> None:
    async with AsyncConnectionPool(postgres.conninfo, min_size=0, max_size=2) as pool:

        async def ask(n: int) -> Any:
            async with pool.connection() as conn:
                return await (await conn.execute("SELECT %s::int, pg_sleep(0.001)", (n,))).fetchone()

        rows = await asyncio.gather(*(ask(n) for n in range(50)))
        assert [row[0] for row in rows] == list(range(50))
        assert len(postgres.backends()) <= 2
        assert pool.get_stats()["requests_queued"] > 0


@in_a_worker
async def test_callbacks_are_coroutines(postgres: Postgres) -> None:
    called: list[str] = []

    async def conninfo() -> str:
        called.append("conninfo")
        return postgres.conninfo

    async def configure(conn: Any) -> None:
        called.append("configure")
        await conn.execute("SET TimeZone = 'Asia/Tokyo'")
        await conn.commit()

    async def check(conn: Any) -> None:
        called.append("check")
        await AsyncConnectionPool.check_connection(conn)

    async def reset(conn: Any) -> None:
        called.append("reset")

    with pytest.raises(OptionError, match="'name' is not given"):
        AsyncConnectionPool(conninfo, min_size=0, max_size=2)
    async with AsyncConnectionPool(
        conninfo, name="own", min_size=0, max_size=1, configure=configure, check=check, reset=reset
    ) as pool:
        for _ in range(2):
            async with pool.connection() as conn:
                assert str(conn.info.timezone) == "Asia/Tokyo"
                await conn.execute("SET TimeZone = 'Europe/Rome'")
        assert called[-7:] == ["configure", "check", "reset", "configure", "check", "reset", "configure"]


@in_a_worker
async def test_it_raises_what_psycopg_pool_raises(postgres: Postgres) -> None:
    pool = AsyncConnectionPool(postgres.conninfo, min_size=0, max_size=1, open=False)
    with pytest.raises(psycopg_pool.PoolClosed, match="not open yet"):
        await pool.getconn()
    await pool.open(wait=True)
    conn = await pool.getconn()
    with pytest.raises(psycopg_pool.PoolTimeout):
        await pool.getconn(timeout=0.05)
    await pool.putconn(conn)
    with pytest.raises(ValueError, match="doesn't come from any pool"):
        await pool.putconn(conn)
    await pool.check()
    await pool.resize(1, 2)
    await pool.drain()
    await pool.close()
    with pytest.raises(psycopg_pool.PoolClosed, match="already closed"):
        await pool.getconn()


@in_a_worker
async def test_a_task_cancelled_in_its_query_loses_nothing(postgres: Postgres) -> None:
    async with AsyncConnectionPool(postgres.conninfo, min_size=0, max_size=1) as pool:

        async def sleep() -> None:
            async with pool.connection() as conn:
                await conn.execute("SELECT pg_sleep(30)")

        for _ in range(3):
            task = asyncio.create_task(sleep())
            while not postgres.ask("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(30)'"
                                   " AND state = 'active'"):  # fmt: skip
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with pool.connection(timeout=10) as conn:
                assert await (await conn.execute("SELECT 1")).fetchone() == (1,)
        assert len(postgres.backends()) == 1


def test_a_session_of_a_process_that_does_not_wait_on_a_loop_is_taken_over(
    two: list[Worker], postgres: Postgres
) -> None:
    one, other = two
    one.attach("own", max_connections=1)
    one.call(make_driver, postgres.conninfo)
    pid = one.call(lease_and_give_back)
    assert other.call(ask_on_a_loop, postgres.conninfo) == (pid, "cancelled")
    assert one.call(lease_and_give_back) == pid


def make_driver(state: State, conninfo: str) -> None:
    sessions.make(state, "psycopg3", conninfo)


def lease_and_give_back(state: State) -> int:
    lease = state.pools["own"].checkout("", 0, state.things["db"])
    pid = int(lease.conn.info.backend_pid)
    lease.checkin()
    return pid


def ask_on_a_loop(state: State, conninfo: str) -> tuple[int, str]:
    """The server's process, and what becomes of a query that is cancelled by another task."""

    async def ask() -> tuple[int, str]:
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(conninfo, name="own", min_size=0, max_size=1)
        async with pool, pool.connection() as conn:
            row = await (await conn.execute("SELECT pg_backend_pid()")).fetchone()
            asyncio.get_running_loop().call_later(0.2, lambda: asyncio.ensure_future(conn.cancel_safe()))
            try:
                await conn.execute("SELECT pg_sleep(30)")
            except psycopg.errors.QueryCanceled:
                await conn.rollback()
                return row[0], "cancelled"
        return row[0], "not cancelled"

    return asyncio.run(ask())
