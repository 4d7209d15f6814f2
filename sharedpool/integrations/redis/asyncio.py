"""The same for redis.asyncio: connections are leased as sockets, and become streams for one lease and one loop.

They move between processes, loops and threads, and are the same ones as `SharedConnectionPool`'s for threads. A
connection is opened, and greeted, by redis-py's synchronous half in a thread. Under TLS they are redis.asyncio's own,
and stay with the loop that opened them; only their permits move (`guests`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import weakref
from typing import Any, Self

import redis
from redis import connection as blocking
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection

from ... import aio, control
from ...errors import OptionError, SharedPoolError
from ...lease import Lease
from .guests import Guest, GuestDriver
from .leasing import NO_NOTIFICATIONS, Leasing, Packed, User, give_back, is_read
from .session import Session

#: redis.asyncio's own, which the synchronous half has by other names.
_ASYNCHRONOUS = ("parser_class", "encoder_class")


class SharedConnectionPool(Leasing, ConnectionPool):
    """`redis.asyncio.BlockingConnectionPool` for all processes together; docs/redis.md has what differs.

    Tasks and loops may share it; it is lazy, and may stand before a fork.

        client = redis.asyncio.Redis(connection_pool=SharedConnectionPool("cache", max_connections=20))

    Args:
        pool: The shared pool's name.
        app: The scope's name, as for sharedpool.attach.
        max_connections: The cap over all processes. None: the environment's, else 50.
        timeout: Seconds to wait for a connection; None: no limit.
        connection_class: redis.asyncio's Connection, SSLConnection or UnixDomainSocketConnection, or one of your own.
        **given: Options of the pool (idle_timeout, max_lifetime, …; see PoolOptions), and the keywords of redis-py's
            connections; `session_label` says that what no name can tell (a `redis_connect_func` that is a closure, say)
            is the same wherever the label is.

    Raises:
        OptionError: An option is wrong, or needs a connection of one's own.
    """

    def __init__(
        self, pool: str = "default", *, app: str | None = None, max_connections: int | None = None,
        timeout: float | None = 20.0, connection_class: type[Any] = Connection, **given: Any,
    ) -> None:  # fmt: skip
        self._tls = issubclass(connection_class, SSLConnection)
        if not self._tls:
            _refuse_coroutine(given)
            _refuse_own_handshake(connection_class)
        arguments = {name: value for name, value in given.items() if name not in _ASYNCHRONOUS}
        self._prepare(pool, app, max_connections, timeout, _twin(connection_class), arguments)
        given = {**arguments, **{name: value for name, value in given.items() if name in _ASYNCHRONOUS}}
        self._users = type(connection_class.__name__, (_Staying if self._tls else _User, connection_class), {})
        self._free: list[Any] = []
        self._async = aio.Pool(self._handle)
        self._drivers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, GuestDriver] = weakref.WeakKeyDictionary()
        ConnectionPool.__init__(self, connection_class, maint_notifications_config=NO_NOTIFICATIONS, **given)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Self:
        """As redis-py's; the URL's query may have the pool's name and options: `redis://host/0?pool=cache`."""
        return super().from_url(url, **kwargs)

    # --- leases -------------------------------------------------------------------------------------------------------

    async def _lease(self) -> Lease[Any]:
        via = self._via
        if self._tls:  # what one loop has opened is never lent in another: it is another driver's
            loop = asyncio.get_running_loop()
            via = self._drivers.get(loop) or self._drivers.setdefault(loop, GuestDriver(loop))
        if not self._transport.resolved:
            await asyncio.to_thread(getattr, self._transport, "host")
        try:
            return await self._async.checkout(self._transport.host, 0, via)
        except OptionError:
            raise
        except SharedPoolError as error:
            raise self._translated(error) from error

    async def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        """A connection, ready for a command; `release` gives it back.

        Raises:
            redis.exceptions.MaxConnectionsError: None became free within `timeout`.
            redis.TimeoutError: The server did not answer in time.
            redis.ConnectionError: It cannot be reached.
        """
        user = self._one()
        user._out = True
        await user._take()
        self._out.add(user)
        return user

    def _one(self) -> Any:
        """An object without a lease: one that was given back, or a new one."""
        try:
            return self._free.pop()
        except IndexError:
            user = self._users(**self.connection_kwargs)
            user._sharedpool = self
            return user

    async def release(self, connection: Any) -> None:
        """Give a connection back; others may have it if it is as it was at its start, else it is closed."""
        if connection not in self._out:
            return
        self._out.discard(connection)
        connection._out = False
        if connection._give_back() and not connection._connect_callbacks:
            self._free.append(connection)

    # --- the pool -----------------------------------------------------------------------------------------------------

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """End what this process has lent; what is idle is everybody's, and stays (`drain` ends that, too)."""
        if inuse_connections:
            for user in list(self._out):
                await user.disconnect(nowait=True)

    async def aclose(self) -> None:
        """This process leaves the pool, until its next connection; what it has lent ends."""
        await self.disconnect()
        self._handle.close()

    def reset(self) -> None:
        """Forget what is lent: it is ended, and its objects take no other connection."""
        for user in list(self._out):
            self._out.discard(user)
            user._out = False
            user._unbind()
            user._discard()

    async def drain(self, wait: float | None = None) -> int:
        """Close the connections of all processes, as `sharedpool.drain`: idle ones now, others as they come back."""
        await self._async.open()
        return await asyncio.to_thread(control.drain, self.name, wait=wait, app=self._handle.app)

    def set_retry(self, retry: Any) -> None:
        """As redis-py's."""
        self.connection_kwargs["retry"] = retry
        for user in list(self._out):
            user.retry = retry

    async def re_auth_callback(self, token: Any) -> None:
        """A new token: every connection is closed once nobody uses it, and opened anew with it."""
        await self.drain()

    def get_connection_count(self) -> list[tuple[int, dict[str, Any]]]:
        """Idle ones of all processes, and those that this process has lent, as redis-py's."""
        (_, free), (_, used) = super().get_connection_count()
        idle = 0 if self._handle.attached is None else self._handle.stats().idle
        return [(idle, free), (len(self._out), used)]

    def can_get_connection(self) -> bool:
        """Whether one is to be had without waiting, as far as can be said without asking."""
        if self._handle.attached is None:
            return True
        stats = self._handle.stats()
        return not stats.waiting and (stats.idle > 0 or stats.used < stats.max_connections)

    def _forked(self) -> None:
        out, self._out, self._free = self._out, set(), []
        for user in out:
            user._lease = user._session = user._reader = user._writer = None
            user._out = False


