"""What a worker can be told to do with PostgreSQL sessions. The first argument is the worker's State."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any, cast

from tests.support import commands
from tests.support.state import State


def make(state: State, kind: str, conninfo: str, label: str = "db", *, settings: str = "", **options: Any) -> None:
    """A driver under a label; `settings`: a query that its configure callback runs."""
    if settings:
        options["configure"] = _configure(settings)
    if kind == "psycopg2":
        from sharedpool.postgres.psycopg2 import Psycopg2Driver

        state.things[label] = Psycopg2Driver(conninfo, **options)
    else:
        from sharedpool.postgres.psycopg3 import Psycopg3Driver

        state.things[label] = Psycopg3Driver(conninfo, **options)


def make_changing(state: State, kind: str, conninfo: str, label: str = "db") -> None:
    """A driver whose conninfo is a callable, and may be changed by `set_database`."""
    state.things["conninfo"] = conninfo
    make(state, kind, cast(Any, lambda: state.things["conninfo"]), label)


def set_database(state: State, name: str) -> None:
    """Where the callable leads from now on."""
    state.things["conninfo"] += f" dbname={name}"


def _configure(query: str) -> Any:
    def configure(conn: Any) -> None:
        with conn.cursor() as cursor:
            cursor.execute(query)
        if query != "BEGIN":
            conn.commit()

    return configure


def lease(state: State, name: str = "a", label: str = "db", **options: Any) -> int:
    """Lease a session and keep it; gives the server's process number as the library knows it."""
    driver = state.things[label]
    state.leases[name] = commands.pool_of(state, "default").checkout(driver.host, driver.port, driver, **options)
    return int(state.leases[name].conn.info.backend_pid)


def sql(state: State, query: str, parameters: Any = None, name: str = "a", commit: bool = True) -> Any:
    """The first row's values, or None."""
    conn = state.leases[name].conn
    with conn.cursor() as cursor:
        cursor.execute(query, parameters)
        row = cursor.fetchone() if cursor.description else None
    if commit and not conn.autocommit:
        conn.commit()
    return row


def query(state: State, text: str, parameters: Any = None, label: str = "db", **options: Any) -> Any:
    """One statement on a lease of its own."""
    lease(state, "query", label, **options)
    try:
        return sql(state, text, parameters, "query")
    finally:
        found = state.leases.pop("query")
        if found.in_force:
            found.checkin()


def try_query(state: State, text: str, label: str = "db") -> str:
    """What a query says on a lease of its own, or its error's name."""
    lease(state, "try", label)
    found = try_sql(state, text, "try")
    state.leases["try"].conn.rollback()
    state.leases.pop("try").checkin()
    return found


def staying(state: State, label: str = "db") -> dict[str, int]:
    """The driver's sessions that cannot move, by reason."""
    from sharedpool.postgres import sessions_that_stay

    return sessions_that_stay(state.things[label])


def try_sql(state: State, text: str, name: str = "a") -> str:
    """What a query says, or its error's name."""
    try:
        return str(sql(state, text, name=name))
    except Exception as error:
        return type(error).__name__


def read(state: State, path: str, name: str = "a") -> Any:
    """An attribute of a leased connection: `info.host`."""
    value = state.leases[name].conn
    for part in path.split("."):
        value = getattr(value, part)
        value = value() if callable(value) and part.startswith("get_") else value
    return value


def put(state: State, attribute: str, value: Any, name: str = "a") -> None:
    setattr(state.leases[name].conn, attribute, value)


def call(state: State, method: str, *arguments: Any, name: str = "a", **options: Any) -> None:
    getattr(state.leases[name].conn, method)(*arguments, **options)


def copy_and_leave_off(state: State, name: str = "a") -> None:
    """Begin a COPY and give the session back in its midst."""
    state.things["copy"] = state.leases[name].conn.cursor().copy("COPY (SELECT 1) TO STDOUT")
    state.things["copy"].__enter__()
    state.leases[name].checkin()


def kept_object(state: State, name: str = "a") -> None:
    """Keep the bare object beyond its lease."""
    state.things["stale"] = state.leases[name].conn


