"""PostgreSQL sessions that move between processes, for psycopg 3 and psycopg2; pools shaped like psycopg_pool's.

`ConnectionPool` and `AsyncConnectionPool` are loaded at their first use, because they need psycopg 3;
`sharedpool.postgres.psycopg3` and `sharedpool.postgres.psycopg2` have the drivers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .asyncpool import AsyncConnectionPool
    from .errors import PoolClosed, PoolTimeout, TooManyRequests
    from .pool import ConnectionPool
    from .psycopg2 import Psycopg2Driver
    from .psycopg3 import Psycopg3Driver
    from .sessions import sessions_that_stay

__all__ = [
    "AsyncConnectionPool", "ConnectionPool", "PoolClosed", "PoolTimeout", "Psycopg2Driver", "Psycopg3Driver",
    "TooManyRequests", "sessions_that_stay",
]  # fmt: skip

_WHERE = {
    "AsyncConnectionPool": "asyncpool", "ConnectionPool": "pool", "PoolClosed": "errors", "PoolTimeout": "errors",
    "Psycopg2Driver": "psycopg2", "Psycopg3Driver": "psycopg3", "TooManyRequests": "errors",
    "sessions_that_stay": "sessions",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
