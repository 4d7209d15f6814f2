"""uvicorn with workers of its own, each of which is a fresh interpreter, and a FastAPI application on asyncio."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.scope import Scope
from tests.system.servers import CAP, Load, Server, Web

pytestmark = pytest.mark.usefixtures("unhurried")

RECYCLE = 100


class Uvicorn(Server):
    """A supervisor and its workers; `multiprocessing`'s resource tracker is a child, too."""

    def __init__(self, directory: Path, scope: Scope, web: Web) -> None:
        super().__init__(
            directory, scope, web, sys.executable, "-m", "uvicorn", "--workers", "2", "--uds",
            str(directory / "server.sock"), "--limit-max-requests", str(RECYCLE), "--timeout-worker-healthcheck", "4",
            "--no-access-log", "examples.fastapi_app:app", workers=2,
        )  # fmt: skip

    def workers(self, master: int | None = None) -> set[int]:
        return {pid for pid in super().workers(master) if "spawn_main" in processes.command_line(pid)}


def test_workers_keep_the_cap_when_they_are_recycled_reloaded_and_killed_for_hanging(
    directory: Path, scope: Scope, web: Web
) -> None:
    with Uvicorn(directory, scope, web) as server:
        with Load(server.get) as load:
            load.wait_more(2 * RECYCLE + 50)
            server.new_workers()
            load.wait_more(50)
        # uvicorn ends connections that are there and have not asked yet; those that have are answered.
        assert not load.failed, (load.statuses, load.failed[:3], server.log[-3000:])
        recycled = load.statuses[200] // RECYCLE
        opened = web.opened()
        assert opened < recycled / 2 + 2 * CAP
        with Load(server.get) as load:
            server.kill_a_hanging_worker()
            load.wait_more(50)
        assert not load.failed
        assert [server.get(path) for path in ("/close", "/missing", "/a%20b")] == [
            (200, b"the last\n"), (404, b"nothing\n"), (404, b"nothing\n"),
        ]  # fmt: skip
        stats = server.stats()
        assert (stats["in_use"], stats["waiting"], stats["max_connections"]) == (0, 0, CAP)
        print(f"{recycled} workers recycled, {opened} connections; with one killed {web.opened()}")
