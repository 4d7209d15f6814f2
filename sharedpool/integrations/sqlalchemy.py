"""Pools for SQLAlchemy 2 (extra `sqlalchemy`) whose connections all processes of the host share, under one cap.

    engine = create_engine(url, poolclass=SharedQueuePool, pool_size=20, max_overflow=0)
    engine = create_engine(url, **options(max_connections=20))

What SQLAlchemy does around a DBAPI connection (`_ConnectionRecord`, `_ConnectionFairy`: events, reset on return,
pre-ping, invalidation) stays SQLAlchemy's own. A pool gives it a record in `_do_get` and has it back in
`_do_return_conn`; here both are a lease of a shared pool. A record belongs to one object of this process: where that
was opened, taken over from another process or set back, the record is given out unconnected, so that SQLAlchemy itself
connects it: by `_invoke_creator`, which here hands out what is leased already, and then the `connect` events. Where
SQLAlchemy closes a connection (`_close_connection`), the lease is discarded. Nothing else is overridden; to subclass
QueuePool instead would mean to disarm its queue and its counts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import logging
import os
import socket
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol, cast

from sqlalchemy import exc
from sqlalchemy.pool import Pool, PoolProxiedConnection
from sqlalchemy.pool.base import ConnectionPoolEntry, _ConnectionRecord
from sqlalchemy.util.concurrency import await_only, greenlet_spawn

from .. import aio, control
from ..aio._threads import in_thread
from ..drivers import Register
from ..drivers import postgres as wire
from ..drivers.dbapi import DbapiDriver, Session
from ..drivers.naming import NotClear, name_of
from ..errors import (
    ConnectFailed,
    ConnectTimeout,
    LeaseError,
    OptionError,
    PoolTimeout,
    SharedPoolError,
    TooManyWaiting,
)
from ..lease import Lease
from ..options import NOT_GIVEN, NotGiven
from ..pool import Pool as Handle
from ..stats import PoolStats

log = logging.getLogger("sharedpool")

#: The dialects whose sessions can move, and what makes their driver.
_MOVING: Final = {"psycopg": "Psycopg3Driver", "psycopg2": "Psycopg2Driver"}
#: SQLAlchemy's code for "QueuePool limit reached", whose page explains what to do.
_LIMIT: Final = "3o7r"
#: A thread that waits for a loop checks this often whether the loop still runs, s.
_LOOKS_UP: Final = 0.2
#: Where an object of a library that moves keeps its record.
_RECORD: Final = "_sharedpool_record"
#: Where one for asyncio keeps what SQLAlchemy uses in its place.
_ADAPTED: Final = "_sharedpool_adapted"

_Make = Callable[[tuple[Any, ...], dict[str, Any]], Any]
#: What `dialect.connect` does instead of connecting, while an engine's own creator runs for a pool.
_making: contextvars.ContextVar[_Make | None] = contextvars.ContextVar("_making", default=None)


def options(
    max_connections: int | NotGiven = NOT_GIVEN,
    *,
    shared_name: str | None = None,
    app: str | None = None,
    checkout_timeout: float | None = 30.0,
    idle_timeout: float | NotGiven | None = NOT_GIVEN,
    max_lifetime: float | None = None,
    steal_after: float | NotGiven = NOT_GIVEN,
    order: str | NotGiven = NOT_GIVEN,
    reset: str = "handoff",
    move: bool = True,
    asyncio: bool = False,
) -> dict[str, Any]:
    """The keywords for create_engine, or create_async_engine with `asyncio=True`.

    Args:
        max_connections: The cap over all processes. Not given: the environment's, else 50.
        shared_name: The pool's name; None: made from what is connected to, without passwords.
        app: The scope's name.
        checkout_timeout: Seconds to wait for a connection; None: no limit.
        idle_timeout: Seconds after which an idle connection is closed; None: never. Not given: 150.
        max_lifetime: Seconds after which a connection is closed once nobody leases it; None: never.
        steal_after: Seconds after which who waits gets the permit of a connection that cannot move, and with
            order="sticky" one that can.
        order: Who is next: "fifo", "sticky" or "auto", as for sharedpool.attach.
        reset: When a session that moves is set back (DISCARD ALL): "handoff", "never" or "always".
        move: False: sessions stay in the process that opened them.
        asyncio: For create_async_engine.
    """
    chosen: dict[str, Any] = {
        "poolclass": AsyncSharedQueuePool if asyncio else SharedQueuePool,
        "pool_size": max_connections, "max_overflow": 0, "pool_timeout": checkout_timeout, "shared_name": shared_name,
        "app": app, "idle_timeout": idle_timeout, "max_lifetime": max_lifetime, "steal_after": steal_after,
        "order": order, "reset": reset, "move": move,
    }  # fmt: skip
    return chosen


class _Library(Protocol):
    """A driver, and how this module reaches its connections and their records."""

    host: str
    port: int
    pool_name: str

    def connection(self, conn: Any) -> Any:
        """The DBAPI connection of what is leased."""
        ...

    def record(self, conn: Any) -> _Record | None:
        """This process's record of it; None where it was taken over or set back since the last lease here."""
        ...

    def remember(self, conn: Any, record: _Record) -> None:
        """From now on that is its record."""
        ...

    def settle(self, conn: Any) -> None:
        """The connect events have run: what is set now is how the next user finds it."""
        ...

    def staying(self) -> dict[str, int]:
        """How many sessions that could have moved do not, by reason."""
        ...


