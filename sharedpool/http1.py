"""HTTP/1.1 over leases, for httpx and httpx2: each request leases a connection, and its response gives it back.

The protocol is httpcore's (`HTTP11Connection`, over a stream of ours). Between two requests a connection has no state
but its socket, so httpcore's object lives as long as the lease. Loads neither library: they are handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar, Final, NoReturn

from . import aio, control
from .drivers import Driver
from .drivers.sockets import readable
from .drivers.tls import TlsDriver
from .errors import ConnectTimeout, NotSupported, OptionError, PoolTimeout, SharedPoolError, TooManyWaiting
from .exchange import MOST_INTERIM, End, Exchange
from .logins import Logins
from .options import LONGEST

_PORTS: Final = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True, slots=True)
class Library:
    """httpx or httpx2, and the httpcore that belongs to it."""

    httpx: ModuleType
    httpcore: ModuleType

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What httpcore, or a pool, raises becomes what httpx's users catch."""
        try:
            yield
        except (OptionError, NotSupported):
            raise
        except SharedPoolError as error:
            raise self._pools(error)(str(error)) from error
        except Exception as error:
            named = getattr(self.httpx, type(error).__name__, None)
            if named is None or not isinstance(error, getattr(self.httpcore, type(error).__name__, ())):
                raise
            raise named(str(error)) from error

    def _pools(self, error: SharedPoolError) -> type[Exception]:
        if isinstance(error, PoolTimeout | TooManyWaiting):
            return self.httpx.PoolTimeout  # type: ignore[no-any-return]
        if isinstance(error, ConnectTimeout):
            return self.httpx.ConnectTimeout  # type: ignore[no-any-return]
        return self.httpx.ConnectError  # type: ignore[no-any-return]


class _Stream:
    """What httpcore reads from and writes to, and a response's `network_stream`.

    Args:
        library: Its errors.
        conn: The leased socket.
        exchange: Reads along.
    """

    def __init__(self, library: Library, conn: Any, exchange: Exchange) -> None:
        self._core: Any = library.httpcore
        self._conn = conn
        self._exchange = exchange

    def _came(self, data: bytes) -> bytes:
        """What was read."""
        self._exchange.came(data)
        if self._exchange.flooded:
            raise self._core.RemoteProtocolError(f"got more than {MOST_INTERIM} interim answers")
        return data

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise getattr(self._core, f"{what}Timeout")(str(error)) from error
        except OSError as error:
            raise getattr(self._core, f"{what}Error")(str(error)) from error

    def get_extra_info(self, info: str) -> Any:
        """As httpcore's own streams: "ssl_object", "client_addr", "server_addr", "socket", "is_readable"."""
        conn = self._conn
        if info == "ssl_object":
            return getattr(conn, "ssl_object", None)
        if info in ("client_addr", "server_addr"):
            return conn.getsockname() if info == "client_addr" else conn.getpeername()
        if info == "is_readable":
            return _readable(conn)
        return conn if info == "socket" else None

    def _refuse_tls(self) -> NoReturn:
        raise NotSupported("a connection of a pool speaks TLS from its beginning, or never: https:// URLs do")


