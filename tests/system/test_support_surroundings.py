"""Signals, ports and files of other programs make no difference to the tests."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sharedpool.served import GRANT_TIMEOUT
from tests.support import commands, leaks
from tests.support.backend import Backend
from tests.support.postgres import Ports
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, Harness, Worker, clean_environment
from tests.system.lineup import line_up

#: A program that hands down the usual signals, and one that shows what it has got.
STARTER = """
import subprocess, sys
from tests.support.processes import hand_down_usual_signals
hand_down_usual_signals()
sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
"""
SHOWER = ["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]


def started_oddly() -> None:
    """As by a script's `&`, by nohup, and by a supervisor that blocks signals."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGALRM})


def test_what_the_tests_start_has_the_usual_signals_however_they_were_started() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STARTER, *SHOWER], preexec_fn=started_oddly, env=clean_environment({}), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = {name: int(value, 16) for name, value in (line.split(":") for line in ended.stdout.splitlines())}
    ours = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1}
    assert not found["SigIgn"] & sum(1 << (number - 1) for number in ours)
    assert found["SigBlk"] == 0


def test_files_of_other_programs_in_shared_memory_are_no_leak(directory: Path) -> None:
    before = leaks.take_census(directory / "s")
    with tempfile.TemporaryDirectory(prefix="sharedpool-", dir="/dev/shm") as others:
        Path(others, "arbiter.sock").touch()
        assert leaks.take_census(directory / "s").left_behind(before) == []


@pytest.mark.parametrize("app", ["default", "shop"])
def test_a_scope_that_a_test_did_not_name_is_seen_by_the_leak_check(harness: Harness, scope: Scope, app: str) -> None:
    before = leaks.take_census(scope.directory)
    worker = harness.start(SHAREDPOOL_DIR="", SHAREDPOOL_APP=app)
    worker.call(commands.hold_permit, "jobs", "held", max_connections=1)
    left = leaks.take_census(scope.directory).left_behind(before)
    assert f"file {scope.directory}/run/sharedpool/{app}/arbiter.sock" in left


def test_a_port_that_was_taken_is_given_to_nobody_else_and_its_server_may_listen() -> None:
    with contextlib.closing(Ports()) as ports:
        port = ports.take()
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        for _ in range(2):  # as a server that is restarted does
            with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
                pass


def test_a_connection_of_somebody_else_at_the_same_port_does_not_keep_the_back_end_from_going_on(
    backend: Backend,
) -> None:
    with socket.create_connection(backend.tcp[:2]) as conn:
        port = conn.getsockname()[1]
        with socket.create_server(("127.0.0.2", 0)) as other, socket.socket() as stranger:
            stranger.bind(("127.0.0.3", port))
            stranger.connect(other.getsockname())
            wait_until(lambda: backend.accepted == 1)
            assert backend.say("x") == 1


def loop_that_was_told_before(state: State) -> commands.Load:
    commands.tell_to_stop(state)
    return commands.requests_until_told(state, [])


def test_a_loop_that_is_told_to_stop_before_it_begins_does_nothing(worker: Worker) -> None:
    assert worker.call(loop_that_was_told_before) == commands.Load()


@pytest.mark.usefixtures("patient")
def test_a_patient_arbiter_leaves_a_grant_where_it_is_for_long(three: list[Worker], backend: Backend) -> None:
    for worker in three:
        worker.attach(max_connections=1)
    label = three[0].checkout(backend.tcp)
    first, second = line_up(three[0], [(three[1], backend.tcp), (three[2], backend.tcp)])
    three[1].stop()
    three[0].checkin(label)
    over = time.monotonic() + 10 * GRANT_TIMEOUT / 1e9
    wait_until(lambda: time.monotonic() > over)
    assert (second.done, three[0].stats().granted) == (False, 1)
    three[1].resume()
    three[1].checkin(first.result())
    three[2].checkin(second.result())
    assert three[0].stats().revoked == 0
