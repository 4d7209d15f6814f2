"""Drivers: each knows one kind of connection. A driver never touches the table, and no driver knows another.

A driver opens connections, says whether they may be used by somebody else, and how they end. Everything about permits,
order, parking and processes is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from ..errors import ConnectFailed, OptionError
from . import places

T = TypeVar("T")

#: As `key` gives it: transport, host, port, and what nobody sees.
Address = tuple[str, str, int, str]

#: Called with the socket of a connection that is about to be opened, before connect().
Register = Callable[[socket.socket], None]


class Ahead(Protocol):
    """What a driver's `prepare` has made for one `adopt`."""

    def close(self) -> None:
        """Whatever `adopt` has not made use of goes; must not fail."""
        ...


class Driver(Protocol[T]):
    """What sharedpool needs to know about one kind of connection.

    A driver is known by its name (`register`), or an object of its own goes into `checkout(transport=...)`. Those with
    equal names and addresses share slots; but a connection's object is lent only through the driver that made it.

    Attributes:
        name: The transport's name, part of every key.
        moves: Whether another process may use an open connection.
        connects: False for permits, which have no connection at all.

    A driver may also have:
        identity: A text: what else tells its connections from those of other drivers with its name. It is part of the
            key, as a hash, and nobody sees it. A class of one's own is part of the key anyway.
        matters(host) -> Iterable[str]: What of the process's place decides where an address leads, of `places.NETWORK`,
            `places.NAMES` and `places.FILES`; all of them if it does not say. Not asked where connections do not move.
        parks: False: an idle connection's object keeps its descriptor. Only where connections do not move.
        check(conn) -> bool: The active check, see the option `check`.
        reset(conn) -> bool: Called when a lease begins on a connection that somebody else has used since this object
            did. False, or an error, and the connection is closed; the same permit opens another.
        always: True: `reset` is called at the beginning of every lease but the one that opened the connection.
        resets: False: `reset` has nothing to do, and is not called.
        settled(conn) -> bool: Asked at a checkin once the object is parked: whether nothing that its user has begun in
            other threads can reach the next user. May wait for that, a second at most.
        idle_readable(conn) -> bool: An idle connection has said something: whether it may be lent all the same.
        prepare(ahead): Called while the descriptor of a connection is on its way here: makes what `adopt` needs, and
            appends it to the list `ahead`. It is given to `adopt` as a third argument, and closed at last in any case.
            Nothing is appended where that fails: `adopt` then does without. Takes microseconds, must not fail.
        goodbye(conn): Said before this process ends a connection of its own accord; must not block, and not fail.

    A connection may have:
        stands_for: A duplicate of its own socket, where what `fileno` gives is a stand-in. Once the stand-in has ended,
            this is closed to the end.
        calls_off: With it, a driver's name and a state for `aborts`.
    """

    name: str
    moves: bool
    connects: bool

    def address(self, host: str, port: int) -> tuple[str, int]:
        """The address in the form in which equal ones are equal; OptionError if it is none."""
        ...

    def open(self, host: str, port: int, timeout: float, register: Register) -> T:
        """Open a connection within `timeout` seconds, calling `register` with each socket before it connects.

        Raises:
            ConnectTimeout, ConnectFailed: It could not be opened.
        """
        ...

    def fileno(self, conn: T) -> int:
        """The number of the connection's descriptor, or -1 once it is closed; so says `conn.fileno()`, too."""
        ...

    def clean(self, conn: T) -> bool:
        """Whether the next user may have it: nothing unread in buffers of its own, settings back at their baseline."""
        ...

    def adopt(self, descriptor: int, state: bytes) -> T:
        """A connection of another process becomes an object here; takes over the descriptor."""
        ...

    def export(self, conn: T) -> bytes | None:
        """The session state that `adopt` needs elsewhere, up to 40,000 bytes; None: this one cannot move.

        Asked once, of an opened connection. Whatever users may change of it is back at this baseline when a connection
        is clean.
        """
        ...

    def close(self, conn: T) -> None:
        """Close this process's object; must not fail."""
        ...


_known: dict[str, Driver[Any]] = {}
#: Known as well, but their modules are loaded when they are first asked for: `ssl` takes longer than all the others.
_later: Final = {"ssl": "tls"}

#: Transports whose connections have no state but their descriptor.
STATELESS: Final = ("tcp", "unix", "permit")

#: By a driver's name: how work that is under way is called off, so that the remote closes; see `abort_of`. Called with
#: the remote's address, the address family and the connection's state. Needs nothing but this library: the arbiter
#: calls it for processes that have died.
aborts: dict[str, Callable[[Any, int, bytes], None]] = {}


