"""Real application servers under load, and a back end over HTTP that counts their connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support import processes
from tests.support.scope import Scope
from tests.support.waiting import DEADLINE, wait_until
from tests.support.workers import ROOT, clean_environment

#: What the applications may have open at once, and who asks.
CAP, CLIENTS = 3, 8

Answer = tuple[int, bytes]


class Web:
    """A running http_server.py.

    Args:
        files: For TLS, as it says itself.
    """

    def __init__(self, *files: Path) -> None:
        command = [sys.executable, "-I", str(Path(__file__).with_name("http_server.py")), *map(str, files)]
        self._tls = bool(files)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)

    @property
    def url(self) -> str:
        """Where it is, without a path; by its name where it speaks TLS."""
        return f"https://localhost:{self.address.rpartition(':')[2]}" if self._tls else f"http://{self.address}"

    def numbers(self) -> dict[str, int]:
        """What it counts; this question is one connection more, which has ended when this returns."""
        connection = http.client.HTTPConnection(self.address, timeout=DEADLINE)
        if self._tls:
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(self.address, timeout=DEADLINE, context=context)
        connection.request("GET", "/numbers", headers={"Connection": "close"})
        found: dict[str, int] = json.loads(connection.getresponse().read())
        assert connection.sock.recv(1) == b""
        connection.close()
        return found

    def opened(self, cap: int = CAP) -> int:
        """How many connections were opened, none of them above the cap."""
        found = self.numbers()
        assert found["peak"] <= cap + 1  # and the question itself
        return found["accepted"] - 1


class Server:
    """An application server that listens on a Unix socket, and its workers: the children of its first process.

    Args:
        directory: Where its log and its socket are; the command says so to the server itself.
        scope: The scope of its workers.
        web: The back end, if it is one of ours.
        command: How it is started.
        workers: How many workers it has.
        env: More of its environment.
    """

    def __init__(
        self, directory: Path, scope: Scope, web: Web | None, *command: str, workers: int, **env: str
    ) -> None:  # fmt: skip
        self.address, self._log = str(directory / "server.sock"), directory / "server.log"
        self.count = workers
        backend = {"BACKEND": web.address, "MAX_CONNECTIONS": str(CAP)} if web else {}
        env = {**backend, "SHAREDPOOL_LINGER": "30", **scope.env, **env}
        with self._log.open("ab") as log:
            self.first = subprocess.Popen(
                command, cwd=ROOT, env=clean_environment(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def __enter__(self) -> Self:
        try:
            self.wait_serving()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text()

    @property
    def master(self) -> int:
        return self.first.pid

    def workers(self, master: int | None = None) -> set[int]:
        master = self.master if master is None else master
        if not processes.alive(master):
            return set()
        return {pid for pid in processes.children(master) if processes.alive(pid)}

    def wait_serving(self) -> None:
        """Wait until it serves."""
        wait_until(lambda: not processes.alive(self.master) or self.get("/page")[0] == 200, what="it serves")
        assert processes.alive(self.master), self.log

    def get(self, path: str) -> Answer:
        """One request over a connection of its own; 0 and the reason if there was no whole answer."""
        connection = http.client.HTTPConnection("localhost", timeout=DEADLINE)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(DEADLINE)
            connection.sock.connect(self.address)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()
        finally:
            connection.close()

    def stats(self) -> dict[str, Any]:
        """The pool's numbers, by the application."""
        status, body = self.get("/stats")
        assert status == 200, body
        numbers: dict[str, Any] = json.loads(body)["pool"]
        return numbers

    def new_workers(self) -> None:
        """HUP: new workers, and the old ones go when they have served what they are at."""
        old = self.workers()
        os.kill(self.master, signal.SIGHUP)
        wait_until(lambda: not old & self.workers() and len(self.workers()) == self.count, what="new workers")

    def kill_a_hanging_worker(self) -> None:
        """Stop a worker in the midst of its requests; the server is to kill it, and to start another."""
        victim = wait_until(self._stop_a_worker, what="a worker that serves is stopped")
        try:
            wait_until(lambda: not processes.alive(victim), what="the server kills its hanging worker")
        except AssertionError as error:
            seen = f"{victim} is {processes.state(victim)}, workers {self.workers()}"
            raise AssertionError(f"{error}; {seen}; the server's log: {self.log[-2000:]}") from error
        wait_until(lambda: len(self.workers()) == self.count, what="there is another")

    def _stop_a_worker(self) -> int:
        """Stop a worker that has served; 0: it had ended. Before its first sign of life gunicorn kills none."""
        status, body = self.get("/stats")
        victim = int(json.loads(body)["pid"]) if status == 200 else 0
        if victim not in self.workers():
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP)
            wait_until(lambda: processes.state(victim) in ("T", "Z", ""), what=f"worker {victim} is stopped")
        return victim if processes.state(victim) == "T" else 0

    def stop(self) -> None:
        if self.first.poll() is None:
            self.first.terminate()
        self.first.wait(DEADLINE)


