"""The driver for psycopg2: its connections, on sessions that move.

psycopg2 can only connect in one blocking call (which lets go of the GIL), so a thread that lives as long as that call
passes the bytes between libpq and the server.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psycopg2
from psycopg2 import extensions

from ..drivers import Register
from ..drivers import postgres as wire
from ..drivers.sockets import ended_if_it_fails
from ..errors import ConnectFailed, ConnectTimeout, OptionError
from . import conninfo
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

Conn = Any

#: Keywords of psycopg2.connect that are not libpq's.
_OF_PSYCOPG2 = ("cursor_factory",)
_PATIENCE = 10.0
_IDLE = extensions.TRANSACTION_STATUS_IDLE
_ACTIVE = extensions.TRANSACTION_STATUS_ACTIVE


class Psycopg2Driver:
    """`checkout(driver.host, driver.port, transport=driver)` lends psycopg2 connections.

    Connections are instances of a subclass of `connection_factory` whose cancel(), info, dsn and get_dsn_parameters()
    are about the server itself.

    Args:
        dsn: As for psycopg2.connect, or a callable that gives it, asked at each opening.
        kwargs: As the keywords of psycopg2.connect, or a callable that gives them.
        connection_factory: The class of the connections.
        reset: As for Psycopg3Driver.
        configure: As for Psycopg3Driver.
        move: False: sessions stay in the process that opened them.
    """

    name = wire.NAME
    connects = True
    host = ""
    port = 0

    def __init__(
        self,
        dsn: str | Callable[[], str] = "",
        kwargs: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
        *,
        connection_factory: Any = None,
        reset: str = "handoff",
        configure: Callable[[Conn], object] | None = None,
        move: bool = True,
    ) -> None:
        self._dsn = dsn
        self._kwargs = kwargs
        self._class = shared_class(connection_factory or extensions.connection)
        self._reset = check_reset(reset)
        self.always = self._reset == "always"
        self.resets = self._reset != "never" or configure is not None
        self._configure = configure
        self._move = move
        self._target: Target | None = None
        self._own: dict[str, Any] = {}
        self._asked = ""
        self._once = Once()

    def __repr__(self) -> str:
        return f"<Psycopg2Driver {'' if self._target is None else self._target.address}>"

    # --- what it leads to ---------------------------------------------------------------------------------------------

    def resolve(self) -> tuple[Target, dict[str, Any]]:
        """Where it leads now, and psycopg2's own keywords; asks what is callable.

        Raises:
            OptionError: It is no connection string.
        """
        text = self._dsn() if callable(self._dsn) else self._dsn
        given = self._kwargs() if callable(self._kwargs) else self._kwargs
        kwargs = dict(given or {})
        own = {name: kwargs.pop(name) for name in _OF_PSYCOPG2 if name in kwargs}
        if "database" in kwargs:
            kwargs["dbname"] = kwargs.pop("database")
        try:
            params = {**(extensions.parse_dsn(text) if text else {}), **kwargs}
            extensions.make_dsn(**params)
        except psycopg2.ProgrammingError as error:
            raise OptionError(
                f"option 'dsn' is no connection string (from the call): {error}",
                option="dsn", value=type(text).__name__, source="the call", allowed="a connection string",
            ) from None  # fmt: skip
        found = conninfo.resolve(params, extensions.libpq_version(), move=self._move)
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
        return f"{self.target.address}{'' if self._reset != 'never' else '#never'}", 0

    @property
    def identity(self) -> str:
        """The same in full, for the key."""
        return self.target.identity

    def matters(self, host: str) -> tuple[str, ...]:
        """What of the process's place decides which server that is."""
        return self.target.matters

    # --- opening ------------------------------------------------------------------------------------------------------

    def open(self, host: str, port: int, timeout: float, register: Register) -> Conn:
        """A new session, configured.

        Raises:
            ConnectFailed, ConnectTimeout: With psycopg2's error as the cause.
        """
        target, own = self.resolve()
        until = time.monotonic() + min(timeout, target.connect_timeout or timeout)
        try:
            conn = self._open(target, own, until, register)
        except ConnectFailed as error:
            raise ConnectFailed(str(error)) from psycopg2.OperationalError(str(error))
        except TimeoutError as error:
            text = str(error) or f"connection to {target.address} failed: no answer within {timeout:.3g} s"
            raise ConnectTimeout(text) from psycopg2.OperationalError(text)
        except psycopg2.Error as error:
            raise ConnectFailed(str(error)) from error
        try:
            with ended_if_it_fails(socket.socket(fileno=os.dup(conn.fileno()))):
                try:
                    self._configured(conn)
                except BaseException:
                    self.close(conn)
                    raise
        except psycopg2.Error as error:
            raise ConnectFailed(f"the configure callback failed: {error}") from error
        return conn

    def _open(self, target: Target, own: dict[str, Any], until: float, register: Register) -> Conn:
        why = target.stays or self._asked or self._why_not_its_key(target)
        if not why:
            try:
                return self._open_relayed(target, own, until, register)
            except wire.CannotMove as error:
                why = self._asked = str(error)
            except psycopg2.OperationalError:
                if target.all.get("sslmode") != "allow":
                    raise
                why = "the server wants TLS, which sslmode=allow gives it"
        if self._move:
            self._once.say(target, why)
        conn = psycopg2.connect(extensions.make_dsn(**target.given), connection_factory=self._class, **own)
        with socket.socket(fileno=os.dup(conn.fileno())) as sock:
            register(sock)
            conn._cancels = Cancels(sock.fileno())
        return conn

    def _open_relayed(self, target: Target, own: dict[str, Any], until: float, register: Register) -> Conn:
        assert target.server is not None
        with ended_if_it_fails(target.server.connect(until, register)) as far:
            return self._connect(wire.Relay(far, path=target.server.path), target, target.at, own, until)

    def _connect(
        self, relay: wire.Relay, target: Target, parameters: Callable[[str], Mapping[str, str]],
        own: dict[str, Any], until: float,
    ) -> Conn:  # fmt: skip
        """psycopg2's object at the near end of a relay, and the server's connection laid over its descriptor."""
        with _relaying(relay, until) as door:
            seconds = max(2, math.ceil(until - time.monotonic()))
            text = extensions.make_dsn(**{**parameters(door), "connect_timeout": seconds})
            try:
                conn = psycopg2.connect(text, connection_factory=self._class, **own)
            except psycopg2.OperationalError as error:
                raise type(error)(real_names(str(error), door, target)) from None
        try:
            conn._shared = Session.of(target, relay.state(), relay.far)
            conn._cancels = Cancels(relay.far.fileno())
            conn._baseline = _knows(conn)
            lay_over(relay.far, conn.fileno())
        except BaseException:
            conn.close()
            raise
        return conn

    def _configured(self, conn: Conn) -> None:
        """Have the user's callback set the connection up; it must leave no transaction open."""
        if self._configure is not None:
            self._configure(conn)
            if conn.get_transaction_status() != _IDLE:
                raise psycopg2.ProgrammingError("the connection has a transaction left open by the configure callback")
        conn._configured = True
        conn._baseline = _knows(conn)

    def _why_not_its_key(self, target: Target) -> str:
        """Why nobody who asks for the key may have a session: a callable, or the environment, says something else."""
        return "" if target.identity == self.target.identity else conninfo.CHANGED

    # --- moving -------------------------------------------------------------------------------------------------------

    def export(self, conn: Conn) -> bytes | None:
        """What the server said at the session's start; None if it stays."""
        return conn._shared.state if conn._shared is not None else None

    def adopt(self, descriptor: int, state: bytes) -> Conn:
        """An object for a session that another process has opened."""
        with socket.socket(fileno=descriptor) as far:
            target, own = self._known()
            return self._connect(wire.Relay(far, state), target, target.again_at, own, time.monotonic() + _PATIENCE)

    def _known(self) -> tuple[Target, dict[str, Any]]:
        """Where it leads, as it was asked first: secrets, and so what is callable, are for openings only."""
        if self._target is None:
            self.resolve()
        assert self._target is not None
        return self._target, self._own

    def reset(self, conn: Conn) -> bool:
        """Somebody else has used the session: set it back, and configure it again."""
        if self._reset != "never":
            return self._set_back(conn, DISCARD)
        if not conn._configured and self._configure is not None:
            return self._set_back(conn, SETTINGS)
        return True

    def _set_back(self, conn: Conn, command: str) -> bool:
        """Run a command of reset, and configure again; False if libpq then knows anything else than the server."""
        try:
            conn.autocommit = True
            _execute(conn, command)
            if command == DISCARD:
                conn.notices.clear()
                conn.notifies.clear()
                _end_dblink(conn)
            agrees = _agrees(conn)
        except psycopg2.Error as error:
            say_not_set_back(self._once, self._known()[0], command, error)
            return False
        if not agrees:
            return False
        if not conn.get_parameter_status("DateStyle").startswith("ISO"):  # as psycopg2 does where it connects
            _execute(conn, "SET DATESTYLE TO 'ISO'")
        conn.set_session(isolation_level="DEFAULT", readonly="DEFAULT", deferrable="DEFAULT", autocommit=False)
        conn.set_client_encoding(conn.get_parameter_status("client_encoding"))
        conn._changed = False
        self._configured(conn)
        return True

    # --- leases -------------------------------------------------------------------------------------------------------

    def fileno(self, conn: Conn) -> int:
        """The number of libpq's descriptor; -1 once it is closed."""
        return int(conn.fileno())

    def clean(self, conn: Conn) -> bool:
        """No transaction, not even a prepared one, no COPY; settings that libpq knows are as at the start.

        A transaction that was prepared is the server's, but the object refuses to do anything else meanwhile.
        """
        if conn.closed or conn.get_transaction_status() != _IDLE or conn.status == extensions.STATUS_PREPARED:
            return False
        try:
            if conn._changed:
                return self._set_back(conn, ALL_BUT_PLANS if self._reset == "never" else DISCARD)
            if conn._shared is None:
                return True
            if conn.notifies:
                return self._set_back(conn, DISCARD)
            status = conn.get_parameter_status
            for name, value in conn._baseline:
                if status(name) != value:
                    return self._set_back(conn, SETTINGS if self._reset == "never" else DISCARD)
        except psycopg2.Error:
            return False
        return True

    def settled(self, conn: Conn) -> bool:
        """No cancel request of this lease can reach the next one."""
        return bool(conn._cancels.settled())

    def check(self, conn: Conn) -> bool:
        """Whether the server answers."""
        with conn.cursor() as cursor:
            cursor.execute("SELECT 1")
        if not conn.autocommit:
            conn.rollback()
        return True

    def close(self, conn: Conn) -> None:
        """End the session (a word of goodbye) and the object, whatever it is doing."""
        with contextlib.suppress(Exception):
            if conn._shared is None and not conn.closed and conn.get_transaction_status() == _ACTIVE:
                with contextlib.suppress(OSError, RuntimeError):
                    cancel_while_closing(self.fileno(conn), functools.partial(self._class._at_once, conn), conn.close)
                    return
            conn.close()


