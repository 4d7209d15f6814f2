"""A TLS server of our own that counts its connections, and certificates for it, good and bad."""

from __future__ import annotations

import contextlib
import datetime
import queue
import select
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trustme

from tests.support.backend import Target
from tests.support.waiting import DEADLINE, wait_until

NAME = "api.test"


class Authority:
    """A certificate authority, and what it has issued; its own certificate is in `file`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self.file = str(directory / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.file)

    def server_context(self, *names: str, expired: bool = False, asks: bool = False) -> ssl.SSLContext:
        """For a server with a certificate for these names; `asks`: clients need one of this authority, too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        self._ca.issue_cert(*names, **({"not_after": past} if expired else {})).configure_cert(context)
        if asks:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self, name: str) -> str:
        """A file with a client's certificate and its key."""
        path = self._directory / f"{name}.pem"
        self._ca.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(path))
        return str(path)


class _Connection:
    def __init__(self, number: int, sock: ssl.SSLSocket) -> None:
        self.number = number
        self.sock = sock
        self.shaken = False
        self.line = b""


class TlsServer:
    """Answers every line as the counting back end does: its connection's number, a blank, the line.

    A line `!bytes N` is answered by so many bytes and the end of the line. One thread serves all.

    Attributes:
        open: How many connections there are; `peak` at most, `accepted` in all, `shaken` with a finished handshake.
        ends: How they ended: "said" (close_notify), "unsaid", or "failed".
        resumed: Whether each, in the order of their handshakes, resumed an earlier session.
        peers: The names in the clients' certificates.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._bell, self._ring = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._connections: dict[int, _Connection] = {}
        self.accepted = self.peak = self.shaken = 0
        self.ends: list[str] = []
        self.resumed: list[bool] = []
        self.peers: list[Any] = []
        self._over = False
        self._thread = threading.Thread(target=self._serve, name="tls-server")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._end)
        self._thread.join()
        self._selector.close()
        for sock in (self._listener, self._bell, self._ring):
            sock.close()

    @property
    def open(self) -> int:
        return len(self._connections)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def target(self, host: str = "127.0.0.1") -> Target:
        return Target(host, self.port, "ssl")

    def say(self, data: bytes) -> None:
        """Send something that nobody asked for over every connection, and see that it has been sent."""
        self._do(lambda: [self._send(each, data) for each in list(self._connections.values())])

    def wait_open(self, number: int) -> None:
        wait_until(lambda: self.open == number, what=f"the TLS server has {number} connections")

    def _do(self, work: Callable[[], Any]) -> None:
        done = threading.Event()

        def act() -> None:
            work()
            done.set()

        self._work.put(act)
        self._ring.send(b"!")
        assert done.wait(DEADLINE)

    def _end(self) -> None:
        self._over = True
        for each in list(self._connections.values()):
            self._close(each, "over")

    def _serve(self) -> None:
        while not self._over:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._bell:
                    for _ in self._bell.recv(100):
                        self._work.get()()
                elif key.data.number in self._connections:
                    self._attend(key.data)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            plain, _ = self._listener.accept()
            plain.setblocking(False)
            sock = self._context.wrap_socket(
                plain, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
            self.accepted += 1
            connection = self._connections[self.accepted] = _Connection(self.accepted, sock)
            self.peak = max(self.peak, self.open)
            self._selector.register(sock, selectors.EVENT_READ, connection)

    def _attend(self, each: _Connection) -> None:
        try:
            if not each.shaken:
                each.sock.do_handshake()
                each.shaken = True
                self.shaken += 1
                self.resumed.append(bool(each.sock.session_reused))
                self.peers.append(each.sock.getpeercert())
            while data := each.sock.recv(65536):
                each.line += data
                while b"\n" in each.line:
                    line, _, each.line = each.line.partition(b"\n")
                    self._send(each, self._answer(each, line))
            self._close(each, "said")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLEOFError:
            self._close(each, "unsaid")
        except OSError as error:
            self._close(each, f"failed: {error}")

    def _answer(self, each: _Connection, line: bytes) -> bytes:
        if line.startswith(b"!bytes "):
            return b"x" * int(line.split()[1]) + b"\n"
        return b"%d %s\n" % (each.number, line)

    def _send(self, each: _Connection, data: bytes) -> None:
        while data:
            try:
                data = data[each.sock.send(data) :]
            except ssl.SSLWantWriteError:
                select.select([], [each.sock], [], DEADLINE)

    def _close(self, each: _Connection, how: str) -> None:
        self.ends.append(how)
        self._selector.unregister(each.sock)
        each.sock.close()
        del self._connections[each.number]
