"""A short run of `python -m tests.stress.postgres`."""

from __future__ import annotations

import random

from tests.stress.postgres import chaos
from tests.support.workers import Harness


def test_while_workers_are_killed_no_session_is_anybody_elses_and_the_cap_holds(
    harness: Harness, seeded: random.Random
) -> None:
    outcome = chaos(harness, 10, seeded.randrange(2**31))
    print(outcome)
    assert (outcome.wrong, outcome.refused) == ([], [])
    assert 0 < outcome.most <= 4
    assert outcome.left == 0
    assert outcome.leases > 0
    assert outcome.killed > 0
