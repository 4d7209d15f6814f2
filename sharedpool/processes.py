"""Which process is meant. A pid is used again; a pid together with its start time is not, until the next boot.

The start time is the kernel's: clock ticks since boot. No clock that can be stepped plays a part. What /proc does not
show is not known. That is something else than not there, and every answer here keeps the two apart.
"""

from __future__ import annotations

import dataclasses
import functools
import os

_STATE = 0
_THREADS = 17
_START = 19


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """One process.

    Attributes:
        pid: Its number.
        start: When it started, in clock ticks since boot; 0 if that is not known.
    """

    pid: int
    start: int

    def lives(self) -> bool:
        """False only if this process has ended for certain."""
        if not _is_there(self.pid):
            return False
        fields = _stat(self.pid)
        if not fields:
            return True
        if fields[_STATE] in ("Z", "X") and int(fields[_THREADS]) <= 1:  # else only its first thread has ended
            return False
        return not self.start or int(fields[_START]) == self.start

    def is_younger_than(self, monotonic: int, now: int, since_boot: int) -> bool:
        """Whether it has certainly started after a time on the monotonic clock, ns.

        Args:
            monotonic: That time.
            now: The monotonic clock now.
            since_boot: The clock since boot now. It also counts while the machine sleeps.
        """
        tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        return bool(self.start) and self.start * tick - (since_boot - now) > monotonic


def find(pid: int) -> Process:
    """The process that has this number now."""
    fields = _stat(pid)
    return Process(pid, int(fields[_START]) if fields else 0)


def is_stopped(pid: int) -> bool:
    """Whether a process stands still because of a signal or a debugger; False also if /proc does not show it."""
    fields = _stat(pid)
    return bool(fields) and fields[_STATE] in ("T", "t")


def is_nested(pid: int) -> bool | None:
    """Whether a process is in a PID namespace below ours; None if /proc does not show it."""
    numbers = _numbers(str(pid)) if shows_ours() else None
    return len(numbers) > 1 if numbers else None


def shows_ours() -> bool:
    """Whether the numbers in /proc are those of our PID namespace: a container may have its host's."""
    return _shows_ours(os.getpid())


@functools.lru_cache(maxsize=4)
def _shows_ours(pid: int) -> bool:
    numbers = _numbers("self")
    return numbers == [str(pid)]


def _numbers(name: str) -> list[str] | None:
    """A process's pids in its PID namespaces, from that of /proc downwards; None if they are not shown."""
    try:
        with open(f"/proc/{name}/status", errors="replace") as file:
            return next((line.split()[1:] for line in file if line.startswith("NSpid:")), None)
    except OSError:
        return None


def _is_there(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # a damaged number is no process's
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none if they are not shown."""
    if not shows_ours():
        return []
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []
