"""Fixtures of the system tests: a back end, a scope, workers, and the leak check around all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patient_arbiter
from tests.support.backend import Backend, Target
from tests.support.leaks import check_nothing_left, places, take_census
from tests.support.postgres import Postgres
from tests.support.processes import adopt_orphans
from tests.support.scope import Scope
from tests.support.workers import ForkServer, Harness, Worker
from tests.system.servers import Web


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """The process that forks the workers, one for the whole session."""
    adopt_orphans()
    server = ForkServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_server(fork_server: ForkServer) -> Iterator[Postgres]:
    """A real PostgreSQL, one for the whole session."""
    server = Postgres()
    try:
        yield server.begin()
    finally:
        server.end()


@pytest.fixture
def postgres(postgres_server: Postgres) -> Postgres:
    """The session's PostgreSQL, without anybody connected."""
    postgres_server.wait_until_alone()
    return postgres_server


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short private directory, below which everything of the test lies."""
    path = Path(tempfile.mkdtemp(prefix="sp-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def nothing_left_behind(directory: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The leak check: set up before and torn down after everything else of a test."""
    scope = directory / "s"
    for name, value in places(scope).items():
        monkeypatch.setenv(name, value)
    before = take_census(scope)
    yield
    check_nothing_left(before, scope)


@pytest.fixture
def scope(directory: Path, nothing_left_behind: None) -> Iterator[Scope]:
    """A private SHAREDPOOL_DIR; its arbiter is told to end when the test is over."""
    scope = Scope(directory / "s")
    yield scope
    scope.stop()


@pytest.fixture
def patient(directory: Path, scope: Scope) -> None:
    """For tests of the queue's order: no waiter loses its grant because the machine is busy (patient_arbiter)."""
    scope.settings.update(patient_arbiter.interpreter(directory))


@pytest.fixture
def unhurried(scope: Scope) -> None:
    """For tests that count connections at a back end: it has 20 s to close one before the permit goes on without it."""
    scope.settings["SHAREDPOOL_DEFAULT_CLOSE_TIMEOUT"] = "20"


@pytest.fixture
def backend(directory: Path, nothing_left_behind: None) -> Iterator[Backend]:
    """The counting back end."""
    with Backend(directory) as running:
        yield running


@pytest.fixture
def tcp(backend: Backend) -> Target:
    return backend.tcp


@pytest.fixture
def unix(backend: Backend) -> Target:
    return backend.listen_unix()


@pytest.fixture
def web(nothing_left_behind: None) -> Iterator[Web]:
    """An HTTP server that counts its connections."""
    with Web() as running:
        yield running


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server: ForkServer) -> Iterator[Harness]:
    """Starts workers in the test's scope, and kills them when it is over."""
    harness = Harness(directory, scope.env, fork_server)
    yield harness
    harness.close()


@pytest.fixture
def worker(harness: Harness) -> Worker:
    return harness.start()


@pytest.fixture
def two(harness: Harness) -> list[Worker]:
    return harness.start_many(2)


@pytest.fixture
def three(harness: Harness) -> list[Worker]:
    return harness.start_many(3)
