"""What `sharedpool.testing` gives to the tests of applications, over processes, and its pytest fixture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sharedpool.testing import assert_no_leases, exhausted
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.workers import ROOT, Worker, clean_environment


def no_leases(state: State, pool: str = "default", **options: Any) -> None:
    assert_no_leases(commands.pool_of(state, pool), **options)


def exhaust(state: State, pool: str = "default") -> None:
    state.things["exhausted"] = exhausted(commands.pool_of(state, pool))
    state.things["exhausted"].__enter__()


def relent(state: State) -> None:
    state.things.pop("exhausted").__exit__(None, None, None)


def test_a_lease_of_another_process_is_told_with_its_pid(two: list[Worker], tcp: Target) -> None:
    mine, other = two
    label = other.checkout(tcp)
    mine.use(tcp)
    error = mine.fails(AssertionError, no_leases)
    assert f"tcp://{tcp.host}:{tcp.port} for " in str(error)
    assert str(error).endswith(f"by process {other.pid}")
    other.checkin(label)
    mine.call(no_leases, wait=10)


def test_without_having_used_the_pool_the_leases_of_others_are_seen(two: list[Worker], tcp: Target) -> None:
    label = two[1].checkout(tcp)
    error = two[0].fails(AssertionError, no_leases)
    assert f"by process {two[1].pid}" in str(error)
    assert two[1].stat("processes") == 1  # and nothing was attached for it
    two[1].checkin(label)
    two[0].call(no_leases)


def test_where_no_arbiter_runs_there_are_no_leases_and_none_is_started(worker: Worker, scope: Scope) -> None:
    worker.call(no_leases)
    assert not scope.arbiters()


def test_ones_own_lease_is_told_with_its_thread(worker: Worker, tcp: Target) -> None:
    label = worker.call(commands.checkout, tcp, thread="shopper")
    error = worker.fails(AssertionError, no_leases)
    assert f"process {worker.pid} (this one), thread 'shopper'" in str(error)
    worker.call(commands.checkin, label, thread="shopper")
    worker.call(no_leases)


def test_an_exhausted_pool_has_nothing_for_any_process(two: list[Worker], tcp: Target, backend: Backend) -> None:
    for worker in two:
        worker.attach(max_connections=4)
    label = two[1].checkout(tcp)
    two[1].use(tcp)  # leaves one idle, which is to be closed for it
    two[0].call(exhaust)
    assert (two[1].stat("in_use"), two[1].stat("idle")) == (4, 0)
    two[1].fails(commands.sharedpool.PoolTimeout, commands.checkout, tcp, checkout_timeout=0.05)
    assert two[1].exchange(label) == 1
    two[0].call(relent)
    assert two[1].use(tcp) == 3
    two[1].checkin(label)
    two[0].call(no_leases)


CONFTEST = 'pytest_plugins = ["sharedpool.pytest_plugin"]\n'
TESTS = """
import socket, sharedpool

pool = sharedpool.attach("api", max_connections=2)

def use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        lease = pool.checkout(*server.getsockname())
        assert (pool.stats().opens, pool.stats().processes) == (1, 1)

def test_one(sharedpool_local):
    use()

def test_another_starts_anew(sharedpool_local):
    use()
"""


def test_the_fixture_gives_every_test_a_clean_state(directory: Path, scope: Scope) -> None:
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_shop.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(directory / "test_shop.py")],
        env=clean_environment({**scope.env, "PYTHONPATH": str(ROOT)}), cwd=directory,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert not scope.arbiters()


def test_the_page_on_testing_shows_what_there_is() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    for name in ("sharedpool_local", "local_mode", "assert_no_leases", "exhausted", CONFTEST.strip()):
        assert name in page


@pytest.mark.parametrize("name", ["sharedpool.testing", "sharedpool.pytest_plugin"])
def test_the_library_itself_does_not_load_it(name: str) -> None:
    code = f"import sharedpool, sys; sys.exit({name!r} in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, timeout=30, check=False).returncode == 0
    )
