"""A server that answers with exactly the bytes that a test wants, and knows on which connection it was asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.support.waiting import wait_until


class Talk:
    """One connection of the server.

    Attributes:
        number: Its number, from 1.
        later: What is sent before the answer to the next request.
        user: Who has logged in on it.
    """

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.number = number
        self.later = b""
        self.user = ""
        self._sock = sock
        self._file = sock.makefile("rb")

    def request(self) -> tuple[str, dict[str, str]]:
        """The path and the fields of the next request; its body is not read. ConnectionError at the end."""
        line = self._file.readline().decode().split()
        if len(line) != 3:
            raise ConnectionResetError
        fields = {}
        while (field := self._file.readline().decode("latin-1").strip()) != "":
            name, _, value = field.partition(":")
            fields[name.lower()] = value.strip()
        return line[1], fields

    def read(self, number: int) -> None:
        """So many bytes of a body."""
        self._file.read(number)

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def finish(self) -> None:
        """Nothing more comes."""
        self._sock.shutdown(socket.SHUT_WR)


class Scripted:
    """A running one.

    Args:
        answer: Called with the connection, the path and the fields of each request.
    """

    def __init__(self, answer: Callable[[Talk, str, dict[str, str]], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, name="scripted")]
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @property
    def open(self) -> int:
        """How many connections there are now."""
        with self._lock:
            return len(self._open)

    def wait_open(self, number: int) -> None:
        wait_until(lambda: self.open == number, what=f"the server has {number} connections")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with self._lock:
                    self.accepted += 1
                    self._open.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock, self.accepted), name="scripted")
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        talk = Talk(sock, number)
        with contextlib.suppress(OSError, ValueError):
            while True:
                path, fields = talk.request()
                later, talk.later = talk.later, b""
                talk.send(later)
                self._answer(talk, path, fields)
        with self._lock:
            self._open.remove(sock)
        talk._file.close()
        sock.close()
