"""uWSGI (pyuwsgi, its wheel): the application loaded before the fork or after it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.scope import Scope
from tests.support.waiting import DEADLINE, wait_until
from tests.support.workers import ROOT
from tests.system.servers import CAP, Load, Server, Web

RECYCLE = 40
UWSGI = shutil.which("uwsgi", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


class Uwsgi(Server):
    """A master and its workers. One that is told to end while it loads the application goes on: mercy has an end."""

    def __init__(self, directory: Path, scope: Scope, web: Web | None, *options: str, **env: str) -> None:
        assert UWSGI is not None
        super().__init__(
            directory, scope, web, UWSGI, "--ini", "examples/uwsgi.ini",
            "--http-socket", str(directory / "server.sock"), "--processes", "3", "--max-requests", str(RECYCLE),
            "--min-worker-lifetime", "0", "--harakiri", "3", "--binary-path", sys.executable,
            "--reload-mercy", "3", "--worker-reload-mercy", "3",
            "--disable-logging", *options, workers=3, **env,
        )  # fmt: skip


pytestmark = [
    pytest.mark.skipif(UWSGI is None, reason="binary uwsgi is missing"),
    pytest.mark.usefixtures("unhurried"),
]


@pytest.mark.parametrize("options", [[], ["--lazy-apps"]], ids=["loaded before the fork", "loaded after it"])
def test_workers_keep_the_cap_when_they_are_recycled_reloaded_and_killed_for_hanging(
    directory: Path, scope: Scope, web: Web, options: list[str]
) -> None:
    with Uwsgi(directory, scope, web, *options) as server:
        with Load(server.get) as load:
            load.wait_more(6 * RECYCLE)
            server.new_workers()
            load.wait_more(50)
        assert not load.wrong, (load.statuses, load.wrong[:3], server.log[-3000:])
        recycled = load.statuses[200] // RECYCLE
        opened = web.opened()
        assert opened < recycled / 2 + 2 * CAP
        if not options:
            assert server.get("/never")[0] == 0  # harakiri: SIGKILL, in the midst of a lease
            wait_until(lambda: len(server.workers()) == server.count, what="there is another")
            wait_until(lambda: server.stats()["in_use"] == 0, what="the killed one's connection is closed")
        stats = server.stats()
        assert (stats["in_use"], stats["waiting"], stats["max_connections"]) == (0, 0, CAP)
        print(f"{recycled} workers recycled, {opened} connections; in the end {web.opened()}")


def test_a_pool_that_is_used_before_the_fork_is_refused_with_a_sentence(
    directory: Path, scope: Scope, web: Web
) -> None:
    (directory / "hasty.py").write_text("from examples.gunicorn_app import app, pool\n\npool.stats()\n")
    path = f"{ROOT}:{directory}"
    server = Uwsgi(directory, scope, web, "--module", "hasty:app", PYTHONPATH=path)
    assert server.first.wait(DEADLINE) == 22
    assert "NotSupported: uWSGI forks its workers without telling Python" in server.log
    with Uwsgi(directory, scope, web, "--module", "hasty:app", "--lazy-apps", PYTHONPATH=path) as server:
        assert server.get("/page")[0] == 200
