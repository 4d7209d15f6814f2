"""What a request and a task do: write something for a tenant, and read what that tenant may see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.db import connection, transaction


@contextlib.contextmanager
def tenant(name: str) -> Iterator[Any]:
    """A cursor of a tenant's: the rows are told by a setting, the tables by the search path."""
    if settings.LEASE == "request":
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('shop.tenant', %s, false)", [name])
            cursor.execute(f"SET search_path = {name}, public")
            yield cursor
    else:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('shop.tenant', %s, true)", [name])
            cursor.execute(f"SET LOCAL search_path = {name}, public")
            yield cursor


def write(name: str, text: str, hold: bool = False) -> str:
    """A note of a tenant's. Gives whose table and whose rows there are to see, and the note; with `hold` once the
    judge lets go.
    """
    with tenant(name) as cursor:
        cursor.execute("INSERT INTO note (text) VALUES (%s)", [text])
        if hold:
            cursor.execute("SELECT pg_advisory_xact_lock_shared(1)")
        cursor.execute("SELECT name FROM owner")
        owners = [row[0] for row in cursor.fetchall()]
        cursor.execute("SELECT DISTINCT tenant FROM note")
        tenants = [row[0] for row in cursor.fetchall()]
        cursor.execute("SELECT text FROM note WHERE text = %s", [text])
        return f"{owners} {tenants} {[row[0] for row in cursor.fetchall()]}"
