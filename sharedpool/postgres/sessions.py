"""What the drivers for all client libraries share: which session an object has, and its rules of reset."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..drivers import postgres as wire
from ..errors import OptionError
from . import conninfo
from .conninfo import Target

log = logging.getLogger("sharedpool")

RESETS: Final = ("handoff", "never", "always")

#: What `reset="never"` leaves alone are temporary tables, prepared statements and the like; settings that the client
#: library has to know are set back even then, by the part of DISCARD ALL that does that.
DISCARD: Final = "DISCARD ALL"
SETTINGS: Final = "SET SESSION AUTHORIZATION DEFAULT; RESET ALL"
#: The parts of DISCARD ALL without those that would take other processes' prepared statements away.
ALL_BUT_PLANS: Final = (
    f"CLOSE ALL; {SETTINGS}; UNLISTEN *; SELECT pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP"
)

#: Connections of dblink are the session's, and DISCARD ALL knows nothing of them. This finds dblink's schema.
FIND_DBLINK: Final = (
    "SELECT pg_catalog.quote_ident(n.nspname) FROM pg_catalog.pg_extension e"
    " JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'dblink'"
)
#: They end, those with a name and the one without; a block, so that nothing is an error in the server's log.
END_DBLINK: Final = """DO $$ DECLARE name text; BEGIN
FOREACH name IN ARRAY coalesce({0}.dblink_get_connections(), '{{}}'::text[]) LOOP PERFORM {0}.dblink_disconnect(name);
END LOOP; BEGIN PERFORM {0}.dblink_disconnect(); EXCEPTION WHEN connection_does_not_exist THEN NULL; END; END $$"""

#: Seconds within which a server that is to cancel something takes a connection.
_REACHES: Final = 1.0
#: A checkin waits so long for a cancel request that is under way, s; then the connection is closed.
_SETTLES: Final = 1.0
#: What a session cannot change, or not by itself: nothing to look at after each lease.
_FIXED: Final = frozenset(
    {b"server_version", b"server_encoding", b"integer_datetimes", b"is_superuser", b"in_hot_standby"}
)


@dataclasses.dataclass(slots=True, eq=False)
class Session:
    """A session that can move, as one object has it.

    Attributes:
        target: Where it leads.
        state: What the server said at its start.
        peer: The server's address, as it was connected to.
        family: Its family.
        names: What the server reported at its start, as far as a session can change it.
        values: Its values, in that order; not to be changed.
    """

    target: Target
    state: bytes
    peer: Any
    family: int
    names: tuple[bytes, ...]
    values: list[bytes]

    @classmethod
    def of(cls, target: Target, state: bytes, sock: socket.socket) -> Session:
        """The session on a connection to the server."""
        names, values = _baseline(state)
        peer = wire.path_of(state) or sock.getpeername()
        return cls(target, state, peer, sock.family, names, values)

    @property
    def hostaddr(self) -> str:
        """The server's IP address; "" for a Unix socket."""
        return "" if self.family == socket.AF_UNIX else str(self.peer[0])

    def cancel(self, seconds: float) -> None:
        """Ask the server to cancel what the session does, and wait until it has passed that on.

        Raises:
            OSError: The server cannot be reached, or did not take it in time.
        """
        wire.cancel(self.peer, self.family, self.state, seconds)


class Cancels:
    """The cancel requests of one object, each of which is to reach the lease in which it was begun, and no later one.

    A server closes the connection of a request once it has signalled the session's process, which looks for signals
    before it begins with another query. So a thread that has seen that end is done. A checkin parks the
    object first, then waits for those that began before. One that begins later finds the parked descriptor.
    """

    __slots__ = ("_inode", "_lost", "_under_way")

    def __init__(self, number: int) -> None:
        self._inode = os.fstat(number).st_ino
        self._under_way: list[bool] = []
        self._lost = False

    @contextlib.contextmanager
    def asking(self, conn: Any) -> Iterator[bool]:
        """For the block, a request is under way; False where the object was given back, and nothing is to be asked."""
        self._under_way.append(True)  # first: the descriptor is parked before this is looked at
        try:
            yield _inode_of(conn.fileno()) == self._inode
        except BaseException:
            self._lost = True  # what was sent may arrive at any time
            raise
        finally:
            self._under_way.pop()

    @property
    def under_way(self) -> bool:
        """Whether one is."""
        return bool(self._under_way)

    def settled(self) -> bool:
        """Whether none can reach the next user; waits for them for a second, but not in a thread that runs a loop."""
        if self._under_way and asyncio._get_running_loop() is None:
            until = time.monotonic() + _SETTLES
            while self._under_way and time.monotonic() < until:
                time.sleep(0.001)
        return not self._under_way and not self._lost


