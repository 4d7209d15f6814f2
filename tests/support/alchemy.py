"""What a worker with SQLAlchemy engines can be told to do; its things: engines, open connections, what events said."""

from __future__ import annotations

import gc
import threading
import traceback
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

import sharedpool.postgres.psycopg2
import sharedpool.postgres.psycopg3  # noqa: F401  the same
from sharedpool.integrations.sqlalchemy import SharedQueuePool
from tests.support.state import State

EVENTS = (
    "first_connect", "connect", "checkout", "checkin", "reset", "invalidate", "soft_invalidate", "close", "detach",
    "close_detached",
)  # fmt: skip


def make(
    state: State, url: str, label: str = "engine", *, listen: str = "", poolclass: Any = None, **given: Any
) -> None:
    """An engine; with `listen` every connect event runs this statement and commits."""
    engine = create_engine(url, poolclass=poolclass or SharedQueuePool, **given)
    state.things[label] = engine
    seen = state.things[f"events of {label}"] = []
    for name in EVENTS:
        event.listen(engine, name, lambda *_, name=name: seen.append(name))

    @event.listens_for(engine, "connect")
    def connected(dbapi_connection: Any, record: Any) -> None:
        record.info["connected"] = record.info.get("connected", 0) + 1
        if listen:
            with dbapi_connection.cursor() as cursor:
                cursor.execute(listen)
            dbapi_connection.commit()


def events(state: State, label: str = "engine") -> list[str]:
    """What events there were since this was asked last."""
    seen = state.things[f"events of {label}"]
    found = list(seen)
    seen.clear()
    return found


def query(state: State, statement: str = "SELECT pg_backend_pid()", label: str = "engine", commit: bool = False) -> Any:
    """Connect, ask one thing, give back."""
    with state.things[label].connect() as connection:
        found = connection.scalar(text(statement))
        if commit:
            connection.commit()
        return found


def execute(state: State, statement: str, label: str = "engine") -> None:
    with state.things[label].begin() as connection:
        connection.execute(text(statement))


def hold(state: State, label: str = "engine", name: str = "held") -> int:
    """Connect and keep it; its backend's number."""
    connection = state.things[name] = state.things[label].connect()
    return int(connection.scalar(text("SELECT pg_backend_pid()")))


def ask(state: State, statement: str = "SELECT pg_backend_pid()", name: str = "held") -> Any:
    """Ask something on a connection that is kept."""
    return state.things[name].scalar(text(statement))


def give_back(state: State, name: str = "held") -> None:
    state.things.pop(name).close()


def forget(state: State, name: str = "held") -> None:
    """Lose a connection without closing it."""
    del state.things[name]
    gc.collect()


def on_connection(state: State, method: str, name: str = "held") -> None:
    getattr(state.things[name], method)()


def on_proxied(state: State, method: str, name: str = "held", **options: Any) -> None:
    getattr(state.things[name].connection, method)(**options)


def on_pool(state: State, method: str, label: str = "engine", *arguments: Any) -> Any:
    return getattr(state.things[label].pool, method)(*arguments)


def dispose(state: State, label: str = "engine") -> None:
    state.things[label].dispose()


def load(state: State, statement: str, number: int, threads: int = 1, label: str = "engine") -> list[str]:
    """So many transactions in each of so many threads, each checked to have its own session; the errors."""
    engine, errors = state.things[label], []

    def run() -> None:
        try:
            for i in range(number):
                token = f"{threading.get_ident()}-{i}"
                with Session(engine) as session, session.begin():
                    session.execute(text("SELECT set_config('my.token', :token, true)"), {"token": token})
                    session.execute(text(statement))
                    if session.scalar(text("SELECT current_setting('my.token')")) != token:
                        errors.append("somebody else's session")
        except Exception as error:
            errors.append("".join(traceback.format_exception(error)))

    started = [threading.Thread(target=run) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return errors
