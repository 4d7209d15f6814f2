"""Fixtures for all tests; those with processes live in tests/system/conftest.py."""

from __future__ import annotations

import os
import random

import pytest

from tests.support.processes import hand_down_usual_signals

# As it is written, unless the caller says otherwise: many tests of the core look at the source's byte code or break its
# stores off, and a source tree's compiled modules may be old. scripts/test runs what can be compiled both ways.
os.environ.setdefault("SHAREDPOOL_SPEED", "pure")


hand_down_usual_signals()


@pytest.fixture
def seeded(request: pytest.FixtureRequest) -> random.Random:
    """A random source whose seed is printed, so that a failure can be played again (`--seed N`)."""
    given = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**32) if given is None else int(given)
    print(f"seed: {seed} (again with --seed {seed})")
    return random.Random(seed)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="the seed of every test that uses chance")
    parser.addoption("--all-points", action="store_true", help="tests/crash: every boundary call, not a sample")
