"""Row 9: from nothing to a first lease, with a fresh scope each time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import servers
from benchmarks.harness import Actor, Limit, Missing, Row, interleave, library, missing_row, say

LIMIT = Limit("<=", 1.0, 0.4)
FIRST = f"""
import sharedpool, sys
with sharedpool.attach("start", max_connections=4).connection("{servers.HOST}", int(sys.argv[1])) as conn:
    sys.stdout.write("leased")
    sys.stdout.flush()
    sys.stdin.read()
"""


class Imported:
    """A process that has imported everything and attached nothing."""

    def __init__(self) -> None:
        self.library = library()

    def first_lease(self, port: int) -> float:
        start = time.monotonic()
        with self.library.attach("start", max_connections=4).connection(servers.HOST, port) as conn:
            seconds = time.monotonic() - start
            conn.sendall(b"alive")
            assert conn.recv(16) == b"alive"
        return seconds


def imported(port: int) -> float:
    with servers.scope(), Actor(Imported) as process:
        seconds: float = process.call("first_lease", port)
        return seconds


def interpreter(port: int) -> float:
    """The interpreter's own start and the import included."""
    with servers.scope():
        start = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-c", FIRST, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
            env=os.environ,
        ) as child:
            assert child.stdin
            assert child.stdout
            try:
                said = os.read(child.stdout.fileno(), 6)
                seconds = time.monotonic() - start
                child.stdin.close()  # lets it check in and end
                assert (said, child.wait(20)) == (b"leased", 0)
            finally:
                child.kill()
        return seconds


def rows(quick: bool) -> list[Row]:
    rows_of = {
        "from nothing to a first lease": imported,
        "the same with the interpreter's start": interpreter,
    }
    try:
        with servers.echo() as (port,):
            runs = {what: (lambda measure=measure: measure(port)) for what, measure in rows_of.items()}
            times: dict[str, list[float]] = interleave(3 if quick else 10, runs)
    except Missing as exc:
        return [missing_row("start", what, str(exc)) for what in rows_of]
    say("  " + ", ".join(f"max {max(values):.3f} s" for values in times.values()))
    return [Row("start", what, values, "s", LIMIT) for what, values in times.items()]