class Gunicorn(Server):
    """A master, and whatever master takes its place.

    Args:
        directory: As for Server.
        scope: As for Server.
        web: As for Server.
        options: More options of gunicorn.
        app: What it serves.
        before: What its command begins with.
        env: More of its environment.
    """

    def __init__(
        self, directory: Path, scope: Scope, web: Web | None, *options: str,
        app: str = "examples.gunicorn_app:app", workers: int = 4, before: Sequence[str] = (), **env: str,
    ) -> None:  # fmt: skip
        self._pid = str(directory / "gunicorn.pid")
        super().__init__(
            directory, scope, web, *before, sys.executable, "-m", "gunicorn", "--pid", self._pid, "--no-control-socket",
            "--bind", f"unix:{directory / 'server.sock'}", "--worker-tmp-dir", str(directory),
            "--workers", str(workers), *options, app, workers=workers, **env,
        )  # fmt: skip

    @property
    def master(self) -> int:
        return self.master_of("")

    def master_of(self, suffix: str) -> int:
        """The master by its pid file, 0 if there is none; one that is to take over has the suffix ".2"."""
        try:
            return int(Path(self._pid + suffix).read_text())
        except (OSError, ValueError):
            return 0

    def wait_serving(self) -> None:
        wait_until(lambda: self.first.poll() is not None or len(self.workers()) == self.count, what="the workers come")
        super().wait_serving()

    def new_master(self) -> None:
        """USR2: a new master starts beside the old one, which is then told to go."""
        old = self.master
        os.kill(old, signal.SIGUSR2)
        wait_until(lambda: len(self.workers(self.master_of(".2"))) == self.count, what="the new master's workers")
        os.kill(old, signal.SIGTERM)
        wait_until(lambda: not processes.alive(old), what="the old master has gone")

    def stop(self) -> None:
        masters = {self.master, self.master_of(".2"), self.first.pid} - {0}
        for pid in filter(processes.alive, masters):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(map(processes.alive, masters)), what="gunicorn ends")
        self.first.wait(DEADLINE)


class Load:
    """Clients that ask for a page until told to stop.

    Attributes:
        statuses: How many answers there were of each status; 0: a connection that ended without one.
    """

    def __init__(self, get: Callable[[str], Answer]) -> None:
        self.statuses: Counter[int] = Counter()
        self._wrong: list[Answer] = []
        self._get = get
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ask(self) -> None:
        while not self._over.is_set():
            status, body = self._get("/page")
            self.statuses[status] += 1
            if status != 200 or body != b"the page\n":
                self._wrong.append((status, body))

    @property
    def wrong(self) -> list[bytes]:
        """Whatever came that was not the page."""
        return [body for _, body in self._wrong]

    @property
    def failed(self) -> list[bytes]:
        """What came wrong, but for connections that the server ended without an answer."""
        return [body for status, body in self._wrong if status]

    def wait_more(self, number: int) -> None:
        """Wait until so many more requests were answered."""
        before = self.statuses[200]
        wait_until(lambda: self.statuses[200] >= before + number, DEADLINE + number / 5, what=f"{number} requests more")

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