class _Record(_ConnectionRecord):
    """SQLAlchemy's record of one object, and the lease while somebody has it.

    Attributes:
        lease: While in force.
        opened: Whether the object's session was opened for this record, and nobody has used it yet.
    """

    def __init__(self, pool: SharedQueuePool, *, opened: bool = False) -> None:
        super().__init__(pool, connect=False)
        self.shared = pool
        self.lease: Lease[Any] | None = None
        self.opened = opened

    def get_connection(self) -> Any:
        """As SQLAlchemy's. What was taken over is not fresh: it is to be pinged."""
        known = self.dbapi_connection
        connection = super().get_connection()
        if connection is not known:
            self.fresh, self.opened = self.opened, False
            self.shared._settle(self)
        return connection

    def checkin(self, _fairy_was_created: bool = True) -> None:
        """As SQLAlchemy's; but what was forgotten and collected is closed, because finalizers may run anywhere."""
        fairy = self.fairy_ref
        if fairy is not None and fairy() is None:
            self.shared._drop(self)
        super().checkin(_fairy_was_created)


class SharedQueuePool(Pool):
    """SQLAlchemy's pool over a shared one: `pool_size` is the cap over all processes with the same `shared_name`.

    Args:
        creator: As for Pool.
        pool_size: The cap over all processes of the scope. Not given: the environment's, else 50.
        max_overflow: 0; anything above is added to the cap, with a warning.
        timeout: Seconds to wait for a connection, SQLAlchemy's `pool_timeout`; None: no limit.
        use_lifo: Taken and ignored: it always is.
        recycle: SQLAlchemy's `pool_recycle`: seconds after which a connection is closed once nobody leases it.
        shared_name: The pool's name; None: made from what is connected to, without passwords.
        app: The scope's name.
        idle_timeout: Seconds after which an idle connection is closed; None: never.
        max_lifetime: The same as `recycle`, by sharedpool's name.
        steal_after: Seconds after which who waits gets the permit of a connection that cannot move, and with
            order="sticky" one that can.
        order: Who is next: "fifo", "sticky" or "auto", as for sharedpool.attach.
        reset: When a session that moves is set back: "handoff", "never" or "always".
        move: False: sessions stay in the process that opened them.
        **kw: As for Pool.

    Making one does no I/O; the first connection attaches. After a fork each process goes on by itself; what was checked
    out belongs to the parent, and is unusable in the child.

    Raises:
        sqlalchemy.exc.ArgumentError: An argument has a value that cannot be.
        sqlalchemy.exc.TimeoutError: From connecting: none became free in time.
    """

    _is_asyncio = False

    def __init__(
        self,
        creator: Any,
        pool_size: int | NotGiven | None = NOT_GIVEN,
        max_overflow: int = 0,
        timeout: float | None = 30.0,
        use_lifo: bool = True,
        recycle: int = -1,
        shared_name: str | None = None,
        app: str | None = None,
        idle_timeout: float | NotGiven | None = NOT_GIVEN,
        max_lifetime: float | None = None,
        steal_after: float | NotGiven = NOT_GIVEN,
        order: str | NotGiven = NOT_GIVEN,
        reset: str = "handoff",
        move: bool = True,
        **kw: Any,
    ) -> None:
        super().__init__(creator, **kw)  # without `recycle`: the age of a session is known to all, not to one process
        self._arguments: dict[str, Any] = {
            "pool_size": pool_size, "max_overflow": max_overflow, "timeout": timeout, "use_lifo": use_lifo,
            "recycle": recycle, "shared_name": shared_name, "app": app, "idle_timeout": idle_timeout,
            "max_lifetime": max_lifetime, "steal_after": steal_after, "order": order, "reset": reset,
            "move": move,
        }  # fmt: skip
        self._timeout = timeout
        self._given = _checked(_given(self._arguments))
        self._create: Callable[[ConnectionPoolEntry], Any] = self._invoke_creator
        self._invoke_creator = cast(Any, self._connection_for)
        self._leases: dict[int, _Record] = {}
        self._disposed = False
        self._started: tuple[Handle[Any], _Library] | None = None
        self._starting = threading.Lock()
        if _is_the_engines(self._create):
            _watch(self._dialect)
        _pools.add(self)

    # --- what it leads to ---------------------------------------------------------------------------------------------

    def _start(self) -> tuple[Handle[Any], _Library]:
        with self._starting:
            if self._started is None:
                library = self._library()
                name = self._arguments["shared_name"] or library.pool_name
                given = {"checkout_timeout": self._timeout, **self._given}
                self._started = control.attach(name, app=self._arguments["app"], **given), library
            return self._started

    def _library(self) -> _Library:
        dialect: Any = self._dialect
        kind = getattr(dialect, "driver", "python")
        if not _is_the_engines(self._create):
            where = self._arguments["shared_name"]
            if not where:
                raise exc.ArgumentError(
                    "with a creator of its own an engine needs shared_name=..., the name under which processes share"
                    " their connections: what the creator connects to is not known"
                )
            self._refuse_resets("a creator of its own")
            return _Staying(self, kind, where)
        cargs, cparams = self._connect_arguments()
        if kind in _MOVING and "async_creator_fn" not in cparams:
            return (_MovingForLoops if dialect.is_async else _Moving)(self, kind, cargs, cparams)
        self._refuse_resets(kind)
        return _Staying(self, kind, self._arguments["shared_name"] or _found_name(kind, cargs, cparams))

    def _refuse_resets(self, what: str) -> None:
        """What nobody would do must not be thought to be done: other libraries' sessions are not set back here."""
        if self._arguments["reset"] == "always":
            raise OptionError(
                f"option 'reset' has the value 'always' (from create_engine); with {what} nothing is set back;"
                " allowed is 'handoff', and a listener for the engine's `reset` event, or psycopg or psycopg2",
                option="reset", value="always", source="create_engine", allowed="handoff",
            )  # fmt: skip

    def _connect_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the engine's creator would connect with."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(cargs: tuple[Any, ...], cparams: dict[str, Any]) -> Any:
            found.append((cargs, cparams))

        connection = self._make(_Record(self), note)
        if connection is not None:
            self._dialect.do_close(connection)
            raise exc.ArgumentError(
                "a do_connect listener that returns connections of its own goes with a shared pool only as the"
                " engine's creator, with shared_name=..."
            )
        return found[0]

    def _make(self, record: _Record, make: _Make) -> Any:
        """Have the engine connect; its own connecting is replaced by `make`."""
        token = _making.set(make)
        try:
            return self._create(record)
        finally:
            _making.reset(token)

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lease(self) -> Lease[Any]:
        handle, library = self._started or self._start()
        try:
            return self._checkout(handle, library)
        except (PoolTimeout, TooManyWaiting) as error:
            raise exc.TimeoutError(str(error), code=_LIMIT) from error
        except (ConnectFailed, ConnectTimeout) as error:
            cause, dbapi = error.__cause__, self._dbapi_error("Error")
            if dbapi is not None and isinstance(cause, dbapi):
                raise cause from None
            raise self._operational(error) from error
        except OptionError:
            raise
        except SharedPoolError as error:
            raise self._operational(error) from error

    def _checkout(self, handle: Handle[Any], library: _Library) -> Lease[Any]:
        return handle.checkout(library.host, library.port, cast(Any, library), checkout_timeout=self._timeout)

    def _dbapi_error(self, name: str) -> type[Exception] | None:
        return getattr(getattr(self._dialect, "dbapi", None), name, None)

    def _operational(self, error: SharedPoolError) -> Exception:
        """The error as the library's own, which the engine translates for its users."""
        kind = self._dbapi_error("OperationalError")
        return error if kind is None else kind(str(error))

    def _do_get(self) -> ConnectionPoolEntry:
        lease = self._lease()
        assert self._started is not None
        library = self._started[1]
        record = library.record(lease.conn) or _Record(self)
        record.lease = lease
        if record.dbapi_connection is not None:
            self._leases[id(record.dbapi_connection)] = record
        return record

    def _connection_for(self, record: ConnectionPoolEntry) -> Any:
        """In the place of the engine's creator: what the record has leased.

        If that was invalidated, in the same checkout, only a new connection will do.
        """
        assert isinstance(record, _Record)
        while record.lease is None or not record.lease.in_force:
            lease = self._lease()
            assert self._started is not None
            known = self._started[1].record(lease.conn)
            if known is None or not known.opened:
                lease.discard()
            else:
                record.lease, record.opened = lease, True
        assert self._started is not None
        conn, library = record.lease.conn, self._started[1]
        library.remember(conn, record)
        connection = library.connection(conn)
        self._leases[id(connection)] = record
        return connection

    def _settle(self, record: _Record) -> None:
        """SQLAlchemy has connected a record, and the connect events have run."""
        if record.lease is not None and record.lease.in_force and self._started is not None:
            library = self._started[1]
            library.settle(record.lease.conn)
            library.remember(record.lease.conn, record)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        assert isinstance(record, _Record)
        lease, connection = record.lease, record.dbapi_connection
        if lease is not None and lease.in_force and connection is not None:
            if record._is_hard_or_soft_invalidated():
                record.close()
            else:  # once it is given back, another thread may have the record
                del self._leases[id(connection)]
                record.lease = None
                with contextlib.suppress(LeaseError):  # it was taken away
                    self._give_back(lease)
        elif lease is not None and lease.in_force and self._is_asyncio and not self._dialect.has_terminate:
            self._drop(record)  # collected: SQLAlchemy only detaches what it cannot close in a finalizer
        # else it was invalidated, and discarded; or detached: the permit is taken until the connection is closed
        self._leave_if_done()

    def _give_back(self, lease: Lease[Any]) -> None:
        lease.checkin()

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        record = self._leases.pop(id(connection), None)
        if record is None or record.lease is None:
            super()._close_connection(connection, terminate=terminate)
            return
        self.logger.debug("Closing connection %r", connection)
        with contextlib.suppress(LeaseError):
            record.lease.discard()
        self._leave_if_done()

    def _drop(self, record: _Record) -> None:
        """A finalizer's, which may run anywhere: the lease is dropped, and ended by another thread."""
        if record.lease is not None and self._started is not None:
            self._leases.pop(id(self._started[1].connection(record.lease.conn)), None)
        record.lease = None

    # --- the pool -----------------------------------------------------------------------------------------------------

    def recreate(self) -> SharedQueuePool:
        """Another of the same kind, for Engine.dispose."""
        self.logger.info("Pool recreating")
        return self.__class__(
            self._creator, echo=self.echo, logging_name=self._orig_logging_name, pre_ping=self._pre_ping,
            reset_on_return=self._reset_on_return, _dispatch=self.dispatch, dialect=self._dialect, **self._arguments,
        )  # fmt: skip

    def dispose(self) -> None:
        """This process leaves the pool, once what is checked out has come back. Other processes go on.

        Idle sessions that can move stay open for them until idle_timeout; `drain` closes those, too.
        """
        self._disposed = True
        self._leave_if_done()
        self.logger.info("Pool disposed.")

    def _leave_if_done(self) -> None:
        if self._disposed and not self._leases and self._started is not None:
            self._started[0].close()

    def drain(self, wait: float | None = None) -> int:
        """Close the connections of all processes: idle ones now, others as they come back; how many there were.

        With `wait`, return when all have ended, after so many seconds at most: before DROP DATABASE, say.

        Raises:
            DrainTimeout: Not all have ended in time.
        """
        handle, _ = self._started or self._start()
        handle.open()
        return control.drain(handle.name, wait=wait, app=handle.app)

    @property
    def shared_name(self) -> str:
        """The name under which processes share the pool."""
        return (self._started or self._start())[0].name

    def shared_stats(self) -> PoolStats:
        """The pool's numbers over all processes; attaches."""
        return (self._started or self._start())[0].stats()

    def status(self) -> str:
        """As QueuePool's, about all processes."""
        stats = self.shared_stats()
        return (
            f"Pool size: {stats.max_connections}  Connections in pool: {stats.idle} Current Overflow: 0 Current Checked"
            f" out connections: {stats.used - stats.idle} (all processes that share {stats.name!r})"
        )

    def sessions_that_stay(self) -> dict[str, int]:
        """How many PostgreSQL sessions this process has opened that cannot move, by reason, as
        `sharedpool.postgres.sessions_that_stay`; empty for libraries whose connections never move.
        """
        return (self._started or self._start())[1].staying()

    def size(self) -> int:
        """The cap over all processes."""
        return self.shared_stats().max_connections

    def timeout(self) -> float | None:
        """Seconds that a checkout waits at most."""
        return self._timeout

    def checkedin(self) -> int:
        """Idle connections, of all processes."""
        return self.shared_stats().idle

    def overflow(self) -> int:
        """There is none."""
        return 0

    def checkedout(self) -> int:
        """Connections that are not idle, of all processes."""
        stats = self.shared_stats()
        return stats.used - stats.idle

    def forked(self) -> None:
        """In a forked child: what is checked out is the parent's; nothing here touches it."""
        self._starting = threading.Lock()
        for record in self._leases.values():
            fairy = record.fairy_ref() if record.fairy_ref is not None else None
            record.fairy_ref = record.lease = record.dbapi_connection = None
            if fairy is not None:
                _part(fairy)
        self._leases.clear()


