"""`sharedpool serve`: the arbiter in the foreground, and the examples that run it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.waiting import DEADLINE, wait_until
from tests.support.workers import ROOT, Worker, clean_environment
from tests.system.cli import command, good, run

pytest.importorskip("typer", reason="the command line needs the package typer (extra cli)")


@contextlib.contextmanager
def serving(scope: Scope, *words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """`sharedpool serve` until the end of the block, where it is killed if it is still there."""
    process = subprocess.Popen(
        command("serve", *words), env=clean_environment({**scope.env, **env}), cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or (scope.directory / "sharedpool" / "arbiter.sock").exists())
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE)
        assert process.stderr is not None
        process.stderr.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=DEADLINE)
    return process.returncode, err


def test_workers_use_the_arbiter_that_is_served(worker: Worker, scope: Scope, tcp: Target) -> None:
    with serving(scope) as process:
        worker.use(tcp)
        assert scope.arbiters() == set()  # none was started beside it
        assert good(scope, "ls", "--json").json[0]["arbiter"] == process.pid
        process.send_signal(signal.SIGTERM)
        worker.kill()
        code, err = ended(process)
    assert code == 0
    assert f"serving {scope.directory}/sharedpool as process {process.pid}" in err
    assert "Traceback" not in err
    assert scope.files() == []


def test_it_stays_without_clients_however_short_the_linger_time(scope: Scope) -> None:
    with serving(scope, SHAREDPOOL_LINGER="0") as process:
        for _ in range(3):
            assert good(scope, "status").lines == []
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 0


def test_it_comes_back_without_clients_when_its_directory_is_removed(worker: Worker, scope: Scope, tcp: Target) -> None:
    with serving(scope) as process:
        shutil.rmtree(scope.directory / "sharedpool")
        wait_until((scope.directory / "sharedpool" / "arbiter.sock").exists)
        worker.use(tcp)
        assert worker.call(commands.library, "ping")["pid"] == process.pid
        worker.kill()
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0
    assert scope.files() == []


def test_sigterm_drains_and_a_second_one_ends_it_at_once(
    worker: Worker, scope: Scope, tcp: Target, backend: Backend
) -> None:
    with serving(scope) as process:
        label = worker.checkout(tcp)
        process.send_signal(signal.SIGTERM)
        assert worker.exchange(label) == 1
        assert good(scope, "status").lines[0][2] == "1"  # it answers as long as somebody needs it
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0
        wait_until(lambda: worker.call(commands.library, "ping"))  # its worker starts another one


def test_a_second_one_says_that_the_scope_is_served(scope: Scope) -> None:
    with serving(scope) as process:
        shown = run(scope, "serve")
        assert shown.code == 1
        assert f"another arbiter serves {scope.directory}/sharedpool already" in shown.err
        process.terminate()
        assert ended(process)[0] == 0


def test_stop_ends_it(scope: Scope) -> None:
    with serving(scope) as process:
        good(scope, "stop")
        assert ended(process)[0] == 0
    assert scope.files() == []


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told_when_it_is_ready(scope: Scope, directory: Path, abstract: bool) -> None:
    name = f"sharedpool-test-{os.getpid()}" if abstract else str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name if abstract else name)
        listener.settimeout(DEADLINE)
        with serving(scope, NOTIFY_SOCKET="@" + name if abstract else name) as process:
            assert listener.recv(100) == b"READY=1"
            assert good(scope, "status").lines == []  # and then it really is
            process.terminate()
            assert ended(process)[0] == 0


UNIT = ROOT / "examples" / "systemd" / "sharedpool.service"


def test_the_command_of_the_systemd_unit_runs(scope: Scope) -> None:
    found = re.search(r"^ExecStart=(\S+)/sharedpool (.+)$", UNIT.read_text(), re.MULTILINE)
    assert found is not None
    assert shlex.split(found[2])[-1] == "serve"
    with serving(scope, *[]) as process:
        words = [word for word in shlex.split(found[2]) if word != "serve"]
        assert words == []  # so what ran is exactly that command
        process.terminate()
        assert ended(process)[0] == 0


def test_systemd_finds_no_fault_with_the_unit(directory: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("the program systemd-analyze (package systemd) is missing")
    binary = directory / "sharedpool"
    binary.symlink_to(sys.executable)  # the unit's own path is that of the user's machine
    text = re.sub(r"^ExecStart=\S+/sharedpool", f"ExecStart={binary}", UNIT.read_text(), flags=re.MULTILINE)
    copy = directory / "sharedpool.service"
    copy.write_text(text)
    done = subprocess.run(
        [verify, "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if "sharedpool.service" in line]
    assert (done.returncode, complaints) == (0, [])
