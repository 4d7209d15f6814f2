"""Connections of any library that makes its own: they stay in their process, and only their permits go over.

What the pool lends, polls and closes is a stand-in: one end of a socket pair whose other end is closed as soon as the
library has closed its connection, or has gone with its process. Then the remote has to close, too: the pool has a
duplicate of the library's own socket, where the library shows one, and ends it like any other connection. Where it
shows none, a server that does not notice at once is not seen.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import weakref
from collections.abc import Callable
from typing import Any, Final

from ..errors import file_limit
from . import Register, check_host, check_port

log = logging.getLogger("sharedpool")


def socket_of(thing: Any) -> socket.socket | None:
    """A duplicate of the connected socket whose number an object's `fileno()` tells; None where it tells none."""
    try:
        number = thing.fileno()
        if not isinstance(number, int) or number < 0 or not stat.S_ISSOCK(os.fstat(number).st_mode):
            return None
    except Exception:  # noqa: BLE001 - the library's; whatever it is, it shows no socket
        return None
    sock = socket.socket(fileno=os.dup(number))
    try:
        sock.getpeername()
    except OSError:
        sock.close()
        return None
    return sock


class Session:
    """A library's connection and its stand-in.

    Attributes:
        connection: The library's object; None once it has been closed.
        note: For whoever lends it.
        stands_for: A duplicate of its socket, on which the pool sees the remote's end; None: there is none, or no more.
        calls_off: A driver's name and a state, by which work that is under way is called off, as in `drivers.aborts`.
    """

    __slots__ = ("__weakref__", "_open", "_owner", "_sign", "_watched", "calls_off", "connection", "note", "stands_for")

    def __init__(self, watched: socket.socket, sign: socket.socket) -> None:
        self.connection: Any = None
        self.note: Any = None
        self.stands_for: socket.socket | None = None
        self.calls_off: tuple[str, bytes] = ("", b"")
        self._open = [True]
        self._owner = os.getpid()
        self._watched = watched
        self._sign = sign
        _sessions.add(self)

    def fileno(self) -> int:
        """The stand-in's number; -1 once closed."""
        return self._watched.fileno()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child's copy, which the child must not even close."""
        return self._owner != os.getpid()

    def ends(self) -> bool:
        """Whether the caller is the one to close it: several threads may find out that it is time."""
        try:
            return self._open.pop()
        except IndexError:
            return False

    def sign_off(self) -> None:
        """The library has closed its connection, cannot any more, or has never made it; the remote is yet to close."""
        self._sign.close()
        self._watched.close()
        if self.stands_for is not None:
            self.stands_for.close()


_sessions: Final[weakref.WeakSet[Session]] = weakref.WeakSet()


def _forked() -> None:
    """In a child: a copy of the other end would make a dead parent's connections look open."""
    for session in list(_sessions):
        session.sign_off()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class DbapiDriver:
    """A driver for whatever `creator()` makes. A lease's `conn` is a Session, its `connection` what was made.

    Args:
        kind: The library's name: the driver's name is `dbapi:KIND`.
        creator: Opens a connection; its errors reach who asked. How long it may take is the library's affair.
        close: Closes one; the connection's own `close()` if not given. Called by whichever thread finds out, one of
            sharedpool too.
        clean: Whether the next user of this process may have one; True if not given. Asked at every checkin.
        find: Gives what has the connection's own socket: its `fileno()` is asked. The connection itself if not given.

    `host` is any text that says what is connected to, without passwords; `port` is 0.
    """

    moves = False
    connects = True
    parks = False

    def __init__(
        self,
        kind: str,
        creator: Callable[[], Any],
        *,
        close: Callable[[Any], object] | None = None,
        clean: Callable[[Any], bool] | None = None,
        find: Callable[[Any], Any] | None = None,
    ) -> None:
        self.name = f"dbapi:{kind}"
        self._creator = creator
        self._close = close or _close
        self._clean = clean
        self._find = find

    def address(self, host: str, port: int) -> tuple[str, int]:
        """Compared as it is written."""
        return check_host(host, "a text that says what is connected to"), check_port(port, 0, 0)

    def open(self, host: str, port: int, timeout: float, register: Register) -> Session:
        """Register the stand-in, then let the library connect."""
        try:
            watched, sign = socket.socketpair()
        except OSError as error:
            raise file_limit(error, f"open {self.name}:{host}") from error
        session = Session(watched, sign)
        try:
            register(watched)
            session.connection = self._creator()
            self.find_remote(session)
        except BaseException:
            self.close(session)
            raise
        return session

    def find_remote(self, session: Session) -> None:
        """Have the pool see the end of the remote, too, where the library shows its socket."""
        try:
            session.stands_for = socket_of(self._find(session.connection) if self._find else session.connection)
        except OSError as error:
            raise file_limit(error, f"hold a connection of {self.name}") from error

    def fileno(self, conn: Session) -> int:
        """The stand-in's."""
        return conn.fileno()

    def clean(self, conn: Session) -> bool:
        """What the caller says."""
        connection = conn.connection
        return connection is not None and (self._clean is None or self._clean(connection))

    def export(self, conn: Session) -> None:
        """None: it cannot move."""

    def adopt(self, descriptor: int, state: bytes) -> Session:
        """Never called."""
        raise NotImplementedError

    def close(self, conn: Session) -> None:
        """Close the connection, and then show that by its stand-in."""
        if conn.ends():
            if conn.connection is None or conn.foreign:
                conn.sign_off()
            else:
                self.end(conn)
            conn.connection = conn.note = None

    def end(self, conn: Session) -> None:
        """Close the library's connection; then sign off."""
        try:
            self._close(conn.connection)
        except Exception as error:  # noqa: BLE001 - the library's; whatever it is, the connection is of no more use
            log.debug("closing a connection of %s failed: %r", self.name, error)
        finally:
            conn.sign_off()


def _close(connection: Any) -> None:
    connection.close()
