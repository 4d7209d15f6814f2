"""A pool shaped like redis-py's BlockingConnectionPool, whose max_connections is the cap over all processes."""

from __future__ import annotations

from typing import Any, Self

import redis
from redis.connection import Connection, ConnectionPool

from ... import control
from ...errors import OptionError, SharedPoolError
from ...lease import Lease
from .driver import greeting_of
from .leasing import NO_NOTIFICATIONS, Leasing, Packed, User, give_back, is_read
from .session import Session


class SharedConnectionPool(Leasing, ConnectionPool):
    """`redis.BlockingConnectionPool` for all processes together; docs/redis.md has what differs.

    Lazy: making it attaches to nothing, so it may stand before a fork; the first connection attaches. After a fork a
    child goes on by itself; what was lent belongs to the parent, and is unusable in the child.

        client = redis.Redis(connection_pool=SharedConnectionPool("cache", max_connections=20, host="10.0.0.5"))

    Args:
        pool: The shared pool's name.
        app: The scope's name, as for sharedpool.attach.
        max_connections: The cap over all processes. None: the environment's, else 50.
        timeout: Seconds to wait for a connection; None: no limit.
        connection_class: redis-py's Connection, SSLConnection or UnixDomainSocketConnection, or one of your own.
        **given: Options of the pool (idle_timeout, max_lifetime, …; see PoolOptions), and the keywords of redis-py's
            connections; `session_label` says that what no name can tell (a `redis_connect_func` that is a closure, say)
            is the same wherever the label is.

    Raises:
        OptionError: An option is wrong, or needs a connection of one's own (client-side caching, say).
    """

    def __init__(
        self, pool: str = "default", *, app: str | None = None, max_connections: int | None = None,
        timeout: float | None = 20.0, connection_class: type[Any] = Connection, **given: Any,
    ) -> None:  # fmt: skip
        given = self._prepare(pool, app, max_connections, timeout, connection_class, given)
        self._users = type(connection_class.__name__, (_User, connection_class), {})
        ConnectionPool.__init__(self, connection_class, maint_notifications_config=NO_NOTIFICATIONS, **given)

    @classmethod
    def from_url(cls, url: str, **kwargs: Any) -> Self:
        """As redis-py's; the URL's query may have the pool's name and options: `redis://host/0?pool=cache`."""
        return super().from_url(url, **kwargs)

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lease(self) -> Lease[Session]:
        try:
            return self._handle.checkout(self._transport.host, 0, self._via)
        except OptionError:
            raise
        except SharedPoolError as error:
            raise self._translated(error) from error

    def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        """A connection, ready for a command; `release` gives it back.

        Raises:
            redis.exceptions.MaxConnectionsError: None became free within `timeout`.
            redis.TimeoutError: The server did not answer in time.
            redis.ConnectionError: It cannot be reached.
        """
        lease = self._lease()
        session = lease.conn
        user = session.user
        if user is None:
            user = self._users(**self.connection_kwargs)
            user._sharedpool = self
        user._bind(lease, session)
        user._out = True
        self._out.add(user)
        return user

    def make_connection(self) -> Any:
        """As `get_connection`: there is none without a lease."""
        return self.get_connection()

    def release(self, connection: Any) -> None:
        """Give a connection back; others may have it if it is as it was at its start, else it is closed."""
        if connection not in self._out:  # as redis-py: of another pool, or given back before
            return
        self._out.discard(connection)
        connection._out = False
        if connection.should_reconnect():
            connection.disconnect()
            return
        connection._give_back()

    def owns_connection(self, connection: Any) -> int:
        """Whether it is lent by this pool, in this process."""
        return connection in self._out

    # --- the pool -----------------------------------------------------------------------------------------------------

    def disconnect(self, inuse_connections: bool = True) -> None:
        """End what this process has lent; what is idle is everybody's, and stays (`drain` ends that, too)."""
        if inuse_connections:
            for user in list(self._out):
                user.disconnect()

    def close(self) -> None:
        """This process leaves the pool, until its next connection; what it has lent ends."""
        self.disconnect()
        self._handle.close()

    def reset(self) -> None:
        """Forget what is lent: it is ended, and its objects take no other connection."""
        for user in list(self._out):
            self._out.discard(user)
            user._out = False
            user.disconnect()

    def drain(self, wait: float | None = None) -> int:
        """Close the connections of all processes, as `sharedpool.drain`: idle ones now, others as they come back."""
        self._handle.open()
        return control.drain(self.name, wait=wait, app=self._handle.app)

    def set_retry(self, retry: Any) -> None:
        """As redis-py's; connections that this process knows from before keep theirs until they come by again."""
        self.connection_kwargs["retry"] = retry
        for user in list(self._out):
            user.retry = retry

    def re_auth_callback(self, token: Any) -> None:
        """A new token: every connection is closed once nobody uses it, and opened anew with it."""
        self.drain()

    def get_connection_count(self) -> list[tuple[int, dict[str, Any]]]:
        """Idle ones of all processes, and those that this process has lent, as redis-py's."""
        (_, free), (_, used) = super().get_connection_count()
        idle = 0 if self._handle.attached is None else self._handle.stats().idle
        return [(idle, free), (len(self._out), used)]

    def _get_free_connections(self) -> list[Any]:
        return []

    def _get_in_use_connections(self) -> set[Any]:
        return set(self._out)

    def _forked(self) -> None:
        out, self._out = self._out, set()
        for user in out:
            user._abandon()


