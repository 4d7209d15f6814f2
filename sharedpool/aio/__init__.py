"""The same pools for asyncio: `async with pool.connection(host, port) as conn`.

Synchronous and asynchronous users of a process share its connections. Nothing here blocks a loop: who waits in the
queue is a future, what takes its time (attaching, opening, taking over from the arbiter) has a thread while it lasts.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import socket
import threading
import weakref
from asyncio import StreamReader, StreamWriter, get_running_loop
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from sys import _getframe
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from .. import control, pool
from ..drivers import Driver
from ..drivers.sockets import Copy, Pooled
from ..errors import OptionError, PoolStopped, file_limit
from ..events import where_taken
from ..hooks import Callback
from ..lease import Lease
from ..options import NOT_GIVEN, NotGiven
from ..pool import Attached, _Handle
from ..stats import KeyStats, PoolStats
from ._threads import give_back, in_thread

T = TypeVar("T")
P = ParamSpec("P")


def attach(
    name: str = "default", *, app: str | None = None, update: bool = True, transport: str | Driver[Any] = "tcp",
    **given: Any,
) -> Pool[socket.socket]:  # fmt: skip
    """A handle on a pool for asyncio, as `sharedpool.attach` gives one; lazy, and safe before forks.

    Args:
        name: The pool's name.
        app: The scope's name; not given: SHAREDPOOL_DIR, else SHAREDPOOL_APP, else "default".
        update: False: options that differ from the pool's raise PoolOptionsDiffer instead of being applied.
        transport: As for `sharedpool.attach`.
        **given: Options (see PoolOptions).

    Raises:
        OptionError: A name, option or value is wrong; at once, also for the environment's.
    """
    return Pool(control.attach(name, app=app, update=update, transport=transport, **given))


def permit(
    name: str, *, app: str | None = None, update: bool = True,
    checkout_timeout: float | NotGiven | None = NOT_GIVEN, priority: str = "normal", **given: Any,
) -> Permit:  # fmt: skip
    """A cap for anything, without a connection: `async with permit`, or a decorator of coroutine functions.

    Args:
        name: The pool's name; all processes of the scope that use it share the cap.
        app: As for attach.
        update: As for attach.
        checkout_timeout: Seconds to wait for a permit; None: no limit.
        priority: "normal" or "high", as for `sharedpool.permit`.
        **given: Options, as for attach: max_connections is the cap.

    Raises:
        OptionError: As for attach.
    """
    plain = control.permit(name, app=app, update=update, checkout_timeout=checkout_timeout, priority=priority, **given)
    return Permit(Pool(plain.pool), name, priority)


class Pool(Generic[T]):
    """A handle on one pool, for coroutines. Tasks, loops and threads may share it; in a forked child it attaches anew.

    Sockets that it lends are non-blocking, for `loop.sock_sendall` and its like.

    Args:
        handle: The synchronous handle, whose leases and callbacks these are.
    """

    def __init__(self, handle: _Handle[T]) -> None:
        self._handle = handle
        self._opening: tuple[int, Future[None] | None] = (0, None)

    @property
    def name(self) -> str:
        """The pool's name."""
        return str(self._handle.name)

    @property
    def attached(self) -> Attached | None:
        """As `sharedpool.Pool.attached`."""
        return self._handle.attached

    def __repr__(self) -> str:
        return f"<aio.{repr(self._handle)[1:]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._handle,)

    async def open(self, timeout: float = 30.0) -> Self:
        """Attach now instead of at the first use, to fail early.

        Raises:
            StartFailed, AttachRefused, PoolNotFound, PoolOptionsDiffer, NotSupported.
        """
        if self._handle._attached is None:
            pid, opening = self._opening
            if opening is None or opening.done() or pid != os.getpid():
                opening = Future()
                threading.Thread(target=self._open, args=(opening, timeout), name="sharedpool-aio", daemon=True).start()
                self._opening = os.getpid(), opening
            await asyncio.shield(asyncio.wrap_future(opening))
        return self

    def _open(self, opening: Future[None], timeout: float) -> None:
        """In a thread, once for all tasks that want it."""
        try:
            self._handle.open(timeout)
            if pool.mode() == "shared":
                with pool._loading:  # a fork waits meanwhile: its child would find half a module
                    from . import _queueing  # noqa: F401
        except BaseException as error:  # noqa: BLE001 - told to who waits
            opening.set_exception(error)
        else:
            opening.set_result(None)

    def close(self) -> None:
        """Detach, as `sharedpool.Pool.close`; who waits gets PoolStopped."""
        self._handle.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._handle.close()

    # --- checkout -----------------------------------------------------------------------------------------------------

    async def checkout(
        self, host: str, port: int = 0, transport: str | Driver[Any] | None = None, *,
        checkout_timeout: float | NotGiven | None = NOT_GIVEN, connect_timeout: float | NotGiven = NOT_GIVEN,
        priority: str = "normal",
    ) -> Lease[T]:  # fmt: skip
        """Lease a connection; waits in line when the cap is reached. Arguments as for `sharedpool.Pool.checkout`.

        Checkin and discard are the lease's, are no coroutines, and never wait. A checkout that is cancelled leaves the
        queue, passes on what it was granted, and breaks off what it was opening.

        Raises:
            PoolTimeout: None became free in time.
            ConnectFailed, ConnectTimeout: The remote refused or did not answer.
            TooManyWaiting, PoolStopped, PoolNotFound, PoolOptionsDiffer, OptionError, StartFailed, AttachRefused.
        """
        return await self._take(host, port, transport, checkout_timeout, connect_timeout, priority)

    async def _take(
        self, host: str, port: int, transport: str | Driver[Any] | None,
        checkout_timeout: float | NotGiven | None, connect_timeout: float | NotGiven, priority: str,
    ) -> Lease[T]:  # fmt: skip
        handle = self._handle
        while True:
            attached = handle._attached
            if attached is None:
                await self.open()
                continue
            route, patience, connect = handle.plan(
                attached, host, port, transport, checkout_timeout, connect_timeout, priority
            )
            try:
                lease: Lease[T] | None = attached.take_own(route)
                if lease is None or lease.conn is None:
                    lease = await _take_slowly(attached, route, lease, patience, connect)
                break
            except PoolStopped as error:
                if error.waited or not attached.lost:
                    raise
                handle._leave(attached)  # its arbiter was stopped; there may be a new one
        conn: Any = lease.conn
        if isinstance(conn, socket.socket):
            conn.settimeout(0.0)
        if attached.noting:
            attached.places[lease.place] = where_taken(_getframe())
        if attached.on_checkout:
            attached.hooks.tell("checkout", lease)
        return lease

    def connection(
        self, host: str, port: int = 0, transport: str | Driver[Any] | None = None, *,
        checkout_timeout: float | NotGiven | None = NOT_GIVEN, connect_timeout: float | NotGiven = NOT_GIVEN,
        priority: str = "normal",
    ) -> AbstractAsyncContextManager[T]:  # fmt: skip
        """Lease a connection for an async with block, as `checkout` does; an exception in the block discards it."""
        return _Leasing(self, host, port, transport, checkout_timeout, connect_timeout, priority)

    def stream(
        self, host: str, port: int = 0, transport: str | Driver[Any] | None = None, *,
        checkout_timeout: float | NotGiven | None = NOT_GIVEN, connect_timeout: float | NotGiven = NOT_GIVEN,
        priority: str = "normal", limit: int = 65536,
    ) -> AbstractAsyncContextManager[tuple[StreamReader, StreamWriter]]:  # fmt: skip
        """Lease a connection for an async with block, as a reader and a writer that are made for this lease.

        It is given back as it is found when the block ends: with anything received and not read, or written and not
        sent, it is discarded. So end with `await writer.drain()` only where a reply has been read.

        Args:
            host: As for checkout, and so are port, transport, the time-outs and priority.
            port: See there.
            transport: See there.
            checkout_timeout: See there.
            connect_timeout: See there.
            priority: See there.
            limit: Of the reader, as for asyncio.open_connection, bytes.
        """
        return _Streaming(self, host, port, transport, checkout_timeout, connect_timeout, priority, limit)

    def checkin(self, lease: Lease[Any]) -> None:
        """The same as `lease.checkin()`."""
        self._handle.checkin(lease)

    def discard(self, lease: Lease[Any]) -> None:
        """The same as `lease.discard()`."""
        self._handle.discard(lease)

    # --- as the synchronous handle ------------------------------------------------------------------------------------

    async def prewarm(
        self, host: str, port: int = 0, transport: str | Driver[Any] | None = None, count: int | None = None
    ) -> None:
        """As `sharedpool.Pool.prewarm`."""
        await in_thread(functools.partial(self._handle.prewarm, host, port, transport, count))

    def on(self, event: str, callback: Callback) -> Callable[[], None]:
        """As `sharedpool.Pool.on`; callbacks are no coroutines, and run on the loop's thread or another."""
        return self._handle.on(event, callback)

    def on_notify(self, callback: Callable[[Any], object]) -> Callable[[], None]:
        """As `sharedpool.Pool.on_notify`: called on the pool's event thread."""
        return self._handle.on_notify(callback)

    def stats(self) -> PoolStats:
        """As `sharedpool.Pool.stats`; attaches first where nothing has yet, which `await pool.open()` does without
        blocking the loop.
        """
        return self._handle.stats()

    def worker_stats(self) -> dict[str, int]:
        """As `sharedpool.Pool.worker_stats`."""
        return self._handle.worker_stats()

    def key_stats(self) -> dict[str, KeyStats]:
        """As `sharedpool.Pool.key_stats`; attaches first, as `stats`."""
        return self._handle.key_stats()


