"""A short run of `scripts/stress --clients`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stress.clients import ClientsChaos, Servers
from tests.support.scope import Scope
from tests.support.workers import ForkServer, Harness

SECONDS = 3


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server: ForkServer) -> Iterator[Harness]:
    """Its fork server has loaded redis-py and urllib3, too."""
    forks = ForkServer("tests.stress.clients")
    harness = Harness(directory, scope.env, forks)
    yield harness
    harness.close()
    forks.stop()


def test_in_chaos_with_redis_py_and_urllib3_nothing_is_lost(
    harness: Harness, directory: Path, scope: Scope, seeded: random.Random
) -> None:
    with Servers(directory) as servers:
        report = ClientsChaos(harness, scope, servers, seeded.randrange(2**31)).run(SECONDS)
    print(report)
    assert report.good, str(report)
    assert report.peak > 0
    assert report.outcomes["done"] > 0
    assert report.faults["worker killed"] > 0
