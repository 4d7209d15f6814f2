"""What makes an engine of Django lease its connections from a pool of all processes.

Django asks its engine for a pool, takes a connection from it when a request first needs one, and gives it back at the
request's end. So the pool is replaced, and nothing else, as long as OPTIONS["pool"]["lease"] is "request". With
"transaction" the connection goes back after each transaction, and outside of transactions after each statement; whoever
uses a cursor then finds another session below it each time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Final

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.base import NO_DB_ALIAS
from django.db.backends.postgresql.psycopg_any import is_psycopg3

from .. import control
from ..errors import DrainTimeout, OptionError, PoolNotFound, SessionNotKept
from .settings import read
from .statements import needs_its_session

if TYPE_CHECKING:
    from django.db.backends.base.creation import BaseDatabaseCreation as _Creation
    from django.db.backends.postgresql.base import DatabaseWrapper as _Wrapper
    from django.db.backends.utils import CursorWrapper as _Cursor
else:
    _Creation = _Wrapper = _Cursor = object

log = logging.getLogger("sharedpool")

#: OPTIONS["pool"] = True stands for these, as does no OPTIONS["pool"] at all, and they for what it does not name.
DEFAULTS: Final = {"min_size": 0, "max_size": 20}
LEASES: Final = ("request", "transaction")
#: Before DROP DATABASE: seconds for other processes to give back what they lease.
_DRAIN: Final = 5.0
#: psycopg's transaction status where nothing is open: idle, and unknown because the connection is broken.
_NOTHING_OPEN: Final = (0, 4)


class _SharedCreation(_Creation):
    """Makes and drops test databases to which no process of the host has an idle session."""

    def _create_test_db(self, verbosity: int, autoclobber: bool, keepdb: bool = False) -> str:
        if not keepdb:  # one of that name may be there from an earlier run, and is dropped
            self.connection.drain_database(self._get_test_db_name())
        return str(super()._create_test_db(verbosity, autoclobber, keepdb))

    def _clone_test_db(self, suffix: str, verbosity: int, keepdb: bool = False) -> None:
        self.connection.close()
        self.connection.drain_database(self.connection.settings_dict["NAME"])  # a template must have no sessions
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
    #: Those that were "closed": they are compared with the settings before they are used again.
    _to_look_at: ClassVar[set[tuple[str, Any]]] = set()
    _making: ClassVar[Any] = threading.Lock()
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
        """The pool, which attaches at its first use; None with OPTIONS["pool"] = False or None, and for no database.

        Raises:
            ImproperlyConfigured: The options are wrong, or go not with others.
        """
        if not self._is_pooled:
            return None
        key = self.alias, self.settings_dict["NAME"]
        known = self._shared_pools.get(key)
        if known is not None and key not in self._to_look_at:
            return known
        return self._pool_of_now(key)

    def _pool_of_now(self, key: tuple[str, Any]) -> Any:
        """The pool that the settings ask for now: the one that is there, if it was made of equal ones."""
        with self._making:
            self._to_look_at.discard(key)
            known, made_of = self._shared_pools.get(key), self._settings_of_pool()
            if known is not None and known.made_of == made_of:
                return known
            made = self._shared_pools[key] = self._make_pool(key[1])
            made.made_of = made_of
        if known is not None:
            known.close()
        return made

    def _settings_of_pool(self) -> tuple[Any, ...]:
        """All that a pool, and what it does to a session, is made of."""
        options = self.settings_dict["OPTIONS"]
        return (
            self.get_connection_params(), dict(self._pool_options), self.timezone_name, options.get("assume_role"),
            self.settings_dict.get("CONN_MAX_AGE"), self.settings_dict.get("CONN_HEALTH_CHECKS"),
        )  # fmt: skip

    @property
    def _is_pooled(self) -> bool:
        """Whoever names this engine wants its pool: only False and None, written down, say no."""
        given = self.settings_dict["OPTIONS"].get("pool", True)
        return given is not False and given is not None and self.alias != NO_DB_ALIAS

    def _make_pool(self, database: Any) -> Any:
        if not is_psycopg3:
            raise ImproperlyConfigured("sharedpool.django needs psycopg 3: Django has loaded psycopg2")
        if self.settings_dict.get("CONN_MAX_AGE", 0) != 0:
            raise ImproperlyConfigured("Pooling doesn't support persistent connections.")
        params = self.get_connection_params()
        from ..postgres.pool import ConnectionPool

        if "pool" not in self.settings_dict["OPTIONS"]:
            _say_defaults(self.alias)
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
        """OPTIONS["pool"] in the words of ConnectionPool.

        Raises:
            ImproperlyConfigured: It is no dictionary, or has a key or a value that cannot be.
        """
        given = self.settings_dict["OPTIONS"].get("pool", True)
        return read({} if given is True else given)

    def close_pool(self) -> None:
        """From the next query on, use what the settings say then: this process's pool is made anew if they differ.

        Nothing waits, and no session ends: Celery calls this before and after each task, and the pool is fit for a
        fork anyway. `drain_database` closes the sessions of all processes.
        """
        self._to_look_at.add((self.alias, self.settings_dict["NAME"]))

    def drain_database(self, database: str) -> None:
        """Close the sessions of all processes to a database: idle ones now, leased ones when they are given back.

        It waits a few seconds for those, so that DROP DATABASE works afterwards. With OPTIONS["pool"]["name"] the pool
        may be one for several databases, and only sessions with this process's connection string are meant.
        """
        if self._is_pooled:
            pool = self._shared_pools.get((self.alias, database)) or self._make_pool(database)
            driver = pool.driver
            wait = _DRAIN if self.connection is None else None  # nobody waits for himself
            key = (driver.host, driver.port, driver) if "name" in self._pool_options else None
            with contextlib.suppress(PoolNotFound, DrainTimeout):
                control.drain(pool.name, key, wait=wait, app=self._pool_options.get("app"))

    # --- a lease for each transaction ---------------------------------------------------------------------------------

    @functools.cached_property
    def leases_transactions(self) -> bool:
        """Whether the connection goes back after each transaction, and outside of transactions after each statement."""
        if not self._is_pooled:
            return False
        lease = self._pool_options.get("lease", LEASES[0])
        if lease not in LEASES:
            raise ImproperlyConfigured(f"OPTIONS['pool']['lease'] is {lease!r}; allowed is one of {', '.join(LEASES)}")
        return bool(lease == "transaction")

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
def _say_defaults(alias: str) -> None:
    """A cap that nobody has chosen is said once in each process."""
    log.warning(
        "DATABASES[%r]['OPTIONS']['pool'] is not given: at most %s connections for all processes together; say"
        " 'pool': {'max_size': N} for another cap, or 'pool': False for no pool and no cap", alias,
        DEFAULTS["max_size"],
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


def _forked() -> None:
    """In a child: another thread of the parent may have had the lock."""
    SharedPoolMixin._making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
