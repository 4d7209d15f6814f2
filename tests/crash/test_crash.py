"""Workers and arbiters that end at their k-th boundary call: a sample of the points; `--all-points` takes every one.

A worker is killed, becomes another program, or a signal handler raises in it. Whichever point it was: a waiter has its
lease, the table is sound and everything in it comes to rest at zero, and the back end never has more
connections than the cap. `scripts/crash-demo` goes through all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from tests.crash import arbiters, scripts
from tests.crash.arbiters import ArbiterScene
from tests.crash.victims import Outcome, Scene
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.workers import Harness

#: Points of each script that are taken when not all are.
SAMPLE = {"kill": 4, "exit": 3, "time out": 2, "exec": 1}
ARBITER_SAMPLE = 2
#: About as many boundary calls an arbiter makes in a script.
ARBITER_POINTS = 40


#: Times are measured by scripts/crash-demo; here they only tell that somebody is not left to wait.
ALLOWED = 30.0


@pytest.fixture(autouse=True)
def as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are counted in what is written, not in what was compiled."""
    monkeypatch.setenv("SHAREDPOOL_SPEED", "pure")


def points(request: pytest.FixtureRequest, chance: random.Random, number: int, wanted: int) -> Iterable[int]:
    """Which points of so many are to be taken."""
    if request.config.getoption("--all-points"):
        return range(1, number + 1)
    return sorted(chance.sample(range(1, number + 1), min(wanted, number)))


def nothing_is_lost(outcomes: Iterable[Outcome]) -> None:
    bad = [str(outcome) for outcome in outcomes if outcome.lost]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("script", list(scripts.SCRIPTS))
def test_a_worker_may_end_at_every_boundary_call(
    harness: Harness, backend: Backend, scope: Scope, seeded: random.Random, request: pytest.FixtureRequest, script: str
) -> None:
    scene = Scene(harness, backend, scope, ALLOWED)
    for way, wanted in SAMPLE.items():
        whole = scene.die(script, 0, way)
        assert whole.ended
        assert whole.count > 3, "no boundary calls are seen"
        chosen = points(request, seeded, whole.count, wanted)
        nothing_is_lost([whole, *(scene.die(script, k, way) for k in chosen)])


@pytest.mark.parametrize("script", list(arbiters.SCRIPTS))
def test_an_arbiter_may_end_at_every_boundary_call(
    harness: Harness, backend: Backend, scope: Scope, seeded: random.Random, request: pytest.FixtureRequest, script: str
) -> None:
    scene = ArbiterScene(harness, backend, scope, ALLOWED)
    nothing_is_lost(scene.die(script, k) for k in points(request, seeded, ARBITER_POINTS, ARBITER_SAMPLE))
