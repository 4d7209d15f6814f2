"""The fixtures of the system tests."""

from __future__ import annotations

from tests.system.conftest import backend, directory, fork_server, harness, nothing_left_behind, scope

__all__ = ["backend", "directory", "fork_server", "harness", "nothing_left_behind", "scope"]
