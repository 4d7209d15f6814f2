"""aiohttp (extra `aiohttp`): a connector whose open connections, idle ones too, count for all processes of the host.

    async with aiohttp.ClientSession(connector=SharedConnector("api", max_connections=20)) as session: ...

A connection of asyncio belongs to its loop and cannot move, so what is leased is its permit, with the connection as
the pool's guest: an idle one stays this connector's until somebody else has waited for its permit for a while
(`steal_after`), and is then closed. The pool has taken the place of the connector's own store of idle connections;
how connections are made (names, proxies, TLS) is aiohttp's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import socket
import weakref
from collections.abc import Awaitable
from time import monotonic
from typing import Any, Final, cast

from aiohttp import ClientConnectionError, ClientRequest, ClientTimeout, TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection, _TransportPlaceholder
from aiohttp.helpers import ceil_timeout
from aiohttp.http_exceptions import HttpProcessingError

from .. import aio, control
from ..drivers.dbapi import DbapiDriver, Session
from ..drivers.sockets import Ending, end, readable
from ..errors import LeaseError, OptionError, PoolTimeout, SharedPoolError
from ..exchange import MOST_INTERIM, End, Exchange
from ..lease import Lease
from ..logins import Logins
from ..options import PoolOptions
from ..stats import PoolStats

#: The pool's own options; whatever else is given is for aiohttp's connector.
_OPTIONS: Final = frozenset(field.name for field in dataclasses.fields(PoolOptions)) - {"checkout_timeout"}
#: Seconds that a server has to close, too, before the permit goes on all the same.
_SEEN_OFF: Final = 1.0
#: The same for a thread that waits for it.
_SEEN_OFF_WAITING: Final = 0.2


class SharedConnector(TCPConnector):
    """`aiohttp.TCPConnector` under a cap of all processes; docs/aiohttp.md has what differs.

    Args:
        pool: The shared pool's name.
        app: The scope's name, as for sharedpool.attach.
        checkout_timeout: Seconds to wait for a permit; None: as long as aiohttp's own time-outs let it.
        limit: Of this connector's own; 0: none.
        limit_per_host: The same for each host; the pool's `max_per_key` is over all processes.
        **given: Options of the pool (max_connections, steal_after, …; see PoolOptions), and aiohttp's.

    What aiohttp raises is raised: ConnectionTimeoutError where no permit became free in time, ClientConnectionError
    where the pool cannot be used, and its own errors of connecting. Made in a running loop, as aiohttp's; what a forked
    child inherits is of no use there.

    Raises:
        OptionError: An option is wrong; or happy_eyeballs_delay is given, which opens several connections for one.
    """

    def __init__(
        self, pool: str = "default", *, app: str | None = None, checkout_timeout: float | None = None, limit: int = 0,
        limit_per_host: int = 0, **given: Any,
    ) -> None:  # fmt: skip
        options = {name: given.pop(name) for name in list(given) if name in _OPTIONS}
        if given.setdefault("happy_eyeballs_delay", None) is not None:
            delay = given["happy_eyeballs_delay"]
            raise OptionError(
                f"option 'happy_eyeballs_delay' has the value {delay!r} (from the call); it opens several connections"
                " at once for one permit; allowed is None",
                option="happy_eyeballs_delay", value=delay, source="the call", allowed="None",
            )  # fmt: skip
        super().__init__(limit=limit, limit_per_host=limit_per_host, **given)
        if options and self._keepalive_timeout is not None:
            options.setdefault("idle_timeout", self._keepalive_timeout)
        self._handle = control.attach(pool, app=app, checkout_timeout=checkout_timeout, **options)
        self._shared: aio.Pool[Any] = aio.Pool(self._handle)
        self._driver = _Driver(self._loop)
        self._factory: Any = functools.partial(_Handler, loop=self._loop)
        self._logins = Logins(lambda: self._handle.stats().waiting > 0)
        self._leases: dict[ResponseHandler, Lease[Any]] = {}
        self._addresses: dict[Any, str] = {}

    def shared_stats(self) -> PoolStats:
        """The pool's numbers over all processes; attaches."""
        return self._handle.stats()

    # --- leases -------------------------------------------------------------------------------------------------------

    async def connect(self, req: ClientRequest, traces: list[Any], timeout: ClientTimeout) -> Connection:
        """As aiohttp's: an idle connection of this connector, or a new one, with its permit; waits in the queue."""
        key = req.connection_key
        async with ceil_timeout(timeout.connect, timeout.ceil_threshold):
            if self._available_connections(key) <= 0:
                await self._wait_for_available_connection(key, traces)
            placeholder = cast(ResponseHandler, _TransportPlaceholder(self._placeholder_future))
            self._acquire(key, placeholder)
            try:
                lease = await self._lease(req, traces, timeout)
            except BaseException:
                self._release_acquired(key, placeholder)
                raise
        protocol = cast(_Handler, lease.conn.connection.protocol)
        self._forget(key, placeholder)
        self._acquire(key, protocol)
        self._leases[protocol] = lease
        return Connection(self, key, protocol, self._loop)

    def _acquire(self, key: Any, protocol: ResponseHandler) -> None:
        self._acquired.add(protocol)
        if self._limit_per_host:
            self._acquired_per_host[key].add(protocol)

    def _forget(self, key: Any, protocol: ResponseHandler) -> None:
        self._acquired.discard(protocol)
        if self._limit_per_host:
            self._acquired_per_host[key].discard(protocol)

    async def _lease(self, req: ClientRequest, traces: list[Any], timeout: ClientTimeout) -> Lease[Any]:
        address = self._address(req.connection_key)
        while True:
            lease = self._kept(address, req) or await self._permit(address)
            try:
                wire = lease.conn.connection
                if wire.protocol is None:
                    await self._open(lease.conn, wire, req, traces, timeout)
                elif not wire.usable or wire.readable or self._is_stale(wire):
                    lease.discard()
                    continue
                else:
                    wire.protocol.begin(req)
                    await self._use_again(req, traces)
                self._check_open()
                return lease
            except BaseException:
                if lease.in_force:
                    lease.discard()
                raise

    def _kept(self, address: str, req: ClientRequest) -> Lease[Any] | None:
        """The lease of a login that this task has begun, for its next request."""
        lease: Lease[Any] | None = self._logins.take(address, _fields(req))
        if lease is None or not lease.in_force:
            return None
        lease.conn.connection.protocol.legs += 1
        return lease

    async def _permit(self, address: str) -> Lease[Any]:
        self._check_open()
        try:
            return await self._shared.checkout(address, 0, self._driver)
        except PoolTimeout:  # a TimeoutError, of which aiohttp makes its own
            raise
        except SharedPoolError as error:
            raise ClientConnectionError(str(error)) from error

    def _check_open(self) -> None:
        if self._closed:
            raise ClientConnectionError("Connector is closed.")

    def _is_stale(self, wire: _Wire) -> bool:
        return self._keepalive_timeout is not None and monotonic() - wire.since > self._keepalive_timeout

    async def _open(
        self, session: Session, wire: _Wire, req: ClientRequest, traces: list[Any], timeout: ClientTimeout
    ) -> None:
        for trace in traces:
            await trace.send_connection_create_start()
        protocol = wire.protocol = cast(_Handler, await self._create_connection(req, traces, timeout))
        protocol.begin(req)
        wire.watch(session)
        for trace in traces:
            await trace.send_connection_create_end()

    async def _use_again(self, req: ClientRequest, traces: list[Any]) -> None:
        for trace in traces:
            await trace.send_connection_reuseconn()
        if req.proxy:
            self._update_proxy_auth_header_and_build_proxy_req(req)

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        lease = self._leases.pop(protocol, None)
        if lease is None:  # half of a tunnel, or the connector has been closed
            super()._release(key, protocol, should_close=True)
            return
        self._release_acquired(key, protocol)
        wire = lease.conn.connection if lease.in_force else None
        if wire is None:  # taken away, or another process's
            protocol.close()
            return
        wire.since = monotonic()
        through = not (self._force_close or should_close or protocol.should_close)
        end = wire.protocol.exchange.end(through=through)
        if end in (End.OFFERED, End.BEGUN) and self._logins.keep(
            self._address(key), end, lease, lambda: _give_up(lease)
        ):
            return
        with contextlib.suppress(LeaseError):
            if end is End.CLEAN or end is End.SURPLUS:
                lease.checkin()  # one with surplus bytes counts as unclean
            else:
                lease.discard()

    def _address(self, key: Any) -> str:
        """A key's name in the pool; without secrets, and another one for each key of this connector."""
        known = self._addresses.get(key)
        if known is None:
            known = f"{key.host}:{key.port}{' by TLS' if key.is_ssl else ''}"
            if key.proxy is not None:
                known += f" through {key.proxy.host}:{key.proxy.port}"
            same = sum(other.partition("#")[0] == known for other in self._addresses.values())
            self._addresses[key] = known = f"{known}#{same}" if same else known
        return known

    def _close(self, *, abort_ssl: bool = False) -> list[Awaitable[object]]:
        leases, self._leases = list(self._leases.values()), {}
        self._logins.clear()
        if not self._loop.is_closed():
            for lease in leases:
                if lease.in_force:
                    with contextlib.suppress(LeaseError):
                        lease.discard()
            waiting: list[Awaitable[object]] = [wire.close(abort=abort_ssl) for wire in list(self._driver.wires)]
        else:
            waiting = []
        return waiting + super()._close(abort_ssl=abort_ssl)


