"""The driver for psycopg 3: its connections, on sessions that move.

libpq connects to a door of this process and is answered by the server (a new session) or with what the server once said
(one that is there already); then the server's connection is laid over libpq's descriptor. libpq does that without
blocking, so one thread does both sides.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import psycopg
from psycopg import errors as e
from psycopg import generators, pq, waiting
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..drivers import Register
from ..drivers import postgres as wire
from ..drivers.sockets import ended_if_it_fails
from ..errors import ConnectFailed, ConnectTimeout, OptionError
from . import conninfo
from .connections import OwnNames, shared_class
from .conninfo import Target
from .sessions import (
    ALL_BUT_PLANS,
    DISCARD,
    END_DBLINK,
    FIND_DBLINK,
    SETTINGS,
    Cancels,
    Once,
    Session,
    cancel_while_closing,
    check_reset,
    lay_over,
    real_names,
    say_not_set_back,
)

C = TypeVar("C", bound="psycopg.Connection[Any] | psycopg.AsyncConnection[Any]")

#: Keywords of Connection.connect that are not libpq's.
_OF_PSYCOPG = ("autocommit", "prepare_threshold", "context", "row_factory", "cursor_factory")
#: Seconds for what a pool itself asks the server: resets, checks.
_PATIENCE = 10.0
#: Seconds for what is done ahead; it waits for nobody else.
_MOMENT = 0.1

_BAD = pq.ConnStatus.BAD
_CONNECTED = pq.PollingStatus.OK
_READING = pq.PollingStatus.READING
_FAILED = pq.PollingStatus.FAILED
_IDLE = int(pq.TransactionStatus.IDLE)
_ACTIVE = int(pq.TransactionStatus.ACTIVE)
_DONE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY)


class Psycopg3Driver(Generic[C]):
    """`checkout(driver.host, driver.port, transport=driver)` lends psycopg connections.

    Connections are instances of a subclass of `connection_class` whose cancel(), cancel_safe() and info are about the
    server itself.

    Args:
        conninfo: As for psycopg.connect, or a callable that gives it, asked at each opening.
        kwargs: As the keywords of psycopg.connect, or a callable that gives them.
        connection_class: The class of the connections, sync or async.
        reset: When DISCARD ALL sets a session back: "handoff": when another process, or another object, has used it;
            "always": at each lease; "never": not at all, only settings that libpq has to know are set back.
        configure: Called with each connection that was opened, taken over or set back, before it is lent.
        move: False: sessions stay in the process that opened them.
    """

    name = wire.NAME
    connects = True
    host = ""
    port = 0

    def __init__(
        self,
        conninfo: str | Callable[[], str] = "",
        kwargs: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
        *,
        connection_class: type[C] = psycopg.Connection,  # type: ignore[assignment]
        reset: str = "handoff",
        configure: Callable[[C], object] | None = None,
        move: bool = True,
    ) -> None:
        self._conninfo = conninfo
        self._kwargs = kwargs
        kind: Any = connection_class
        self._class: type[C] = shared_class(kind)
        self._plain = _is_plain(kind)
        self._reset = check_reset(reset)
        self.always = self._reset == "always"
        self.resets = self._reset != "never" or configure is not None
        self._configure = configure
        self._move = move
        self._target: Target | None = None
        self._own: dict[str, Any] = {}
        self._asked: str = ""
        self._again = b""
        self._once = Once()

    def __repr__(self) -> str:
        return f"<Psycopg3Driver {'' if self._target is None else self._target.address}>"

    # --- what it leads to ---------------------------------------------------------------------------------------------

    def resolve(self) -> tuple[Target, dict[str, Any]]:
        """Where it leads now, and psycopg's own keywords; asks what is callable.

        Raises:
            OptionError: It is no connection string.
        """
        text = self._conninfo() if callable(self._conninfo) else self._conninfo
        given = self._kwargs() if callable(self._kwargs) else self._kwargs
        kwargs = dict(given or {})
        own = {name: kwargs.pop(name) for name in _OF_PSYCOPG if name in kwargs}
        try:
            params = conninfo_to_dict(text, **kwargs)
        except e.ProgrammingError as error:
            raise OptionError(
                f"option 'conninfo' is no connection string (from the call): {error}",
                option="conninfo", value=type(text).__name__, source="the call", allowed="a connection string",
            ) from None  # fmt: skip
        found = conninfo.resolve(params, pq.version(), move=self._move)
        if self._target is None:
            self._target, self._own = found, own
        return found, own

    @property
    def target(self) -> Target:
        """Where it led when it was first asked; that is its key."""
        return self._target or self.resolve()[0]

    @property
    def moves(self) -> bool:
        """Whether sessions can move, as far as can be said without asking the server."""
        return not self.target.stays

    def address(self, host: str, port: int) -> tuple[str, int]:
        """User, host, port, database, and a hash of what else makes sessions differ."""
        target = self.target
        return f"{target.address}{'' if self._reset != 'never' else '#never'}", 0

    @property
    def identity(self) -> str:
        """The same in full, for the key."""
        return self.target.identity

    def matters(self, host: str) -> tuple[str, ...]:
        """What of the process's place decides which server that is."""
        return self.target.matters

    # --- opening ------------------------------------------------------------------------------------------------------

    def open(self, host: str, port: int, timeout: float, register: Register) -> C:
        """A new session, configured.

        Raises:
            ConnectFailed, ConnectTimeout: With psycopg's error as the cause.
        """
        target, own = self.resolve()
        until = time.monotonic() + min(timeout, target.connect_timeout or timeout)
        try:
            conn = self._open(target, own, until, register)
        except ConnectFailed as error:
            raise ConnectFailed(str(error)) from e.OperationalError(str(error))
        except TimeoutError as error:
            text = str(error) or f"connection to {target.address} failed: no answer within {timeout:.3g} s"
            raise ConnectTimeout(text) from e.ConnectionTimeout(text)
        except e.Error as error:
            raise ConnectFailed(str(error)) from error
        try:
            with ended_if_it_fails(socket.socket(fileno=os.dup(conn.fileno()))):
                try:
                    self._configured(conn)
                except BaseException:
                    self.close(conn)
                    raise
        except e.Error as error:
            raise ConnectFailed(f"the configure callback failed: {error}") from error
        return conn

    def _open(self, target: Target, own: dict[str, Any], until: float, register: Register) -> C:
        why = target.stays or self._asked or self._why_not_its_key(target)
        if not why:
            try:
                return self._open_relayed(target, own, until, register)
            except wire.CannotMove as error:
                why = self._asked = str(error)
            except e.OperationalError:
                if target.all.get("sslmode") != "allow":
                    raise
                why = "the server wants TLS, which sslmode=allow gives it"
        if self._move:
            self._once.say(target, why)
        return self._open_directly(target, own, until, register)

    def _open_relayed(self, target: Target, own: dict[str, Any], until: float, register: Register) -> C:
        assert target.server is not None
        with ended_if_it_fails(target.server.connect(until, register)) as far:
            relay = wire.Relay(far, path=target.server.path)
            pgconn = _start(relay, target, until)
            try:
                session = Session.of(target, relay.state(), far)
                lay_over(far, pgconn.socket)
                return self._about(self._made(pgconn, own), session)
            except BaseException:
                pgconn.finish()
                raise

    def _open_directly(self, target: Target, own: dict[str, Any], until: float, register: Register) -> C:
        """As libpq does it; the pool gets a duplicate of each socket that libpq tries."""
        with contextlib.ExitStack() as duplicates:
            seen = set()
            generator = generators.connect(make_conninfo("", **target.given))
            ready: Any = None
            try:
                number, wait = next(generator)
                while True:
                    inode = os.fstat(number).st_ino
                    if inode not in seen:
                        seen.add(inode)
                        copy = socket.socket(fileno=os.dup(number))
                        register(duplicates.enter_context(ended_if_it_fails(copy)))
                    ready = _wait(number, wait, until)
                    number, wait = generator.send(ready)
            except StopIteration as stop:
                pgconn: pq.abc.PGconn = stop.value
        return self._about(self._made(pgconn, own), None)

    def _made(self, pgconn: pq.abc.PGconn, own: dict[str, Any]) -> C:
        """The object of psycopg, as its connect() would make it."""
        conn: Any = self._class(pgconn)
        conn._pool = None
        conn._configured = False
        if self._reset == "never":
            conn._prepared = OwnNames()
        conn._autocommit = bool(own.get("autocommit"))
        conn.prepare_threshold = own.get("prepare_threshold", 5)
        if own.get("row_factory"):
            conn.row_factory = own["row_factory"]
        if own.get("cursor_factory"):
            conn.cursor_factory = own["cursor_factory"]
        if own.get("context"):
            conn._adapters = AdaptersMap(own["context"].adapters)
        found: C = conn
        return found

    @staticmethod
    def _about(conn: C, session: Session | None) -> C:
        """The same, about its session."""
        conn._shared = session  # type: ignore[union-attr]
        conn._cancels = Cancels(conn.fileno())  # type: ignore[union-attr]
        conn._baseline = _knows(conn)  # type: ignore[union-attr]
        return conn

    def _configured(self, conn: C) -> None:
        """Have the user's callback set the connection up; it must leave no transaction open."""
        if self._configure is not None:
            self._configure(conn)
            if conn.pgconn.transaction_status != _IDLE:
                status = pq.TransactionStatus(conn.pgconn.transaction_status).name
                raise e.ProgrammingError(f"connection left in status {status} by configure function: discarded")
        conn._configured = True  # type: ignore[union-attr]
        conn._baseline = _knows(conn)  # type: ignore[union-attr]

    def _why_not_its_key(self, target: Target) -> str:
        """Why nobody who asks for the key may have a session: a callable, or the environment, says something else."""
        return "" if target.identity == self.target.identity else conninfo.CHANGED

    # --- moving -------------------------------------------------------------------------------------------------------

    def export(self, conn: C) -> bytes | None:
        """What the server said at the session's start; None if it stays."""
        session: Session | None = conn._shared  # type: ignore[union-attr]
        return session.state if session is not None else None

    def prepare(self, ahead: list[Any]) -> None:
        """What can be made before it is known for which session: libpq's connection, which has asked, and the object.

        It takes about as long as the arbiter takes to hand over the descriptor, and who is at work need not be woken.
        """
        with contextlib.suppress(Exception):  # then `adopt` does it, and its error is told
            self._get_ready(ahead, time.monotonic() + _MOMENT)

    def _get_ready(self, ahead: list[Any], until: float) -> None:
        target, own = self._known()
        if not self._again:
            self._again = _text(target.again_at(wire.Door.SAMPLE))
        near = _Near(target, self._again_at, until)
        ready: _Ahead[C] = _Ahead(near)
        try:
            while near.poll() != _READING:
                pass
            wire.hear(near.sock, until)
            if self._plain:
                ready.conn = self._made(near.pgconn, own)
        except BaseException:
            ready.close()
            raise
        ahead.append(ready)

    def adopt(self, descriptor: int, state: bytes, ahead: _Ahead[C] | None = None) -> C:
        """An object for a session that another process has opened; no word goes to the server."""
        with socket.socket(fileno=descriptor) as far:
            until = time.monotonic() + _PATIENCE
            if ahead is not None:
                return self._adopted(ahead, far, state, until)
            made: list[_Ahead[C]] = []
            try:
                self._get_ready(made, until)
                return self._adopted(made[0], far, state, until)
            finally:
                for ready in made:
                    ready.close()

    def _adopted(self, ready: _Ahead[C], far: socket.socket, state: bytes, until: float) -> C:
        target, own = self._known()
        near = ready.near
        pgconn = near.pgconn
        wire.tell(near.sock, state, until)
        while near.poll() != _CONNECTED:
            pass
        pgconn.nonblocking = 1
        session = Session.of(target, state, far)
        lay_over(far, pgconn.socket)
        conn = ready.conn or self._made(pgconn, own)
        conn._shared = session  # type: ignore[union-attr]
        conn._cancels = Cancels(far.fileno())  # type: ignore[union-attr]
        conn._baseline = session.names, session.values  # type: ignore[union-attr]
        ready.taken = True
        return conn

    def _again_at(self, door: str) -> bytes:
        """The connection string for a session that is there already: the parts are put together once, not for each."""
        return self._again.replace(wire.Door.SAMPLE.encode(), door.encode())

    def _known(self) -> tuple[Target, dict[str, Any]]:
        """Where it leads, as it was asked first: secrets, and so what is callable, are for openings only."""
        if self._target is None:
            self.resolve()
        assert self._target is not None
        return self._target, self._own

    def reset(self, conn: C) -> bool:
        """Somebody else has used the session: set it back, and configure it again."""
        if self._reset != "never":
            return self._set_back(conn, DISCARD)
        if not conn._configured and self._configure is not None:  # type: ignore[union-attr]
            return self._set_back(conn, SETTINGS)
        return True

    def _set_back(self, conn: C, command: str) -> bool:
        """Run a command of reset, and configure again; False if libpq then knows anything else than the server."""
        try:
            execute(conn, command)
            if command == DISCARD:
                _forget(conn)
                _end_dblink(conn)
            agrees = _agrees(conn)
        except e.Error as error:
            say_not_set_back(self._once, self._known()[0], command, error)
            return False
        if not agrees:
            return False
        _begin_as_made(conn, self._known()[1])
        conn._changed = False  # type: ignore[union-attr]
        self._configured(conn)
        return True

    # --- leases -------------------------------------------------------------------------------------------------------

    def fileno(self, conn: C) -> int:
        """The number of libpq's descriptor; -1 once it is closed."""
        return conn.fileno()

    def clean(self, conn: C) -> bool:
        """No transaction, not even a prepared one, no COPY, no pipeline; settings that libpq knows are as at the start.

        A transaction that was prepared is the server's, but the object refuses to do anything else meanwhile.
        """
        pgconn = conn.pgconn
        if pgconn.transaction_status != _IDLE or pgconn.pipeline_status:  # UNKNOWN for one that is closed
            return False
        if conn._tpc:
            return False
        changed = conn._changed  # type: ignore[union-attr]
        heard = conn._shared is not None and (conn._notifies_backlog or conn._notify_handlers)  # type: ignore[union-attr]
        if not heard and not changed:
            names, values = conn._baseline  # type: ignore[union-attr]
            if [*map(pgconn.parameter_status, names)] == values:
                return True
        never = ALL_BUT_PLANS if changed else SETTINGS
        try:
            return self._set_back(conn, DISCARD if heard or self._reset != "never" else never)
        except (e.Error, e._WaitTimeout):
            return False

    def settled(self, conn: C) -> bool:
        """No cancel request of this lease can reach the next one."""
        return conn._cancels.settled()  # type: ignore[union-attr, no-any-return]

    def talks(self, conn: C) -> bool:
        """Whether giving it back takes a moment, so that an event loop leaves it to a thread.

        Settings were changed, something was listened to, or a cancel request is under way, which the loop carries on.
        """
        if conn._cancels.under_way:  # type: ignore[union-attr]
            return True
        if conn._shared is None:  # type: ignore[union-attr]
            return False
        if conn._notifies_backlog or conn._notify_handlers:
            return True
        return bool(_knows(conn) != conn._baseline)  # type: ignore[union-attr]

    def check(self, conn: C) -> bool:
        """Whether the server answers."""
        execute(conn, "")
        return True

    def close(self, conn: C) -> None:
        """End the session (a word of goodbye) and the object, whatever it is doing."""
        with contextlib.suppress(Exception):
            conn._closed = True
            pgconn = conn.pgconn
            if conn._shared is None and pgconn.transaction_status == _ACTIVE:  # type: ignore[union-attr]
                with contextlib.suppress(OSError, RuntimeError):
                    cancel_while_closing(pgconn.socket, pgconn.get_cancel().cancel, pgconn.finish)
                    return
            pgconn.finish()


