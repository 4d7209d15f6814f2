"""What the workers of `benchmarks.http` serve: each request is one of requests' own to the back end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import requests

from sharedpool.integrations.requests import SharedPoolAdapter

URL = os.environ.get("BENCH_URL", "")
session = requests.Session()
session.trust_env = False
if os.environ.get("BENCH_SHARED"):
    session.mount("http://", SharedPoolAdapter("bench", max_connections=8))


def app(_: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Fetch the page."""
    body = session.get(URL).content
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
