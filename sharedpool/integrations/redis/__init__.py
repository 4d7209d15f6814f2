"""redis-py (extra `redis`): its connections, shared by all processes of the host under one cap.

    client = redis.Redis(connection_pool=SharedConnectionPool("cache", max_connections=20, host="10.0.0.5"))
    client = redis.Redis(connection_pool=SharedConnectionPool.from_url("redis://10.0.0.5/0?pool=cache&max_connections=20"))

`sharedpool.integrations.redis.asyncio` has the pool for redis.asyncio, `.celery` Celery's result backend; Django's
cache takes `SharedConnectionPool` as its OPTIONS["pool_class"].
"""

from .pool import SharedConnectionPool

__all__ = ["SharedConnectionPool"]