class AsyncSharedQueuePool(SharedQueuePool):
    """The same for asyncio engines: who waits does not block the loop.

    psycopg's sessions move between processes. Other libraries' connections stay with the process and the loop that
    opened them; only permits go over to others.
    """

    _is_asyncio = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drivers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _MovingWithLoop | _StayingWithLoop]
        self._drivers = weakref.WeakKeyDictionary()

    def _checkout(self, handle: Handle[Any], library: _Library) -> Lease[Any]:
        loop = asyncio.get_running_loop()
        driver = self._drivers.get(loop)
        if driver is None:  # what one loop has made is never lent in another: it is another driver's
            made: _MovingWithLoop | _StayingWithLoop
            if isinstance(library, _MovingForLoops):
                made = library.of(loop)
            else:
                made = _StayingWithLoop(self, getattr(self._dialect, "driver", ""), library.host, loop)
            driver = self._drivers.setdefault(loop, made)
        asked = aio.Pool(handle).checkout(driver.host, driver.port, cast(Any, driver), checkout_timeout=self._timeout)
        lease: Lease[Any] = await_only(asked)
        return lease

    def _give_back(self, lease: Lease[Any]) -> None:
        """Settings that have to be set back are set back in a thread."""
        assert self._started is not None
        library = self._started[1]
        if isinstance(library, _MovingForLoops) and _may_await() and library.talks(lease.conn):
            await_only(in_thread(lease.checkin))
        else:
            lease.checkin()

    def _close_connection(self, connection: Any, *, terminate: bool = False) -> None:
        record = self._leases.get(id(connection))
        if record is not None and record.fairy_ref is None and record.dbapi_connection is None:
            self._drop(record)  # detached, perhaps by a finalizer
            self._leave_if_done()
        else:
            super()._close_connection(connection, terminate=terminate)


