"""Fixtures for the tests of applications: `pytest_plugins = ["sharedpool.pytest_plugin"]` in a conftest.py.

No entry point, on purpose: pytest would import sharedpool in every run of every project that has it installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import testing


@pytest.fixture
def sharedpool_local() -> Iterator[None]:
    """Local mode for one test: no arbiter, no shared memory; pools are new in it, and gone after it."""
    with testing.local_mode():
        yield
