"""Celery's prefork workers: recycled after some tasks, told to stop within a checkout or a lease, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sharedpool
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, clean_environment
from tests.system.servers import Server, Web

CAP, RECYCLE, TASKS = 2, 5, 40
GOOD, STOPPED, KILLED = "s: '200 OK'", "s: 'told to stop'", "Hard time limit ("


class Celery(Server):
    """A worker with three processes, and the client that gives it tasks."""

    def __init__(self, directory: Path, scope: Scope, web: Web) -> None:
        self.env = {"CELERY_FILES": str(directory / "files"), "MAX_CONNECTIONS": str(CAP)}
        super().__init__(
            directory, scope, web, sys.executable, "-m", "celery", "-A", "examples.celery_app", "worker",
            "--concurrency", "3", "--max-tasks-per-child", str(RECYCLE), "--loglevel", "info",
            "--without-gossip", "--without-mingle", "--without-heartbeat", workers=3, **self.env,
        )  # fmt: skip

    def wait_serving(self) -> None:
        wait_until(lambda: "ready." in self.log or self.first.poll() is not None, what="it is ready")
        assert self.first.poll() is None, self.log

    def stop(self) -> None:
        """Kill it: the lock of its processes' queue may have died with one that was over its time."""
        for pid in (self.first.pid, *self.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.first.wait(40)

    def fetch(self, path: str, number: int, *limits: float) -> dict[str, int]:
        """Have a path fetched so many times, with a soft and a hard limit in seconds; gives how many went how."""
        before = self.outcomes()
        command = [sys.executable, "-m", "examples.celery_app", path, str(number), *map(str, limits)]
        subprocess.run(command, cwd=ROOT, env=clean_environment(self.env), check=True)
        wait_until(lambda: sum(self.outcomes().values()) == sum(before.values()) + number, what="all have ended")
        return {how: times - before[how] for how, times in self.outcomes().items() if times > before[how]}

    def outcomes(self) -> dict[str, int]:
        log = self.log
        return {how: log.count(how) for how in (GOOD, STOPPED, KILLED)}


def test_its_processes_keep_the_cap_when_they_are_recycled_told_to_stop_and_killed(
    directory: Path, scope: Scope, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_DIR", str(scope.directory))
    with Celery(directory, scope, web) as celery:
        assert celery.fetch("/page", TASKS) == {GOOD: TASKS}
        opened, recycled = web.opened(CAP), TASKS // RECYCLE
        assert opened < recycled / 2
        # Two of three in a lease, one in a checkout.
        assert celery.fetch("/never", 3, 0.5) == {STOPPED: 3}
        assert celery.fetch("/page", 10) == {GOOD: 10}
        assert celery.fetch("/never", 3, 0, 1) == {KILLED: 3}
        wait_until(lambda: not busy(sharedpool.pool_stats()), what="what the killed ones had is free")
        wait_until(lambda: web.numbers()["open"] == 1 + sharedpool.pool_stats().idle, what="and closed")
        print(f"{recycled} processes recycled, {opened} connections; in the end {web.opened(CAP)}")


def busy(stats: sharedpool.PoolStats) -> int:
    return stats.in_use + stats.opening + stats.granted + stats.closing + stats.waiting


def test_with_the_integration_a_process_leaves_its_pools_as_celery_says_that_it_ends(scope: Scope) -> None:
    code = """
import os, sharedpool, sharedpool.integrations.celery
from celery.signals import worker_process_shutdown
pool = sharedpool.attach("default", max_connections=1).open()
worker_process_shutdown.send(sender="", pid=os.getpid(), exitcode=0)
print(sharedpool.pool_stats().processes, flush=True)
os._exit(0)
"""
    environment = clean_environment(scope.env)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"0\n"