class _User(User):
    """What is before redis.asyncio's class."""

    async def _take(self) -> None:
        """Lease a socket, and make streams of it, on a descriptor of their own: they end before the lease does."""
        this: Any = self
        lease = await this._sharedpool._lease()
        session: Session = lease.conn
        try:
            this._reader, this._writer = await aio.streams_over(session.sock)
        except BaseException:
            lease.discard()
            raise
        self._lease, self._session = lease, session
        this._reset_himport_state()
        this._parser.on_connect(this)

    def _unbind(self) -> bool:
        """Take the streams away, at once; whether nothing was left in them."""
        this: Any = self
        reader, writer = this._reader, this._writer
        this._reader = this._writer = None
        this._parser.on_disconnect()
        return writer is not None and aio.all_said(reader, writer)

    def _give_back(self) -> bool:
        """Whether it was in the end as at its beginning."""
        this: Any = self
        clean = is_read(this._parser) and self._unbind() and not this.should_reconnect()
        if not clean:
            self._unbind()
            self._discard()
            return False
        lease, session = self._lease, self._session
        self._lease = self._session = None
        clean = session is not None and session.clean
        if lease is not None:
            give_back(lease)
        return clean

    async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Take a lease, unless there is one; it may have to wait for it."""
        this: Any = self
        if this.is_connected:
            return
        self._may_connect()
        self._discard()
        await self._take()
        for reference in list(this._connect_callbacks):
            callback = reference()
            if callback is None:
                this._connect_callbacks.remove(reference)
                continue
            task = callback(this)
            if task is not None and inspect.isawaitable(task):
                await task

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """End the connection: the lease is discarded, and whoever waits gets the permit."""
        self._unbind()
        self._discard()
        await super().disconnect(*args, **kwargs)  # type: ignore[misc]

    def _close(self) -> None:
        self._unbind()
        self._discard()

    def __del__(self) -> None:
        """Nothing: a lease that is forgotten is ended by its pool; its streams are not those of the connection."""
        this: Any = self
        with contextlib.suppress(Exception):
            if this._writer is not None and not this._writer.transport.is_closing():
                this._writer.transport.abort()

    async def send_command(self, *args: Any, **kwargs: Any) -> None:
        """As redis-py's."""
        await self.send_packed_command(self.pack_command(*args), check_health=kwargs.get("check_health", True))

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """As redis-py's; what was packed by others than this object's `pack_commands` is not known, and not lent on."""
        this: Any = self
        if not this.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health and this.health_check_interval:
            await this.check_health()
        session = self._session
        if session is None:
            raise redis.ConnectionError("the connection was ended while it was in use")
        session.sends(command.commands if isinstance(command, Packed) else None)
        await super().send_packed_command(command, check_health=False)  # type: ignore[misc]

    async def _read_response_from_parser(self, *args: Any, **kwargs: Any) -> Any:
        session = self._session
        response = await super()._read_response_from_parser(*args, **kwargs)  # type: ignore[misc]
        if session is not None:
            session.answered(response if isinstance(response, redis.ResponseError) else None)
        return response


