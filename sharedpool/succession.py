"""What an arbiter inherits from one that was killed: the segments that its scope's processes still have.

A segment has no path, but whoever has it open shows it under /proc to processes of the same user. So a new arbiter
knows all pools of its scope before it answers anybody, and no second cap comes to be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from . import segment
from .errors import AttachRefused
from .segment import Segment


def scope_id(directory: str) -> str:
    """What tells the segments of this scope from those of others."""
    return hashlib.blake2b(os.fsencode(os.path.realpath(directory)), digest_size=8).hexdigest()


def segments(scope: str) -> tuple[dict[str, Segment], dict[str, str]]:
    """The segments of a scope that live processes have, by pool; where there are several, the one that most have.

    Then why those are refused that have a layout which this version does not serve.
    """
    found: dict[str, dict[tuple[int, int], list[str]]] = {}
    for path, name in _open_segments(scope):
        try:
            status = os.stat(path)
        except OSError:  # closed just now
            continue
        found.setdefault(name, {}).setdefault((status.st_dev, status.st_ino), []).append(path)
    inherited, refused = {}, {}
    for name, copies in found.items():
        try:
            taken = _open(name, max(copies.values(), key=len))
        except AttachRefused as error:
            refused[name] = str(error)
            continue
        if taken is not None:
            inherited[name] = taken
    return inherited, refused


def _open(name: str, paths: list[str]) -> Segment | None:
    """The segment that is open under these paths, checked; None if nobody has it any more.

    Raises:
        AttachRefused: It has a layout that this version does not serve.
    """
    for path in paths:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            taken = segment.attach(fd)
        except AttachRefused as error:
            if error.fact == "layout":
                raise
            continue
        if taken.pool == name:
            return taken
        taken.let_go()
    return None


def _open_segments(scope: str) -> Iterator[tuple[str, str]]:
    """(path under /proc, pool) of every descriptor of a segment of this scope."""
    prefix = f"/memfd:{segment.name(scope, '')}"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for path, target in _descriptors(int(pid)):
            if target.startswith(prefix):
                yield path, target[len(prefix) :].removesuffix(" (deleted)")


def holders(scope: str, pool: str) -> list[int]:
    """The processes that have a pool's segment open."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if has(pid, scope, pool)]


def has(pid: int, scope: str, pool: str) -> bool:
    """Whether a process has a pool's segment open: not one that was exec'd, nor a stranger who got its pid."""
    wanted = f"/memfd:{segment.name(scope, pool)}"
    return any(target.removesuffix(" (deleted)") == wanted for _, target in _descriptors(pid))


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """(path, what it leads to) of a process's descriptors, as far as we may see them."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        path = f"{directory}/{name}"
        try:
            yield path, os.readlink(path)
        except OSError:
            continue
