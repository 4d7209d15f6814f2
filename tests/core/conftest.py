"""The marker of the tests in here that take longer than the rest together: `-m "not slow"` leaves them out."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: more than a quarter of a second, with the reason in the test's comment")