@contextlib.contextmanager
def _relaying(relay: wire.Relay, until: float) -> Iterator[str]:
    """For the block: a door, and a thread that relays who comes through it; its error, if it had one, is raised."""
    door = wire.Door()
    stop = os.eventfd(0, os.EFD_CLOEXEC)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with door.accept(until) as relay.near:
                while relay.step(until, stop):
                    pass
        except (OSError, EOFError, wire.CannotMove) as error:  # libpq sees the end of its connection
            errors.append(error)

    thread = threading.Thread(target=run, name="sharedpool-relay", daemon=True)
    thread.start()
    try:
        yield door.name
    except psycopg2.OperationalError:
        os.eventfd_write(stop, 1)
        thread.join()
        if errors and isinstance(errors[0], wire.CannotMove | TimeoutError):
            raise errors[0] from None
        raise
    finally:
        os.eventfd_write(stop, 1)
        door.close()
        thread.join()
        os.close(stop)


def _execute(conn: Conn, command: str) -> None:
    with extensions.cursor(conn) as cursor:
        cursor.execute(command)


def _end_dblink(conn: Conn) -> None:
    """See psycopg3._end_dblink."""
    with extensions.cursor(conn) as cursor:
        cursor.execute(FIND_DBLINK)
        found = cursor.fetchone()
        if found is not None:
            cursor.execute(END_DBLINK.format(found[0]))


