"""The driver: redis-py opens and greets, the descriptor moves.

A connection is opened by redis-py itself (its handshake: HELLO, AUTH, CLIENT SETNAME, CLIENT SETINFO, SELECT), on a
socket that was registered before it connected. What another process needs to go on is what the server said in its
greeting; nothing is said again. TLS is the process's own, so those connections stay where they were opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import redis
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection

from ...drivers import Register
from ...drivers import find as driver_named
from ...drivers.sockets import TIMED, Pooled, PooledSocket, fresh
from ...errors import ConnectFailed, ConnectTimeout, OptionError
from .session import Session

#: Of a greeting (the answer to HELLO) what redis-py's users may want to know.
_GREETING: Final = ("server", "version", "proto", "id", "mode", "role")
#: What a client alone needs, or what must not be there on a shared connection.
_OF_THE_CLIENT: Final = ("retry", "retry_on_error", "retry_on_timeout", "health_check_interval", "event_dispatcher")


class RedisDriver:
    """How connections with these arguments are opened; `sharedpool.drivers.Driver` for Session.

    Args:
        connection_class: redis-py's class, or one of your own below it.
        arguments: Its keywords.

    Attributes:
        host: The key: who, where to, which database, and what else the handshake sets; never a password.
        port: 0.
    """

    connects = True
    port = 0

    def __init__(self, connection_class: type[Any], arguments: Mapping[str, Any]) -> None:
        self._arguments = {name: value for name, value in arguments.items() if name not in _OF_THE_CLIENT}
        self.tls = issubclass(connection_class, SSLConnection)
        self.moves = self.parks = not self.tls
        kind = UnixDomainSocketConnection if issubclass(connection_class, UnixDomainSocketConnection) else Connection
        if not issubclass(connection_class, kind):
            raise OptionError(
                f"option 'connection_class' has the value {connection_class!r} (from the call); allowed is"
                " redis-py's Connection, SSLConnection or UnixDomainSocketConnection, or a subclass",
                option="connection_class", value=connection_class, source="the call", allowed="a subclass",
            )  # fmt: skip
        self._unix = kind is UnixDomainSocketConnection
        self.name = "rediss" if self.tls else "redis+unix" if self._unix else "redis"
        self._class: type[Any] = type(connection_class.__name__, (_Opening, connection_class), {})
        sample = connection_class(**self._arguments)  # checks the arguments, at once
        self.connect_timeout: float | None = sample.socket_connect_timeout
        self.host = self._key(sample)

    def _key(self, sample: Any) -> str:
        """Equal keys share: everything that the handshake sets, but no secret."""
        asked = self._arguments.get("redis_connect_func")
        more = {
            "protocol": sample.protocol, "name": sample.client_name,
            "connect": asked and f"{getattr(asked, '__module__', '')}.{getattr(asked, '__qualname__', asked)}",
            "tls": self._tls_of(sample) if self.tls else None,
        }  # fmt: skip
        where = quote(sample.path) if self._unix else f"{sample.host}:{sample.port}"
        who = f"{quote(self._user(sample), '()')}@" if self._user(sample) else ""
        extra = "&".join(f"{name}={quote(str(value), '.<>')}" for name, value in more.items() if value)
        return f"{who}{where}/{sample.db}?{extra}"

    def _user(self, sample: Any) -> str:
        provider = sample.credential_provider
        if provider is not None:
            kind = type(provider)
            return f"{getattr(provider, 'username', None) or ''}({kind.__module__}.{kind.__qualname__})"
        return str(sample.username or "")

    def _tls_of(self, sample: Any) -> str:
        """What else decides who the peer must be; a hash, because paths and certificates are long."""
        said = {n: v for n, v in self._arguments.items() if n.startswith("ssl_") and n != "ssl_password"}
        return hashlib.blake2b(repr(sorted(said.items())).encode(), digest_size=4).hexdigest()

    def address(self, host: str, port: int) -> tuple[str, int]:
        """As it is."""
        return host, port

    # --- opening ------------------------------------------------------------------------------------------------------

    def open(self, host: str, port: int, timeout: float, register: Register) -> Session:
        """Connect and greet.

        Raises:
            ConnectFailed, ConnectTimeout: The server cannot be reached, or does not answer.
            redis.RedisError: It refuses: a wrong password, no such database.
        """
        conn = self._class(**self._arguments)
        conn._begin(register, time.monotonic() + timeout)
        try:
            conn.connect_check_health(check_health=False, retry_socket_connect=False)
            if conn.can_read(0):
                raise redis.ConnectionError("the server says more than it was asked")
        except redis.RedisError as error:
            conn.disconnect()
            failed = conn._sharedpool_failed
            if failed is not None:
                raise type(failed)(str(failed)) from error
            if isinstance(error, redis.TimeoutError):
                raise ConnectTimeout(
                    f"{self.name}:{host} did not finish its handshake within {timeout:.3g} s (connect_timeout)"
                ) from error
            raise
        except BaseException:
            conn.disconnect()
            raise
        greeting = conn.handshake_metadata or {}
        said = {_str(name): _str(value) for name, value in greeting.items()}
        state = json.dumps({name: said[name] for name in _GREETING if name in said}).encode()
        sock, conn._sock = conn._sock, None
        conn._parser.on_disconnect()
        return self._made(sock, None if self.tls else state)

    def _made(self, sock: socket.socket, state: bytes | None) -> Session:
        if isinstance(sock, PooledSocket):
            sock.rest()
        return Session(sock, state)

    def export(self, conn: Session) -> bytes | None:
        """What the server said in its greeting; None for TLS, which stays."""
        return conn.state

    def adopt(self, descriptor: int, state: bytes) -> Session:
        """The same connection in another process; nothing is said to the server."""
        return self._made(fresh(fileno=descriptor), state)

    # --- leases -------------------------------------------------------------------------------------------------------

    def fileno(self, conn: Session) -> int:
        """The socket's."""
        return conn.fileno()

    def clean(self, conn: Session) -> bool:
        """Every answer was read, no transaction is open, and the state is that of the handshake; of the socket, too."""
        sock = conn.sock
        return conn.clean and (not isinstance(sock, Pooled) or not sock._touched & ~TIMED or sock.clean(timeouts=False))

    def check(self, conn: Session) -> bool:
        """Whether the server answers a PING."""
        conn.sock.settimeout(self.connect_timeout)
        conn.timed = conn
        conn.sock.sendall(b"*1\r\n$4\r\nPING\r\n")
        return conn.sock.recv(64) == b"+PONG\r\n"

    def close(self, conn: Session) -> None:
        """Close the socket; redis-py's object may connect again, with another lease."""
        user, conn.user = conn.user, None
        if user is not None:
            user.lost(conn)
        with contextlib.suppress(OSError):
            conn.sock.close()


