"""The driver: redis-py opens and greets, the descriptor moves.

A connection is opened by redis-py itself (its handshake: HELLO, AUTH, CLIENT SETNAME, CLIENT SETINFO, SELECT), on a
socket that was registered before it connected. What another process needs to go on is what the server said in its
greeting; nothing is said again. TLS is the process's own, so those connections stay where they were opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import redis
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection

from ...drivers import Register
from ...drivers import find as driver_named
from ...drivers.places import FILES, NETWORK, of_host
from ...drivers.sockets import TIMED, Pooled, PooledSocket, fresh
from ...errors import ConnectFailed, ConnectTimeout, OptionError
from .session import Session

log = logging.getLogger("sharedpool")

#: Of a greeting (the answer to HELLO) what redis-py's users may want to know.
_GREETING: Final = ("server", "version", "proto", "id", "mode", "role")
#: What a client alone needs, or what must not be there on a shared connection.
_OF_THE_CLIENT: Final = ("retry", "retry_on_error", "retry_on_timeout", "health_check_interval", "event_dispatcher")


#: redis-py's own classes; the transport says which of them it is.
_OF_REDIS_PY: Final = (Connection, SSLConnection, UnixDomainSocketConnection)
#: Whom a server takes for a client that says a password and no name.
_DEFAULT_USER: Final = "default"


class RedisDriver:
    """How connections with these arguments are opened; `sharedpool.drivers.Driver` for Session.

    Args:
        connection_class: redis-py's class, or one of your own below it.
        arguments: Its keywords.
        label: Says what only the caller can know: two drivers with equal labels greet a server alike. "": nothing.

    Attributes:
        port: 0.
    """

    connects = True
    port = 0

    def __init__(self, connection_class: type[Any], arguments: Mapping[str, Any], *, label: str = "") -> None:
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
        if self._arguments.get("path"):
            self._arguments["path"] = _absolute(self._arguments["path"])
        if self._arguments.get("socket_type"):
            raise OptionError(
                f"option 'socket_type' has the value {self._arguments['socket_type']!r} (from the call); a pool tries"
                " all addresses of a host; allowed is 0, and an address as the host",
                option="socket_type", value=self._arguments["socket_type"], source="the call", allowed=0,
            )  # fmt: skip
        self.name = "rediss" if self.tls else "redis+unix" if self._unix else "redis"
        self._class: type[Any] = type(connection_class.__name__, (_Opening, connection_class), {})
        sample: Any = connection_class(**self._arguments)  # checks the arguments, at once
        self.connect_timeout: float | None = sample.socket_connect_timeout
        where = sample.path if self._unix else sample.host
        self.identity = json.dumps([str(part) for part in (where, self._unix or sample.port, sample.db)])
        self._matters = _matters(str(where)) if self._unix else of_host(str(where))
        self._provider: Any = sample.credential_provider
        self._user: str | None = None if self._asks else _user_of(sample)
        self._rest = self._described(sample, connection_class, label)
        if self._asks:
            self._arguments["credential_provider"] = _SameUser(self)

    def matters(self, host: str) -> tuple[str, ...]:
        """What of the process's place decides which server that is."""
        return self._matters

    @property
    def _asks(self) -> bool:
        """Whether a credential provider says who it is. Connections under TLS are lent by this object only."""
        return self._provider is not None and not self.tls

    def _described(self, sample: Any, connection_class: type[Any], label: str) -> str:
        """What else equal keys have in common: where to, and all that the handshake sets, but no secret.

        The library's name (CLIENT SETINFO) is not among it: it is for people who read CLIENT LIST.
        """
        asked = self._arguments.get("redis_connect_func")
        own = None if connection_class in _OF_REDIS_PY else connection_class
        more = {
            "protocol": sample.protocol, "name": sample.client_name,
            "connect": asked and self._name_for("redis_connect_func", asked, label),
            "class": own and self._name_for("connection_class", own, label),
            "label": label, "tls": self._tls_of() if self.tls else None,
        }  # fmt: skip
        where = quote(sample.path) if self._unix else f"{sample.host}:{sample.port}"
        extra = "&".join(f"{name}={quote(str(value), '.<>')}" for name, value in more.items() if value)
        return f"{where}/{sample.db}?{extra}"

    def _name_for(self, option: str, thing: Any, label: str) -> str:
        """The name by which every process knows a function or class; without one it is this driver's alone."""
        name = _global_name(thing)
        if name or label:
            return name or "labelled"
        log.warning(
            "connections to Redis are not shared with other processes, but for forked children of this pool: the"
            " option %r is nothing that a module has by its name, and so nobody knows whether theirs is the same;"
            " session_label='...' says so", option,
        )  # fmt: skip
        return secrets.token_hex(8)

    def _tls_of(self) -> str:
        """What else decides who the peer must be; a hash, because paths and certificates are long."""
        said = {n: v for n, v in self._arguments.items() if n.startswith("ssl_") and n != "ssl_password"}
        return hashlib.blake2b(repr(sorted(said.items())).encode(), digest_size=16).hexdigest()

    @property
    def resolved(self) -> bool:
        """Whether the key is known without asking a credential provider, which may take its time."""
        return self._user is not None

    @property
    def host(self) -> str:
        """The key: who, where to, which database, and what else the handshake sets; never a password.

        Equal keys share, in all processes. A credential provider is asked once for who it is.
        """
        if self._user is None:
            self.credentials()
        assert self._user is not None
        return f"{quote(self._user, '()')}@{self._rest}" if self._user else self._rest

    def credentials(self) -> Any:
        """What the credential provider says; the first time it decides whose the connections are.

        Raises:
            OptionError: It names another user than before, with whose name the connections are shared.
        """
        found = self._provider.get_credentials()
        user = _user_in(found)
        if self._user is None:
            self._user = user
        if user != self._user:
            raise OptionError(
                f"option 'credential_provider' named the user {self._user!r} first, and now {user!r}; all connections"
                " of a pool belong to one user; allowed is a pool for each",
                option="credential_provider", value=user, source="the call", allowed=self._user,
            )  # fmt: skip
        return found

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


def _matters(path: str) -> tuple[str, ...]:
    return (NETWORK,) if path.startswith("\0") else (FILES,)


class _SameUser(redis.CredentialProvider):
    """A user's provider as connections ask it: it must name one user for all of them."""

    def __init__(self, driver: RedisDriver) -> None:
        self._driver = driver

    def get_credentials(self) -> Any:
        """What the provider says."""
        return self._driver.credentials()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver._provider, name)


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


def _user_of(sample: Any) -> str:
    """Whom a server takes a client for; "" if it says neither a name nor a password."""
    if sample.credential_provider is not None:
        kind = type(sample.credential_provider)
        return f"({kind.__module__}.{kind.__qualname__})"
    return str(sample.username or (_DEFAULT_USER if sample.password else ""))


def _user_in(credentials: Any) -> str:
    """The user that credentials name, as redis-py says them: (password,) or (user, password)."""
    return str(_str(credentials[0])) if len(credentials) > 1 else _DEFAULT_USER


def _absolute(path: Any) -> str:
    """A socket's path as it is now, wherever this process goes later; abstract names have no directory."""
    text = os.fsdecode(path)
    return text if text.startswith("\0") else os.path.abspath(text)


def _global_name(thing: Any) -> str:
    """The name by which other processes have the same function or class; "" for closures, methods, lambdas, objects."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    where = getattr(found, "__file__", None) if module in ("__main__", "__mp_main__") else module
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    return f"{where}.{name}" if found is thing and where else ""


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