def _knows(conn: Conn) -> tuple[tuple[str, str | None], ...]:
    """What libpq knows of the settings that a server reports."""
    return tuple((name, conn.get_parameter_status(name)) for name in _names(conn))


def _names(conn: Conn) -> list[str]:
    session: Session | None = conn._shared
    return [name.decode() for name in session.names] if session is not None else []


def _agrees(conn: Conn) -> bool:
    """After a reset: make libpq know what the server has; see psycopg3._agrees."""
    session: Session | None = conn._shared
    values = zip(session.names, session.values, strict=True) if session else ()
    there = {name.decode(): value.decode() for name, value in values}
    differs = [(name, value) for name, value in _knows(conn) if value != there[name]]
    for name, value in differs:
        with extensions.cursor(conn) as cursor:
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
    if differs:
        _execute(conn, SETTINGS)
    return dict(_knows(conn)) == there


class _Info(extensions.ConnectionInfo):  # type: ignore[misc]
    """About the server itself, not about the door through which libpq went."""

    _session: Session

    @property
    def host(self) -> str:
        """The server's host name, or the directory of its socket."""
        server = self._session.target.server
        assert server is not None
        return server.host or server.hostaddr

    @property
    def port(self) -> int:
        """The server's port."""
        server = self._session.target.server
        assert server is not None
        return server.port

    @property
    def dsn_parameters(self) -> dict[str, str]:
        """What the connection was made with."""
        hidden = ("host", "hostaddr", "port", "sslmode", "gssencmode", "require_auth", "connect_timeout")
        found = {name: value for name, value in super().dsn_parameters.items() if name not in hidden}
        shown = {name: value for name, value in self._session.target.given.items() if name != "password"}
        return {**found, **shown, "host": self.host, "port": str(self.port)}