def _give_up(lease: Lease[Any]) -> None:
    if lease.in_force:
        lease.discard()


def _fields(req: ClientRequest) -> list[tuple[str, str]]:
    return [*req.headers.items(), *(req.proxy_headers or {}).items()]


def _is_sound(req: ClientRequest) -> bool:
    """Whether the head announces exactly what aiohttp sends behind it.

    aiohttp sends chunks where `chunked` is not None. It sends a body as it is where the user's own field speaks of
    chunks, and then a server may find another request in it.
    """
    length = req.headers.get("Content-Length")
    codings = [value.lower() for value in req.headers.getall("Transfer-Encoding", ())]
    if codings or req.chunked is not None:
        return bool(req.chunked) and codings == ["chunked"] and length is None
    size = req.body.size if req.body else 0
    return length == str(size) or (length is None and size == 0)


class _Handler(ResponseHandler):
    """aiohttp's protocol, while an Exchange reads along."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.exchange = Exchange()
        self.legs = 0

    def begin(self, req: ClientRequest) -> None:
        """A request is about to be sent."""
        sound = _is_sound(req) and not self.exchange.surplus
        self.exchange = Exchange(self.legs)
        self.exchange.asks(req.method, _fields(req), sound=sound)

    def data_received(self, data: bytes) -> None:
        """As aiohttp's."""
        if data:
            self.exchange.came(data)
            if self.exchange.flooded:
                self.set_exception(HttpProcessingError(message=f"got more than {MOST_INTERIM} interim answers"))
                self.close()
                return
        super().data_received(data)


