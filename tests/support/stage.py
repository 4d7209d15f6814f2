"""What the fixtures of the system tests give, for scripts: a back end, a scope and workers, and nothing left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.backend import Backend
from tests.support.leaks import check_nothing_left, take_census
from tests.support.processes import adopt_orphans, hand_down_usual_signals
from tests.support.scope import Scope
from tests.support.workers import ForkServer, Harness


@dataclass(frozen=True)
class Stage:
    harness: Harness
    backend: Backend
    scope: Scope


@contextmanager
def stage(*modules: str) -> Iterator[Stage]:
    """Processes, which have loaded these modules, and a scope of its own for the block.

    Raises:
        AssertionError: Something is left behind it; with a line for each thing.
    """
    hand_down_usual_signals()
    adopt_orphans()
    directory = Path(tempfile.mkdtemp(prefix="sp-", dir="/tmp"))
    before = take_census(directory / "s")
    server, scope = ForkServer(*modules), Scope(directory / "s")
    harness = Harness(directory, scope.env, server)
    try:
        with Backend(directory) as backend:
            yield Stage(harness, backend, scope)
    finally:
        harness.close()
        scope.stop()
        server.stop()
    check_nothing_left(before, directory / "s")
    shutil.rmtree(directory)