class _Staying(_User):
    """The same for TLS: its streams are the loop's own, and stay with the lease's guest."""

    async def _take(self) -> None:
        this: Any = self
        while True:
            lease = await this._sharedpool._lease()
            guest: Guest = lease.conn.connection
            if guest.writer is None or guest.usable:
                break
            lease.discard()
        self._lease, self._session = lease, guest
        if guest.writer is not None:
            this._reader, this._writer = guest.reader, guest.writer
            this._parser.on_connect(this)
            return
        try:
            await self._open(guest)
        except BaseException:
            self._unbind()
            self._discard()
            raise

    async def _open(self, guest: Guest) -> None:
        """As redis.asyncio itself does it."""
        this: Any = self
        callbacks, this._connect_callbacks = this._connect_callbacks, []
        try:
            await super(_User, self).connect_check_health(  # type: ignore[misc]
                check_health=False, retry_socket_connect=False
            )
        finally:
            this._connect_callbacks = callbacks
        guest.reader, guest.writer = this._reader, this._writer
        guest.spoiled = False  # by the handshake's own commands

    def _unbind(self) -> bool:
        this: Any = self
        guest, writer = self._session, this._writer
        this._reader = this._writer = None
        this._parser.on_disconnect()
        if isinstance(guest, Guest) and guest.writer is writer:
            return writer is not None  # the driver says whether they are lent on
        if writer is not None:
            writer.transport.abort()
        return False


def _twin(connection_class: type[Any]) -> type[Any]:
    """The synchronous class that opens the same, and names its key."""
    if issubclass(connection_class, SSLConnection):
        return blocking.SSLConnection
    if issubclass(connection_class, UnixDomainSocketConnection):
        return blocking.UnixDomainSocketConnection
    return blocking.Connection


def _refuse_coroutine(given: dict[str, Any]) -> None:
    if inspect.iscoroutinefunction(given.get("redis_connect_func")):
        raise OptionError(
            "option 'redis_connect_func' is a coroutine function (from the call); connections are greeted by redis-py's"
            " synchronous half; allowed is a function",
            option="redis_connect_func", value=given["redis_connect_func"], source="the call", allowed="a function",
        )  # fmt: skip


#: Of a connection's methods those that decide what the handshake says.
_HANDSHAKE = ("on_connect", "on_connect_check_health", "_connect")


def _refuse_own_handshake(connection_class: type[Any]) -> None:
    """What a class of the user's own says to the server would not be said: redis-py's synchronous half greets."""
    for name in _HANDSHAKE:
        usual = UnixDomainSocketConnection if issubclass(connection_class, UnixDomainSocketConnection) else Connection
        if getattr(connection_class, name, None) is not getattr(usual, name):
            raise OptionError(
                f"option 'connection_class' has the value {connection_class!r} (from the call), whose {name}() is its"
                " own; connections are greeted by redis-py's synchronous half, which would not call it; allowed is a"
                " class that leaves it as it is",
                option="connection_class", value=connection_class, source="the call", allowed=f"redis-py's own {name}",
            )  # fmt: skip
