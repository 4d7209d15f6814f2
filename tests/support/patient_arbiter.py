"""An arbiter that leaves a grant with its waiter for 5 s instead of 0.1 s, for tests of the queue's order.

A waiter that does not take its grant in time loses it to the next one. The rule is meant for stopped processes. But a
busy machine can keep any thread from running for 0.1 s, and then the order changes.

It runs in the place of a Python (SHAREDPOOL_PYTHON), so it is started like every arbiter: `-I -c CODE ARGUMENTS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

PATIENCE = 5_000_000_000


def interpreter(directory: Path) -> dict[str, str]:
    """The environment for workers that start such arbiters."""
    path = directory / "patient-python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o700)
    return {"SHAREDPOOL_PYTHON": str(path)}


def main() -> None:
    _, _, code, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from sharedpool import served

    served.GRANT_TIMEOUT = PATIENCE  # type: ignore[misc]
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<arbiter>", "exec"), {"__name__": "__main__"})  # noqa: S102 - as `python -c` does


if __name__ == "__main__":
    main()
