"""The fixtures of the system tests, and a Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.redises import RedisServer
from tests.system.conftest import directory, fork_server, nothing_left_behind, scope

__all__ = ["directory", "fork_server", "nothing_left_behind", "scope"]


@pytest.fixture
def redis_server(nothing_left_behind: None) -> Iterator[RedisServer]:
    """A Redis without any data."""
    server = RedisServer()
    try:
        yield server.begin()
    finally:
        server.end()
