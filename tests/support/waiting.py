"""The one way in which the tests wait for a fact that only the kernel or another process knows."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Generous, because it is only ever reached by a failing test: a loaded machine must not turn a pass into a failure.
DEADLINE = 40.0


def wait_until(predicate: Callable[[], T], deadline: float = DEADLINE, what: str = "") -> T:
    """Return the first true value of `predicate`, asked again and again for `deadline` seconds.

    Raises:
        AssertionError: the time is over; it says what was waited for and the last value seen.
    """
    end = time.monotonic() + deadline
    pause = 0.001
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"not so within {deadline} s: {what or _source(predicate)} (last value: {value!r})")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def _source(predicate: Callable[[], object]) -> str:
    try:
        return inspect.getsource(predicate).strip()
    except (OSError, TypeError):
        return repr(predicate)
