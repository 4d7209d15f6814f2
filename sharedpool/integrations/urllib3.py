"""urllib3 2 (extra `urllib3`) over a shared pool: one cap for the connections of all processes of the host.

    http = SharedPoolManager("api", max_connections=20)
    http.request("GET", "http://api.example.com/")

What urllib3 does with a request (retries, redirects, time-outs, proxies, TLS) stays urllib3's own. Its pools keep
connection *objects*; here such an object is connected while it has a lease, and only then. It takes one in `connect`,
which http.client calls when there is something to send and no socket: so what http.client reconnects by itself is
another lease, and no connection is ever opened beside the one that was leased. `_put_conn` ends the lease, and what
goes back to urllib3's queue is an object without a connection.

http:// connections are plain sockets, which move between processes. An https:// one is opened by urllib3's `connect`,
with all that urllib3 can do there, on a socket that the pool knows from the beginning; it stays in its process.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import itertools
import os
import queue
import socket
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self, cast

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ClosedPoolError,
    ConnectTimeoutError,
    EmptyPoolError,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
    PoolError,
    ProtocolError,
)
from urllib3.util.ssl_ import resolve_cert_reqs
from urllib3.util.ssltransport import SSLTransport
from urllib3.util.timeout import Timeout

from .. import control, options
from ..drivers import Register
from ..drivers.tcp import NODELAY, TcpDriver
from ..errors import (
    ArbiterLost,
    ConnectFailed,
    ConnectTimeout,
    FileLimit,
    LeaseError,
    OptionError,
    PoolStopped,
    PoolTimeout,
    SharedPoolError,
    TooManyWaiting,
    file_limit,
)
from ..exchange import MOST_INTERIM, End, Exchange
from ..lease import Lease
from ..logins import Logins
from ..options import NOT_GIVEN
from ..pool import Pool as Handle

#: What an https:// connection's settings are where nothing was asked for.
_PLAIN_TLS: Final = (None,) * 14


# --- connections --------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Connection = HTTPConnection
else:
    _Connection = object


class _Leased(_Connection):
    """What our connection objects do beyond urllib3's: they have a connection while they have a lease."""

    _handle: Handle[Any]
    _pool: weakref.ref[HTTPConnectionPool]
    _lease: Lease[Any] | None = None
    _patience: float | None = None
    _queued = False
    _answering = False
    _spent = False
    _tunneling = False
    _exchange: Exchange

    def connect(self) -> None:
        """Lease a connection, of those that there are or a new one; what was leased before ends.

        Raises:
            EmptyPoolError: None became free in time.
            NewConnectionError, ConnectTimeoutError: It could not be opened.
        """
        if self._lease is not None:
            self._end_lease()
        seconds = Timeout.resolve_default_timeout(self.timeout)
        host, port, transport = self._where()
        patience: Any = self._patience
        connect_timeout: Any = NOT_GIVEN
        if seconds is not None:  # which says nothing about waiting for one's turn
            connect_timeout = min(seconds, options.LONGEST)
            patience = self._handle.patience if patience is None else patience
        elif patience is None:
            patience = NOT_GIVEN
        try:
            lease = self._handle.checkout(
                host, port, transport, checkout_timeout=patience, connect_timeout=connect_timeout
            )
        except SharedPoolError as error:
            raise self._translated(error) from error
        self._lease, self._spent = lease, False
        self._exchange = Exchange()
        sys.audit("http.client.connect", self, self.host, self.port)
        self._take(lease.conn, seconds)

    def _where(self) -> tuple[str, int, Any]:
        """What to lease: host, port, transport."""
        raise NotImplementedError

    def _take(self, conn: Any, seconds: float | None) -> None:
        """Use what was leased."""
        raise NotImplementedError

    def _translated(self, error: Exception) -> Exception:
        """What urllib3 raises in such a case."""
        pool = cast(HTTPConnectionPool, self._pool())
        if isinstance(error, PoolTimeout | TooManyWaiting):
            if self._queued and pool is not None:  # urllib3 takes it that nothing was taken from its queue
                pool._put_conn(self)
            return EmptyPoolError(pool, str(error))
        if isinstance(error, PoolStopped):
            return ClosedPoolError(pool, str(error))
        if isinstance(error, ConnectTimeout):
            return ConnectTimeoutError(
                self, f"Connection to {self.host} timed out. (connect timeout={self.timeout}): {error}"
            )
        cause = error.__cause__
        if isinstance(cause, UnicodeError):
            return LocationParseError(f"{self.host!r}, label empty or too long")
        if isinstance(cause, socket.gaierror):
            return NameResolutionError(self.host, self, cause)
        if isinstance(error, ConnectFailed | FileLimit | ArbiterLost | OptionError):  # the last: no such port, say
            return NewConnectionError(self, f"Failed to establish a new connection: {cause or error}")
        return PoolError(pool, str(error))

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        """As urllib3's."""
        self._exchange = Exchange(self._exchange.legs if self._lease is not None else 0)
        super().putrequest(*args, **kwargs)

    def send(self, data: Any) -> None:
        """As http.client's."""
        super().send(data)
        if self._tunneling:  # that is between the proxy and us
            return
        if isinstance(data, bytes | bytearray | memoryview):
            self._exchange.sent(data if isinstance(data, bytes) else memoryview(data).cast("B"))
        else:
            self._exchange.sent_unseen()

    def _tunnel(self) -> None:
        self._tunneling = True
        try:
            cast(Any, super())._tunnel()
        finally:
            self._tunneling = False

    def getresponse(self) -> Any:
        """As urllib3's. An answer that ends with its connection keeps the lease until it has been read."""
        self._answering = True
        try:
            response = super().getresponse()
        except BaseException:
            self._answering = False
            if self.sock is None:
                self.close()
            raise
        self._answering = False
        if self._lease is None:
            response._sock_shutdown = None  # it is somebody else's
        return response

    if not TYPE_CHECKING:

        def response_class(self, *args: Any, **kwargs: Any) -> _Answer:
            """What http.client reads the answer with."""
            return _Answer(self, Exchange() if self._tunneling else self._exchange, *args, **kwargs)

    def let_go(self) -> None:
        """The answer has come whole, and is still to be understood: meanwhile others may have the connection."""
        lease = self._lease
        if lease is not None and not self._spent and self._exchange.end(through=True) is End.CLEAN:
            self._lease = self.sock = None
            with contextlib.suppress(LeaseError):
                lease.checkin()

    def close(self) -> None:
        """End the connection, and the lease."""
        if self._answering and self._lease is not None:
            self.sock = None  # http.client gives it to the answer, which is yet to be read
        super().close()
        if self._lease is not None and not self._answering:
            self._end_lease()

    def go_on(self) -> Self:
        """The next request of a login that has begun: on this connection, unless it has ended."""
        self._exchange = Exchange(self._exchange.legs + 1)
        self._queued = True
        lease = self._lease
        if lease is None or not lease.in_force or not self.is_connected:
            self.close()
        return self

    def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            with contextlib.suppress(LeaseError):  # it was taken away, or is a parent process's
                lease.discard()

    def _give_back(self) -> End:
        """The user has done with the answer: what has become of the connection."""
        lease, through = self._lease, self._is_through()
        if self.sock is None and lease is None and through:
            self._forget()
            return End.CLEAN
        end = End.CLOSE
        if self.sock is not None and lease is not None:
            end = self._exchange.end(through=through and not self._spent)
        if end in (End.OFFERED, End.BEGUN):
            return end
        if end is not End.CLEAN and end is not End.SURPLUS:
            self.close()
            return end
        if end is End.SURPLUS:
            self._cut()
        self._lease = self.sock = None
        self._forget()
        with contextlib.suppress(LeaseError):
            cast("Lease[Any]", lease).checkin()
        return end

    def _cut(self) -> None:
        """Close the leased connection, so that it is given back as unclean."""
        with contextlib.suppress(OSError):
            cast(Any, self.sock).close()

    def _is_through(self) -> bool:
        """Whether what was asked for has come whole, and has been read."""
        this: Any = self
        response = this._HTTPConnection__response
        return this._HTTPConnection__state == "Idle" and (response is None or response.isclosed())

    def _forget(self) -> None:
        """Nothing of one connection stays for the next."""
        self._response_options = None
        if self.proxy is not None:
            self.proxy_is_verified = None
            self._has_connected_to_proxy = False
            self._tunnel_host = self._tunnel_port = self._tunnel_scheme = None


