"""The test's side of the workers: start real processes, send them commands, wait for the answers."""

from __future__ import annotations

import json
import os
import pickle
import select
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support import commands, processes
from tests.support.backend import Target
from tests.support.waiting import DEADLINE, wait_until

ROOT = Path(__file__).resolve().parents[2]


class Pending:
    """A command under way."""

    def __init__(self, worker: Worker, number: int, what: str) -> None:
        self._worker, self._number, self._what = worker, number, what

    @property
    def done(self) -> bool:
        """Whether the answer is there, without waiting."""
        self._worker.read_answers(0)
        return self._number in self._worker.answers

    def result(self, deadline: float = DEADLINE) -> Any:
        """Wait for the answer; an exception in the worker is raised here."""
        end = time.monotonic() + deadline
        while self._number not in self._worker.answers:
            left = end - time.monotonic()
            if left <= 0:
                raise AssertionError(f"{self._what}: no answer within {deadline} s\n{self._worker.stacks()}")
            self._worker.read_answers(left)
        good, value = self._worker.answers.pop(self._number)
        if not good:
            raise value
        return value

    def error(self, kind: type[BaseException] = Exception, deadline: float = DEADLINE) -> Any:
        """Wait for the command to fail with an exception of this kind, and return it."""
        try:
            value = self.result(deadline)
        except kind as error:
            return error
        raise AssertionError(f"{self._what}: {kind.__name__} was expected, but it returned {value!r}")


class Worker(processes.Watched):
    """One worker process, driven command by command."""

    def __init__(self, harness: Harness, pid: int, inner_pid: int, connection: Connection, stderr: Path) -> None:
        super().__init__(pid)
        self.harness, self.inner_pid, self._connection, self._stderr = harness, inner_pid, connection, stderr
        self.answers: dict[int, tuple[bool, Any]] = {}
        self._number = 0

    def begin(self, function: Callable[..., Any], *arguments: Any, thread: str = "", **options: Any) -> Pending:
        """Send a command and don't wait. The commands of one thread are carried out in the order they were sent."""
        self._number += 1
        try:
            self._connection.send((self._number, thread, function, arguments, options))
        except BrokenPipeError:
            raise AssertionError(f"worker {self.pid} has ended:\n{self.stderr()}") from None
        return Pending(self, self._number, f"worker {self.pid}: {function.__name__}{arguments}")

    def call(self, function: Callable[..., Any], *arguments: Any, thread: str = "", **options: Any) -> Any:
        """Carry out a command and return its value."""
        return self.begin(function, *arguments, thread=thread, **options).result()

    def fails(self, kind: type[BaseException], function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Carry out a command that must raise; return the exception."""
        return self.begin(function, *arguments, **options).error(kind)

    def read_answers(self, timeout: float) -> None:
        """Take in what has been answered, after waiting up to `timeout` for a first answer."""
        while self._connection.poll(timeout):
            try:
                number, good, value = pickle.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                raise AssertionError(f"worker {self.pid} has ended:\n{self.stderr()}") from None
            self.answers[number] = (good, value)
            timeout = 0

    def stderr(self) -> str:
        return self._stderr.read_text() if self._stderr.exists() else ""

    def stacks(self) -> str:
        """The stack of every thread of a live worker, for the message of a test that waits in vain."""
        import signal

        if processes.state(self.pid) not in ("R", "S", "D"):
            return f"worker {self.pid} is in state {processes.state(self.pid)!r}\n{self.stderr()}"
        before = len(self.stderr())
        self.signal(signal.SIGUSR1)
        try:
            wait_until(lambda: self.stderr()[before:].endswith("_run_module_as_main\n"), deadline=5)
        except AssertionError:
            return f"worker {self.pid} doesn't answer SIGUSR1\n{self.stderr()}"
        return self.stderr()

    # -- the commands that nearly every test needs ---------------------------------------------------------------

    def attach(self, name: str = "default", **options: Any) -> None:
        self.call(commands.attach, name, **options)

    def checkout(self, target: Target, **options: Any) -> str:
        """Returns the label under which the worker keeps the lease."""
        return str(self.call(commands.checkout, target, **options))

    def begin_checkout(self, target: Target, **options: Any) -> Pending:
        return self.begin(commands.checkout, target, **options)

    def checkin(self, label: str, **options: Any) -> None:
        self.call(commands.checkin, label, **options)

    def discard(self, label: str) -> None:
        self.call(commands.discard, label)

    def exchange(self, label: str, text: str = "hello", **options: Any) -> int:
        """Send a line over a lease, check that the answer is its own, return the connection's number."""
        return int(self.call(commands.exchange, label, text, **options))

    def use(self, target: Target, text: str = "hello", **options: Any) -> int:
        """Checkout, exchange, checkin. Returns the connection's number at the back end."""
        return int(self.call(commands.use, target, text, **options))

    def stats(self, pool: str = "default") -> Any:
        return self.call(commands.stats, pool)

    def stat(self, name: str, pool: str = "default") -> int:
        return int(getattr(self.stats(pool), name))

    def wait_stats(self, pool: str = "default", **expected: int) -> Any:
        """Wait until the pool's statistics have these values, all at once, and return them."""

        def reached() -> Any:
            stats = self.stats(pool)
            seen.append(stats)
            return stats if all(getattr(stats, name) == value for name, value in expected.items()) else None

        seen: list[Any] = []
        try:
            return wait_until(reached)
        except AssertionError as error:
            raise AssertionError(f"waited for {expected}; last: {seen[-1]!r}") from error

    # -- life ----------------------------------------------------------------------------------------------------

    def fork(self) -> Worker:
        """Let the worker fork; return the child, which has everything that the worker had."""
        return self.harness.expect(lambda address, token: self.begin(commands.fork, address, token))

    def start_child(self, method: str) -> Worker:
        """Let the worker start a `multiprocess.Process` by this start method."""
        return self.harness.expect(lambda address, token: self.begin(commands.start_child, method, address, token))

    def close(self) -> None:
        self._connection.close()
        super().close()


class ForkServer:
    """The process that has imported everything, and these modules, and forks the workers; one for many tests."""

    def __init__(self, *modules: str) -> None:
        ours, theirs = socket.socketpair()
        self._control = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker_main", "--fork-server", str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=clean_environment({}),
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, address: str, token: str, env: dict[str, str], stderr: Path) -> None:
        request = {"address": address, "token": token, "env": env, "stderr": str(stderr)}
        self._control.sendall(json.dumps(request).encode() + b"\n")

    def stop(self) -> None:
        self._control.close()
        self._process.wait(DEADLINE)


