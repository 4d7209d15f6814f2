"""What psycopg_pool's users catch: its own errors where it is installed, else equals of the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests
else:
    try:
        from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests
    except ImportError:

        class PoolClosed(psycopg.OperationalError):
            """The pool is closed, or not open yet."""

        class PoolTimeout(psycopg.OperationalError):
            """No connection became free in time."""

        class TooManyRequests(psycopg.OperationalError):
            """Too many wait already."""


__all__ = ["PoolClosed", "PoolTimeout", "TooManyRequests"]
