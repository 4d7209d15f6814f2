"""PostgreSQL's wire: how a session is relayed to a library at its start, noted, started again elsewhere, and cancelled.

Nothing here knows a client library, so the arbiter can load it. What is noted of a session are messages of the server:
ParameterStatus and BackendKeyData, one after the other, and for a Unix socket the path that led to it. Formats: the
PostgreSQL documentation, "Frontend/Backend Protocol", "Message Formats".
"""

from __future__ import annotations

import errno
import functools
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, Final

from ..errors import ConnectFailed, ConnectTimeout, file_limit
from . import Register, aborts
from .sockets import connect_unix

NAME: Final = "postgres"

_CHUNK: Final = 1 << 16
_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)
_CANCEL_REQUEST: Final = 80877102
_AUTHENTICATION_OK: Final = b"R" + struct.pack("!ii", 8, 0)
_READY: Final = b"Z" + struct.pack("!i", 5) + b"I"
#: The type of a message that no server sends: the path of the Unix socket that a session was opened by. The kernel
#: knows only the server's own path, which is another one where a volume or a symbolic link leads there.
_PATH: Final = b"@"
#: Authentication requests that name the server's host: GSSAPI and SSPI.
_BY_HOST: Final = (7, 9)
#: struct ucred.
_CREDENTIALS: Final = struct.Struct("3i")
#: A server that does not take a CancelRequest in so many seconds does not heed it.
_CANCEL: Final = 1.0


class CannotMove(Exception):
    """This session cannot be relayed, for the reason that is its text; it is opened by the library itself."""


