"""Running the command `sharedpool` as a user does: a process of its own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

from tests.support.scope import Scope
from tests.support.waiting import DEADLINE
from tests.support.workers import ROOT, clean_environment


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[list[str]]:
        """The table's rows as words, without its head."""
        return [line.split() for line in self.out.splitlines()[1:]]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sharedpool", *words]


def run(scope: Scope | None, *words: str, **env: str) -> Ended:
    """Carry out a command in the scope; whatever went wrong, it must not be a traceback."""
    done = subprocess.run(
        command(*words), env=clean_environment({**(scope.env if scope else {}), **env}), cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def good(scope: Scope | None, *words: str, **env: str) -> Ended:
    """Carry out a command that must end with 0."""
    ended = run(scope, *words, **env)
    assert ended.code == 0, ended
    return ended
