"""A WSGI application whose workers share one pool of connections to a back end.

    BACKEND=127.0.0.1:8080 gunicorn --workers 8 examples.gunicorn_app:app

However many workers serve it, never more than MAX_CONNECTIONS connections to the back end are open: whoever needs one
while all are in use waits for its turn, over all workers, and takes over what another worker has left idle.

`GET /stats` shows the pool; every other path (without its query) is fetched from the back end. Never keep a connection
beyond its `with` block: it belongs to somebody else as soon as the block ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

import sharedpool

HOST, _, PORT = os.environ.get("BACKEND", "127.0.0.1:8080").rpartition(":")

# At import, once for all workers: no I/O happens here, so that this is right before the fork (--preload) and after it.
pool = sharedpool.attach("default", max_connections=int(os.environ.get("MAX_CONNECTIONS", "4")))

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], object]


def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Serve one request."""
    path = environ.get("PATH_INFO", "/")
    try:
        status, body = ("200 OK", show_stats()) if path == "/stats" else fetch(path)
    except sharedpool.PoolTimeout as exc:  # all connections in use for too long: the caller may try again
        status, body = "503 Service Unavailable", f"{exc}\n".encode()
    except (OSError, ProtocolError) as exc:  # the connection is closed by now: an exception never gives it back
        status, body = "502 Bad Gateway", f"{exc}\n".encode()
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def show_stats() -> bytes:
    """The whole pool's numbers, over all processes, and those of this worker."""
    numbers = {
        "pid": os.getpid(),
        "pool": dataclasses.asdict(pool.stats()),
        "worker": pool.worker_stats(),
    }
    return json.dumps(numbers, indent=2).encode() + b"\n"


def fetch(path: str, pool: sharedpool.Pool[socket.socket] = pool) -> tuple[str, bytes]:
    """GET a path from the back end over a connection of the pool."""
    with pool.connection(HOST, int(PORT)) as sock:
        sock.settimeout(10)
        sock.sendall(request_for(path))
        status, headers, body = read_response(sock)
        if headers.get("connection", "").lower() == "close":
            sock.close()  # the back end is about to close: a closed connection is thrown away, not given back
    return status, body


def request_for(path: str) -> bytes:
    """The bytes that ask for a path; servers give it decoded: it may contain anything, CR LF too."""
    target = quote(path, encoding="latin-1", errors="replace")
    return f"GET {target} HTTP/1.1\r\nHost: {HOST}:{PORT}\r\n\r\n".encode("ascii")


class ProtocolError(Exception):
    """The back end did not answer in the part of HTTP/1.1 that this example understands."""


def read_response(sock: socket.socket) -> tuple[str, dict[str, str], bytes]:
    """Read exactly one response: nothing of it may be left unread, and nothing beyond it may have come.

    Whatever else arrives raises; then the connection's `with` block ends in an exception, which closes it.
    """
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += receive(sock)
    status, headers, length = understand(bytes(received[:end]))
    total = end + 4 + length
    while len(received) < total:
        received += receive(sock)
    if len(received) > total:
        raise ProtocolError(f"{len(received) - total} bytes beyond the response")
    return status, headers, bytes(received[end + 4 :])


def understand(head: bytes) -> tuple[str, dict[str, str], int]:
    """The status, the headers and the length of the body, from a response's first lines."""
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = status_line.partition(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if version != "HTTP/1.1" or "content-length" not in headers or "transfer-encoding" in headers:
        raise ProtocolError(f"not understood: {status_line}")
    return status, headers, int(headers["content-length"])


def receive(sock: socket.socket) -> bytes:
    """Receive some bytes; the end of the stream is an error here."""
    data = sock.recv(65536)
    if not data:
        raise ProtocolError("the back end closed the connection within a response")
    return data
