"""Which processes have which pools, in a file of the runtime directory: for the successor of an arbiter that is killed.

/proc does not show what every process has open. A process that has dropped root without an exec hides it even from its
own user. So the arbiter writes each process down before it gives it a pool, and a successor knows for whom to wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Final

from .processes import Process
from .scope import ROSTER, ROSTER_DRAFT

#: The file is written anew when it has this many lines more than twice the number of those that count.
_SURPLUS: Final = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Attached:
    """A process that has a pool, or had it.

    Attributes:
        pool: The pool's name.
        memory: The pool's segment, as `segment.memory_of` names it.
        process: The process.
    """

    pool: str
    memory: str
    process: Process


class Roster:
    """The file of one scope. Only the arbiter that leads writes it.

    Args:
        directory: A descriptor of the runtime directory.
        place: What the numbers of processes belong to: the boot, the PID namespace.
        current: Gives all that has to be in the file.
    """

    def __init__(self, directory: int, place: Any, current: Callable[[], Iterable[Attached]]) -> None:
        self._directory = directory
        self._place = place
        self._current = current
        self._written = (0, 0)
        self._lines = 0

    def note(self, attached: Attached) -> bool:
        """Add a process; False if that cannot be written."""
        if not self._is_whole():
            return self.write()
        try:
            size = self._append(_line(attached))
        except OSError:
            return self.write()
        self._written = self._written[0], size
        self._lines += 1
        return True

    def keep(self) -> None:
        """Write the file anew if it was taken away or cut, or if most of it no longer counts."""
        if not self._is_whole() or self._lines > _SURPLUS + 2 * len(set(self._current())):
            self.write()

    def write(self) -> bool:
        """Write all that counts, in one piece or not at all; False if that fails."""
        lines = [_line(each) for each in dict.fromkeys(self._current())]
        data = b"".join([json.dumps(self._place).encode() + b"\n", *lines])
        try:
            self._written = self._exchange(data)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(ROSTER_DRAFT, dir_fd=self._directory)
            return False
        self._lines = len(lines)
        return True

    def _is_whole(self) -> bool:
        """Whether the file is there as it was written last."""
        try:
            status = os.stat(ROSTER, dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return False
        return (status.st_ino, status.st_size) == self._written

    def _append(self, line: bytes) -> int:
        """Add a line; gives the file's new size."""
        fd = os.open(ROSTER, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            _write_all(fd, line)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _exchange(self, data: bytes) -> tuple[int, int]:
        """Put a new file in the place of the old one; gives its inode and size."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(ROSTER_DRAFT, flags, 0o600, dir_fd=self._directory)
        try:
            _write_all(fd, data)
            status = os.fstat(fd)
        finally:
            os.close(fd)
        os.rename(ROSTER_DRAFT, ROSTER, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        return status.st_ino, status.st_size


def _write_all(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError("the file system is full")


def _line(attached: Attached) -> bytes:
    process = attached.process
    return json.dumps([attached.pool, attached.memory, process.pid, process.start]).encode() + b"\n"


def read(directory: int, place: Any) -> list[Attached]:
    """What an arbiter has written down here, in its order; nothing if it was of another place.

    A last line without its end is of a process that has not got its pool: its arbiter was killed over it.
    """
    try:
        fd = os.open(ROSTER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return []
    with os.fdopen(fd, "rb") as file:
        first, *lines = file.read().split(b"\n")
    if _parsed(first) != place:
        return []
    return [found for found in map(_attached, lines[:-1]) if found is not None]


def _attached(line: bytes) -> Attached | None:
    match _parsed(line):
        case [str(pool), str(memory), int(pid), int(start)]:
            return Attached(pool, memory, Process(pid, start))
    return None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
