"""What a worker process remembers between commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class NoAnswer(Exception):
    """Raised by a command that must not be answered: the forked child's side of `commands.fork`."""


class State:
    """Pools by name, leases by label, and whatever else a test's own commands keep."""

    def __init__(self, reconnect: Callable[[str, str], None]) -> None:
        self.reconnect = reconnect
        self.pools: dict[str, Any] = {}
        self.leases: dict[str, Any] = {}
        self.things: dict[str, Any] = {}
        self.log: list[tuple[str, str]] = []
        self._labels = 0

    def new_label(self) -> str:
        self._labels += 1
        return f"lease-{self._labels}"
