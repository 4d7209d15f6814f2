"""A WSGI application whose pool is declared elsewhere: by gunicorn_conf.py, or SHAREDPOOL_DB_MAX_CONNECTIONS=20.

BACKEND=127.0.0.1:8080 gunicorn -c examples/gunicorn_conf.py examples.configured_app:app
"""

from __future__ import annotations

from collections.abc import Iterable

import sharedpool
from examples.gunicorn_app import Environ, StartResponse, fetch

pool = sharedpool.attach("db")


def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Serve one request: /limit tells the cap, every other path is fetched from the back end."""
    path = environ["PATH_INFO"]
    if path == "/limit":
        status, body = "200 OK", f"{pool.stats().max_connections}\n".encode()
    else:
        status, body = fetch(path, pool)
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