def clean_environment(more: dict[str, str]) -> dict[str, str]:
    """This process's environment without any setting of sharedpool, and with the project importable."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SHAREDPOOL_")}
    env["SHAREDPOOL_SPEED"] = os.environ["SHAREDPOOL_SPEED"]
    return {**env, "PYTHONPATH": str(ROOT), **more}


class Harness:
    """Starts workers and ends them; one per test."""

    def __init__(self, directory: Path, env: dict[str, str], fork_server: ForkServer) -> None:
        self.directory, self.env, self._fork_server = directory, env, fork_server
        self.workers: list[Worker] = []
        self._address = str(directory / "test.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self._address)
        self._listener.listen(128)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, **env: str) -> Worker:
        """A worker forked from a process that has only imported the library, as pre-forking servers do."""
        return self.start_many(1, **env)[0]

    def start_many(self, number: int, **env: str) -> list[Worker]:
        tokens = [uuid.uuid4().hex for _ in range(number)]
        for token in tokens:
            self._fork_server.fork(self._address, token, {**self.env, **env}, self._stderr(token))
        return self._accept(tokens)

    def execute(self, *prefix: str, **env: str) -> Worker:
        """A worker in an interpreter of its own; `prefix` is a command to run it under."""
        token = uuid.uuid4().hex
        with open(self._stderr(token), "wb") as stderr:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.support.worker_main", self._address, token],
                cwd=ROOT,
                env=clean_environment({**self.env, **env}),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        self._processes.append(process)
        return self._accept([token])[0]

    def expect(self, ask: Callable[[str, str], Pending]) -> Worker:
        """Ask a worker for a child of its own, by a command that is given the address and a token."""
        token = uuid.uuid4().hex
        asked = ask(self._address, token)
        child = self._accept([token])[0]
        asked.result()
        return child

    def _stderr(self, token: str) -> Path:
        return self.directory / f"stderr-{token}"

    def _accept(self, tokens: Iterable[str]) -> list[Worker]:
        """Wait for the hello of every token, and return the workers in the order of the tokens."""
        found: dict[str, Worker] = {}
        waited_for = list(tokens)
        end = time.monotonic() + DEADLINE
        while len(found) < len(waited_for):
            ready, _, _ = select.select([self._listener], [], [], max(0, end - time.monotonic()))
            if not ready:
                texts = [path.read_text() for path in map(self._stderr, waited_for) if path.exists()]
                raise AssertionError("a worker didn't start:\n" + "\n".join(texts))
            token, worker = self._hello()
            found[token] = worker
        return [found[token] for token in waited_for]

    def _hello(self) -> tuple[str, Worker]:
        sock, _ = self._listener.accept()
        # The kernel's word for who it is: in another pid namespace the process itself knows another number.
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        connection = Connection(sock.detach())
        if not connection.poll(DEADLINE):
            raise AssertionError("a worker connected and said nothing")
        token, inner_pid = connection.recv()
        worker = Worker(self, int.from_bytes(peer[:4], sys.byteorder), inner_pid, connection, self._stderr(token))
        self.workers.append(worker)
        return token, worker

    def close(self) -> None:
        """Kill every worker and collect it."""
        for worker in self.workers:
            worker.kill()
            worker.close()
        for process in self._processes:
            process.wait(DEADLINE)
        self._listener.close()
