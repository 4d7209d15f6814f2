"""What runs inside a worker process: it takes commands from its channel, carries each out and answers it.

A command is a function of a module (`commands` or a test's own), given by reference; its first argument is this
process's `State`. Commands without a thread name run in the main thread, one after the other; a command with a
thread name runs in the thread of that name, which is made at its first command. So a test decides what happens in
which thread and process, and in which order, by sending commands and waiting for their answers.

Two ways in: `python -m tests.support.worker_main ADDRESS TOKEN` is a fresh interpreter; `fork_server` is a process that
has imported everything, is used for nothing else, and forks a worker per request, as a pre-fork server does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.support.state import NoAnswer, State


class Channel:
    """The connection to the test, and the threads that carry out its commands."""

    def __init__(self, address: str, token: str) -> None:
        self.state = State(self.reconnect)
        self.connect(address, token)

    def connect(self, address: str, token: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(address)
        self.connection = Connection(sock.detach())
        self.sending = threading.Lock()
        self.threads: dict[str, queue.SimpleQueue[tuple[Any, ...]]] = {}
        self.connection.send((token, os.getpid()))

    def reconnect(self, address: str, token: str) -> None:
        """In a forked child: let go of the parent's channel and take one of our own."""
        self.connection.close()
        self.connect(address, token)

    def serve(self) -> None:
        while True:
            try:
                number, thread, function, arguments, options = self.connection.recv()
            except (EOFError, ConnectionResetError):
                os._exit(0)  # the test is over; nothing of this process may outlive it
            if thread:
                self._queue(thread).put((number, function, arguments, options))
            else:
                self._carry_out(number, function, arguments, options)

    def _queue(self, name: str) -> queue.SimpleQueue[tuple[Any, ...]]:
        if name not in self.threads:
            self.threads[name] = queue.SimpleQueue()
            threading.Thread(target=self._serve_thread, args=(self.threads[name],), name=name, daemon=True).start()
        return self.threads[name]

    def _serve_thread(self, commands: queue.SimpleQueue[tuple[Any, ...]]) -> None:
        while True:
            self._carry_out(*commands.get())

    def _carry_out(self, number: int, function: Callable[..., Any], arguments: tuple[Any, ...], options: Any) -> None:
        try:
            answer = (number, True, function(self.state, *arguments, **options))
        except NoAnswer:
            return
        except Exception as error:
            error.add_note(f"in worker {os.getpid()}:\n{traceback.format_exc()}")
            answer = (number, False, error)
        self._answer(answer)

    def _answer(self, answer: tuple[int, bool, Any]) -> None:
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)  # a value that can't be read back is this worker's error, not the test's
        except Exception as error:
            data = pickle.dumps((answer[0], False, TypeError(f"can't be pickled: {answer[2]!r}: {error!r}")))
        with self.sending:
            self.connection.send_bytes(data)


def run(address: str, token: str) -> None:
    """Be a worker until the test is over."""
    with contextlib.suppress(ValueError):  # not in the main thread, which is the only one that may
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    Channel(address, token).serve()


def fork_server(control: socket.socket, modules: list[str]) -> None:
    """Fork a worker for every line `{"address", "token", "env"}`; end with the control channel."""
    for name in ["tests.support.commands", *modules]:  # the workers have them, and what they import, from the start
        importlib.import_module(name)
    with control.makefile("rb") as lines:
        for line in lines:
            request = json.loads(line)
            child = os.fork()
            if child == 0:
                if os.fork() != 0:
                    os._exit(0)  # the worker's parent is the test, not this process
                _become_worker(control, request)
            os.waitpid(child, 0)


def _become_worker(control: socket.socket, request: dict[str, Any]) -> None:
    """Be a worker; SystemExit passes through, so that the interpreter ends as that of a forked server's worker does."""
    try:
        os.close(control.detach())  # close() would wait for the file object of the loop that we are in
        os.environ.update(request["env"])
        stderr = os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(stderr, 2)
        os.close(stderr)
        run(request["address"], request["token"])
    except Exception:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    # By its real name, so that what is pickled by reference is the same here and in the test.
    itself = importlib.import_module("tests.support.worker_main")
    if sys.argv[1] == "--fork-server":
        itself.fork_server(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:])
    else:
        itself.run(sys.argv[1], sys.argv[2])
