"""What makes an engine of Django lease its connections from a pool of all processes.

Django asks its engine for a pool, takes a connection from it when a request first needs one, and gives it back at the
request's end. So the pool is replaced, and nothing else, as long as OPTIONS["pool"]["lease"] is "request". With
"transaction" the connection goes back after each transaction, and outside of transactions after each statement; whoever
uses a cursor then finds another session below it each time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Final

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import NO_DB_ALIAS

from .. import control
from ..errors import DrainTimeout, OptionError, PoolNotFound, SessionNotKept
from .statements import needs_its_session

if TYPE_CHECKING:
    from django.db.backends.base.creation import BaseDatabaseCreation as _Creation
    from django.db.backends.postgresql.base import DatabaseWrapper as _Wrapper
    from django.db.backends.utils import CursorWrapper as _Cursor
else:
    _Creation = _Wrapper = _Cursor = object

#: OPTIONS["pool"] = True stands for these, and they for what it does not name.
DEFAULTS: Final = {"min_size": 0, "max_size": 20}
LEASES: Final = ("request", "transaction")
#: Before DROP DATABASE: seconds for other processes to give back what they lease.
_DRAIN: Final = 5.0
#: psycopg's transaction status where nothing is open: idle, and unknown because the connection is broken.
_NOTHING_OPEN: Final = (0, 4)


class _SharedCreation(_Creation):
    """Makes and drops test databases to which no process of the host has an idle session."""

    def _clone_test_db(self, suffix: str, verbosity: int, keepdb: bool = False) -> None:
        self.connection.drain_database(self.get_test_db_clone_settings(suffix)["NAME"])
        super()._clone_test_db(suffix, verbosity, keepdb)

    def _destroy_test_db(self, test_database_name: str, verbosity: int) -> None:
        self.connection.drain_database(test_database_name)
        super()._destroy_test_db(test_database_name, verbosity)


class SharedPoolMixin(_Wrapper):
    """Goes before an engine's DatabaseWrapper: its OPTIONS["pool"] is then a pool of all processes.

        class DatabaseWrapper(SharedPoolMixin, postgis.base.DatabaseWrapper): ...

    OPTIONS["pool"] takes the keys of sharedpool.postgres.ConnectionPool, which are those of Django's own, and `lease`.
    """

    connection: Any
    _shared_pools: ClassVar[dict[tuple[str, Any], Any]] = {}
    #: How many things are under way that need the session to stay.
    _holds = 0
    #: The statement that was refused since the last `close`; its caller may have ignored the error.
    _refused = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls.creation_class, _SharedCreation):
            cls.creation_class = type("DatabaseCreation", (_SharedCreation, cls.creation_class), {})

    # --- the pool -----------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> Any:
        """The pool, which attaches at its first use; None without OPTIONS["pool"], and for no database in particular.

        Raises:
            ImproperlyConfigured: The options are wrong, or go not with others.
        """
        if not self._is_pooled:
            return None
        key = self.alias, self.settings_dict["NAME"]
        known = self._shared_pools.get(key)
        return known or self._shared_pools.setdefault(key, self._make_pool(self.settings_dict["NAME"]))

    @property
    def _is_pooled(self) -> bool:
        return bool(self.settings_dict["OPTIONS"].get("pool")) and self.alias != NO_DB_ALIAS

    def _make_pool(self, database: Any) -> Any:
        if self.settings_dict.get("CONN_MAX_AGE", 0) != 0:
            raise ImproperlyConfigured("Pooling doesn't support persistent connections.")
        params = self.get_connection_params()  # refuses psycopg2
        from ..postgres.pool import ConnectionPool

        options = {**DEFAULTS, **self._pool_options}
        options.pop("lease", None)
        kind: Any = _ResettingPool() if self.leases_transactions else ConnectionPool
        if self.settings_dict.get("CONN_HEALTH_CHECKS"):
            options.setdefault("check", ConnectionPool.check_connection)
        params = {**params, "autocommit": True}  # Django sets it later on
        if database and self.settings_dict["NAME"]:
            params["dbname"] = database
        try:
            return kind(kwargs=params, open=False, configure=self._configure_session, **options)
        except (TypeError, ValueError, OptionError) as error:
            raise ImproperlyConfigured(f"OPTIONS['pool']: {error}") from error

    def _configure_session(self, session: Any) -> None:
        """Django's settings for a session; in whatever thread it is that has just got it.

        Django asks its own connection how to quote a role's name: meanwhile that is this session.
        """
        wrapper: Any = connections[self.alias] if self.alias in connections else self  # noqa: SIM401 - no dict
        before, wrapper.connection = wrapper.connection, session
        wrapper._holds += 1
        try:
            wrapper._configure_connection(session)
        finally:
            wrapper._holds -= 1
            wrapper.connection = before

    @property
    def _pool_options(self) -> dict[str, Any]:
        options = self.settings_dict["OPTIONS"].get("pool")
        return options if isinstance(options, dict) else {}

    def close_pool(self) -> None:
        """Close the sessions of all processes to this database, and this process's pool.

        Idle ones at once; what others lease when they give it back, and a DROP DATABASE after this waits for them a few
        seconds.
        """
        if self._is_pooled:
            self.drain_database(self.settings_dict["NAME"])
            pool = self._shared_pools.pop((self.alias, self.settings_dict["NAME"]), None)
            if pool is not None:
                pool.close()

    def drain_database(self, database: str) -> None:
        """Close the sessions of all processes to a database."""
        if self._is_pooled:
            pool = self._shared_pools.get((self.alias, database)) or self._make_pool(database)
            driver = pool.driver
            wait = _DRAIN if self.connection is None else None  # nobody waits for himself
            with contextlib.suppress(PoolNotFound, DrainTimeout):
                control.drain(
                    pool.name, (driver.host, driver.port, driver), wait=wait, app=self._pool_options.get("app")
                )

    # --- a lease for each transaction ---------------------------------------------------------------------------------

    @functools.cached_property
    def leases_transactions(self) -> bool:
        """Whether the connection goes back after each transaction, and outside of transactions after each statement."""
        lease = self._pool_options.get("lease", LEASES[0])
        if lease not in LEASES:
            raise ImproperlyConfigured(f"OPTIONS['pool']['lease'] is {lease!r}; allowed is one of {', '.join(LEASES)}")
        return lease == "transaction" and self._is_pooled

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """For a block: the same session for all statements, whatever `lease` is."""
        if not self._keeps_its_session:
            self._refused = ""  # this is what its error has asked for
        self.ensure_connection()
        with self._held():
            yield

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self._give_back()

    @property
    def _keeps_its_session(self) -> bool:
        """Whether the next statement has the session that this one has."""
        if not self.leases_transactions or self._holds or self.in_atomic_block or not self.autocommit:
            return True
        return self.connection is not None and self.connection.pgconn.transaction_status not in _NOTHING_OPEN

    def _give_back(self) -> None:
        """Give the connection back, if nothing needs this session any more.

        By way of `close`, because engines forget there what they have done to their session.
        """
        if self.connection is None or self._keeps_its_session or self.closed_in_transaction:
            return
        refused = self._refused
        self.close()
        self.connection = None
        self._refused = refused

    def close(self) -> None:
        """As Django's; a refused statement is forgotten."""
        self._refused = ""
        super().close()

    def close_if_unusable_or_obsolete(self) -> None:
        """As Django's, which does it at the beginning and the end of a request; a refused statement is forgotten."""
        self._refused = ""
        super().close_if_unusable_or_obsolete()

    def connect(self) -> None:
        """As Django's; receivers of its signal have the session that they set up."""
        if not self.leases_transactions:
            super().connect()
            return
        self._holds += 1
        try:
            super().connect()
        finally:
            self._holds -= 1

    def get_autocommit(self) -> bool:
        """As Django's, without taking a connection for the answer."""
        if self.leases_transactions and self.connection is None and not self.in_atomic_block:
            return bool(self.settings_dict["AUTOCOMMIT"])
        return bool(super().get_autocommit())

    def set_autocommit(self, *args: Any, **kwargs: Any) -> None:
        """As Django's, which ends a transaction with it."""
        super().set_autocommit(*args, **kwargs)
        self._give_back()

    def chunked_cursor(self) -> Any:
        """As Django's; outside of transactions a cursor at the server would be another session's."""
        if not self._keeps_its_session:
            return self.cursor()
        return super().chunked_cursor()

    def _prepare_cursor(self, cursor: Any) -> Any:
        wrapped = super()._prepare_cursor(cursor)
        if self.leases_transactions:
            kind: Any = type(wrapped)
            wrapped.__class__ = _leasing(kind)
        return wrapped

    @contextlib.contextmanager
    def statement(self, wrapper: Any, sql: Any) -> Iterator[None]:
        """Around a statement of a cursor: a session is there at its beginning, and goes back at its end if it may."""
        changes = needs_its_session(sql)
        if self._refused or (changes and not self._keeps_its_session):
            raise self._refusal(sql)
        self.ensure_connection()
        old = wrapper.cursor
        if old.connection is not self.connection:
            with self.wrap_database_errors:
                wrapper.cursor = self.create_cursor()
                wrapper.cursor.arraysize, wrapper.cursor.row_factory = old.arraysize, old.row_factory
        if changes:
            self.connection._changed = True
        with self._held():
            yield

    def _refusal(self, sql: Any) -> SessionNotKept:
        """The error for a statement that is about its session, and for all that follow it until `close`.

        Those that follow would not find what the first one was to set up, and its error may have been ignored.
        """
        before, self._refused = self._refused, self._refused or " ".join(str(sql).split())[:60]
        what = f"{self._refused!r} is about the session"
        return SessionNotKept(
            f"{f'an earlier statement was refused: {what}' if before else what}, and with OPTIONS['pool']['lease'] ="
            " 'transaction' the next statement outside of atomic() has another; use `with connection.pinned():` around"
            " all that needs it, or lease='request'", statement=self._refused,
        )  # fmt: skip


