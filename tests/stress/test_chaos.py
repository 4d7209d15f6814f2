"""A short run of scripts/stress. Longer ones are for who has time: `scripts/stress --seconds 1800`."""

from __future__ import annotations

import random

from tests.stress.chaos import Chaos
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.workers import Harness

SECONDS = 25


def test_in_chaos_nothing_is_lost(harness: Harness, backend: Backend, scope: Scope, seeded: random.Random) -> None:
    report = Chaos(harness, backend, scope, seeded.randrange(2**31)).run(SECONDS)
    print(report)
    assert report.good, str(report)
    assert report.outcomes["done"] > 0
    assert report.faults["worker killed"] > 0
