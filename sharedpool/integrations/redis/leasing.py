"""What the pool for threads and the one for asyncio have in common: arguments, names, errors, what comes back."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Final

import redis
from redis.driver_info import resolve_driver_info
from redis.maint_notifications import MaintNotificationsConfig
from redis.utils import SENTINEL

from ... import control
from ...errors import ConnectFailed, ConnectTimeout, LeaseError, OptionError, PoolTimeout, SharedPoolError
from ...errors import TooManyWaiting as Crowded
from ...lease import Lease
from ...options import PoolOptions, check
from ...pool import Pool as Handle
from ...stats import PoolStats
from .driver import RedisDriver
from .session import Ledger, Session

#: What redis-py's pools are made with: no messages of their own on connections that are everybody's.
NO_NOTIFICATIONS: Final = MaintNotificationsConfig(enabled=False)
#: The pool's own options; whatever else is given is for redis-py's connections.
_OPTIONS: Final = frozenset(field.name for field in dataclasses.fields(PoolOptions))
#: What a URL says of them in words.
_WORDS: Final = {"true": True, "yes": True, "false": False, "no": False, "none": None}


class Packed(list[Any]):
    """Packed commands that still know what they were."""

    __slots__ = ("commands",)

    def __init__(self, parts: Iterable[Any], commands: Sequence[tuple[Any, ...]]) -> None:
        super().__init__(parts)
        self.commands = commands


class User:
    """Before redis-py's class: a connection object whose socket is that of a lease.

    `connect` takes a lease, `disconnect` discards it; so what redis-py does where a connection is lost (disconnect,
    and connect again to send the command once more) is another lease, which may have to wait for its permit. An object
    that was released has none, and takes none.
    """

    _sharedpool: Any
    _lease: Lease[Any] | None = None
    _session: Ledger | None = None
    _out = False

    def lost(self, session: Session) -> None:
        """The pool has closed the session."""

    def pack_command(self, *args: Any) -> Packed:
        """As redis-py's."""
        return Packed(super().pack_command(*args), (args,))  # type: ignore[misc]

    def pack_commands(self, commands: Iterable[tuple[Any, ...]]) -> Packed:
        """As redis-py's."""
        known = list(commands)
        return Packed(super().pack_commands(known), known)  # type: ignore[misc]

    def _discard(self) -> None:
        lease, self._lease, self._session = self._lease, None, None
        if lease is not None and lease.in_force:
            try:
                lease.discard()
            except LeaseError:
                pass  # it was taken away

    def _may_connect(self) -> None:
        if not self._out:
            raise redis.ConnectionError("this connection was given back to its pool, and is no longer yours")


class Leasing:
    """The arguments, and the names by which a pool is found.

    Args:
        pool: The shared pool's name.
        app: The scope's name, as for sharedpool.attach.
        max_connections: The cap over all processes. None: the environment's, else 50.
        timeout: Seconds to wait for a connection, as for BlockingConnectionPool; None: no limit.
        connection_class: redis-py's.
        given: Options of the shared pool, `session_label`, and keywords of the connections.
    """

    def _prepare(
        self, pool: str, app: str | None, max_connections: int | None, timeout: float | None, connection_class: Any,
        given: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        options = {name: _value(given.pop(name)) for name in list(given) if name in _OPTIONS}
        if max_connections is not None:
            options["max_connections"] = _value(max_connections)
        _refuse(given)
        if given.get("socket_connect_timeout") is not None:
            options.setdefault("connect_timeout", given["socket_connect_timeout"])
        names = given.pop("lib_name", SENTINEL), given.pop("lib_version", SENTINEL)
        label = str(given.pop("session_label", None) or "")
        given["driver_info"] = resolve_driver_info(given.get("driver_info", SENTINEL), *names)  # 0.5 ms for each object
        self.name = pool
        self.timeout: float | None = check("checkout_timeout", _value(timeout))
        options["checkout_timeout"] = self.timeout
        self._handle: Handle[Any] = control.attach(pool, app=app, **options)
        self._transport = RedisDriver(connection_class, given, label=label)
        self._via: Any = self._transport
        self._out: set[Any] = set()
        _pools.add(self)
        return given

    def _translated(self, error: SharedPoolError) -> Exception:
        """As redis-py's users know it."""
        cause = error.__cause__
        if isinstance(error, PoolTimeout | Crowded):
            return redis.exceptions.MaxConnectionsError(str(error))
        if isinstance(error, ConnectTimeout | ConnectFailed) and isinstance(cause, redis.RedisError):
            return cause
        return redis.ConnectionError(str(error))

    def shared_stats(self) -> PoolStats:
        """The pool's numbers over all processes; attaches."""
        return self._handle.stats()

    @property
    def _available_connections(self) -> list[Any]:
        return []

    @_available_connections.setter
    def _available_connections(self, value: Any) -> None:
        """Set by what this class does not use."""

    @property
    def _in_use_connections(self) -> set[Any]:
        return self._out

    @_in_use_connections.setter
    def _in_use_connections(self, value: Any) -> None:
        """The same."""

    def __del__(self) -> None:
        """Nothing: redis-py's would count connections out that it has not counted in."""

    def _forked(self) -> None:
        """In a forked child: what is lent belongs to the parent, and is unusable here."""


def give_back(lease: Lease[Any]) -> None:
    """As it is: the driver says whether the next user may have it."""
    if lease.in_force:
        try:
            lease.checkin()
        except LeaseError:
            pass  # it was taken away


def is_read(parser: Any) -> bool:
    """Whether a parser has given out all that it has received."""
    if hasattr(parser, "_reader"):  # hiredis
        return parser._reader is None or not parser._reader.has_data()
    buffer = parser._buffer
    if isinstance(buffer, bytes):  # redis.asyncio's: what has not been received whole
        return not buffer
    return buffer is None or not buffer.unread_bytes()


def _value(value: Any) -> Any:
    """An option's value; in a URL all are text."""
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        return value


def _refuse(given: dict[str, Any]) -> None:
    """What needs a connection of one's own."""
    for name in ("cache", "cache_config", "cache_factory"):
        if given.pop(name, None) is not None:
            raise OptionError(
                f"option {name!r} is given (from the call); client-side caching needs CLIENT TRACKING, whose messages"
                " come on a connection of one's own, and those of a shared pool are everybody's",
                option=name, value="given", source="the call", allowed="none",
            )  # fmt: skip
    asked = given.pop("maint_notifications_config", None)
    if asked is not None and asked.enabled is True:
        raise OptionError(
            "option 'maint_notifications_config' has enabled=True (from the call); maintenance notifications come on"
            " idle connections too, and those of a shared pool are everybody's; allowed is enabled=False",
            option="maint_notifications_config", value=asked, source="the call", allowed="enabled=False",
        )  # fmt: skip


_pools: Final[weakref.WeakSet[Leasing]] = weakref.WeakSet()


def _in_child() -> None:
    for pool in list(_pools):
        pool._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
