"""Celery's result backend over a shared pool (extras `redis` and Celery's own).

    result_backend = "sharedpool.integrations.redis.celery:SharedBackend+redis://10.0.0.5/1?pool=results&max_connections=10"

Workers and clients of the host share its connections. While somebody waits for a result, he has one of them for
Celery's pub/sub. `redis_max_connections` is the cap over all processes, where the URL says none.
"""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend

from .pool import SharedConnectionPool


class SharedBackend(RedisBackend):  # type: ignore[misc]
    """`celery.backends.redis.RedisBackend`, but for its pool."""

    def _get_pool(self, **params: Any) -> SharedConnectionPool:
        return SharedConnectionPool(**params)
