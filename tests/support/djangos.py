"""What a worker with a Django project can be told to do."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import django
from django.db import connection, transaction

import sharedpool.django.postgresql.base
import sharedpool.postgres.pool  # noqa: F401  loaded before the workers are forked
from tests.support.state import State


def setup(state: State, database: str, debug: bool = False) -> None:
    """Begin with the project; the database as in settings.DATABASES, as JSON."""
    os.environ.update(
        SHOP_DATABASE=database,
        SHOP_DEBUG=str(int(debug)),
        DJANGO_SETTINGS_MODULE="tests.support.djangoproject.settings",
    )
    django.setup()


def setup_tenants(state: State, database: str, limit: bool) -> None:
    """Begin with django-tenants over the project's database; `limit`: its TENANT_LIMIT_SET_CALLS."""
    from django.conf import settings

    settings.configure(
        DATABASES={"default": json.loads(database)}, TENANT_LIMIT_SET_CALLS=limit, TENANT_MODEL="x.X", USE_TZ=True,
        INSTALLED_APPS=["django.contrib.contenttypes"],
    )  # fmt: skip
    django.setup()


def query(state: State, sql: str = "SELECT pg_backend_pid()", params: Any = None) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()[0] if cursor.description else None


def close(state: State) -> None:
    """The end of a request."""
    connection.close()


def end_of_request(state: State) -> None:
    """What Django does at the end of every request."""
    from django.core.signals import request_finished

    request_finished.send(None)


def is_held(state: State) -> bool:
    return connection.connection is not None


def request(state: State, name: str, between: Any = None) -> tuple[str, int]:
    """A request to the project's page, as a WSGI server does it: how many there are of that name, and the session."""
    from django.core.handlers.wsgi import WSGIHandler

    from tests.support.djangoproject import urls

    urls.between[:] = [between] if between else []
    if "handler" not in state.things:
        state.things["handler"] = WSGIHandler()
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": f"/{name}", "SERVER_NAME": "x", "SERVER_PORT": "80",
        "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
    }  # fmt: skip
    started: list[str] = []
    response = state.things["handler"](environ, lambda status, headers: started.append(status))
    body = b"".join(response).decode()
    response.close()
    if not started[0].startswith("200"):
        raise AssertionError(f"{started[0]}: {body[:2000]}")
    count, pid = body.split()
    return count, int(pid)


def requests(state: State, prefix: str, number: int) -> list[str]:
    """So many requests, each for a name of its own; the wrong answers."""
    found = [request(state, f"{prefix}{i}")[0] for i in range(number)]
    return [answer for answer in found if answer != "1"]


def begin(state: State) -> None:
    """Enter an atomic block."""
    block = state.things["atomic"] = transaction.atomic()
    block.__enter__()


def end(state: State) -> None:
    state.things.pop("atomic").__exit__(None, None, None)


def close_pool(state: State) -> None:
    connection.close_pool()
