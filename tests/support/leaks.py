"""What a test could leave behind, counted before and after it."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.support import processes
from tests.support.waiting import DEADLINE, wait_until


@dataclass(frozen=True)
class Census:
    """Everything that must be the same after a test as before it.

    As the test process adopts orphans (processes.adopt_orphans), `children` has every process that a test started and
    that is still there, the arbiters included.
    """

    descriptors: dict[int, str]
    children: frozenset[int]
    threads: frozenset[str]
    unix_sockets: frozenset[str]
    scope_files: frozenset[str]

    def left_behind(self, before: Census) -> list[str]:
        """One line for each thing that is there now and wasn't before."""
        new = {f"descriptor {n} -> {t}" for n, t in self.descriptors.items() if before.descriptors.get(n) != t}
        new |= {f"process {pid}: {processes.command_line(pid)}" for pid in self.children - before.children}
        new |= {f"thread {name}" for name in self.threads - before.threads}
        new |= {f"bound Unix socket {path}" for path in self.unix_sockets - before.unix_sockets}
        new |= {f"file {path}" for path in self.scope_files - before.scope_files}
        return sorted(new)


def places(directory: Path) -> dict[str, str]:
    """The environment in which a scope that nobody named lies below `directory`, where the census sees it."""
    return {"XDG_RUNTIME_DIR": str(directory / "run")}


def take_census(directory: Path) -> Census:
    """Count now; files and Unix sockets are looked for below `directory`.

    Only what the tests' own processes make is counted. Other programs use /dev/shm and /tmp, too, perhaps by
    sharedpool. A segment has no name, and the default scope of a test's processes lies below `directory` (`places`).
    """
    for pid in processes.children():
        if processes.state(pid) == "Z":
            processes.collect(pid)
    return Census(
        descriptors=processes.descriptors(),
        children=frozenset(processes.children()),
        threads=frozenset(f"{thread.name} {thread.ident}" for thread in threading.enumerate()),
        unix_sockets=frozenset(path for path in bound_unix_sockets() if path.startswith(str(directory))),
        scope_files=frozenset(files_below(directory)),
    )


def bound_unix_sockets() -> list[str]:
    """The paths of all Unix sockets of this network namespace."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [fields[7] for fields in (line.split(maxsplit=7) for line in lines) if len(fields) == 8]


def files_below(directory: Path) -> list[str]:
    """Every file and socket below a directory; empty directories are no leak."""
    return [str(Path(root, name)) for root, _, names in os.walk(directory) for name in names]


def check_nothing_left(before: Census, directory: Path) -> None:
    """Wait until nothing new is there; what stays is ended, so that the next test starts clean, and reported.

    Raises:
        AssertionError: with a line for each thing left behind.
    """
    # Waiting, because the last steps of a dying process are the kernel's.
    try:
        wait_until(lambda: not take_census(directory).left_behind(before), deadline=DEADLINE)
    except AssertionError:
        after = take_census(directory)
        left = after.left_behind(before)
        for pid in after.children - before.children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if left:
            raise AssertionError("left behind:\n" + "\n".join(left)) from None
