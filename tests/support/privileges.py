"""Programs that root starts and that then become another user, or that another user runs from the beginning.

Such a user may have no way to this interpreter: a Python below root's home is behind a directory that only root may
enter. So these programs run in a mount namespace of their own, in which the ways to what they need are open.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from tests.support.workers import ROOT

#: A user and a group without a name.
UID = 7203


@functools.cache
def may_become_another() -> bool:
    """Whether a program started here can become another user who can run this interpreter."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    command = [*as_another(), sys.executable, "-c", "import sharedpool, psutil, multiprocess"]
    tried = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    return tried.returncode == 0


def as_another() -> list[str]:
    """What to put before a command that another user is to run."""
    return [*with_open_ways(), "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]


@functools.cache
def with_open_ways() -> list[str]:
    """What to put before a command of root's that becomes another user by itself; its process stays the same."""
    script = ["set -e"]
    for closed, needed in _closed_ways():
        opened = [f"exec {3 + place}<'{path}'" for place, path in enumerate(needed)]
        bound = [
            f"mkdir -p '{path}'; mount --no-canonicalize --bind /proc/self/fd/{3 + place} '{path}'; exec {3 + place}<&-"
            for place, path in enumerate(needed)
        ]
        script += [*opened, f"mount -t tmpfs -o mode=755 none '{closed}'", *bound]
    if len(script) == 1:
        return []
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "; ".join([*script, 'exec "$@"']), "sh"]


def _closed_ways() -> list[tuple[Path, list[Path]]]:
    """The directories that others may not enter, and what is needed below each of them."""
    found: dict[Path, list[Path]] = {}
    for each in {sys.prefix, sys.base_prefix, str(ROOT)}:
        for path in {Path(each), Path(each).resolve()}:
            ways = [way for way in reversed([path, *path.parents]) if not way.stat().st_mode & stat.S_IXOTH]
            if ways:
                found.setdefault(ways[0], []).append(path)
    return [(closed, _outermost(needed)) for closed, needed in sorted(found.items())]


def _outermost(paths: list[Path]) -> list[Path]:
    """Those that lie below no other of them."""
    return [path for path in sorted(set(paths)) if not any(other in path.parents for other in paths)]


def give(path: Path) -> None:
    """Make a directory that user's own, and open the way to it."""
    os.chown(path, UID, UID)
    path.chmod(0o700)
    for way in path.parents:
        if not way.stat().st_mode & stat.S_IXOTH:
            way.chmod(way.stat().st_mode | stat.S_IXOTH)
