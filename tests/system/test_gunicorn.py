"""gunicorn with --preload: workers recycled, reloaded and replaced by a new master, all under load."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, clean_environment

#: The issue asks for 60.
SECONDS = float(os.environ.get("SHAREDPOOL_TEST_SECONDS", "5"))
CAP, WORKERS, CLIENTS, RECYCLE = 3, 4, 8, 50


@pytest.fixture
def web(nothing_left_behind: None) -> Iterator[str]:
    """An HTTP server that counts its connections: host:port."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("http_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        yield f"127.0.0.1:{int(server.stdout.readline())}"


def numbers(web: str) -> dict[str, int]:
    """What the back end counts; this question is one connection more."""
    connection = http.client.HTTPConnection(web, timeout=20)
    connection.request("GET", "/numbers")
    found: dict[str, int] = json.loads(connection.getresponse().read())
    connection.close()
    return found


class Gunicorn:
    """A master, and whatever master takes its place."""

    def __init__(self, directory: Path, scope: Scope, web: str) -> None:
        self.address, self._pid, self.log = (str(directory / f"gunicorn.{kind}") for kind in ("sock", "pid", "log"))
        command = [
            *(sys.executable, "-m", "gunicorn", "--preload", "--max-requests", str(RECYCLE), "--pid", self._pid),
            *("--bind", f"unix:{self.address}", "--workers", str(WORKERS), "--worker-tmp-dir", str(directory)),
            *("--no-control-socket", "--log-file", self.log, "examples.gunicorn_app:app"),
        ]
        env = {**scope.env, "BACKEND": web, "MAX_CONNECTIONS": str(CAP), "SHAREDPOOL_LINGER": "30"}
        self.first = subprocess.Popen(command, cwd=ROOT, env=clean_environment(env), stdin=subprocess.DEVNULL)
        wait_until(lambda: len(self.workers()) == WORKERS, what="the workers are there")
        wait_until(lambda: self.get("/page")[0] == 200, what="it serves")

    @property
    def master(self) -> int:
        return self.master_of("")

    def master_of(self, suffix: str) -> int:
        """The master by its pid file, 0 if there is none; one that is to take over has the suffix ".2"."""
        try:
            return int(Path(self._pid + suffix).read_text())
        except (OSError, ValueError):
            return 0

    def workers(self, master: int | None = None) -> set[int]:
        master = self.master if master is None else master
        if not processes.alive(master):
            return set()
        return {pid for pid in processes.children(master) if processes.alive(pid)}

    def get(self, path: str) -> tuple[int, bytes]:
        """One request over a connection of its own; 0 and the reason if there was no whole answer."""
        connection = http.client.HTTPConnection("localhost", timeout=20)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(20)
            connection.sock.connect(self.address)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()

    def stop(self) -> None:
        masters = {self.master, self.master_of(".2"), self.first.pid} - {0}
        for pid in filter(processes.alive, masters):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(map(processes.alive, masters)), what="gunicorn ends")
        self.first.wait(20)


@pytest.fixture
def gunicorn(directory: Path, scope: Scope, web: str) -> Iterator[Gunicorn]:
    running = Gunicorn(directory, scope, web)
    yield running
    running.stop()


class Load:
    """Clients that ask until told to stop."""

    def __init__(self, server: Gunicorn) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[bytes] = []
        self.pids: set[int] = set()
        self._over = threading.Event()
        self._server = server
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._over.is_set():
            status, body = self._server.get("/page")
            self.statuses[status] += 1
            if status != 200 or body != b"the page\n":
                self.wrong.append(body)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def load(gunicorn: Gunicorn) -> Iterator[Load]:
    running = Load(gunicorn)
    yield running
    running.stop()


def good(load: Load, server: Gunicorn, web: str) -> int:
    """No error, and the cap held; gives how many connections were opened."""
    assert not load.wrong, (load.statuses, load.wrong[:3], Path(server.log).read_text()[-3000:])
    found = numbers(web)
    assert found["peak"] <= CAP + 1  # and the question itself
    return found["accepted"] - 1


def test_recycled_workers_lose_no_request_and_leave_their_connections_to_the_others(
    gunicorn: Gunicorn, load: Load, web: str
) -> None:
    seen: set[int] = set()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        seen |= gunicorn.workers()
        time.sleep(0.005)  # how many workers there have been can only be seen while they live
    load.stop()
    recycled = load.statuses[200] // RECYCLE
    opened = good(load, gunicorn, web)
    print(f"{load.statuses[200]} requests, {recycled} workers recycled ({len(seen)} seen), {opened} connections")
    assert recycled >= 2 * WORKERS
    assert opened < recycled / 2 + 2 * CAP


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_new_workers_and_a_new_master_take_over_under_load(
    gunicorn: Gunicorn, load: Load, web: str, number: signal.Signals
) -> None:
    old, workers = gunicorn.master, gunicorn.workers()
    os.kill(old, number)
    if number == signal.SIGUSR2:  # a new master starts beside the old one, which is then told to go
        wait_until(lambda: len(gunicorn.workers(gunicorn.master_of(".2"))) == WORKERS)
        os.kill(old, signal.SIGTERM)
        wait_until(lambda: not processes.alive(old), what="the old master has gone")
    else:
        wait_until(lambda: not workers & gunicorn.workers() and len(gunicorn.workers()) == WORKERS)
    before = load.statuses[200]
    wait_until(lambda: load.statuses[200] > before + 2 * RECYCLE, what="the new ones serve")
    load.stop()
    good(load, gunicorn, web)
    status, body = gunicorn.get("/stats")
    assert status == 200
    stats = json.loads(body)["pool"]
    assert (stats["in_use"], stats["waiting"], stats["max_connections"]) == (0, 0, CAP)