class _SyncStream(_Stream):
    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._errors("Read"):
            self._conn.settimeout(timeout)
            data: bytes = self._conn.recv(max_bytes)
        return self._came(data)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            with self._errors("Write"):
                self._conn.settimeout(timeout)
                self._conn.sendall(buffer)
            self._exchange.sent(buffer)

    def close(self) -> None:
        """Nothing: whoever has the lease looks whether httpcore wants it closed."""

    def start_tls(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_tls()


class _AsyncStream(_Stream):
    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._errors("Read"):
            async with asyncio.timeout(timeout):
                data = await asyncio.get_running_loop().sock_recv(self._conn, max_bytes)
        return self._came(data)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            with self._errors("Write"):
                async with asyncio.timeout(timeout):
                    await asyncio.get_running_loop().sock_sendall(self._conn, buffer)
            self._exchange.sent(buffer)

    async def aclose(self) -> None:
        """Nothing, as above."""

    async def start_tls(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_tls()


class _Turn:
    """One request's lease, until its response has been read or closed.

    Args:
        lease: The connection's.
        logins: Where it stays while a login goes on.
        where: Its address.
    """

    __slots__ = ("_lease", "_logins", "_where", "connection", "exchange")

    def __init__(self, lease: Any, logins: Logins, where: tuple[Any, ...], legs: int = 0) -> None:
        self._lease = lease
        self._logins = logins
        self._where = where
        self.exchange = Exchange(legs)
        self.connection: Any = None  # httpcore's object on it

    @property
    def conn(self) -> Any:
        """The leased socket."""
        return self._lease.conn

    @property
    def usable(self) -> bool:
        """Whether a connection that was kept may go on: it is still ours, and the server has said nothing more."""
        if not self._lease.in_force:
            return False
        return not _readable(self.conn)

    def next(self) -> _Turn:
        """The next request on the same lease."""
        return _Turn(self._lease, self._logins, self._where, self.exchange.legs + 1)

    def end(self) -> None:
        """Give the connection back: others may have it only after a whole exchange, with nothing beyond it."""
        lease = self._lease
        if not lease.in_force:
            return
        end = self.exchange.end(through=self.connection.is_idle())
        if end in (End.OFFERED, End.BEGUN) and self._logins.keep(self._where, end, self, self.abandon):
            return
        if end is End.SURPLUS:
            with contextlib.suppress(OSError):
                lease.conn.close()
        if end is End.SURPLUS or end is End.CLEAN:
            lease.checkin()  # one that was closed counts as unclean
        else:
            lease.discard()

    def abandon(self) -> None:
        """There was no answer, or no next request."""
        if self._lease.in_force:  # it may have been taken away
            self._lease.discard()


def _readable(conn: Any) -> bool:
    return readable(conn.number() if hasattr(conn, "number") else conn.fileno())


class SyncBody:
    """A response's stream, which the response closes at its end at the latest; then the connection goes back."""

    def __init__(self, library: Library, turn: _Turn, body: Any) -> None:
        self._library = library
        self._turn = turn
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        with self._library.errors():
            yield from self._body

    def close(self) -> None:
        """Give the connection back, or end it if the response was not read to its end."""
        try:
            with self._library.errors():
                self._body.close()
        finally:
            self._turn.end()


class AsyncBody:
    """The same for tasks."""

    def __init__(self, library: Library, turn: _Turn, body: Any) -> None:
        self._library = library
        self._turn = turn
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._library.errors():
            async for part in self._body:
                yield part

    async def aclose(self) -> None:
        """Give the connection back, or end it if the response was not read to its end."""
        try:
            with self._library.errors():
                await self._body.aclose()
        finally:
            self._turn.end()


class _Transport:
    """What both kinds of transport share.

    Args:
        pool: The pool's name.
        app: The scope's name, as for `sharedpool.attach`.
        update: As for `sharedpool.attach`.
        verify: As for httpx's own transport: whether, or by what context, servers are verified.
        cert: The client's certificate, likewise.
        trust_env: Whether SSL_CERT_FILE and SSL_CERT_DIR count, likewise.
        http1: True.
        http2: False; HTTP/2 is refused.
        proxy: None; proxies are refused.
        uds: The path of a Unix socket that stands for every host of `http://`; a relative one is one from here.
        priority: "normal" or "high", as for a checkout.
        **options: Options that declare the pool (see PoolOptions).

    Raises:
        OptionError, NotSupported: Something is wrong, or refused; at once.
    """

    library: ClassVar[Library]
    attach: ClassVar[Callable[..., Any]]

    def __init__(
        self, pool: str = "default", *, app: str | None = None, update: bool = True, verify: Any = True,
        cert: Any = None, trust_env: bool = True, http1: bool = True, http2: bool = False, proxy: Any = None,
        uds: str | None = None, priority: str = "normal", **options: Any,
    ) -> None:  # fmt: skip
        if http2 or not http1:
            raise NotSupported(
                "HTTP/2 puts many requests on one connection, which then has no moment to change hands: use http1, or"
                " httpx's own transport with a sharedpool.permit"
            )
        if proxy is not None:
            raise NotSupported("proxies are not supported: use httpx's own transport with a sharedpool.permit")
        self._pool = type(self).attach(pool, app=app, update=update, **options)
        self._logins = Logins(lambda: self._pool.stats().waiting > 0)
        self._priority = priority
        self._uds = None if uds is None else os.path.join(os.getcwd(), uds)
        self._context: ssl.SSLContext = self.library.httpx.create_ssl_context(verify, cert, trust_env)
        self._context.set_alpn_protocols(["http/1.1"])
        given = verify if isinstance(verify, bool | str) else "context"
        facts = repr((given, cert if isinstance(cert, str) else cert and cert[:2], trust_env)).encode()
        self._label = f"httpx-{hashlib.blake2b(facts, digest_size=16).hexdigest()}"
        self._drivers: dict[str | None, TlsDriver] = {}
        self._making = threading.Lock()
        self._driver(None)

    def _driver(self, name: str | None) -> TlsDriver:
        """The driver for a server that is asked for by this name; None: its host."""
        with self._making:  # two for the same name could not lend each other's connections
            found = self._drivers.get(name)
            if found is None:
                found = self._drivers[name] = TlsDriver(context=self._context, server_hostname=name, label=self._label)
            return found

    def _where(self, request: Any) -> tuple[str, int, str | Driver[Any]]:
        """Host, port and transport of a request."""
        scheme, host = request.url.scheme, request.url.raw_host.decode("ascii")
        if scheme not in _PORTS:
            raise self.library.httpx.UnsupportedProtocol(f"an URL with the scheme {scheme!r} is not supported")
        if self._uds is not None:
            if scheme == "https":
                raise NotSupported("TLS over a Unix socket is not supported")
            return self._uds, 0, "unix"
        port = request.url.port or _PORTS[scheme]
        return host, port, "tcp" if scheme == "http" else self._driver(request.extensions.get("sni_hostname"))

    def _kept(self, where: tuple[Any, ...], request: Any) -> _Turn | None:
        """The connection of a login that this thread or task has begun, for its next request."""
        kept: _Turn | None = self._logins.take(where, request.headers.multi_items())
        if kept is None or kept.usable:
            return kept and kept.next()
        kept.abandon()
        return None

    def _timeouts(self, request: Any) -> dict[str, Any]:
        given = request.extensions.get("timeout", {})
        connect = given.get("connect")
        return {
            "checkout_timeout": given.get("pool"),
            "connect_timeout": LONGEST if connect is None else connect,
            "priority": self._priority,
        }

    def _asked(self, request: Any) -> Any:
        """The request as httpcore's."""
        core: Any = self.library.httpcore
        url = request.url
        target = core.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        return core.Request(
            request.method, target, headers=request.headers.raw, content=request.stream, extensions=request.extensions
        )

    @property
    def pool(self) -> Any:
        """The handle on the pool."""
        return self._pool


class SyncTransport(_Transport):
    """`handle_request` and `close` of a transport."""

    attach = staticmethod(control.attach)
    body: ClassVar[type[SyncBody]]

    def handle_request(self, request: Any) -> Any:
        """Lease a connection, send the request, and receive the response's head."""
        library = self.library
        with library.errors():
            where = self._where(request)
            turn = self._kept(where, request)
            if turn is None:
                lease = self._pool.checkout(*where, **self._timeouts(request))
                turn = _Turn(lease, self._logins, where)
            try:
                asked = self._asked(request)
                core: Any = library.httpcore
                stream = _SyncStream(library, turn.conn, turn.exchange)
                turn.connection = core.HTTP11Connection(asked.url.origin, stream)
                answer = turn.connection.handle_request(asked)
            except BaseException:
                turn.abandon()
                raise
        return library.httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=self.body(library, turn, answer.stream),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Leave the pool; its idle connections stay for others."""
        self._logins.clear()
        self._pool.close()


class AsyncTransport(_Transport):
    """`handle_async_request` and `aclose` of a transport, for asyncio."""

    attach = staticmethod(aio.attach)
    body: ClassVar[type[AsyncBody]]

    async def handle_async_request(self, request: Any) -> Any:
        """Lease a connection, send the request, and receive the response's head; may be cancelled anywhere."""
        library = self.library
        if asyncio._get_running_loop() is None:
            raise NotSupported("AsyncSharedTransport needs asyncio; under trio use httpx's own with permits in threads")
        with library.errors():
            where = self._where(request)
            turn = self._kept(where, request)
            if turn is None:
                lease = await self._pool.checkout(*where, **self._timeouts(request))
                turn = _Turn(lease, self._logins, where)
            try:
                asked = self._asked(request)
                core: Any = library.httpcore
                stream = _AsyncStream(library, turn.conn, turn.exchange)
                turn.connection = core.AsyncHTTP11Connection(asked.url.origin, stream)
                answer = await turn.connection.handle_async_request(asked)
            except BaseException:
                turn.abandon()
                raise
        return library.httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=self.body(library, turn, answer.stream),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        """Leave the pool; its idle connections stay for others."""
        self._logins.clear()
        self._pool.close()