def messages(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The type and the body of each of the server's messages; ValueError or struct.error if they are none."""
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from("!ci", data, at)
        if length < 4:  # it counts itself
            raise ValueError(f"a message of PostgreSQL with a length of {length}")
        yield kind, data[at + 5 : at + 1 + length]
        at += 1 + length


def parameters(state: bytes) -> dict[bytes, bytes]:
    """What the server has reported of a session, by name."""
    found = {}
    for kind, body in messages(state):
        if kind == b"S":
            name, value, _ = body.split(b"\0")
            found[name] = value
    return found


def backend_key(state: bytes) -> bytes:
    """The process number and the secret that a CancelRequest needs; empty where the server gave none."""
    return next((body for kind, body in messages(state) if kind == b"K"), b"")


def with_key(key: bytes, path: bytes = b"") -> bytes:
    """What is needed to cancel a session: its key, as in a BackendKeyData message, and its Unix socket's path."""
    return with_path(b"K" + struct.pack("!i", 4 + len(key)) + key, path)


def with_path(state: bytes, path: bytes) -> bytes:
    """The state of a session that was opened by a Unix socket; its path is "" for TCP."""
    return state + _PATH + struct.pack("!i", 4 + len(path)) + path if path else state


def path_of(state: bytes) -> bytes:
    """The path of the Unix socket that a session was opened by; empty for TCP."""
    return next((body for kind, body in messages(state) if kind == _PATH), b"")


def cancel(peer: Any, family: int, state: bytes, seconds: float = _CANCEL) -> None:
    """Ask the server to cancel what a session is doing, and wait until it has taken note.

    Raises:
        OSError: It cannot be reached, or did not take it in time.
    """
    key = backend_key(state)
    if not key:
        return
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        sock.connect(path_of(state) or peer)
        sock.sendall(struct.pack("!ii", 8 + len(key), _CANCEL_REQUEST) + key)
        sock.recv(1)  # it says nothing, and closes


aborts[NAME] = cancel


class Door:
    """A place of this process alone where a library connects to, once: a name in the abstract namespace.

    Others on this machine can see the name while it is there, and connect: only a connection of this very process is
    let in.
    """

    #: A name like any door's.
    SAMPLE: Final = f"@sharedpool-{'0' * 32}"

    def __init__(self) -> None:
        self.name = f"@sharedpool-{os.urandom(16).hex()}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.bind(f"\0{self.name[1:]}/.s.PGSQL.5432")
            self._sock.listen(8)
        except BaseException:
            self._sock.close()
            raise

    def accept(self, until: float) -> socket.socket:
        """This process's connection.

        Raises:
            TimeoutError: It has not come until then (monotonic seconds).
        """
        self._sock.setblocking(False)  # it is there already, as a rule
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                self._sock.settimeout(max(0.001, until - time.monotonic()))
                continue
            pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            if pid == os.getpid():
                return sock
            sock.close()

    def close(self) -> None:
        """Nobody connects there any more."""
        self._sock.close()


class Relay:
    """Passes bytes between a library's connection and the server's until the session is ready, and notes what matters.

    Args:
        far: The server's connection.
        state: A session that is there already: it is told to the library, instead of being begun.
        path: The path of the Unix socket that led to the server.
    """

    def __init__(self, far: socket.socket, state: bytes = b"", path: bytes = b"") -> None:
        self.far = far
        self.near: socket.socket | None = None
        self._state = state
        self._path = path
        self._said = bytearray()
        self._begun = not state
        self._parameters: dict[bytes, bytes] = {}
        self._key = b""

    def state(self) -> bytes:
        """What the server said until the session was ready, and where it was found."""
        return self._state

    def step(self, until: float, stop: int = -1) -> bool:
        """Wait for bytes from either side and pass them on; False if the descriptor `stop` is readable instead.

        Raises:
            TimeoutError: Nothing came until then (monotonic seconds).
            EOFError: One side has closed.
            CannotMove: The server wants what a relay cannot give.
        """
        near = self.near
        assert near is not None
        poll = select.poll()
        poll.register(near, select.POLLIN)
        poll.register(self.far, select.POLLIN)
        if stop >= 0:
            poll.register(stop, select.POLLIN)
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        if not ready:
            raise TimeoutError
        for number, _ in ready:
            if number == stop:
                return False
            elif number == near.fileno():
                self._from_library(near, until)
            else:
                self._from_server(near, until)
        return True

    def _from_library(self, near: socket.socket, until: float) -> None:
        data = near.recv(_CHUNK)
        if not data:
            raise EOFError
        if self._begun:
            _send(self.far, data, until)
            return
        self._said += data
        if len(self._said) >= 4 and len(self._said) >= struct.unpack_from("!i", self._said)[0]:
            self._begun = True
            self._said.clear()
            _send(near, _told(self._state), until)

    def _from_server(self, near: socket.socket, until: float) -> None:
        data = self.far.recv(_CHUNK)
        if not data:
            near.shutdown(socket.SHUT_WR)
            raise EOFError
        self._note(data)
        _send(near, data, until)

    def _note(self, data: bytes) -> None:
        self._said += data
        while len(self._said) >= 5:
            kind, length = struct.unpack_from("!ci", self._said)
            if len(self._said) < 1 + length:
                return
            message = bytes(self._said[: 1 + length])
            del self._said[: 1 + length]
            if kind == b"S":
                self._parameters[message[5:].split(b"\0")[0]] = message
            elif kind == b"K":
                self._key = message
            elif kind == b"Z" and not self._state:
                self._state = with_path(b"".join(self._parameters.values()) + self._key, self._path)
            elif kind == b"R" and struct.unpack_from("!i", message, 5)[0] in _BY_HOST:
                raise CannotMove("the server asks for GSSAPI or SSPI, which are about its host's name")


def hear(near: socket.socket, until: float) -> None:
    """Wait until a library has asked for a session, whatever it asks for.

    Raises:
        TimeoutError: Nothing came until then (monotonic seconds).
        EOFError: It has closed.
    """
    said = b""
    while len(said) < 4 or len(said) < struct.unpack_from("!i", said)[0]:
        try:
            data = near.recv(_CHUNK, _AT_ONCE)
        except BlockingIOError:
            near.settimeout(max(0.001, until - time.monotonic()))
            data = near.recv(_CHUNK)
        if not data:
            raise EOFError
        said += data


def tell(near: socket.socket, state: bytes, until: float) -> None:
    """Tell a library that has asked of a session that is there already; no word goes to the server, and no more comes.

    Args:
        near: The other end of the library's connection.
        state: What the server said at the session's start.
        until: When to give up, monotonic seconds.

    Raises:
        TimeoutError: The library does not read it.
    """
    told = _told(state)
    try:
        sent = near.send(told, _AT_ONCE)
    except BlockingIOError:
        sent = 0
    if sent < len(told):
        _send(near, told[sent:], until)
    near.shutdown(socket.SHUT_WR)  # a library that wants to hear more than that fails, and does not wait for it


@functools.lru_cache(64)
def _told(state: bytes) -> bytes:
    """What a library hears of a session that is there already.

    Its key has the 4 bytes that every version of the protocol knows: cancelling goes its own way.
    """
    told = b"".join(
        kind + struct.pack("!i", 4 + len(body)) + body
        for kind, body in ((k, b[:8] if k == b"K" else b) for k, b in messages(state) if k != _PATH)
    )
    return _AUTHENTICATION_OK + told + _READY


def _send(sock: socket.socket, data: bytes, until: float) -> None:
    sock.settimeout(max(0.001, until - time.monotonic()))
    sock.sendall(data)


class Server:
    """Where a server is, and how its connections are set up.

    Args:
        host: A name or an address; a directory (or @name) of a Unix socket.
        hostaddr: An address instead of the host's; or "".
        port: The port.
        asks_tls: Whether to ask the server for TLS, as a library would.
        sockopts: (level, option, value) of a TCP connection.
    """

    def __init__(
        self, host: str, hostaddr: str, port: int, *, asks_tls: bool = False,
        sockopts: tuple[tuple[int, int, int], ...] = (),
    ) -> None:  # fmt: skip
        self.host = host
        self.hostaddr = hostaddr
        self.port = port
        self.asks_tls = asks_tls
        self.sockopts = sockopts

    def __str__(self) -> str:
        """As libpq's messages name it."""
        if self.is_unix:
            return f'server on socket "{self.host}/.s.PGSQL.{self.port}"'
        return f'server at "{self.hostaddr or self.host}", port {self.port}'

    @property
    def is_unix(self) -> bool:
        """Whether the host is a place in the file system, or an abstract one."""
        return not self.hostaddr and self.host[:1] in ("/", "@")

    @property
    def path(self) -> bytes:
        """The path of its Unix socket; empty for TCP."""
        if not self.is_unix:
            return b""
        path = os.fsencode(f"{self.host}/.s.PGSQL.{self.port}")
        return b"\0" + path[1:] if path[:1] == b"@" else path

    def _addresses(self) -> list[tuple[int, Any]]:
        if self.is_unix:
            return [(socket.AF_UNIX, self.path)]
        flags = socket.AI_NUMERICHOST if self.hostaddr else 0
        try:
            found = socket.getaddrinfo(self.hostaddr or self.host, self.port, type=socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(f"connection to {self} failed: its name cannot be resolved: {error}") from error
        return [(family, address) for family, _, _, _, address in found]

    def connect(self, until: float, register: Register) -> socket.socket:
        """A connection to the server, before any word of a session.

        Raises:
            ConnectFailed, ConnectTimeout: The server cannot be reached.
            CannotMove: It speaks TLS.
        """
        last: ConnectFailed | ConnectTimeout = ConnectFailed(f"connection to {self} failed: it has no address")
        for family, address in self._addresses():
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                raise file_limit(error, f"connect to {self}") from error
            try:
                self._set_up(sock)
                register(sock)
                _connect(sock, address, until)
                if self.asks_tls and not self.is_unix:
                    self._ask_for_tls(sock)
                return sock
            except (ConnectFailed, CannotMove):
                sock.close()
                raise
            except TimeoutError as error:
                sock.close()
                last = ConnectTimeout(f"connection to {self} failed: it did not answer in time")
                last.__cause__ = error
            except OSError as error:
                sock.close()
                last = ConnectFailed(f"connection to {self} failed: {os.strerror(error.errno or errno.EIO)}")
                last.__cause__ = error
            except BaseException:
                sock.close()
                raise
        raise last

    def _set_up(self, sock: socket.socket) -> None:
        if not self.is_unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for level, option, value in self.sockopts:
                sock.setsockopt(level, option, value)

    def _ask_for_tls(self, sock: socket.socket) -> None:
        sock.sendall(_SSL_REQUEST)
        answer = sock.recv(1)
        if answer == b"S":
            raise CannotMove("the server speaks TLS, which sslmode=prefer takes; sslmode=disable lets sessions move")
        if answer != b"N":
            raise ConnectFailed(f"connection to {self} failed: it answered {answer!r} to the question for TLS")


def _connect(sock: socket.socket, address: Any, until: float) -> None:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    if sock.family == socket.AF_UNIX:
        connect_unix(sock, address, left)
    else:
        sock.settimeout(left)
        sock.connect(address)
    sock.settimeout(max(0.001, until - time.monotonic()))
