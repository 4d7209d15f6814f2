"""The standard library's pool of processes, whose workers are replaced after some tasks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.scope import Scope
from tests.support.workers import ROOT, clean_environment
from tests.system.servers import CAP, Web


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_its_workers_keep_the_cap_and_take_over_connections_of_those_that_were_replaced(
    scope: Scope, web: Web, method: str
) -> None:
    tasks = 120
    command = [sys.executable, "-m", "examples.process_pool", method, "/page", str(tasks)]
    environment = clean_environment({"BACKEND": web.address, "MAX_CONNECTIONS": str(CAP), **scope.env})
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{tasks} 200 OK" in ended.stdout
    assert web.opened() < tasks // 10 / 2  # a worker is replaced after ten
    print(ended.stdout)