def _may_await() -> bool:
    """Whether this runs for a coroutine of SQLAlchemy's, and not in a finalizer; versions that do not tell: no."""
    greenlet: Any = sys.modules.get("greenlet")  # SQLAlchemy's own, where there is asyncio
    return greenlet is not None and getattr(greenlet.getcurrent(), "__sqlalchemy_greenlet_provider__", False)


def _part(fairy: PoolProxiedConnection) -> None:
    proxy: Any = fairy
    finalizer = getattr(proxy, "_finalizer", None)  # SQLAlchemy 2.1; 2.0 has a weak reference's callback
    if finalizer is not None:
        finalizer.detach()
    proxy.dbapi_connection = proxy._connection_record = None


# --- libraries ----------------------------------------------------------------------------------------------------


class _Staying(DbapiDriver):
    """Any library: its connections stay in their process, and only their permits go over."""

    port = 0

    def __init__(self, pool: SharedQueuePool, kind: str, host: str) -> None:
        super().__init__(kind, self._create, close=pool._dialect.do_close, find=_with_a_socket)
        self.host = self.pool_name = host
        self._pool = weakref.ref(pool)

    def _create(self) -> Any:
        pool = self._pool()
        assert pool is not None
        record = _Record(pool, opened=True)
        return record, pool._create(record)

    def find_remote(self, session: Session) -> None:
        """As its base; remembers the record that the engine's events have seen."""
        session.note, session.connection = session.connection
        super().find_remote(session)
        if session.stands_for is not None:
            session.calls_off = _calls_off(session.connection, session.stands_for)

    def connection(self, conn: Session) -> Any:
        return conn.connection

    def record(self, conn: Session) -> _Record | None:
        return cast("_Record | None", conn.note)

    def remember(self, conn: Session, record: _Record) -> None:
        conn.note = record

    def settle(self, conn: Session) -> None:
        """Nobody else uses it."""

    def staying(self) -> dict[str, int]:
        return {}


