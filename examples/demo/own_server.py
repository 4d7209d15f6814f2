"""A small HTTP/1.1 server with keep-alive that counts its connections exactly, for machines without nginx.

python -m examples.demo.own_server PORT LOG MILLISECONDS
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import signal
import sys
from typing import IO

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 15\r\n\r\nhello from here"


class Server:
    """What all connections share: the count, the log, the time an answer takes."""

    def __init__(self, log: IO[str], seconds: float) -> None:
        self.log, self.seconds = log, seconds
        self.active = 0
        self.numbers = itertools.count(1)


class Connection(asyncio.Protocol):
    """One connection: requests without a body, one after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.number = next(server.numbers)
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server.active += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.active -= 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            _, _, self.received = self.received.partition(b"\r\n\r\n")
            self.server.log.write(f"{self.number} {self.server.active}\n")
            asyncio.get_running_loop().call_later(self.server.seconds, self.transport.write, ANSWER)


async def serve(port: int, log: IO[str], milliseconds: int) -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    factory = functools.partial(Connection, Server(log, milliseconds / 1000))
    server = await loop.create_server(factory, "127.0.0.1", port)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    with open(sys.argv[2], "a", buffering=1) as output:
        asyncio.run(serve(int(sys.argv[1]), output, int(sys.argv[3])))