class _Opening:
    """Before redis-py's class: it connects on a registered socket, within what is left of the time."""

    _sharedpool_register: Register
    _sharedpool_until: float
    _sharedpool_failed: ConnectFailed | ConnectTimeout | None = None

    def _begin(self, register: Register, until: float) -> None:
        self._sharedpool_register = register
        self._sharedpool_until = until

    def _left(self) -> float:
        return max(0.001, self._sharedpool_until - time.monotonic())

    def _connect(self) -> Any:
        this: Any = self
        unix = isinstance(this, UnixDomainSocketConnection)
        host, port = (this.path, 0) if unix else (this.host, this.port)
        try:
            sock = driver_named("unix" if unix else "tcp").open(host, port, self._left(), self._sharedpool_register)
        except (ConnectFailed, ConnectTimeout) as error:
            self._sharedpool_failed = error
            raise error.__cause__ or error from None  # redis-py's words for it are made of the system's error
        if unix:
            return self._limited(sock)
        try:
            if this.socket_keepalive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in this.socket_keepalive_options.items():
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
            self._limited(sock)
            return this._wrap_socket_with_ssl(sock) if hasattr(this, "_wrap_socket_with_ssl") else sock
        except BaseException:
            sock.close()
            raise

    def _limited(self, sock: Any) -> Any:
        sock.settimeout(self._left())
        return sock


def _str(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def greeting_of(session: Session, *, decode: bool) -> dict[Any, Any]:
    """The server's greeting, as redis-py keeps it."""
    if session.greeting is None:
        found = json.loads(session.state) if session.state else {}
        if not decode:
            found = {n.encode(): v.encode() if isinstance(v, str) else v for n, v in found.items()}
        session.greeting = found
    return session.greeting
