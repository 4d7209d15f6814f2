"""gunicorn's kinds of workers, and pools declared in its configuration file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sharedpool
from tests.support import processes
from tests.support.scope import Scope
from tests.support.waiting import DEADLINE, wait_until
from tests.support.workers import ROOT, clean_environment
from tests.system.servers import CAP, CLIENTS, Gunicorn, Load, Web

pytestmark = pytest.mark.usefixtures("unhurried")

ASGI = "examples.fastapi_app:app"
KINDS = {
    "sync": ["--worker-class", "sync"],
    "gthread, preloaded": ["--worker-class", "gthread", "--threads", "3", "--preload"],
    "gevent": ["--worker-class", "gevent", "--worker-connections", "20", "--graceful-timeout", "3"],
    "uvicorn": ["--worker-class", "uvicorn.workers.UvicornWorker"],
    "uvicorn, preloaded": ["--worker-class", "uvicorn.workers.UvicornWorker", "--preload"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_every_kind_keep_the_cap_when_they_are_recycled_reloaded_and_killed_for_hanging(
    directory: Path, scope: Scope, web: Web, kind: str
) -> None:
    app, recycle = (ASGI, 100) if "uvicorn" in kind else ("examples.gunicorn_app:app", 40)
    options = [*KINDS[kind], "--max-requests", str(recycle), "--timeout", "3"]
    with Gunicorn(directory, scope, web, *options, app=app, workers=3) as server:
        with Load(server.get) as load:
            load.wait_more(250)
            server.new_workers()
            load.wait_more(50)
        # uvicorn ends connections that are there and have not asked yet; those that have are answered.
        wrong = load.failed if "uvicorn" in kind else load.wrong
        assert not wrong, (load.statuses, wrong[:3], server.log[-3000:])
        recycled = load.statuses[200] // recycle
        opened = web.opened()
        assert opened < recycled / 2 + 2 * CAP
        if kind != "uvicorn, preloaded":
            with Load(server.get) as load:
                server.kill_a_hanging_worker()
                load.wait_more(50)
            assert not load.failed
            assert len(load.wrong) <= 2 * CLIENTS  # what the killed one was at, and what waited at its door
        stats = server.stats()
        assert (stats["in_use"], stats["waiting"], stats["max_connections"]) == (0, 0, CAP)
        print(f"{recycled} workers recycled, {opened} connections; in the end {web.opened()}")


def test_told_to_end_all_at_once_with_the_arbiter_they_serve_what_they_are_at_and_nothing_is_left(
    directory: Path, scope: Scope, web: Web
) -> None:
    """As systemd and a container's end do it: TERM for every process of the group."""
    with Gunicorn(directory, scope, web) as server:
        everybody = [server.master, scope.arbiter(), *server.workers()]
        with Load(server.get) as load:
            wait_until(lambda: server.stats()["processes"] == server.count, what="every worker has the pool")
            load.wait_more(100)
            for pid in everybody:
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not any(map(processes.alive, everybody)), what="all have ended")
        assert not load.failed, (load.statuses, load.failed[:3], server.log[-3000:])
        assert not scope.arbiters()
        assert "Traceback" not in server.log
    assert web.opened() <= 2 * CAP


# --- pools declared in the configuration ------------------------------------------------------------------------------

HOOKS = """
def on_starting(server):
    server.log.info("on_starting of the user's own")
def on_reload(server):
    server.log.info("on_reload of the user's own")
from sharedpool.integrations import gunicorn as sp
"""


class Configuration:
    """A configuration file that declares pools."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.file, self._writes = directory, directory / "of_this_test.py", 0
        self.write(db={"max_connections": 3})

    def write(self, **pools: dict[str, object]) -> None:
        """Write it, of another size each time: whether a module's byte code is stale goes by size and second."""
        self._writes += 1
        self.file.write_text(f"{HOOKS}sp.install(globals(), pools={pools}){' ' * 99 * self._writes}")

    def server(self, scope: Scope, web: Web, *options: str, form: str = "{}", **env: str) -> Gunicorn:
        """A gunicorn with this configuration, given as the form says."""
        return Gunicorn(
            self.directory, scope, web, "-c", form.format(self.file), *options, app="examples.configured_app:app",
            workers=2, PYTHONPATH=f"{ROOT}:{self.directory}", **env,
        )  # fmt: skip


@pytest.fixture
def configuration(directory: Path) -> Configuration:
    return Configuration(directory)


def limit(server: Gunicorn) -> int:
    """The cap, as a worker sees it."""
    return int(server.get("/limit")[1])