def abort_of(name: str, sock: socket.socket, state: bytes | None) -> Callable[[], None] | None:
    """What calls off the work on a connection, in a thread of its own; None where there is no such thing."""
    abort = aborts.get(name)
    if abort is None or not state:
        return None
    try:
        peer, family = sock.getpeername(), sock.family
    except OSError:
        return None
    if not places.is_here(sock):  # the peer's address is somebody else's in this process's network namespace
        return None

    def call_off() -> None:
        with contextlib.suppress(Exception):
            abort(peer, family, state)

    return threading.Thread(target=call_off, name="sharedpool-abort", daemon=True).start


def register(driver: Driver[Any]) -> None:
    """Make a driver known under its name."""
    _known[driver.name] = driver


def find(name: object) -> Driver[Any]:
    """The driver of that name; a driver is its own.

    Raises:
        OptionError: There is none; the message lists those there are.
    """
    if isinstance(name, str) and name in _later and name not in _known:
        importlib.import_module(f"{__name__}.{_later[name]}")
    driver = _known.get(name) if isinstance(name, str) else None
    if driver is None and not isinstance(name, str) and hasattr(name, "open") and hasattr(name, "address"):
        own: Driver[Any] = name  # type: ignore[assignment]
        return own
    if driver is None:
        known = ", ".join(sorted({*_known, *_later}))
        raise OptionError(
            f"option 'transport' has the value {name!r} (from the call); allowed is one of {known}, or a driver",
            option="transport", value=name, source="the call", allowed=known,
        )  # fmt: skip
    return driver


def check_port(port: object, low: int, high: int) -> int:
    """The port, or OptionError."""
    if isinstance(port, bool) or not isinstance(port, int) or not low <= port <= high:
        allowed = f"a whole number from {low} to {high}" if high else "0"
        raise OptionError(
            f"option 'port' has the value {port!r} (from the call); allowed is {allowed}",
            option="port", value=port, source="the call", allowed=allowed,
        )  # fmt: skip
    return port


def check_host(host: object, what: str, *, absolute: bool = False) -> str:
    """The host, or OptionError; with `absolute` it must be an absolute path."""
    sound = isinstance(host, str) and host and "\0" not in host and _encodes(host)
    if not isinstance(host, str) or not sound or (absolute and not os.path.isabs(host)):
        raise OptionError(
            f"option 'host' has the value {host!r} (from the call); allowed is {what}",
            option="host", value=host, source="the call", allowed=what,
        )  # fmt: skip
    return host


def _encodes(host: str) -> bool:
    try:
        host.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def matters(driver: Driver[Any], host: str) -> tuple[str, ...]:
    """What of the process's place is part of the key: nothing, where no connection leaves its process."""
    if not (driver.connects and driver.moves):
        return ()
    said = getattr(driver, "matters", None)
    return tuple(said(host)) if said is not None else (places.NETWORK, places.NAMES, places.FILES)


def key(driver: Driver[Any], host: str, port: int) -> Address:
    """What decides who may use a connection: transport, host, port, and a text that nobody sees.

    Args:
        driver: Opens it.
        host: As `driver.address` gives it.
        port: Likewise.
    """
    kind = type(driver)
    ours = kind.__module__.startswith(f"{__package__.partition('.')[0]}.")
    who = ["" if ours else f"{kind.__module__}.{kind.__qualname__}", str(getattr(driver, "identity", ""))]
    return driver.name, host, port, json.dumps([*who, places.here(matters(driver, host))])


class _Placed(Protocol):
    """A route: an address, and the place for which it was made."""

    @property
    def where(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def matters(self) -> tuple[str, ...]: ...


def check_place(route: _Placed) -> None:
    """Before a connection is opened: it would be lent to those for whom the address leads elsewhere.

    Raises:
        ConnectFailed: This thread has left the place for which the route was made.
    """
    if not places.still(route.place, route.matters):
        raise ConnectFailed(
            f"{route.where} leads elsewhere from here: this thread is in another network or mount namespace, or under"
            " another root directory, than where this handle first used the address; make a handle for each"
            " (sharedpool.attach), after entering it"
        )


def named(transport: str, host: str, port: int) -> str:
    """An address for people and logs: `tcp://host:port`, `tcp://[::1]:port`, `unix:/path`, `permit:name`."""
    if not port:
        return f"{transport}:{host}"
    return f"{transport}://[{host}]:{port}" if ":" in host else f"{transport}://{host}:{port}"
