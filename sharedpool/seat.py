"""The arbiter's place in the runtime directory: its lock and its sockets, by which newcomers find it.

Others may remove them while the arbiter lives: logind at a user's last logout (RemoveIPC), systemd-tmpfiles, a script
that empties /tmp. So the arbiter looks at its own files again and again, and makes anew what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from typing import Final

from . import foreign, scope

_BACKLOG: Final = 512
_Id = tuple[int, int]


class Seat:
    """One arbiter's place. Only its own thread uses it.

    Attributes:
        directory: The runtime directory's path.
        fd: A descriptor of the runtime directory. Its number stays, also when the directory is another one later.
        doors: They bind the sockets. Called once, and again whenever the files were taken away.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.fd = -1
        self.doors: list[Callable[[], None]] = []
        self._leader = -1
        self._files: dict[str, _Id] = {}
        self._made: list[str] = []

    def take(self) -> bool:
        """Lock the directory that is there, which is made if it is missing; False if another arbiter has it.

        Raises:
            StartFailed: There is none that can be used.
            OSError: It cannot be locked; FileNotFoundError: it was removed just now.
        """
        missing = scope.missing_parents(self.directory)
        fd = scope.open_directory(scope.prepare(self.directory))
        try:
            leader = _lead(fd)
            if leader is None:
                return False
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # systemd-tmpfiles spares it: tmpfiles.d(5), "Age"
            if self.fd < 0:
                self.fd = os.dup(fd)
            else:
                os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        if self._leader >= 0:
            os.close(self._leader)
        self._leader = leader
        self._made += missing
        return True

    def give_up(self) -> None:
        """Somebody else may have it."""
        os.close(self._leader)
        os.close(self.fd)
        self._leader = self.fd = -1

    def open(self) -> None:
        """Bind the sockets; from now on newcomers find this arbiter.

        Raises:
            OSError: The directory was removed, or is full.
        """
        unlink(self.fd, scope.ARBITER_SOCKET, scope.REGISTRY_SOCKET)
        for door in self.doors:
            door()
        names = scope.LEADER_LOCK, scope.ARBITER_SOCKET, scope.REGISTRY_SOCKET
        self._files = {name: self._id_of(name) for name in names}

    def is_gone(self) -> bool:
        """Whether the directory is no longer where it was."""
        try:
            return _id(os.lstat(self.directory)) != _id(os.fstat(self.fd))
        except OSError:
            return True

    def is_whole(self) -> bool:
        """Whether all is where it was made, so that newcomers find this arbiter."""
        try:
            return not self.is_gone() and all(self._id_of(name) == known for name, known in self._files.items())
        except OSError:
            return False

    def take_again(self) -> bool:
        """Make anew what was taken away; False if another arbiter is there by now.

        Raises:
            StartFailed, OSError: That cannot be done now.
        """
        if (self.is_gone() or not self._leads()) and not self.take():
            return False
        self.open()
        return True

    def leave(self, *, keep_roster: bool, refuse: Callable[[], None]) -> bool:
        """Take all files away; False if somebody is about to come.

        Args:
            keep_roster: Whether a successor needs the roster.
            refuse: Closes the door: it ends the connections of those who were not let in yet.
        """
        if self.is_gone():
            refuse()
            return True
        try:
            lock = os.open(scope.inside(self.fd, scope.START_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the directory was removed just now
            refuse()
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        unlink(self.fd, scope.ARBITER_SOCKET)
        refuse()
        if not keep_roster:
            unlink(self.fd, scope.ROSTER)
        unlink(self.fd, scope.REGISTRY_SOCKET, scope.LEADER_LOCK, scope.START_LOCK)
        with contextlib.suppress(OSError):  # somebody keeps something of his own in it
            os.rmdir(self.directory)
            if scope.is_private(self.directory):
                os.rmdir(os.path.dirname(self.directory))
            for parent in reversed(self._made):
                os.rmdir(parent)
        os.close(lock)
        os.close(self._leader)
        return True

    def _leads(self) -> bool:
        """Whether the lock is on the file that is there. Only then must it not be opened: a close would unlock it."""
        try:
            return self._id_of(scope.LEADER_LOCK) == _id(os.fstat(self._leader))
        except OSError:
            return False

    def _id_of(self, name: str) -> _Id:
        return _id(os.stat(name, dir_fd=self.fd, follow_symlinks=False))


def listen(directory: int) -> socket.socket:
    """The socket where workers come."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(scope.inside(directory, scope.ARBITER_SOCKET))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def refuse_callers(listener: socket.socket) -> None:
    """Whoever has connected but was not accepted sees the end of its channel, and looks for another arbiter."""
    listener.setblocking(False)
    with contextlib.suppress(OSError):
        while True:
            foreign.end_channel(listener.accept()[0])
    listener.close()


def unlink(directory: int, *names: str) -> None:
    """Remove these files of a directory, as far as they are there."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)


def _lead(directory: int) -> int | None:
    """Take the leader lock: a record lock, which a fork never inherits. None if another arbiter has it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(scope.LEADER_LOCK, flags, 0o600, dir_fd=directory)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        with contextlib.suppress(FileNotFoundError):
            if _id(os.stat(scope.LEADER_LOCK, dir_fd=directory, follow_symlinks=False)) == _id(os.fstat(fd)):
                return fd
        os.close(fd)  # the file was exchanged: its lock is worth nothing


def _id(status: os.stat_result) -> _Id:
    return status.st_dev, status.st_ino