def execute(conn: Any, command: str) -> list[pq.abc.PGresult]:
    """Have the server do something for the pool itself, whatever the connection's modes are; what it answers.

    Raises:
        psycopg.Error: It did not.
    """
    found: list[pq.abc.PGresult] = waiting.wait(
        _executing(conn.pgconn, command), conn.pgconn.socket, interval=0.1, timeout=_PATIENCE
    )
    return found


def _executing(pgconn: pq.abc.PGconn, command: str) -> Any:
    pgconn.send_query(command.encode())
    results = yield from generators.execute(pgconn)
    for result in results:
        if result.status not in _DONE:
            raise e.error_from_result(result)
    return results


def _knows(conn: Any) -> tuple[tuple[bytes, ...], list[bytes | None]]:
    """The settings that a server reports, and what libpq knows of them."""
    session: Session | None = conn._shared
    names = session.names if session else ()
    return names, [*map(conn.pgconn.parameter_status, names)]


def _agrees(conn: Any) -> bool:
    """After a reset: make libpq know what the server has.

    A server tells of a change only, and only whoever has the session then. What another process has set back is unknown
    here: set to what is believed here, and back again, it is told.
    """
    session: Session | None = conn._shared
    if session is None:
        return True
    differs = [
        (name, value) for name, value, there in zip(*_knows(conn), session.values, strict=True) if value != there
    ]
    if not differs:
        return True
    for name, value in differs:
        if value is None:
            return False
        execute(conn, f"SELECT set_config({_quoted(name)}, {_quoted(value)}, false)")
    execute(conn, SETTINGS)
    return _knows(conn)[1] == session.values