#: http.client refuses more fields.
_MOST_FIELDS: Final = 100


class _Source(io.RawIOBase):
    """What an answer is read from: the socket's own file object, while an Exchange reads along."""

    def __init__(self, raw: Any, exchange: Exchange) -> None:
        self._raw = raw
        self._exchange = exchange

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        if count:
            self._exchange.came(memoryview(buffer)[:count])
        return count

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return cast(int, self._raw.fileno())

    @property
    def _sock(self) -> Any:
        """As SocketIO's, where some look for the socket."""
        return self._raw._sock

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._raw.close()


class _Answer(http.client.HTTPResponse):
    """http.client's response. One that has come whole at once, as most do, is read from memory.

    To understand it takes Python longer than a near server takes to answer: meanwhile others have the connection.
    """

    def __init__(self, connection: _Leased, exchange: Exchange, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leased = connection
        self._exchange = exchange
        this: Any = self
        this.fp = io.BufferedReader(_Source(this.fp.detach(), exchange))

    def begin(self) -> None:
        this: Any = self
        if this.headers is None and not this.debuglevel:
            came = this.fp.peek()
            if self._is_simple():
                self._take(came)
                return
        super().begin()

    def _is_simple(self) -> bool:
        """Whether it has come whole at once, and http.client would think the same of it."""
        exchange = self._exchange
        head = exchange.head
        if head is None or not exchange.came_at_once or not 0 < len(head.fields) <= _MOST_FIELDS:
            return False
        told = {name.lower(): value.lower() for name, value in head.fields}
        return (
            head.version == 11
            and 200 <= head.status < 600
            and "transfer-encoding" not in told
            and told.get("connection", "keep-alive") == "keep-alive"
        )

    def _take(self, came: bytes) -> None:
        this: Any = self
        head = self._exchange.head
        assert head is not None
        body = came[head.length :]
        this.fp, read = io.BufferedReader(io.BytesIO(body)), this.fp
        read.close()
        self._leased.let_go()
        this.status, this.reason, this.version = head.status, head.reason, head.version
        this.code = this.status
        this.chunked = this.will_close = False
        this.chunk_left, this.length = None, len(body)
        this.headers = this.msg = http.client.HTTPMessage()
        for name, value in head.fields:
            this.msg.set_raw(name, value)

    def _read_status(self) -> tuple[str, int, str]:
        """As http.client's, which skips 100 only: the final answer's, or that of 101."""
        this: Any = self
        for _ in range(MOST_INTERIM):
            found: tuple[str, int, str] = cast(Any, super())._read_status()
            if not 100 <= found[1] < 200 or found[1] == 101:
                return found
            http.client.parse_headers(this.fp)
        raise http.client.HTTPException(f"got more than {MOST_INTERIM} interim answers")


class SharedHTTPConnection(_Leased, HTTPConnection):
    """urllib3's HTTPConnection on a leased socket."""

    _transport: str | TcpDriver | None = None

    def _where(self) -> tuple[str, int, Any]:
        if self._transport is None:
            self._transport = _tcp(self)
        return self._dns_host.strip("[]"), self.port, self._transport

    def _take(self, conn: Any, seconds: float | None) -> None:
        self.sock = conn
        if seconds is not None:
            conn.settimeout(seconds)
        if self.proxy is not None or self._tunnel_host is not None:
            self._has_connected_to_proxy = True
            if self._tunnel_host is not None:
                self._spent = True  # it leads elsewhere now
                cast(Any, self)._tunnel()
            self.proxy_is_verified = False


class SharedHTTPSConnection(_Leased, HTTPSConnection):
    """urllib3's HTTPSConnection: connected by urllib3, kept by the pool, for this process."""

    _known: tuple[Any, _TlsDriver] | None = None
    _socket: socket.socket | None = None

    def _where(self) -> tuple[str, int, Any]:
        this: Any = self
        tunnel = None
        if self._tunnel_host is not None:
            tunnel = (self._tunnel_scheme, self._tunnel_host, self._tunnel_port, tuple(this._tunnel_headers.items()))
        if self._known is None or self._known[0] != tunnel:
            self._known = tunnel, self._driver(tunnel)
        if tunnel is None:
            return self._dns_host.strip("[]"), self.port, self._known[1]
        return cast(str, self._tunnel_host).strip("[]"), self._tunnel_port or self.port, self._known[1]

    def _driver(self, tunnel: tuple[Any, ...] | None) -> _TlsDriver:
        """Whose connections are as this one's would be, and have been proven as much."""
        reqs = resolve_cert_reqs(self.cert_reqs)
        told: tuple[Any, ...] = (
            None if reqs == _REQUIRED else int(reqs), self.assert_hostname, self.assert_fingerprint,
            self.server_hostname, self.ssl_version, self.ssl_minimum_version, self.ssl_maximum_version,
            self.ca_certs, self.ca_cert_dir, self.ca_cert_data and _digest(self.ca_cert_data),
            self.cert_file, self.key_file,
            None if self.ssl_context is None else "context", None,
        )  # fmt: skip
        untold: tuple[Any, ...] = (self.key_password, _serial_of(self.ssl_context), self.ca_cert_data)
        config = self.proxy_config
        if self.proxy is not None:
            via: tuple[Any, ...] = (self.proxy.scheme, self.proxy.host, self.proxy.port, tunnel and tunnel[:3])
            if config is not None:
                via += (config.use_forwarding_for_https, config.assert_hostname, config.assert_fingerprint)
                untold += (_serial_of(config.ssl_context),)
            told = (*told[:-1], via)
            untold += (tunnel and tunnel[3], self.proxy.auth)
        return _tls(told, untold, _tcp(self))

    def _new_conn(self) -> socket.socket:
        """The socket that the pool knows; without a lease as urllib3's."""
        found, self._socket = self._socket, None
        return found or super()._new_conn()

    def open_on(self, sock: socket.socket) -> _Link:
        """Connect as urllib3 does, on a socket that is connected already."""
        self._socket = sock
        try:
            super(_Leased, self).connect()
            if getattr(self.sock, "selected_alpn_protocol", str)() == "h2":
                raise ProtocolError("HTTP/2 is not spoken over a shared pool: do not offer it (ALPN)")
            return _Link(self)
        except BaseException:
            sock.close()
            if self.sock is not None:
                self.sock.close()
                self.sock = None
            raise

    def _take(self, conn: _Link, seconds: float | None) -> None:
        self.sock = conn.sock
        self.is_verified, self.proxy_is_verified, self._has_connected_to_proxy = conn.facts
        self.sock.settimeout(seconds)

    def connect(self) -> None:
        """As for http://; if one has to be opened, this object opens it."""
        token = _opening.set(self)
        try:
            super().connect()
        finally:
            _opening.reset(token)

    def _forget(self) -> None:
        super()._forget()
        self.is_verified = False


#: The object by which a driver opens.
_opening: ContextVar[SharedHTTPSConnection | None] = ContextVar("_opening", default=None)
_REQUIRED: Final = resolve_cert_reqs(None)


class _Link:
    """An open https:// connection, and what urllib3 knows of it."""

    __slots__ = ("facts", "sock")

    def __init__(self, connection: SharedHTTPSConnection) -> None:
        self.sock: Any = connection.sock
        self.facts = connection.is_verified, connection.proxy_is_verified, connection.has_connected_to_proxy

    def fileno(self) -> int:
        return cast(int, self.sock.fileno())

    @property
    def inner(self) -> Any:
        """What has the descriptor: with TLS within TLS, to a proxy, that of the outer one."""
        return getattr(self.sock, "socket", self.sock)


def _unread(sock: Any) -> bool:
    """Whether bytes wait in a TLS socket: ssl's own, urllib3's for TLS within TLS, or pyOpenSSL's."""
    if isinstance(sock, SSLTransport):
        return bool(sock.sslobj.pending() or sock.incoming.pending) or _unread(sock.socket)
    return bool((sock if hasattr(sock, "pending") else sock.connection).pending())


class _TlsDriver:
    """Opens https:// connections by the object that wants one; they stay in their process."""

    moves = False
    connects = True
    parks = False

    def __init__(self, name: str, tcp: TcpDriver) -> None:
        self.name = name
        self._tcp = tcp

    def address(self, host: str, port: int) -> tuple[str, int]:
        return self._tcp.address(host, port)

    def open(self, host: str, port: int, timeout: float, register: Register) -> _Link:
        """Connect a socket that is registered; urllib3 has a duplicate, because TLS takes its socket over."""
        connection = _opening.get()
        assert connection is not None, "https connections are opened for a request"
        raw = self._tcp.open(connection._dns_host.strip("[]"), connection.port, timeout, register)
        try:
            try:
                sock = socket.socket(fileno=os.dup(raw.number()))
            except OSError as error:
                raise file_limit(error, f"open https://{host}:{port}") from error
            sock.settimeout(Timeout.resolve_default_timeout(connection.timeout))
            return connection.open_on(sock)
        finally:
            os.close(raw.detach())

    def fileno(self, conn: _Link) -> int:
        return conn.fileno()

    def clean(self, conn: _Link) -> bool:
        """Nothing that came is left in a buffer."""
        inner = conn.inner
        return inner.fileno() >= 0 and not getattr(inner, "_io_refs", 0) and not _unread(conn.sock)

    def export(self, conn: _Link) -> None:
        """None: it cannot move."""

    def adopt(self, descriptor: int, state: bytes) -> _Link:
        """Never called."""
        raise NotImplementedError

    def close(self, conn: _Link) -> None:
        with contextlib.suppress(OSError):
            conn.inner._io_refs = 0
            conn.inner.close()


#: Drivers by their settings. What decides who is at the other end is compared itself: two settings may have one digest.
#: The name is compared, too, because `False` and `0` are equal, and mean different things to urllib3.
_tcps: Final[dict[tuple[Any, ...], TcpDriver]] = {}
_drivers: Final[weakref.WeakValueDictionary[tuple[Any, ...], _TlsDriver]] = weakref.WeakValueDictionary()
_serials: Final[weakref.WeakKeyDictionary[Any, int]] = weakref.WeakKeyDictionary()
_numbers: Final = itertools.count(1)
_making = threading.Lock()


def _tcp(connection: HTTPConnection) -> TcpDriver:
    """The driver for plain sockets with a connection's settings. urllib3's defaults are the pool's own."""
    chosen = tuple(tuple(each) for each in connection.socket_options or ())
    source = connection.source_address
    name = "tcp"
    if connection.proxy is not None and not chosen:
        chosen = NODELAY  # urllib3 has Nagle's algorithm for proxies; connections are shared whatever they are for
    if chosen != NODELAY or source is not None:
        name = f"tcp+{_digest((chosen, source))}"
    with _making:
        driver = _tcps.get((name, chosen, source))
        if driver is None:
            driver = _tcps[name, chosen, source] = TcpDriver(name, cast(Any, chosen), source)
        return driver


def _tls(told: tuple[Any, ...], untold: tuple[Any, ...], tcp: TcpDriver) -> _TlsDriver:
    """The driver for connections with these settings; what is told is part of the key, what is not may be secret."""
    settings = told if tcp.name == "tcp" else (*told, tcp.name)
    name = "https" if settings == _PLAIN_TLS else f"https+{_digest(settings)}"
    with _making:
        driver = _drivers.get((name, told, untold, tcp))
        if driver is None:
            driver = _drivers[name, told, untold, tcp] = _TlsDriver(name, tcp)
        return driver


def _digest(value: Any) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _serial_of(context: Any) -> int:
    """A number that no other context of this process ever has; 0: none."""
    if context is None:
        return 0
    with _making:
        return _serials.setdefault(context, next(_numbers))


def _made_anew() -> None:
    global _making
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_made_anew)


