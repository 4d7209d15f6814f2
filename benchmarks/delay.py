"""A network between the client and the server: a relay of our own that passes everything on a while later.

The kernel's own way, netem in a network namespace, is missing on many machines, and needs root. A relay is the same for
all contestants; its processor time, some 20 µs a message, is part of every figure.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from benchmarks.servers import HOST

_SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """A port that leads to another one of this host; every byte takes so many seconds more, each way."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_relay, args=(theirs, port, seconds), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join(5)
        ours.close()


def _relay(report: Connection, port: int, seconds: float) -> None:
    listener = socket.create_server((HOST, 0), backlog=128)
    report.send(listener.getsockname()[1])
    peers: dict[socket.socket, socket.socket] = {}
    due: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    clock = time.monotonic
    while True:
        left = max(0.0, due[0][0] - clock()) if due else None
        for sock in select.select([listener, *peers], [], [], left)[0]:  # epoll counts in milliseconds
            if sock is listener:
                near, _ = listener.accept()
                far = socket.create_connection((HOST, port))
                peers[near], peers[far] = far, near
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                data = b""
                with contextlib.suppress(OSError):
                    data = sock.recv(1 << 16)
                due.append((clock() + seconds, peers[sock], data))
                if not data:
                    del peers[sock]
        while due and due[0][0] <= clock():
            _, to, data = due.popleft()
            with contextlib.suppress(OSError):
                to.sendall(data) if data else to.shutdown(socket.SHUT_WR)
            if not data and to not in peers:  # the other way has ended, too
                to.close()
