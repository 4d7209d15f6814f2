"""A pytest plugin: urllib3's tests find our classes where they look for urllib3's, by the same names.

Each test has a shared pool of its own, so that none finds connections of another.
"""

from __future__ import annotations

import logging
from typing import Any

import urllib3
import urllib3.connection
import urllib3.connectionpool
import urllib3.poolmanager

from sharedpool import pool as handles
from sharedpool.integrations import urllib3 as ours

_number = 0
logging.getLogger("sharedpool").setLevel(logging.WARNING)


class _OfTheTest:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, pool=f"test-{_number}", max_connections=50, **kwargs)  # type: ignore[call-arg]


def _class(name: str, *bases: type, **members: Any) -> type:
    return type(name, bases, members)


_connection = _class("HTTPConnection", ours.SharedHTTPConnection)
_tls_connection = _class("HTTPSConnection", ours.SharedHTTPSConnection)
_http = _class("HTTPConnectionPool", _OfTheTest, ours.SharedHTTPConnectionPool, ConnectionCls=_connection)
_https = _class("HTTPSConnectionPool", _OfTheTest, ours.SharedHTTPSConnectionPool, ConnectionCls=_tls_connection)
_OURS = {
    "HTTPConnection": _connection,
    "HTTPSConnection": _tls_connection,
    "VerifiedHTTPSConnection": _tls_connection,
    "HTTPConnectionPool": _http,
    "HTTPSConnectionPool": _https,
}

for _module in (urllib3, urllib3.connection, urllib3.connectionpool, urllib3.poolmanager):
    for _name, _kind in _OURS.items():
        if hasattr(_module, _name):
            setattr(_module, _name, _kind)
urllib3.poolmanager.pool_classes_by_scheme.update(http=_http, https=_https)


def pytest_runtest_setup() -> None:
    global _number
    _number += 1


def pytest_runtest_teardown() -> None:
    handles.close_all()
