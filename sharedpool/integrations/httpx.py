"""Transports for httpx: their requests lease connections from a pool that all workers share.

`client = httpx.Client(transport=SharedTransport("api", max_connections=20))`
"""

from __future__ import annotations

import httpcore
import httpx

from ..http1 import AsyncBody, AsyncTransport, Library, SyncBody, SyncTransport

__all__ = ["AsyncSharedTransport", "SharedTransport"]

_LIBRARY = Library(httpx, httpcore)


class _Body(SyncBody, httpx.SyncByteStream):
    """A response's stream."""


class _AsyncBody(AsyncBody, httpx.AsyncByteStream):
    """A response's stream."""


class SharedTransport(SyncTransport, httpx.BaseTransport):
    """`httpx.Client(transport=SharedTransport("api", max_connections=20))`; arguments as for SyncTransport.

    Threads may share it. Made before a fork, it attaches anew in each child; responses that are open then are the
    parent's.
    """

    library = _LIBRARY
    body = _Body


class AsyncSharedTransport(AsyncTransport, httpx.AsyncBaseTransport):
    """The same for `httpx.AsyncClient`, under asyncio; tasks and loops may share it."""

    library = _LIBRARY
    body = _AsyncBody