def use_stale(state: State, text: str) -> str:
    """A query on it; the error's name."""
    try:
        with state.things["stale"].cursor() as cursor:
            cursor.execute(text)
            return str(cursor.fetchone())
    except Exception as error:
        return type(error).__name__


def cancel_stale(state: State) -> None:
    with contextlib.suppress(Exception):
        state.things["stale"].cancel()


def work(state: State, seconds: float, label: str = "db", query: str = "", evidence: str = "") -> list[str]:
    """Leases with a token of their own, for so long, or until told to stop; gives what was wrong.

    Killed at any moment: what is wrong is written to the file `evidence` at once, and a line for each lease that was
    well.
    """
    pool, driver, errors = commands.pool_of(state, "default"), state.things[label], []
    chance = random.Random(f"{os.getpid()}")
    end, n = time.monotonic() + seconds, 0
    with open(evidence or os.devnull, "a", buffering=1) as file:
        stop = commands.told_to_stop(state)
        while time.monotonic() < end and not stop.is_set():
            n += 1
            wrong = ""
            try:
                with pool.connection(driver.host, driver.port, driver, checkout_timeout=30) as conn:
                    wrong = _talk(conn, f"{os.getpid()}-{n}", chance, query)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                errors.append(wrong)
            file.write(f"{wrong!r}\n" if wrong else ".\n")
    return errors


#: What a lease does beside asking for its token.
_DEEDS = (
    "SELECT 1", "SELECT pg_sleep(0.02)", "SELECT repeat('x', 200000)", "SET client_encoding TO 'LATIN1'", "LISTEN news",
    "CREATE TEMP TABLE IF NOT EXISTS mine (x int)", "SET TimeZone TO 'Asia/Tokyo'", "SELECT pg_advisory_lock_shared(7)",
)  # fmt: skip


def _talk(conn: Any, token: str, chance: random.Random, query: str) -> str:
    """Whether a session is one's own for the whole of a lease, and nobody else's before it."""
    conn.autocommit = True
    with conn.cursor() as cursor:
        cursor.execute("SELECT current_setting('my.token', true)")
        before = cursor.fetchone()[0]
        if before and not before.startswith(f"{os.getpid()}-"):
            return f"{token}: the session still had {before}"
        cursor.execute("SELECT set_config('my.token', %s, false)", (token,))
        for i in range(3):
            cursor.execute(query or chance.choice(_DEEDS))
            if cursor.description:
                cursor.fetchall()
            cursor.execute("SELECT current_setting('my.token'), %s::int, 'ü'::text", (i,))
            found = cursor.fetchone()
            if found != (token, i, "ü"):
                return f"{token} {i} was answered by {found!r}"
    return ""


def let_go_of_all(state: State) -> int:
    """The process has no session any more; gives how many descriptors it has."""
    attached = commands.pool_of(state, "default").attached
    for entry in list(attached.entries.values()):
        assert attached._let_go_of(entry)
    return len(os.listdir("/proc/self/fd"))


def query_with_fault(state: State, text: str, place: str, after: bool, error: type[BaseException]) -> Any:
    """As `query` for psycopg3 on a session that this process does not have, with an error at a step of the adoption.

    Returns:
        The error's name, or the first row's values.
    """
    from sharedpool.postgres import psycopg3

    let_go_of_all(state)
    owner: Any = psycopg3
    *parts, name = place.split(".")
    for part in parts:
        owner = getattr(owner, part)
    real = owner.__dict__[name]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, real)
        if after:
            getattr(owner, name)(*args[isinstance(real, classmethod) :], **kwargs)
        raise error("a fault")

    setattr(owner, name, classmethod(faulty) if isinstance(real, classmethod) else faulty)
    try:
        said = query(state, text)
    except BaseException as caught:
        said = type(caught).__name__
    assert owner.__dict__[name] is real, "the fault has happened"
    return said


def make_with_own_class(state: State, conninfo: str, label: str = "db") -> None:
    """psycopg3, with a class whose objects ask the server something when they are made."""
    import psycopg

    from sharedpool.postgres.psycopg3 import Psycopg3Driver

    class Asking(psycopg.Connection[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.pgconn.exec_(b"SET application_name = 'asked'")

    state.things[label] = Psycopg3Driver(conninfo, connection_class=Asking, reset="never")
