"""Transports for httpx2: their requests lease connections from a pool that all workers share.

`client = httpx2.Client(transport=SharedTransport("api", max_connections=20))`
"""

from __future__ import annotations

import httpcore2
import httpx2

from ..http1 import AsyncBody, AsyncTransport, Library, SyncBody, SyncTransport

__all__ = ["AsyncSharedTransport", "SharedTransport"]

_LIBRARY = Library(httpx2, httpcore2)


class _Body(SyncBody, httpx2.SyncByteStream):
    """A response's stream."""


class _AsyncBody(AsyncBody, httpx2.AsyncByteStream):
    """A response's stream."""


class SharedTransport(SyncTransport, httpx2.BaseTransport):
    """`httpx2.Client(transport=SharedTransport("api", max_connections=20))`; arguments as for SyncTransport.

    Threads may share it. Made before a fork, it attaches anew in each child; responses that are open then are the
    parent's.
    """

    library = _LIBRARY
    body = _Body


class AsyncSharedTransport(AsyncTransport, httpx2.AsyncBaseTransport):
    """The same for `httpx2.AsyncClient`, under asyncio; tasks and loops may share it."""

    library = _LIBRARY
    body = _AsyncBody
