"""Start the demonstration's processes, wait for facts, and end everything again, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from . import interrupt


class DemoError(Exception):
    """The demonstration cannot go on; the message is for the person in front of it."""


def wait_until(predicate: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll for a fact that only the kernel or another process knows.

    Raises:
        DemoError: It did not come about in time.
    """
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            raise DemoError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.01)


@contextlib.contextmanager
def running(
    command: list[str], log: Path, ready: Callable[[], bool], environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends, in a session of its own: Ctrl-C is for the demonstration alone.

    The block is entered as soon as the program is ready. A program that does not come up shows the end of its log.
    """
    process = None
    try:
        with log.open("wb") as output, interrupt.held():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environ or os.environ),
                start_new_session=True,
            )
        name = " ".join(command[:3])
        wait_until(lambda: ready() or process.poll() is not None, 30, f"{name} does not answer\n{tail(log)}")
        if process.poll() is not None:
            raise DemoError(f"{name} has ended at once with code {process.returncode}\n{tail(log)}")
        yield process
    finally:
        if process is not None:
            with interrupt.held():
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all of its session: politely, and by force after ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log, indented."""
    return "\n".join("    " + line for line in log.read_text(errors="replace").splitlines()[-lines:])


def answers(address: tuple[str, int] | str) -> bool:
    """Whether somebody accepts connections there: a (host, port), or a Unix socket's path."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(address) == 0


def free_port() -> int:
    """A port of the loopback address that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
