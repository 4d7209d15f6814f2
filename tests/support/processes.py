"""Facts about processes, from the kernel. Everything is by pidfd or by pid of a descendant, never by a name."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
from pathlib import Path

from tests.support.waiting import wait_until

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make the calling process the parent of every descendant whose own parent dies.

    So nothing that a test starts, however often it forks away (as the arbiter does), can leave the test unseen.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def hand_down_usual_signals() -> None:
    """Give the programs that this process starts the usual signals, whatever this process was started with.

    A script's `&` ignores SIGINT, nohup ignores SIGHUP, and a parent may block signals. Fork and exec hand this down.
    This process goes on ignoring these signals, but by a handler, and exec hands down no handler. Call it in the main
    thread, before anything is started.
    """
    for number in signal.valid_signals() - _PYTHONS:
        if signal.getsignal(number) == signal.SIG_IGN:
            # A child whose parent ignores SIGCHLD cannot be waited for.
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else _do_nothing)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


#: Python ignores these by itself, and subprocess gives them back to what it starts.
_PYTHONS = {signal.SIGPIPE, signal.SIGXFSZ}


def _do_nothing(number: int, frame: object) -> None:
    """The handler of the signals that were ignored."""


def state(pid: int) -> str:
    """The state letter of /proc/PID/stat ("R", "S", "T", "Z", ...), "" if there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def thread_states(pid: int) -> list[str]:
    """The state letters of all threads of a process."""
    stats = [each / "stat" for each in Path(f"/proc/{pid}/task").iterdir()]
    return [text[text.rindex(")") + 2] for text in (stat.read_text() for stat in stats)]


def parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def session(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[3]) if fields else 0


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def children(pid: int | None = None) -> set[int]:
    """The direct children of a process (default: this one), the dead and not yet collected ones included."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.update(int(each) for each in (task / "children").read_text().split())
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descriptors(pid: int | None = None) -> dict[int, str]:
    """Number -> target of every open descriptor."""
    found: dict[int, str] = {}
    directory = f"/proc/{pid or os.getpid()}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"{directory}/{name}")
    return {number: target for number, target in found.items() if not target.endswith("/fd")}


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def collect(pid: int) -> None:
    """Collect a dead child, if it is one of ours."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


class Watched:
    """A process held by its pidfd, so that a signal can never reach another one that got its number."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    @property
    def dead(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread stands still."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: set(thread_states(self.pid)) == {"T"}, what=f"process {self.pid} is stopped")

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self) -> None:
        wait_until(lambda: self.dead, what=f"process {self.pid} is dead")
        collect(self.pid)

    def close(self) -> None:
        os.close(self._pidfd)