class _Shared:
    """What all of them have in common, before psycopg2's own class."""

    _shared: Session | None = None
    _cancels: Cancels
    _baseline: tuple[tuple[str, str | None], ...] = ()
    _configured = False
    _changed = False

    def fileno(self) -> int:
        """The number of libpq's descriptor; -1 once it is closed."""
        try:
            return int(super().fileno())  # type: ignore[misc]
        except psycopg2.InterfaceError:
            return -1

    def __repr__(self) -> str:
        closed = self.closed  # type: ignore[attr-defined]
        return f"<connection object at 0x{id(self):x}; dsn: {self.dsn!r}, closed: {closed}>"

    __str__ = __repr__

    def _at_once(self) -> None:
        """As psycopg2's cancel(), whether it was given back or not."""
        super().cancel()  # type: ignore[misc]

    def cancel(self) -> None:
        """Cancel what the session is doing; nothing, once it was given back."""
        if self.closed:  # type: ignore[attr-defined]
            raise psycopg2.InterfaceError("connection already closed")
        with self._cancels.asking(self) as asks:
            if asks and self._shared is None:
                super().cancel()  # type: ignore[misc]
            elif asks and self._shared is not None:
                try:
                    self._shared.cancel(_PATIENCE)
                except OSError as error:
                    raise psycopg2.OperationalError(f"cancellation failed: {error}") from error

    @property
    def info(self) -> Any:
        """As psycopg2's, about the server itself."""
        if self._shared is None:
            return super().info  # type: ignore[misc]
        found = _Info(self)
        found._session = self._shared
        return found

    @property
    def dsn(self) -> str:
        """The connection string, without its password."""
        if self._shared is None:
            return str(super().dsn)  # type: ignore[misc]
        given = self._shared.target.given
        return str(extensions.make_dsn(**{**given, **({"password": "xxx"} if "password" in given else {})}))

    def get_dsn_parameters(self) -> dict[str, str]:
        """What the connection was made with."""
        if self._shared is None:
            return dict(super().get_dsn_parameters())  # type: ignore[misc]
        return dict(self.info.dsn_parameters)


@functools.cache
def shared_class(base: Any) -> Any:
    """The user's class, with what is about the server instead of the door; one for each."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_Shared, base), names)
