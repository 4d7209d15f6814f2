"""An HTTP server of the awkward kind, in threads of the test; it knows what each of its connections has been told.

The first part of a path says how it answers:

    /plain/...    as it should
    /hints/...    103 before the answer, which comes a moment later
    /surplus/...  the answer, a byte too much with it, and a moment later a whole answer that nobody asked for
    /late/...     204, the beginning of a body with it, and a moment later its end
    /mail/...     as it should, for whoever the connection belongs to

A connection belongs to the first that logs in on it with `Authorization: NTLM USER`; from then on all that is asked
there is answered as that one's, whatever it says. An answer tells its path and whose the connection is.
"""

from __future__ import annotations

import select
import socket
import threading
from dataclasses import dataclass
from typing import Self

POISON = "nobody asked for this"
#: Seconds that a moment takes, unless the next request is there before.
_MOMENT = 0.05


@dataclass(frozen=True)
class Served:
    """A request, who sent it, and whose its connection was then."""

    path: str
    sender: str | None
    login: str | None
    connection: int


class Awkward:
    """The running server.

    Attributes:
        served: All requests.
        peak: The most connections that there were at once.
    """

    def __init__(self) -> None:
        self.served: list[Served] = []
        self.peak = self.accepted = 0
        self._open: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def open(self) -> int:
        return len(self._open)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        with self._lock:
            for conn in self._open.values():
                conn.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                self._open[self.accepted] = conn
                self.peak = max(self.peak, len(self._open))
                thread = threading.Thread(target=self._serve, args=(conn, self.accepted))
                self._threads.append(thread)
            thread.start()

    def _serve(self, conn: socket.socket, number: int) -> None:
        login = None
        try:
            with conn.makefile("rb") as lines:
                while (asked := _read_request(lines)) is not None:
                    path, sender = asked
                    login = login or sender
                    self.served.append(Served(path, sender, login, number))
                    _answer(conn, path, login)
        except OSError:
            pass
        finally:
            with self._lock:
                del self._open[number]
                conn.close()


def _read_request(lines: object) -> tuple[str, str | None] | None:
    """The next request's path, and who logs in with it; None at the end."""
    readline = lines.readline  # type: ignore[attr-defined]
    first, sender = readline().decode().split(), None
    while (line := readline().decode()) not in ("\r\n", ""):
        name, _, value = line.partition(":")
        if name.lower() == "authorization":
            sender = value.split()[1]
    return (first[1], sender) if first else None


def _answer(conn: socket.socket, path: str, login: str | None) -> None:
    right = _whole(f"{path} as {login}")
    match path.split("/")[1]:
        case "hints":
            conn.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n")
            _wait_a_moment(conn)
            conn.sendall(right)
        case "surplus":
            conn.sendall(right + b"\n")
            _wait_a_moment(conn)
            conn.sendall(_whole(POISON))
        case "late":
            conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\nthe body ")
            _wait_a_moment(conn)
            conn.sendall(f"of {path}".encode())
        case _:
            conn.sendall(right)


def _whole(text: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()


def _wait_a_moment(conn: socket.socket) -> None:
    select.select([conn], [], [], _MOMENT)
