"""In a process that gevent has patched a greenlet waits, and the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.tls import Authority, TlsServer
from tests.support.workers import Worker, clean_environment

pytestmark = pytest.mark.usefixtures("patient")

pytest.importorskip("gevent")

PROGRAM = Path(__file__).with_name("greenlets.py")


def begin(scope: Scope, target: Target, scene: str, when: str = "early", **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), when, str(target.port), scene],
        env=clean_environment({**scope.env, **env}), cwd=os.getcwd(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Any:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.mark.parametrize("when", ["early", "late"])
def test_fifty_greenlets_share_two_connections_and_others_run_meanwhile(
    scope: Scope, backend: Backend, tcp: Target, when: str
) -> None:
    found = finish(begin(scope, tcp, "fifty", when))
    handed = found.pop("handed")
    assert found == {"most": 2, "ticked": True, "numbers": [1, 2], "in_use": 0, "waiting": 0}
    assert handed >= 40
    assert backend.peak == 2


@pytest.mark.parametrize("when", ["early", "late"])
def test_greenlets_share_connections_under_tls(scope: Scope, directory: Path, when: str) -> None:
    authority = Authority(directory)
    with TlsServer(authority.server_context("127.0.0.1")) as server:
        assert finish(begin(scope, server.target(), "encrypted", when, SSL_CERT_FILE=authority.file)) == {
            "numbers": [1, 2]
        }
        assert server.peak == 2


def test_a_warm_checkout_switches_no_greenlets(scope: Scope, tcp: Target) -> None:
    assert finish(begin(scope, tcp, "switches")) == {"switches": 0}


def test_greenlets_that_give_up_leave_the_queue(scope: Scope, tcp: Target) -> None:
    found = finish(begin(scope, tcp, "given_up"))
    assert found == {"ended": ["PoolTimeout", "gevent.Timeout"], "waiting": 0, "number": 2}


def test_greenlets_wait_behind_threads_of_other_processes(scope: Scope, two: list[Worker], tcp: Target) -> None:
    for worker in two:
        worker.attach(max_connections=2)
        worker.checkout(tcp, label="held")
    process = begin(scope, tcp, "wait")
    two[0].wait_stats(waiting=1)
    two[1].checkin("held")
    assert finish(process) == {"number": 2}
    assert two[0].wait_stats(waiting=0, in_use=1).revoked == 0
