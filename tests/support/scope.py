"""A scope of its own for a test: a directory, and the arbiters that were started in it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from tests.support import leaks, processes
from tests.support.waiting import wait_until


class Scope:
    """A private SHAREDPOOL_DIR. The path is short, because a Unix socket's name has room for 107 bytes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings: dict[str, str] = {}
        directory.mkdir()

    @property
    def env(self) -> dict[str, str]:
        return {"SHAREDPOOL_DIR": str(self.directory), **leaks.places(self.directory), **self.settings}

    def files(self) -> list[str]:
        return leaks.files_below(self.directory)

    def arbiters(self) -> set[int]:
        """The living processes that have come to us and are of another session than ours, as only arbiters are."""
        ours = os.getsid(0)
        return {pid for pid in processes.children() if processes.alive(pid) and processes.session(pid) != ours}

    def arbiter(self) -> int:
        """The one arbiter.

        Raises:
            AssertionError: there is none, or more than one.
        """
        found = self.arbiters()
        assert len(found) == 1, f"arbiters: {found}"
        return found.pop()

    def stop(self) -> None:
        """End the arbiters politely; whether they then go, and their files with them, is for the leak check to see."""
        for pid in self.arbiters():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.arbiters())
