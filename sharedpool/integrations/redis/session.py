"""One connection to a Redis server, as the shared pool has it, and what its users have done to it.

The server's side of a connection has a state: the protocol, who is logged in, the database. All that is set at the
handshake, and is the baseline in which the next user must find it. Most commands change nothing of it; those that do
are known here by their names, so that a connection is either as it was or closed. And every command has an answer:
they are counted, because an answer that is still on its way would reach the next user.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any, Final

from ...drivers.sockets import Pooled

#: What a command does to its session: nothing; it cannot be lent on; it begins, ends, watches or no longer watches.
_PLAIN, _SPOILS, _MULTI, _ENDS, _WATCH, _UNWATCH, _CLIENT, _SCRIPT = range(8)

#: Session state that nobody else must meet, and modes in which answers are no longer one for each command. Redis
#: documentation, "Commands": those of the group "connection", "pubsub" and "server" that are about the caller's own.
_SPOILING: Final = (
    "ASKING", "AUTH", "HELLO", "HIMPORT", "MONITOR", "PSUBSCRIBE", "PSYNC", "PUNSUBSCRIBE", "QUIT", "READONLY",
    "READWRITE", "REPLCONF", "RESET", "SELECT", "SHUTDOWN", "SSUBSCRIBE", "SUBSCRIBE", "SUNSUBSCRIBE", "SYNC",
    "UNSUBSCRIBE",
)  # fmt: skip
#: Of CLIENT's subcommands those that ask, or are about others.
_HARMLESS: Final = frozenset(
    {"GETNAME", "GETREDIR", "HELP", "ID", "INFO", "KILL", "LIST", "PAUSE", "TRACKINGINFO", "UNBLOCK", "UNPAUSE"}
)
_FIRST: Final = {
    **dict.fromkeys(_SPOILING, _SPOILS), "MULTI": _MULTI, "EXEC": _ENDS, "DISCARD": _ENDS, "WATCH": _WATCH,
    "UNWATCH": _UNWATCH, "CLIENT": _CLIENT, "SCRIPT": _SCRIPT,
}  # fmt: skip
#: Names as they were given, looked up once; more than so many different ones are no command names.
_known: dict[Any, int] = {}
_MOST_KNOWN: Final = 4096


def _text(part: Any) -> str:
    if isinstance(part, bytes | bytearray | memoryview):
        return bytes(part).decode("ascii", "replace").upper()
    return str(part).upper()


def _kind(args: tuple[Any, ...]) -> int:
    """What a command does; the name may have its subcommand in it ("CLIENT ID"), as redis-py allows."""
    words = _text(args[0]).split()
    kind = _FIRST.get(words[0] if words else "", _PLAIN)
    if kind in (_CLIENT, _SCRIPT):
        words += [_text(part) for part in args[1:2]]
        second = words[1] if len(words) > 1 else ""
        harmless = second in _HARMLESS if kind == _CLIENT else second != "DEBUG"
        return _PLAIN if harmless else _SPOILS
    if len(_known) < _MOST_KNOWN and isinstance(args[0], str | bytes):
        _known[args[0]] = kind
    return kind


class Ledger:
    """What has been said on a connection since its handshake.

    Attributes:
        awaited: So many commands have not been answered.
        spoiled: It must not be lent on.
    """

    __slots__ = ("_multi", "_watch", "awaited", "spoiled")

    def __init__(self) -> None:
        self.awaited = 0
        self.spoiled = self._multi = self._watch = False

    def sends(self, commands: Iterable[tuple[Any, ...]] | None) -> None:
        """These commands are about to be sent; None: nobody knows which."""
        if commands is None:
            self.spoiled = True
            return
        for args in commands:
            self.awaited += 1
            try:
                kind = _known[args[0]]
            except (KeyError, TypeError):
                kind = _kind(args)
            if kind:
                self._note(kind)

    def _note(self, kind: int) -> None:
        """As the server does it: within MULTI all but its end is queued, and its end forgets the watches, too."""
        if kind == _SPOILS:
            self.spoiled = True
        elif kind == _MULTI:
            self._multi = True
        elif kind == _ENDS:
            if self._multi:
                self._multi = self._watch = False
        elif not self._multi:
            self._watch = kind == _WATCH

    def refused(self) -> None:
        """The server refused a command for want of a right: if that was a transaction's end, it goes on."""
        self.spoiled = True

    @property
    def clean(self) -> bool:
        """Whether the next user finds it as this one did: nothing on its way, no transaction, the first state."""
        return not (self.awaited or self.spoiled or self._multi or self._watch)


class Session(Ledger):
    """A connection's socket, its state at the handshake, and what has been said on it since.

    Attributes:
        sock: The socket.
        state: What another process needs besides the descriptor; None: it stays in this one.
        user: redis-py's object for it in this process, or None.
        greeting: The state as redis-py keeps it, once it was asked for.
        timed: The timeout that the socket was given last, s or None; the session itself: it was given none.
        fileno: Gives the socket's number; -1 once it is closed.
        inside: As of `Pooled`.
    """

    __slots__ = ("fileno", "greeting", "inside", "sock", "state", "timed", "user")

    def __init__(self, sock: socket.socket, state: bytes | None) -> None:
        super().__init__()
        self.sock = sock
        self.fileno = sock.number if isinstance(sock, Pooled) else sock.fileno
        self.inside: list[None] = sock.inside if isinstance(sock, Pooled) else []
        self.state = state
        self.user: Any = None
        self.greeting: dict[Any, Any] | None = None
        self.timed: Any = self