#: Where libraries keep the socket of a connection, or what has it: pg8000; PyMySQL; asyncpg; asyncmy, aiomysql.
_PLACES: Final = ("_usock", "_sock", "_transport", "_writer")


def _own(connection: Any) -> Any:
    """The library's own connection, of which SQLAlchemy's adapters for asyncio are made."""
    return getattr(connection, "driver_connection", None) or getattr(connection, "_connection", connection)


def _with_a_socket(connection: Any) -> Any:
    """What has the socket of a library's connection."""
    own = _own(connection)
    found = next((part for name in _PLACES if (part := getattr(own, name, None)) is not None), own)
    return found.get_extra_info("socket") if hasattr(found, "get_extra_info") else found


def _calls_off(connection: Any, sock: socket.socket) -> tuple[str, bytes]:
    """How a PostgreSQL session's query is cancelled, where the library shows the session's key."""
    own = _own(connection)
    try:
        protocol = getattr(own, "_protocol", None)
        if protocol is not None:
            key = struct.pack("!ii", protocol.backend_pid, protocol.backend_secret)
        else:
            key = own._backend_key_data
        address = getattr(own, "_addr", "")
        path = address if isinstance(address, str) and sock.family == socket.AF_UNIX else ""
        return wire.NAME, wire.with_key(key, os.fsencode(path))
    except (AttributeError, TypeError, struct.error):  # another database's, or another version's
        return "", b""


