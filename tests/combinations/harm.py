"""What is done to services, and how they come to rest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from typing import Any

from tests.combinations.clients import DEADLINE
from tests.support import processes
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.system.servers import Answer

#: Numbers of a pool that are 0 when nobody uses it.
BUSY = "in_use", "waiting", "opening", "granted", "closing"


def kill(pid: int) -> None:
    """SIGKILL a process that may have ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes.alive(pid), DEADLINE, f"process {pid} is dead")


def kill_the_arbiter(scope: Scope) -> None:
    """And wait until it has a successor."""
    wait_until(lambda: len(scope.arbiters()) == 1, DEADLINE, "there is one arbiter")
    pid = scope.arbiter()
    kill(pid)
    wait_until(lambda: scope.arbiters() - {pid}, DEADLINE, "there is another")


def numbers(get: Callable[[str], Answer], pool: str) -> dict[str, Any]:
    """A pool's numbers, by the service itself; what it says instead, if it cannot tell them."""
    status, body = get(f"/stats/{pool}")
    found: dict[str, Any] = json.loads(body)["pool"] if status == 200 else {"error": body}
    return found


def wait_at_rest(get: Callable[[str], Answer], pool: str, open_: Callable[[], int]) -> None:
    """Until nobody uses the pool, and its idle connections are those that its server has."""
    wait_until(lambda: not any(numbers(get, pool).get(name, 1) for name in BUSY), DEADLINE, f"{pool} is at rest")
    wait_until(lambda: numbers(get, pool).get("idle") == open_(), DEADLINE, f"{pool} has what is open")