def _inode_of(number: int) -> int:
    """The socket's that a descriptor is of; 0 for one that is closed."""
    try:
        return os.fstat(number).st_ino
    except OSError:
        return 0


@functools.lru_cache(64)  # 15 us, where an object for a session takes 80
def _baseline(state: bytes) -> tuple[tuple[bytes, ...], list[bytes]]:
    """What a session can change of what the server reported at its start: the names, and the values."""
    found = {name: value for name, value in wire.parameters(state).items() if name not in _FIXED}
    return tuple(found), [*found.values()]


class Once:
    """Says why sessions do not move, once, and counts them by reason.

    Attributes:
        counts: How many this process has opened that stay, by a word for the reason.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said = self.said_not_set_back = False
        self.lock = threading.Lock()

    def say(self, target: Target, why: str) -> None:
        """The first reason is a warning, others are for who looks for them."""
        with self.lock:
            self.counts[conninfo.word_for(why)] += 1
            level, self._said = (logging.DEBUG if self._said else logging.WARNING), True
        log.log(
            level, "PostgreSQL sessions of %s stay in the process that opened them: %s; each process that needs one"
            " opens its own, under the same cap", target.address, why,
        )  # fmt: skip


def say_not_set_back(once: Once, target: Target, command: str, error: Exception) -> None:
    """A session could not be set back, and so it ends: a warning, once for each driver, because every handoff then
    opens a new session.
    """
    with once.lock:
        level, once.said_not_set_back = (logging.DEBUG if once.said_not_set_back else logging.WARNING), True
    log.log(
        level, "a PostgreSQL session of %s could not be set back for its next user, and was closed: %s said %r; if the"
        " server cannot do that, reset='never' spares it where nobody leaves anything in a session", target.address,
        command.split(";", maxsplit=1)[0], str(error).strip(),
    )  # fmt: skip


def sessions_that_stay(driver: Any) -> dict[str, int]:
    """How many sessions a driver has opened in this process that cannot move, by reason; not those of `move=False`.

    Args:
        driver: Psycopg3Driver or Psycopg2Driver; a pool's is `pool.driver`.

    Returns:
        By "tls", "gssapi", "hosts", "no_host", "service", "changed" or "other": docs/postgres.md has what they mean.
        They count from the driver's making, or from its process's fork on from what the parent had.
    """
    return dict(driver._once.counts)


def check_reset(value: object) -> str:
    """One of the words, or OptionError."""
    if value in RESETS:
        return str(value)
    raise OptionError(
        f"option 'reset' has the value {value!r} (from the call); allowed is one of {', '.join(RESETS)}",
        option="reset", value=value, source="the call", allowed=RESETS,
    )  # fmt: skip


def cancel_while_closing(number: int, cancel: Callable[[], object], close: Callable[[], object]) -> None:
    """Close a session that stays and is at work: in a thread of its own, libpq cancels that, and closes.

    A server that is at work does not see that its client has gone. Of a session that moves the key is known, and the
    arbiter cancels. libpq's way may keep the interpreter lock until the server answers, so that it is tried first
    whether the server can be reached.

    Args:
        number: The session's descriptor.
        cancel: Asks the server; only called if it can be reached.
        close: Called in any case.
    """
    with socket.socket(fileno=os.dup(number)) as sock:
        family, peer = sock.family, sock.getpeername()

    def run() -> None:
        try:
            with contextlib.suppress(Exception):  # then the session is left to close_timeout
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.settimeout(_REACHES)
                    probe.connect(peer)
                cancel()
        finally:
            close()

    threading.Thread(target=run, name="sharedpool-cancel", daemon=True).start()


def real_names(text: str, door: str, target: Target) -> str:
    """A library's message about a door, as it would be about the server itself."""
    return text.replace(f'server on socket "{door}/.s.PGSQL.5432"', str(target.server)).replace(
        "\n\tIs the server running locally and accepting connections on that socket?", ""
    )


def lay_over(sock: socket.socket, number: int) -> None:
    """Give a library's descriptor number the server's connection; it never blocks, as libpq expects."""
    sock.setblocking(False)
    os.dup2(sock.fileno(), number, inheritable=False)