# --- pools --------------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Pool = HTTPConnectionPool
    _Manager = PoolManager
else:
    _Pool = _Manager = object


#: The fields of the request that this thread or task is about to send, and those for its proxy.
_asking: ContextVar[tuple[Any, Any]] = ContextVar("sharedpool_asking", default=(None, None))


def _asked_fields() -> Iterator[tuple[str, str]]:
    for fields in _asking.get():
        for name, value in (fields or {}).items():
            yield _text(name), _text(value)


def _text(given: Any) -> str:
    return given.decode("latin-1") if isinstance(given, bytes) else str(given)


class _Shared(_Pool):
    """What our pools do beyond urllib3's."""

    def __init__(self, *args: Any, pool: str | Handle[Any] = "default", app: str | None = None, **kwargs: Any) -> None:
        self.shared_pool, kwargs = _shared(pool, app, kwargs)
        self._logins = Logins(lambda: self.shared_pool.stats().waiting > 0)
        super().__init__(*args, **kwargs)

    def _new_conn(self) -> Any:
        conn = super()._new_conn()
        if not isinstance(conn, _Leased):
            raise TypeError(
                f"{type(self).__name__}.ConnectionCls is {self.ConnectionCls!r}, whose connections no shared pool"
                " counts; allowed is a subclass of SharedHTTPConnection or SharedHTTPSConnection"
            )
        conn._handle, conn._pool = self.shared_pool, weakref.ref(self)
        return conn

    def urlopen(self, method: str, url: str, body: Any = None, headers: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As urllib3's."""
        asked = _asking.set((self.headers if headers is None else headers, self.proxy_headers))
        try:
            return super().urlopen(method, url, body, headers, *args, **kwargs)
        finally:
            _asking.reset(asked)

    def _get_conn(self, timeout: float | None = None) -> Any:
        """An object without a connection; it leases one as soon as there is something to send.

        Waiting for the object and for the lease together take no longer than `timeout`, s.
        """
        known = self.pool
        if known is None:
            raise ClosedPoolError(self, "Pool is closed.")
        conn, began = self._logins.take(None, _asked_fields()), monotonic()
        if conn is not None:
            return conn.go_on()
        try:
            conn = known.get(block=self.block, timeout=timeout)
        except queue.Empty:
            if self.block:
                text = "as many requests of this pool object are at work in this process as may be (maxsize, block)"
                raise EmptyPoolError(self, text) from None
        conn = conn or self._new_conn()
        conn._patience = None if timeout is None else max(0.0, timeout - (monotonic() - began))
        conn._queued = True
        return conn

    def _put_conn(self, conn: Any) -> None:
        """End the lease; the object is kept where there is room for it."""
        if isinstance(conn, _Leased):
            conn._queued = False
            end = conn._give_back()
            if end in (End.OFFERED, End.BEGUN):
                if self._logins.keep(None, end, conn, lambda: self._give_up(conn)):
                    return
                conn.close()
        self._put_back(conn)

    def _give_up(self, conn: Any) -> None:
        """A login was begun and not gone on with."""
        conn.close()
        self._put_back(conn)

    def _put_back(self, conn: Any) -> None:
        """An object without a connection, which is kept where there is room for it."""
        known = self.pool
        if known is None or self.block:
            super()._put_conn(conn)
            return
        with contextlib.suppress(queue.Full):
            known.put(conn, block=False)

    def close(self) -> None:
        """As urllib3's; a login that has only begun is given up."""
        self._logins.clear()
        super().close()


class SharedHTTPConnectionPool(_Shared, HTTPConnectionPool):
    """urllib3's pool for one http:// address, whose connections all processes of the host share.

    Args:
        *args: As for HTTPConnectionPool.
        pool: The shared pool: its name, or a handle.
        app: The scope's name.
        **kwargs: Options of sharedpool (`max_connections`, ...), which declare the pool; all others as for
            HTTPConnectionPool. `maxsize` and `block` limit this process beside the cap, as docs/urllib3.md says.

    Making one does no I/O. After a fork each process goes on by itself.

    Raises:
        OptionError: An option is wrong.
    """

    ConnectionCls = SharedHTTPConnection


class SharedHTTPSConnectionPool(_Shared, HTTPSConnectionPool):
    """The same for https://: connections stay in their process, and permits go over to others.

    Args:
        *args: As for HTTPSConnectionPool.
        pool: The shared pool: its name, or a handle.
        app: The scope's name.
        **kwargs: As for SharedHTTPConnectionPool.

    Raises:
        OptionError: An option is wrong.
    """

    ConnectionCls = SharedHTTPSConnection


class SharedPoolManager(PoolManager):
    """urllib3's PoolManager over one shared pool.

    Args:
        pool: The shared pool: its name, or a handle.
        num_pools: As for PoolManager.
        headers: As for PoolManager.
        app: The scope's name.
        **kwargs: Options of sharedpool, which declare the pool; all others as for PoolManager.

    `clear()` forgets urllib3's pools. Idle connections stay in the shared pool until its `idle_timeout`.

    Raises:
        OptionError: An option is wrong.
    """

    def __init__(
        self, pool: str | Handle[Any] = "default", num_pools: int = 10, headers: Mapping[str, str] | None = None, *,
        app: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.shared_pool, kwargs = _shared(pool, app, kwargs)
        super().__init__(num_pools, headers, **kwargs)
        self.pool_classes_by_scheme = _CLASSES

    def clear(self) -> None:
        """As urllib3's; logins that have only begun are given up."""
        _give_up_logins(self)
        super().clear()

    def _new_pool(self, scheme: str, host: str, port: int, request_context: dict[str, Any] | None = None) -> Any:
        return _new_pool(self, super()._new_pool, scheme, host, port, request_context)


class SharedProxyManager(ProxyManager):
    """urllib3's ProxyManager over one shared pool: connections to the proxy, and tunnels through it.

    Args:
        proxy_url: As for ProxyManager.
        pool: The shared pool: its name, or a handle.
        app: The scope's name.
        **kwargs: Options of sharedpool, which declare the pool; all others as for ProxyManager.

    Raises:
        OptionError: An option is wrong.
    """

    def __init__(
        self, proxy_url: str, pool: str | Handle[Any] = "default", *, app: str | None = None, **kwargs: Any
    ) -> None:
        self.shared_pool, kwargs = _shared(pool, app, kwargs)
        super().__init__(proxy_url, **kwargs)
        self.pool_classes_by_scheme = _CLASSES

    def clear(self) -> None:
        """As urllib3's; logins that have only begun are given up."""
        _give_up_logins(self)
        super().clear()

    def _new_pool(self, scheme: str, host: str, port: int, request_context: dict[str, Any] | None = None) -> Any:
        return _new_pool(self, super()._new_pool, scheme, host, port, request_context)


def _give_up_logins(manager: PoolManager) -> None:
    for key in list(manager.pools.keys()):
        known: Any = manager.pools.get(key)
        if known is not None:
            known._logins.clear()


_CLASSES: Final[Any] = {"http": SharedHTTPConnectionPool, "https": SharedHTTPSConnectionPool}


def _new_pool(
    manager: SharedPoolManager | SharedProxyManager, make: Any, scheme: str, host: str, port: int,
    context: dict[str, Any] | None,
) -> Any:  # fmt: skip
    """One of the manager's pools, over the manager's shared one."""
    context = (manager.connection_pool_kw if context is None else context).copy()
    return make(scheme, host, port, {**context, "pool": manager.shared_pool})


def _shared(pool: str | Handle[Any], app: str | None, kwargs: dict[str, Any]) -> tuple[Handle[Any], dict[str, Any]]:
    """The handle, and what is left of the keywords for urllib3."""
    given = {name: value for name, value in kwargs.items() if name in options.RULES}
    left = {name: value for name, value in kwargs.items() if name not in given}
    if not isinstance(pool, Handle):
        return control.attach(pool, app=app, **given), left
    beside = [*given, *(["app"] if app is not None else [])]
    if beside:
        raise OptionError(
            f"option 'pool' has the value {pool!r} (from the call) beside {', '.join(beside)}; allowed is a name,"
            " or a handle alone",
            option="pool", value=pool, source="the call", allowed="a name, or a handle alone",
        )  # fmt: skip
    return pool, left