@pytest.fixture
def here(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process looks at the test's scope."""
    monkeypatch.setenv("SHAREDPOOL_DIR", str(scope.directory))


@pytest.mark.parametrize("form", ["{}", "python:of_this_test"])
def test_its_pools_are_there_before_a_worker_and_a_reload_changes_their_numbers(
    configuration: Configuration, scope: Scope, web: Web, here: None, form: str
) -> None:
    with configuration.server(scope, web, form=form) as server:
        assert limit(server) == 3
        assert "on_starting of the user's own" in server.log
        with Load(server.get) as load:
            configuration.write(db={"max_connections": 2}, more={"max_connections": 7})
            server.new_workers()
            load.wait_more(50)
        assert not load.wrong, (load.statuses, load.wrong[:3], server.log[-3000:])
        assert limit(server) == 2
        assert sharedpool.max_connections("more") == 7  # which no worker has used
        assert server.log.count("on_reload of the user's own") == 1
        sharedpool.set_max_connections("db", 1)
        server.new_workers()
        assert limit(server) == 1  # a reload that changes nothing undoes no operator's change


def test_an_old_masters_end_stops_nothing(configuration: Configuration, scope: Scope, web: Web) -> None:
    with configuration.server(scope, web, "--preload") as server:
        arbiter = scope.arbiter()
        with Load(server.get) as load:
            configuration.write(db={"max_connections": 2})
            server.new_master()
            load.wait_more(50)
        assert not load.wrong, (load.statuses, load.wrong[:3], server.log[-3000:])
        assert (scope.arbiter(), limit(server)) == (arbiter, 2)
        assert web.opened() <= 2 * CAP


def test_its_pools_come_back_with_their_numbers_when_the_arbiter_is_killed_before_a_worker_has_attached(
    configuration: Configuration, scope: Scope, web: Web, here: None
) -> None:
    server = configuration.server(scope, web)
    try:
        wait_until(lambda: len(server.workers()) == 2, what="the workers are there")
        assert sharedpool.max_connections("db") == 3
        arbiter = processes.Watched(scope.arbiter())
        arbiter.kill()
        arbiter.close()
        assert sharedpool.find_pool("db") is None
        assert limit(server) == 3
    finally:
        server.stop()


def test_the_environment_comes_before_the_file(
    configuration: Configuration, scope: Scope, web: Web, here: None
) -> None:
    with configuration.server(scope, web, SHAREDPOOL_DB_MAX_CONNECTIONS="5") as server:
        assert (limit(server), sharedpool.max_connections("db")) == (5, 5)
        assert "->" not in server.log  # nobody had to change it


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_connections": 0}, "option 'max_connections' has the value 0"),
        ({"max_conections": 2}, "unknown option 'max_conections'"),
        ({"checkout_timeout": 2}, "option 'checkout_timeout' has the value 2"),
    ],
)
def test_a_wrong_option_ends_gunicorn_before_it_forks(
    configuration: Configuration, scope: Scope, web: Web, options: dict[str, object], sentence: str
) -> None:
    configuration.write(db=options)
    server = configuration.server(scope, web)
    assert server.first.wait(DEADLINE) == 1
    assert sentence in server.log
    assert "Booting worker" not in server.log
    assert not scope.arbiters()


def test_a_pool_that_cannot_be_as_declared_ends_gunicorn_at_its_start_and_changes_nothing_at_a_reload(
    configuration: Configuration, scope: Scope, web: Web
) -> None:
    sentence = "pool 'db': move cannot change while it runs"
    with configuration.server(scope, web) as server:
        configuration.write(db={"max_connections": 3, "move": False})
        server.new_workers()
        assert f"sharedpool: nothing is changed: {sentence}" in server.log
        assert limit(server) == 3
        other = subprocess.run(
            [sys.executable, "-m", "gunicorn", "-c", str(configuration.file), "--bind", "unix:other.sock", "x:x"],
            cwd=configuration.directory, env=clean_environment(scope.env), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert other.returncode == 1
        assert f"sharedpool: {sentence}" in other.stderr
        assert "Booting worker" not in other.stderr


def test_a_check_of_the_configuration_starts_nothing(configuration: Configuration, scope: Scope, web: Web) -> None:
    server = configuration.server(scope, web, "--check-config")
    assert server.first.wait(DEADLINE) == 0, server.log
    assert not scope.files()


def test_the_integration_does_not_need_gunicorn(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['gunicorn'] = None\n"
        "from sharedpool.integrations import gunicorn as sp\n"
        "sp.install(globals(), pools={'db': {'max_connections': 2}}); print(on_starting.__name__)"
    )
    command = [sys.executable, "-c", code]
    environment = clean_environment({"SHAREDPOOL_DIR": str(tmp_path)})
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout == b"hook\n"
    assert os.listdir(tmp_path) == []