async def _take_slowly(
    attached: Any, route: Any, lease: Lease[Any] | None, patience: float | None, connect: float
) -> Lease[Any]:
    if not hasattr(attached, "attempt"):  # local mode: its lock and conditions are waited for in a thread
        gone: list[Any] = []
        work = functools.partial(attached.checkout, route, patience, connect, given_up=lambda: bool(gone))
        return await in_thread(work, undo=give_back, stop=gone.append)
    from ._queueing import take_slowly

    return await take_slowly(attached, route, lease, patience, connect)


class _Leasing(Generic[T]):
    """`async with pool.connection(...)`; may be entered once."""

    __slots__ = ("_arguments", "_lease", "_pool")

    _lease: Lease[T]

    def __init__(self, pool: Pool[T], *arguments: Any) -> None:
        self._pool = pool
        self._arguments = arguments

    async def __aenter__(self) -> T:
        self._lease = await self._pool._take(*self._arguments)
        return self._lease.conn

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lease.__exit__(kind, error, trace)


async def streams_over(conn: Any, limit: int = 65536) -> tuple[StreamReader, StreamWriter]:
    """A reader and a writer on a duplicate of a leased socket, for this lease: abort their transport before it ends.

    Raises:
        FileLimit: No descriptor is left.
    """
    try:
        number = conn.number() if isinstance(conn, Pooled) else conn.fileno()
        copy = Copy(os.dup(number))
    except OSError as error:
        raise file_limit(error, "make streams of a connection") from error
    loop = get_running_loop()
    try:
        copy.setblocking(False)
        reader = StreamReader(limit=limit, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport: asyncio.Transport
        if hasattr(conn, "sealed"):
            from ._tls import Records

            records = Records(conn, protocol)
            await loop.create_connection(lambda: records, sock=copy)
            transport = records.transport
        else:
            transport, _ = await loop.create_connection(lambda: protocol, sock=copy)
    except BaseException:
        copy.close()
        raise
    if isinstance(conn, Pooled):
        copy.of = conn  # from now on: what is done to it, a user does
    return reader, StreamWriter(transport, protocol, reader, loop)


def all_said(reader: StreamReader, writer: StreamWriter) -> bool:
    """Take such streams away, at once: out of the loop's epoll, whoever has the connection next; nothing more is sent.

    Returns:
        Whether nothing received was left unread, nothing written unsent, and the connection open.
    """
    transport = writer.transport
    unread = bool(reader._buffer) or reader.at_eof() or reader.exception() is not None  # type: ignore[attr-defined]
    said = not unread and not transport.is_closing() and not transport.get_write_buffer_size()
    transport.abort()
    return said


class _Streaming:
    """`async with pool.stream(...)`; may be entered once.

    The streams stand on a descriptor of their own, so that what asyncio does to it when they end (take it out of its
    epoll, which knows connections and not descriptors, and close it) leaves the connection alone.
    """

    __slots__ = ("_arguments", "_lease", "_limit", "_pool", "_reader", "_writer")

    def __init__(self, pool: Pool[Any], *arguments: Any) -> None:
        self._pool = pool
        *self._arguments, self._limit = arguments
        self._lease: Lease[Any] | None = None

    async def __aenter__(self) -> tuple[StreamReader, StreamWriter]:
        lease = self._lease = await self._pool._take(*self._arguments)
        try:
            self._reader, self._writer = await streams_over(lease.conn, self._limit)
        except BaseException:
            lease.discard()
            raise
        return self._reader, self._writer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lease is not None
        lease = self._lease
        said = all_said(self._reader, self._writer)
        if lease.in_force:
            if kind is None and said:
                lease.checkin()
            else:
                lease.discard()


class Permit:
    """The cap without a connection: `async with permit:`, or a decorator. Tasks may share one; it may be nested.

    Args:
        pool: The pool that counts; its transport is "permit".
        name: What the permit is for.
        priority: "normal" or "high".
    """

    def __init__(self, pool: Pool[None], name: str, priority: str = "normal") -> None:
        self.pool = pool
        self.name = name
        self._priority = priority
        self._held: weakref.WeakKeyDictionary[asyncio.Task[Any], list[Lease[None]]] = weakref.WeakKeyDictionary()

    async def _take(self) -> Lease[None]:
        return await self.pool._take(self.name, 0, "permit", NOT_GIVEN, NOT_GIVEN, self._priority)

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        lease = await self._take()
        self._held.setdefault(task, []).append(lease)
        return self

    async def __aexit__(self, *exception: object) -> None:
        task = asyncio.current_task()
        leases = self._held.get(task) if task is not None else None
        if not leases:  # entered by another task, as fixtures are: one is as good as another
            leases = next((others for others in list(self._held.values()) if others), None)
        if leases:
            lease = leases.pop()
            if lease.in_force:
                lease.checkin()

    def __call__(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        """Every call of the coroutine function holds a permit.

        Raises:
            OptionError: It is none.
        """
        if not inspect.iscoroutinefunction(function):
            raise OptionError(
                f"option 'function' has the value {function!r} (from the call); allowed is a coroutine function",
                option="function", value=function, source="the call", allowed="a coroutine function",
            )  # fmt: skip

        @functools.wraps(function)
        async def permitted(*args: P.args, **kwargs: P.kwargs) -> T:
            with await self._take():
                return await function(*args, **kwargs)

        return permitted
