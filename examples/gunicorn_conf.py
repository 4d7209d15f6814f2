"""A gunicorn configuration that declares the pools of its application, so that their numbers stand in one place.

    BACKEND=127.0.0.1:8080 gunicorn -c examples/gunicorn_conf.py examples.configured_app:app

An application that gives its options itself, as gunicorn_app does, needs none of this. After `kill -HUP` changed
numbers are in force, for the workers that are there and for the new ones.
"""

from __future__ import annotations

import os
from typing import Any

from sharedpool.integrations import gunicorn as sp

workers = 4


def on_starting(server: Any) -> None:
    """A hook of one's own stays: it is called once the pools are there."""
    server.log.info("master %d starts", os.getpid())


sp.install(globals(), pools={"db": {"max_connections": 3, "idle_timeout": 60}})