class _StayingWithLoop(_Staying):
    """A library for asyncio: opened and closed by one loop, whichever thread finds out that it is time."""

    def __init__(self, pool: SharedQueuePool, kind: str, host: str, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(pool, kind, host)
        self._loop = weakref.ref(loop)
        self._dialect: Any = pool._dialect
        self._ending: set[asyncio.Task[Any]] = set()

    def _create(self) -> Any:
        pool, loop = self._pool(), self._loop()
        assert pool is not None
        assert loop is not None
        record = _Record(pool, opened=True)
        return record, _made_by(loop, greenlet_spawn(pool._create, record))

    def end(self, conn: Session) -> None:
        """Have the loop close it; of a loop that does not run any more, the pool itself ends the connection."""
        connection, loop = conn.connection, self._loop()
        try:
            if loop is None or not loop.is_running():
                raise RuntimeError
            loop.call_soon_threadsafe(self._end_in_loop, conn, connection)
        except RuntimeError:  # nobody can say goodbye, and the library's object is left to be collected
            conn.sign_off()

    def _end_in_loop(self, conn: Session, connection: Any) -> None:
        # In a greenlet a library waits for what it says: that a query is to be cancelled, and goodbye.
        how = self._dialect.do_terminate if self._dialect.has_terminate else self._dialect.do_close
        task = asyncio.get_running_loop().create_task(greenlet_spawn(how, connection))
        self._ending.add(task)  # a loop does not keep its tasks
        task.add_done_callback(functools.partial(self._ended, conn))

    def _ended(self, conn: Session, task: asyncio.Task[Any]) -> None:
        self._ending.discard(task)
        conn.sign_off()
        if not task.cancelled() and task.exception() is not None:
            log.debug("closing a connection of %s failed: %r", self.name, task.exception())


def _made_by(loop: asyncio.AbstractEventLoop, making: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine makes in a loop, for a thread that waits for it; ConnectFailed if the loop ends meanwhile."""
    made = asyncio.run_coroutine_threadsafe(making, loop)
    while True:
        done, _ = concurrent.futures.wait([made], _LOOKS_UP)
        if done:
            return made.result()
        if not loop.is_running():
            made.cancel()
            raise ConnectFailed("the event loop has ended while it opened a connection")


class _Moving:
    """psycopg and psycopg2: sessions that move; opened with what the engine's events make of its arguments."""

    def __init__(self, pool: SharedQueuePool, kind: str, cargs: tuple[Any, ...], cparams: dict[str, Any]) -> None:
        self._pool = weakref.ref(pool)
        self._kind = kind
        self._arguments = cargs, cparams
        self._driver: Any = None
        self._driver = self._made(cargs, cparams)
        self.pool_name: str = self._driver.target.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def _made(self, cargs: tuple[Any, ...], cparams: dict[str, Any]) -> Any:
        pool = self._pool()
        assert pool is not None
        chosen = {name: pool._arguments[name] for name in ("reset", "move")}
        text = cargs[0] if cargs else ""
        make = functools.partial(_driver_class(self._kind), text, cparams, configure=self._changed, **self._more())
        made = make(**chosen)
        if self._driver is not None:
            if made.target.identity != self._driver.target.identity:  # a listener's: nobody else asks for that
                made = make(**{**chosen, "move": False})
            made._once = self._driver._once  # what stays is said, and counted, in one place
        return made

    def _more(self) -> dict[str, Any]:
        """What else the driver is to know."""
        return {}

    def _changed(self, conn: Any) -> None:
        """The driver has opened it, taken it over or set it back: SQLAlchemy has to connect it anew."""
        conn.__dict__.pop(_RECORD, None)

    def open(self, host: str, port: int, timeout: float, register: Register) -> Any:
        """Have the engine open one, so that its events see it and may change how."""
        pool = self._pool()
        assert pool is not None

        def make(cargs: tuple[Any, ...], cparams: dict[str, Any]) -> Any:
            same = (cargs, cparams) == self._arguments
            driver = self._driver if same else self._made(cargs, cparams)
            return driver.open(host, port, timeout, register)

        record = _Record(pool, opened=True)
        conn = pool._make(record, make)
        self.remember(conn, record)
        return conn

    def connection(self, conn: Any) -> Any:
        return conn

    def record(self, conn: Any) -> _Record | None:
        return cast("_Record | None", conn.__dict__.get(_RECORD))

    def remember(self, conn: Any, record: _Record) -> None:
        conn.__dict__[_RECORD] = record

    def settle(self, conn: Any) -> None:
        if conn.info.transaction_status == 0:  # what a transaction has set is not settled
            self._driver._configured(conn)

    def staying(self) -> dict[str, int]:
        from ..postgres.sessions import sessions_that_stay

        return sessions_that_stay(self._driver)


class _MovingForLoops(_Moving):
    """psycopg for asyncio: sessions move; SQLAlchemy sees them through its own adapters."""

    def _more(self) -> dict[str, Any]:
        import psycopg

        return {"connection_class": psycopg.AsyncConnection}

    def of(self, loop: asyncio.AbstractEventLoop) -> _MovingWithLoop:
        """What one loop uses: its objects are lent there only."""
        pool = self._pool()
        assert pool is not None
        made = _MovingWithLoop(pool, self._kind, *self._arguments, loop)
        made._driver._once = self._driver._once
        return made

    def connection(self, conn: Any) -> Any:
        """SQLAlchemy's adapter, made in a greenlet once for each object."""
        found = conn.__dict__.get(_ADAPTED)
        if found is None:
            pool = self._pool()
            assert pool is not None

            async def itself(*_: Any, **__: Any) -> Any:
                return conn

            dbapi = cast(Any, pool._dialect).dbapi
            found = conn.__dict__[_ADAPTED] = dbapi.connect(async_creator_fn=itself)
        return found


class _MovingWithLoop(_MovingForLoops):
    """The same for one loop: the engine's events run there, what takes its time has a thread."""

    def __init__(
        self, pool: SharedQueuePool, kind: str, cargs: tuple[Any, ...], cparams: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        super().__init__(pool, kind, cargs, cparams)
        self._loop = weakref.ref(loop)

    def open(self, host: str, port: int, timeout: float, register: Register) -> Any:
        """Have the engine open one, in its loop, which waits for the thread that does."""
        pool, loop = self._pool(), self._loop()
        assert pool is not None
        assert loop is not None

        def make(cargs: tuple[Any, ...], cparams: dict[str, Any]) -> Any:
            driver = self._driver if (cargs, cparams) == self._arguments else self._made(cargs, cparams)
            return self.connection(await_only(in_thread(functools.partial(driver.open, host, port, timeout, register))))

        record = _Record(pool, opened=True)
        made = _made_by(loop, greenlet_spawn(pool._make, record, make))
        conn = cast(Any, pool._dialect).get_driver_connection(made)
        self.remember(conn, record)
        return conn


def _driver_class(kind: str) -> Any:
    if kind == "psycopg":
        from ..postgres.psycopg3 import Psycopg3Driver

        return Psycopg3Driver
    from ..postgres.psycopg2 import Psycopg2Driver

    return Psycopg2Driver


# --- arguments ----------------------------------------------------------------------------------------------------


def _is_the_engines(creator: Any) -> bool:
    """Whether create_engine made it, so that it connects by the dialect's own `connect`."""
    return getattr(creator, "__module__", "") == "sqlalchemy.engine.create"


def _watch(dialect: Any) -> None:
    """Let pools see what an engine's creator, and the listeners that it asks, would connect with."""
    if "_sharedpool_connect" in dialect.__dict__:
        return
    original = dialect._sharedpool_connect = dialect.connect

    @functools.wraps(original)
    def connect(*cargs: Any, **cparams: Any) -> Any:
        make = _making.get()
        return original(*cargs, **cparams) if make is None else make(cargs, cparams)

    dialect.connect = connect


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Options of sharedpool for arguments of SQLAlchemy."""
    size, overflow = arguments["pool_size"], arguments["max_overflow"]
    given = {name: arguments[name] for name in ("idle_timeout", "steal_after", "order")}
    if size is not NOT_GIVEN and size is not None:
        given["max_connections"] = size
        if overflow > 0:
            given["max_connections"] = size + overflow
            warnings.warn(
                f"a shared pool has no overflow: pool_size={size} and max_overflow={overflow} are a cap of"
                f" {size + overflow} connections over all processes; say pool_size={size + overflow}, max_overflow=0",
                stacklevel=_CALLER,
            )
    if overflow < 0 or (overflow and "max_connections" not in given):
        raise exc.ArgumentError(f"max_overflow={overflow}: a shared pool needs a cap; say pool_size=N, max_overflow=0")
    lifetime = arguments["max_lifetime"]
    if lifetime is None and arguments["recycle"] >= 0:
        lifetime = max(arguments["recycle"], 0.001)
    if lifetime is not None:
        given["max_lifetime"] = lifetime
    if not arguments["move"]:
        given["move"] = False
    return {name: value for name, value in given.items() if value is not NOT_GIVEN}


#: From `_given` to who calls create_engine, through SQLAlchemy's wrapper.
_CALLER: Final = 6


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The same, or what create_engine raises for wrong arguments."""
    from .. import options as rules

    try:
        for name, value in given.items():
            rules.check(name, value, "create_engine")
    except OptionError as error:
        raise exc.ArgumentError(str(error)) from error
    return given


def _found_name(kind: str, cargs: tuple[Any, ...], cparams: Mapping[str, Any]) -> str:
    """A pool's name, made of what an engine connects with."""
    try:
        return name_of(kind, cargs, cparams)
    except NotClear as error:
        raise exc.ArgumentError(
            f"with {kind} this engine needs shared_name=..., the name under which processes share their connections:"
            f" {error}"
        ) from None


_pools: Final[weakref.WeakSet[SharedQueuePool]] = weakref.WeakSet()


def _forked() -> None:
    for pool in list(_pools):
        pool.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