def _quoted(value: bytes) -> str:
    return "'" + value.decode().replace("'", "''") + "'"


def _end_dblink(conn: Any) -> None:
    """Close what dblink has open for the session's last user; asked each time, because an extension may come later."""
    (found,) = execute(conn, FIND_DBLINK)
    if found.ntuples:
        schema = found.get_value(0, 0) or b""
        execute(conn, END_DBLINK.format(schema.decode()))


def _begin_as_made(conn: Any, own: dict[str, Any]) -> None:
    """Transactions begin again as connect() has it; psycopg keeps in the object how its user wanted them."""
    conn._autocommit = bool(own.get("autocommit"))
    conn._isolation_level = conn._read_only = conn._deferrable = None
    conn._begin_statement = b""


def _forget(conn: Any) -> None:
    """After DISCARD ALL: what psycopg believed to be prepared is not; handlers were somebody else's."""
    prepared = conn._prepared
    prepared._names.clear()
    prepared._counts.clear()
    prepared._to_flush.clear()
    conn._notice_handlers.clear()
    conn._notify_handlers.clear()
    if conn._notifies_backlog:
        conn._notifies_backlog.clear()


def _is_plain(kind: Any) -> bool:
    """Whether a class's objects are made as psycopg makes them, so that it does not matter when."""
    return any(
        kind.__init__ is base.__init__ and kind.__new__ is base.__new__
        for base in (psycopg.Connection, psycopg.AsyncConnection)
    )


