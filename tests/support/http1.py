"""A small HTTP/1.1 server in a thread, over TLS or not, that counts its connections and does as the path says.

`/number` answers its connection's number; `/chunked` and `/large` the same, in chunks, or with a megabyte behind it; a
POST to `/length` is answered by its body's length; `/close` says `Connection: close`; `/drop` ends without an answer;
`/extra` has an answer that nobody asked for behind its own; `/slowly` sends the head and a half of the body;
`/never` nothing; `/switch` 101, and then echoes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from types import TracebackType
from typing import Self

from tests.support.waiting import wait_until

MEGABYTE = 1 << 20


class HttpServer:
    """A running one; `url` is where."""

    def __init__(self, context: ssl.SSLContext | None = None, name: str = "127.0.0.1", path: str = "") -> None:
        self.path = path
        self._context = context
        self._name = name
        self.open = self.peak = self.accepted = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="http-server")
        self._thread.start()
        self._ready.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"{'http' if self._context is None else 'https'}://{self._name}:{self.port}"

    def wait_open(self, number: int) -> None:
        wait_until(lambda: self.open == number, what=f"the server has {number} connections")

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        if self.path:
            server: asyncio.Server = await asyncio.start_unix_server(self._connected, self.path)
        else:
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._context)
            self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._over.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open += 1
        self.accepted += 1
        self.peak = max(self.peak, self.open)
        number = self.accepted
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                while await self._answer(number, reader, writer):
                    pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether another one may follow."""
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode().rpartition("/")[2]
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = len(await reader.readexactly(int(line.split()[1])))
            elif line == b"transfer-encoding: chunked":
                while size := int(await reader.readline(), 16):
                    length += len(await reader.readexactly(size + 2)) - 2
                await reader.readline()
        body = b"%d" % (length if path == "length" else number)
        if path == "large":
            body += b" " * MEGABYTE
        sized = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        answers = {
            "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n1\r\n \r\n0\r\n\r\n"
            % (len(body), body),
            "close": sized.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"),
            "extra": sized + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen",
            "slowly": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500,
            "switch": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n",
            "never": b"",
            "drop": b"",
        }
        writer.write(answers.get(path, sized))
        await writer.drain()
        if path in ("never", "slowly"):
            await reader.read(1)
        while path == "switch" and (data := await reader.read(100)):
            writer.write(data)
        return path not in ("close", "drop", "never", "slowly", "switch")