@functools.cache
def _ResettingPool() -> Any:  # noqa: N802 - a class, once psycopg is there
    """A pool that sets each session back before each lease, unless its options say otherwise."""
    from ..postgres.pool import ConnectionPool

    return type("ConnectionPool", (ConnectionPool,), {"_resets": "always", "__module__": ConnectionPool.__module__})


class _PerStatement(_Cursor):
    """A cursor of Django whose session is there while it executes; its rows are read from memory."""

    def execute(self, sql: Any, params: Any = None) -> Any:
        with self.db.statement(self, sql):
            return super().execute(sql, params)

    def executemany(self, sql: Any, param_list: Any) -> Any:
        with self.db.statement(self, sql):
            return super().executemany(sql, param_list)

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        with self.db.statement(self, f"SELECT {args[0] if args else kwargs.get('procname', '')}()"):
            return super().callproc(*args, **kwargs)

    @contextlib.contextmanager
    def copy(self, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As psycopg's; the session stays for the block."""
        with self.db.statement(self, statement):
            copy = getattr(super(), "copy", None) or self.cursor.copy
            with copy(statement, *args, **kwargs) as found:
                yield found

    def stream(self, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As psycopg's; the session stays until the last row."""
        with self.db.statement(self, query):
            yield from self.cursor.stream(query, *args, **kwargs)

    def close(self) -> None:
        self.cursor.close()
        self.db._give_back()


@functools.cache
def _leasing(kind: Any) -> Any:
    """A class of Django's cursors that leases for each statement; one for each."""
    return type(kind.__name__, (_PerStatement, kind), {"__module__": kind.__module__})
