"""The same application for asyncio: uvicorn's workers, each an interpreter of its own, share one pool.

    BACKEND=127.0.0.1:8080 uvicorn --workers 2 examples.fastapi_app:app

The endpoints are `async def`: waiting for a connection is a future on the loop, so a thousand requests may wait. For
`def` endpoints, which FastAPI runs in threads, `sharedpool.attach` gives the same pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator

import fastapi

from examples.gunicorn_app import HOST, PORT, ProtocolError, request_for, understand
from sharedpool import PoolTimeout, aio

#: Seconds for an answer of the back end.
PATIENCE = 10


@contextlib.asynccontextmanager
async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    """A worker attaches when it starts, and leaves the pool when it has served its last request."""
    async with aio.attach("default", max_connections=int(os.environ.get("MAX_CONNECTIONS", "4"))) as pool:
        app.state.pool = pool
        yield


app = fastapi.FastAPI(lifespan=lifespan)


@app.get("/stats")
async def stats() -> dict[str, object]:
    """The pool's numbers, over all workers, and those of this one."""
    pool = app.state.pool
    return {"pid": os.getpid(), "pool": dataclasses.asdict(pool.stats()), "worker": pool.worker_stats()}


@app.get("/{path:path}")
async def page(path: str) -> fastapi.Response:
    """Fetch a path from the back end."""
    try:
        status, body = await fetch("/" + path)
    except PoolTimeout as error:  # all connections in use for too long: the caller may try again
        return fastapi.Response(f"{error}\n", 503)
    except (OSError, EOFError, ProtocolError) as error:  # the connection is closed by now
        return fastapi.Response(f"{error}\n", 502)
    return fastapi.Response(body, int(status.split()[0]))


async def fetch(path: str) -> tuple[str, bytes]:
    """GET a path from the back end over a connection of the pool.

    Whatever comes beyond the answer is left in the reader: then the connection is closed at the end of the block.
    """
    async with app.state.pool.stream(HOST, int(PORT)) as (reader, writer), asyncio.timeout(PATIENCE):
        writer.write(request_for(path))
        await writer.drain()
        status, headers, length = understand((await reader.readuntil(b"\r\n\r\n"))[:-4])
        body = await reader.readexactly(length)
        if headers.get("connection", "").lower() == "close":
            writer.close()  # the back end is about to close: a closed connection is thrown away, not given back
    return status, body