class _User(User):
    """What is before redis-py's class."""

    def _bind(self, lease: Lease[Session], session: Session) -> None:
        """Make a lease's socket this object's."""
        this: Any = self
        sock = session.sock
        self._lease, self._session = lease, session
        if this._sock is not sock:
            if session.user is not None:
                session.user.lost(session)
            session.user = self
            this._sock = sock
            this._handshake_metadata = greeting_of(session, decode=this.encoder.decode_responses)
            this._reset_himport_state()
            this._parser.on_connect(this)
        if session.timed != this.socket_timeout:
            session.timed = this.socket_timeout
            sock.settimeout(session.timed)

    def _give_back(self) -> None:
        this: Any = self
        lease, session = self._lease, self._session
        self._lease = self._session = None
        if lease is not None and session is not None:
            if not is_read(this._parser):
                session.spoiled = True
            give_back(lease)

    def lost(self, session: Session) -> None:
        """The pool has closed the session; who is using it finds out by himself."""
        this: Any = self
        if self._lease is None and this._sock is session.sock:
            this._sock = None
            this._parser.on_disconnect()

    def _abandon(self) -> None:
        """In a forked child."""
        this: Any = self
        self._lease = self._session = None
        self._out = False
        this._sock = None
        this._parser.on_disconnect()

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Take a lease, unless there is one; it may have to wait for it."""
        this: Any = self
        if self._lease is not None and this._sock is not None:
            return
        self._may_connect()
        lease = this._sharedpool._lease()
        self._bind(lease, lease.conn)
        for reference in list(this._connect_callbacks):
            callback = reference()
            if callback is None:
                this._connect_callbacks.remove(reference)
            else:
                callback(this)

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """End the connection: the lease is discarded, and whoever waits gets the permit."""
        this: Any = self
        this._sock = None
        self._discard()
        super().disconnect(*args, **kwargs)  # type: ignore[misc]

    def __del__(self) -> None:
        """Nothing: a lease that is forgotten is the pool's affair."""

    def send_command(self, *args: Any, **kwargs: Any) -> None:
        """As redis-py's."""
        this: Any = self
        self._send(this._command_packer.pack(*args), (args,), kwargs.get("check_health", True))

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """As redis-py's; what was packed by others than this object's `pack_commands` is not known, and not lent on."""
        self._send(command, command.commands if isinstance(command, Packed) else None, check_health)

    def _send(self, parts: Any, commands: Any, check_health: bool) -> None:
        this: Any = self
        if self._lease is None or this._sock is None:
            self.connect_check_health(check_health=False)
        if check_health and this.health_check_interval:
            this.check_health()
        session = self._session
        assert session is not None
        session.sends(commands)
        super().send_packed_command(parts, check_health=False)  # type: ignore[misc]

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """As redis-py's."""
        session = self._session
        try:
            response = super().read_response(*args, **kwargs)  # type: ignore[misc]
        except redis.ResponseError as error:
            if session is not None:
                session.answered(error)
            raise
        if session is not None:
            session.answered()
        return response

    def can_read(self, timeout: float = 0) -> bool:
        """As redis-py's."""
        this: Any = self
        if self._lease is None:
            this.connect()
        return bool(super().can_read(timeout))  # type: ignore[misc]
