"""The page on the command line says what there is, and the examples beside it are what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.waiting import DEADLINE
from tests.support.workers import ROOT, clean_environment
from tests.system.cli import command

pytest.importorskip("typer", reason="the command line needs the package typer (extra cli)")

PAGE = (ROOT / "docs" / "command_line.md").read_text()
DOCKER = ROOT / "examples" / "docker"


def test_every_command_is_on_the_page_and_no_other() -> None:
    from sharedpool.cli.commands import app

    known = {each.name or (each.callback.__name__ if each.callback else "") for each in app.registered_commands}
    section = PAGE.partition("## Commands")[2].partition("\n\n`keys`")[0]
    listed = {
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)", row)
    }
    assert listed == known


def test_every_exit_code_is_on_the_page() -> None:
    from sharedpool.cli.exits import Exit

    section = PAGE.partition("## Exit codes")[2].partition("## serve")[0]
    assert {int(code) for code in re.findall(r"^\| (\d) \|", section, re.MULTILINE)} == {int(code) for code in Exit}


def test_every_check_of_the_doctor_is_on_the_page() -> None:
    source = (ROOT / "sharedpool" / "cli" / "checks.py").read_text()
    named = set(re.findall(r'Check\(\s*"([\w ]+)"', source))
    section = PAGE.partition("## doctor")[2]
    assert set(re.findall(r"^\| ([\w ]+) \|", section, re.MULTILINE)) - {"check"} == named


def test_every_link_of_the_page_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


def test_what_the_images_run_is_there() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    for path in re.findall(r"^COPY (examples/\S+)", text, re.MULTILINE):
        assert (ROOT / path).exists(), path
    assert os.access(DOCKER / "entrypoint", os.X_OK)


def test_the_entrypoint_serves_before_it_becomes_the_application(scope: Scope, directory: Path, tcp: Target) -> None:
    binaries = directory / "bin"
    binaries.mkdir()
    wrapper = binaries / "sharedpool"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(command())} "$@"\n')
    wrapper.chmod(0o755)
    program = (
        "import os, sharedpool\n"
        f"with sharedpool.attach(max_connections=2).connection({tcp.host!r}, {tcp.port}) as sock:\n"
        "    sock.sendall(b'x\\n'); assert sock.recv(9)\n"
        "print(sharedpool.find_pool().arbiter_pid, os.getpid(), flush=True)\n"
    )
    environment = clean_environment({**scope.env, "PATH": f"{binaries}:{os.environ['PATH']}"})
    said, complained = directory / "said", directory / "complained"  # files: the arbiter keeps what it inherits open
    with said.open("w") as out, complained.open("w") as err:
        code = subprocess.call(
            [str(DOCKER / "entrypoint"), command()[0], "-c", program], env=environment, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=DEADLINE,
        )  # fmt: skip
    assert code == 0, complained.read_text()
    arbiter, application = map(int, said.read_text().split())
    os.kill(arbiter, 15)  # there, the end of process 1 does this
    assert f"serving {scope.directory}/sharedpool as process {arbiter}" in complained.read_text()
    assert arbiter != application


def test_a_scope_directory_on_a_small_tmpfs_with_a_read_only_root_is_enough(
    scope: Scope, directory: Path, backend: Backend, tcp: Target
) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("the program unshare (package util-linux) is missing")
    tried = subprocess.run([unshare, "--mount", "true"], capture_output=True, timeout=30, check=False)
    if tried.returncode != 0:
        pytest.skip("this user may make no mount namespace")
    small, shared_memory = scope.directory, "/dev/shm"
    program = (
        "import sharedpool\n"
        "pool = sharedpool.attach(max_connections=2)\n"
        f"with pool.connection({tcp.host!r}, {tcp.port}) as sock:\n"
        "    sock.sendall(b'x\\n'); assert sock.recv(9)\n"
        "sharedpool.stop()\n"
    )
    script = (
        f"set -e; mount -t tmpfs -o size=1m,mode=0700 none {small}; mount -t tmpfs -o size=4k none {shared_memory};"
        " mount --bind / /; mount -o remount,ro,bind /;"
        f' if mkdir {ROOT}/written 2>/dev/null; then rmdir {ROOT}/written; echo "not read-only" >&2; exit 9; fi;'
        ' exec "$@"'
    )
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", script, "sh", command()[0], "-B", "-c", program],
        env=clean_environment({**scope.env, "TMPDIR": str(small)}), cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert backend.accepted == 1