class _Wire:
    """A connection of a loop's, and the stand-in by which the pool knows it.

    Attributes:
        protocol: aiohttp's, once there is one.
        since: When it was last given back, s.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.protocol: _Handler | None = None
        self.since = monotonic()
        self._loop = loop
        self._session: Session | None = None
        self._ended: asyncio.Future[None] | None = None

    @property
    def usable(self) -> bool:
        """Whether it is open, and the last answer was read to its end, and nothing came beyond it."""
        protocol = self.protocol
        return (
            protocol is not None
            and protocol.is_connected()
            and not protocol.should_close
            and not protocol.exchange.surplus
        )

    @property
    def readable(self) -> bool:
        """Whether the server has said something that the loop has not read yet."""
        transport = self.protocol.transport if self.protocol is not None else None
        sock = transport.get_extra_info("socket") if transport is not None else None
        return sock is None or readable(sock.fileno())

    def watch(self, session: Session) -> None:
        """Show by its stand-in when the connection has ended."""
        self._session = session
        closed = self.protocol.closed if self.protocol is not None else None
        if closed is None:
            self._lost(None)
        else:
            closed.add_done_callback(self._lost)

    def _lost(self, closed: asyncio.Future[None] | None) -> None:
        if closed is not None and not closed.cancelled():
            closed.exception()  # aiohttp has told whoever was in the midst of something
        if self._ended is None and self._session is not None:
            self._session.sign_off()

    def close(self, *, abort: bool = False) -> asyncio.Future[None]:
        """End it, in its loop; done when the server has closed, too, or after a second."""
        if self._ended is not None:
            return self._ended
        ended = self._ended = self._loop.create_future()
        copy = self._copy()
        protocol = self.protocol
        closed = protocol.closed if protocol is not None else None
        if protocol is not None:
            protocol.abort() if abort else protocol.close()

        def see_off(_: object = None) -> None:
            if copy is None:
                self._over()
            else:
                self._see_off(copy, Ending(copy), self._loop.time() + _SEEN_OFF, begun=False)

        if closed is None or closed.done():
            see_off()
        else:
            closed.add_done_callback(see_off)
        return ended

    def _copy(self) -> socket.socket | None:
        """The connection itself, to see when the server has closed it."""
        transport = self.protocol.transport if self.protocol is not None else None
        sock = transport.get_extra_info("socket") if transport is not None else None
        try:
            return socket.socket(fileno=os.dup(sock.fileno())) if sock is not None else None
        except OSError:
            return None

    def _see_off(self, copy: socket.socket, ending: Ending, until: float, *, begun: bool) -> None:
        if not begun:
            ending.begin()
        if ending.ended() or self._loop.time() >= until:
            copy.close()
            self._over()
        else:
            self._loop.call_later(ending.pause(), lambda: self._see_off(copy, ending, until, begun=True))

    def _over(self) -> None:
        if self._session is not None:
            self._session.sign_off()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def cut(self) -> None:
        """Its loop was closed over it: whoever has found that out sees it off, for a moment."""
        copy = self._copy()
        if copy is not None:
            with copy:
                end(copy, _SEEN_OFF_WAITING)
        if self._session is not None:
            self._session.sign_off()


class _Driver(DbapiDriver):
    """Permits with a guest: opening makes the stand-in only, because connecting is for the request's own task."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__("aiohttp", lambda: self._made(loop), clean=lambda wire: bool(wire.usable))
        self._loop = loop
        self.wires: weakref.WeakSet[_Wire] = weakref.WeakSet()

    def _made(self, loop: asyncio.AbstractEventLoop) -> _Wire:
        wire = _Wire(loop)
        self.wires.add(wire)
        return wire

    def end(self, conn: Session) -> None:
        """In its loop, whichever thread has found out that it is time."""
        wire: _Wire = conn.connection
        wire._session = conn
        try:
            self._loop.call_soon_threadsafe(wire.close)
        except RuntimeError:  # the loop was closed
            wire.cut()
