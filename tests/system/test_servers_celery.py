"""Celery's prefork workers: recycled after some tasks, told to stop within a checkout or a lease, killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, clean_environment
from tests.system.servers import Server, Web

CAP, RECYCLE = 2, 5


class Celery(Server):
    """A worker with three processes, and the client that gives it tasks."""

    def __init__(self, directory: Path, scope: Scope, web: Web) -> None:
        self.env = {
            "BACKEND": web.address, "MAX_CONNECTIONS": str(CAP), "CELERY_FILES": str(directory / "files"), **scope.env
        }  # fmt: skip
        self.ask("/page", 0)  # makes the folders
        super().__init__(
            directory, scope, web, sys.executable, "-m", "celery", "-A", "examples.celery_app", "worker",
            "--concurrency", "3", "--max-tasks-per-child", str(RECYCLE), "--loglevel", "info",
            "--without-gossip", "--without-mingle", "--without-heartbeat", workers=3, **self.env,
        )  # fmt: skip

    def wait_serving(self) -> None:
        wait_until(lambda: "ready." in self.log or self.first.poll() is not None, what="it is ready")
        assert self.first.poll() is None, self.log

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        """Have a path fetched so many times; soft and hard limits in seconds may follow."""
        command = [sys.executable, "-m", "examples.celery_app", *map(str, arguments)]
        environment = clean_environment(self.env)
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def ask(self, *arguments: object) -> dict[str, int]:
        """As begin; gives how many went how."""
        return outcome(self.begin(*arguments))


def outcome(client: subprocess.Popen[str]) -> dict[str, int]:
    said, _ = client.communicate(timeout=60)
    assert client.returncode == 0
    return {how: int(times) for times, _, how in (line.partition(" ") for line in said.splitlines())}


def test_its_processes_keep_the_cap_when_they_are_recycled_told_to_stop_and_killed(
    directory: Path, scope: Scope, web: Web
) -> None:
    with Celery(directory, scope, web) as celery:
        assert celery.ask("/page", 100) == {"200 OK": 100}
        opened, recycled = web.opened(CAP), 100 // RECYCLE
        assert opened < recycled / 2
        # Two hang in a lease until the hard limit, the third in a checkout until it is told to stop.
        hanging = celery.begin("/never", 2, 0, 3)
        wait_until(lambda: web.numbers()["open"] == CAP + 1)
        assert celery.ask("/page", 1, 0.5) == {"soft time limit": 1}
        assert outcome(hanging) == {"hard time limit": 2}
        assert celery.ask("/never", 2, 0.5) == {"soft time limit": 2}  # in a lease
        assert celery.ask("/page", 10) == {"200 OK": 10}
        print(f"{recycled} processes recycled, {opened} connections; in the end {web.opened(CAP)}")