def _text(parameters: dict[str, str]) -> bytes:
    return make_conninfo("", **parameters).encode()


class _Near:
    """libpq's connection to a door of this process, and that door's end of it.

    Args:
        target: Where it is to lead.
        text: The connection string for a door.
        until: When to give up, monotonic seconds.

    Attributes:
        pgconn: libpq's connection.
        sock: What libpq is connected to.
    """

    def __init__(self, target: Target, text: Callable[[str], bytes], until: float) -> None:
        self._target = target
        door = wire.Door()
        self._name = door.name
        try:
            self.pgconn = pq.PGconn.connect_start(text(door.name))
            if self.pgconn.status == _BAD:
                raise self.failure()
            self.sock = door.accept(until)
        finally:
            door.close()

    def poll(self) -> int:
        """One step of libpq's; gives what it waits for.

        Raises:
            OperationalError: It has failed.
        """
        status = self.pgconn.connect_poll()
        if status == _FAILED:
            raise self.failure()
        return status

    def failure(self) -> e.OperationalError:
        """What libpq says of its failure."""
        text = real_names(self.pgconn.get_error_message("utf-8"), self._name, self._target)
        return e.OperationalError(f"connection failed: {text}", pgconn=e.finish_pgconn(self.pgconn))


class _Ahead(Generic[C]):
    """An object of psycopg for a session that is not known yet: libpq has connected and asked, and nobody has answered.

    Attributes:
        conn: The object, unless the user's class wants it to be connected before it is made.
        taken: Whether it has a session; no longer ours, then.
    """

    def __init__(self, near: _Near) -> None:
        self.near = near
        self.conn: C | None = None
        self.taken = False

    def close(self) -> None:
        """Let go of what was not needed; no word goes to a server whose connection is there already."""
        near = self.near
        if not self.taken:
            self.taken, self.conn = True, None
            with contextlib.suppress(e.OperationalError):  # it has none
                os.dup2(near.sock.fileno(), near.pgconn.socket, inheritable=False)
            near.pgconn.finish()
        near.sock.close()


def _start(relay: wire.Relay, target: Target, until: float) -> pq.abc.PGconn:
    """The connection of libpq at the near end of a relay, ready."""
    near = _Near(target, lambda door: _text(target.at(door)), until)
    with near.sock as relay.near:
        while (status := near.poll()) != _CONNECTED:
            if status == _READING:
                with contextlib.suppress(EOFError):  # libpq says what that means
                    relay.step(until)
    near.pgconn.nonblocking = 1
    return near.pgconn


def _wait(number: int, wait: Any, until: float) -> Any:
    """Wait for a descriptor as a generator of psycopg asks."""
    poll = select.poll()
    poll.register(
        number, (select.POLLIN if wait & waiting.Wait.R else 0) | (select.POLLOUT if wait & waiting.Wait.W else 0)
    )
    if not (found := poll.poll(max(0.0, until - time.monotonic()) * 1000)):
        raise TimeoutError
    events = found[0][1]
    failed = events & (select.POLLERR | select.POLLHUP | select.POLLNVAL)
    ready = (waiting.Ready.R if events & select.POLLIN else 0) | (waiting.Ready.W if events & select.POLLOUT else 0)
    return waiting.Ready(ready) if ready else waiting.Ready(int(wait)) if failed else waiting.Ready.NONE
