"""The same application for uvicorn: several workers, each an interpreter of its own, share one pool.

    BACKEND=127.0.0.1:8080 uvicorn --workers 2 examples.fastapi_app:app

The endpoints are `def`, not `async def`: FastAPI runs them in threads, where waiting for a connection blocks no loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import fastapi

import sharedpool
from examples.gunicorn_app import ProtocolError, fetch, pool, show_stats


@contextlib.asynccontextmanager
async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
    """A worker leaves the pool when it has served its last request; it attaches by itself, at its first."""
    with pool:
        yield


app = fastapi.FastAPI(lifespan=lifespan)


@app.get("/stats")
def stats() -> fastapi.Response:
    """The pool's numbers."""
    return fastapi.Response(show_stats(), media_type="application/json")


@app.get("/{path:path}")
def page(path: str) -> fastapi.Response:
    """Fetch a path from the back end."""
    try:
        status, body = fetch("/" + path)
    except sharedpool.PoolTimeout as error:
        return fastapi.Response(f"{error}\n", 503)
    except (OSError, ProtocolError) as error:
        return fastapi.Response(f"{error}\n", 502)
    return fastapi.Response(body, int(status.split()[0]))
