"""A desk: FastAPI over asyncpg. Its clients hang up, its queries have time limits, and some work is done afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator

import fastapi
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

import sharedpool
from sharedpool.integrations.sqlalchemy import AsyncSharedQueuePool

#: Seconds that a query of `/limit` may take, which it never keeps.
LIMIT = 0.2

engine = create_async_engine(
    os.environ["DESK_POSTGRES"],
    poolclass=AsyncSharedQueuePool, pool_size=int(os.environ["DESK_CAP"]), max_overflow=0, pool_timeout=60,
    shared_name="desk",
)  # fmt: skip
app = fastapi.FastAPI(default_response_class=PlainTextResponse)


async def note(conn: AsyncConnection, user: str, words: str) -> str:
    """Write a note of a user's, who is told by a setting. Gives whose notes there are to see, and the note."""
    await conn.execute(text("SELECT set_config('desk.user', :user, true)"), {"user": user})
    await conn.execute(text("INSERT INTO note (text) VALUES (:words)"), {"words": words})
    owners = (await conn.execute(text("SELECT DISTINCT owner FROM note"))).scalars().all()
    notes = (await conn.execute(text("SELECT text FROM note WHERE text = :words"), {"words": words})).scalars().all()
    return f"{owners} {notes}"


async def hold(conn: AsyncConnection) -> None:
    """A query that ends when the judge lets go."""
    await conn.execute(text("SELECT pg_advisory_xact_lock_shared(1)"))


@app.get("/page")
async def page() -> str:
    return "the page\n"


@app.get("/stats/{pool}")
async def stats(pool: str) -> fastapi.responses.JSONResponse:
    return fastapi.responses.JSONResponse({"pool": dataclasses.asdict(sharedpool.pool_stats(pool))})


@app.get("/write/{user}/{words}")
async def write(user: str, words: str) -> str:
    async with engine.begin() as conn:
        return await note(conn, user, words)


@app.get("/limit/{user}/{words}")
async def limit(user: str, words: str) -> str:
    """A query that is over its time limit; and then a note."""
    try:
        async with asyncio.timeout(LIMIT), engine.begin() as conn:
            await note(conn, user, f"never {words}")
            await hold(conn)
    except TimeoutError:
        return await write(user, words)
    return "nobody held it"


@app.get("/later/{user}/{words}")
async def later(user: str, words: str, background: fastapi.BackgroundTasks) -> str:
    """A note, once this has been answered."""
    background.add_task(write, user, words)
    return "later"


@app.get("/stream/{user}/{words}")
async def stream(user: str, words: str) -> StreamingResponse:
    """A note, and then nothing until the client hangs up."""

    async def lines() -> AsyncIterator[str]:
        async with engine.begin() as conn:
            yield await note(conn, user, words) + "\n"
            await hold(conn)

    return StreamingResponse(lines())
