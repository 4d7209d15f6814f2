"""What an arbiter inherits from one that was killed: the segments that its scope's processes still have.

A segment has no path. /proc shows it where it shows what a process has open, and the processes that come back bring
it. What /proc does not show may still be there: the roster tells who has it. Until they have come back or have ended,
nobody gets a pool of that name. So no second cap comes to be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any, Final

from . import layout, processes, segment, view
from .errors import AttachRefused
from .processes import Process
from .roster import Attached
from .segment import Segment

_AWAITED: Final = "the arbiter that served it was killed, and they have not come back yet (stopped, or very busy)"


@dataclasses.dataclass(slots=True)
class Kept:
    """A pool's name that nobody gets: processes have such a pool, and it could not be taken over.

    Attributes:
        why: The reason, for people.
        fact: What it is about, as in AttachRefused.
        memory: The segment that is waited for; empty if none would be taken.
        processes: Those that have it.
        until: Who wants the pool waits until then, monotonic ns, instead of being refused.
    """

    why: str
    fact: str
    memory: str
    processes: list[Process]
    until: int = 0


@dataclasses.dataclass(slots=True)
class _Copy:
    """One segment as /proc shows it: where it is open, and in which processes."""

    paths: list[str] = dataclasses.field(default_factory=list)
    pids: set[int] = dataclasses.field(default_factory=set)


def scope_id(directory: str) -> str:
    """What tells the segments of this scope from those of others."""
    return hashlib.blake2b(os.fsencode(os.path.realpath(directory)), digest_size=8).hexdigest()


def place() -> dict[str, Any]:
    """What the numbers of processes belong to."""
    return {name: segment.identity()[name] for name in ("boot", "pid_namespace", "time_namespace")}


def find(scope: str, noted: Iterable[Attached]) -> tuple[dict[str, Segment], dict[str, Kept]]:
    """The pools of a scope that live processes have: the segments, by name, and those names that are kept.

    Args:
        scope: As `scope_id` gives it.
        noted: Who had which pool, in the order in which they attached.
    """
    shown = _shown(scope)
    having: dict[str, list[Attached]] = {}
    for each in noted:
        if has(each.process, scope, each.pool, each.memory) is not False:
            having.setdefault(each.pool, []).append(each)
    inherited, kept = {}, {}
    for name in {**shown, **having}:
        found = _one(name, shown.get(name, {}), having.get(name, []))
        if isinstance(found, Segment):
            inherited[name] = found
        elif found is not None:
            kept[name] = found
    return inherited, kept


def _one(name: str, copies: dict[str, _Copy], having: list[Attached]) -> Segment | Kept | None:
    """The segment of one pool, or why there is none; None if nobody has the pool any more.

    A process may still have an older segment of that name: the one counts that was given out last. Where no roster
    tells, it is the one that most processes have.
    """
    memory = having[-1].memory if having else ""
    if not memory and copies:
        memory = max(copies, key=lambda each: len(copies[each].pids))
    copy = copies.get(memory, _Copy())
    unseen = [each.process for each in having if each.process.pid not in copy.pids and each.memory in ("", memory)]
    try:
        taken = _open(name, copy.paths)
    except AttachRefused as error:
        return Kept(str(error), error.fact, "", [*map(processes.find, sorted(copy.pids)), *unseen])
    if taken is None and unseen:
        return Kept(_AWAITED, "", memory, list(dict.fromkeys(unseen)))
    return taken


def _open(name: str, paths: list[str]) -> Segment | None:
    """The segment that is open under these paths, checked; None if nobody has it any more.

    Raises:
        AttachRefused: It is damaged, or has a layout that this version does not serve.
    """
    for path in paths:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        return _checked(name, segment.attach(fd))
    return None


def _checked(name: str, taken: Segment) -> Segment:
    if taken.pool != name:
        taken.let_go()
        raise AttachRefused(f"the segment's header is damaged: it is named {name!r} and says {taken.pool!r}")
    return taken


def brought(fd: int, scope: str, name: str, memory: str, row: object, pid: int, nonce: object) -> Segment:
    """The segment that a process has brought which comes back for its row. Takes over `fd`.

    Args:
        fd: What came.
        scope: As `scope_id` gives it.
        name: The pool's name.
        memory: The segment that is waited for; empty if it is not known.
        row: The process's row, as it says.
        pid: The process, as the kernel says.
        nonce: What it was given with the row.

    Raises:
        AttachRefused: It is another one, or has no such row (fact "row"); or it is damaged, or of another layout.
    """
    try:
        ours = _is_named(os.readlink(f"/proc/self/fd/{fd}"), segment.name(scope, name))
        last = memory in ("", segment.memory_of(fd))
    except OSError:
        ours = last = False
    if not (ours and last):
        os.close(fd)
        raise _not_his(name, pid, "is not the one that was given out last" if ours else "is none of it")
    taken = _checked(name, segment.attach(fd))
    if not _has_row(taken, row, pid, nonce):
        taken.let_go()
        raise _not_his(name, pid, "has no row of it")
    return taken


def _not_his(name: str, pid: int, problem: str) -> AttachRefused:
    return AttachRefused(f"the memory that process {pid} has brought for pool {name!r} {problem}", fact="row")


def _has_row(taken: Segment, row: object, pid: int, nonce: object) -> bool:
    w = taken.words
    if type(row) is not int or row not in view.live_rows(w, taken.geometry):
        return False
    return view.row_pid(w, row) == pid and w[layout.HEADER + layout.ROW * row + layout.ROW_NONCE] == nonce


def has(process: Process, scope: str, pool: str, memory: str = "") -> bool | None:
    """Whether a process has a pool's segment open; None if the kernel does not show what it has open.

    False also for one that has executed another program, and where the number is another process's by now.

    Args:
        process: The process.
        scope: As `scope_id` gives it.
        pool: The pool's name.
        memory: The segment; empty: any of that name.
    """
    if not process.lives():
        return False
    if not processes.shows_ours():
        return None
    wanted = segment.name(scope, pool)
    try:
        return any(
            _is_named(target, wanted) and memory in ("", _memory_at(path)) for path, target in _open_in(process.pid)
        )
    except OSError:
        return None if process.lives() else False


def _shown(scope: str) -> dict[str, dict[str, _Copy]]:
    """By pool and segment: what /proc shows of this scope. What belongs to another user does not count."""
    prefix = f"/memfd:{segment.name(scope, '')}"
    found: dict[str, dict[str, _Copy]] = {}
    for pid in map(int, filter(str.isdigit, _listed("/proc"))):
        with contextlib.suppress(OSError):
            for path, target in _open_in(pid):
                if target.startswith(prefix):
                    name = target[len(prefix) :].removesuffix(" (deleted)")
                    _note(found.setdefault(name, {}), path, pid)
    return {name: copies for name, copies in found.items() if copies}


def _note(copies: dict[str, _Copy], path: str, pid: int) -> None:
    with contextlib.suppress(OSError):  # closed just now
        status = os.stat(path)
        if status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode):
            copy = copies.setdefault(segment.memory_in(status), _Copy())
            copy.paths.append(path)
            copy.pids.add(pid)


def _listed(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(directory)
    return []


def _open_in(pid: int) -> Iterator[tuple[str, str]]:
    """(path, what it leads to) of a process's descriptors.

    Raises:
        OSError: They are not shown, or not what they lead to (root without CAP_SYS_PTRACE).
    """
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        with contextlib.suppress(FileNotFoundError):  # closed just now
            yield path, os.readlink(path)


def _memory_at(path: str) -> str:
    try:
        return segment.memory_in(os.stat(path))
    except FileNotFoundError:  # closed just now
        return "closed"


def _is_named(target: str, name: str) -> bool:
    return target.removesuffix(" (deleted)") == f"/memfd:{name}"
