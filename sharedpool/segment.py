"""A pool's shared memory: a sealed memfd with a header that says who may attach, the mutex, and the table's words.

It has no path: nothing to leak, to unlink or to find by accident. Whoever gets the descriptor checks everything in the
header before the first use, because a mutex shared across PID namespaces or libcs corrupts memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import json
import mmap
import os
import platform
import struct
import weakref
from collections.abc import Mapping
from typing import Any

from . import layout, mutex
from .errors import NO_DESCRIPTOR, AttachRefused, SharedPoolError, StartFailed, file_limit
from .layout import Geometry
from .native import Call, finder, map_over, waker
from .table import Table

MAGIC = b"SHRDPOOL"
_HEADER_BYTES = 4096
_MUTEX_AT = 64
_FACTS_AT = 256
_HEAD = struct.Struct("<8sIIQ")  # magic, layout, length of the facts, bytes in all

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

#: Why each fact must agree, in the words of the refusal.
_REASONS = {
    "pid_namespace": "their robust mutexes would unlock each other: one container = one cap;"
    " share the PID namespace (shareProcessNamespace: true) or give each its own SHAREDPOOL_DIR",
    "time_namespace": "their monotonic clocks differ",
    "boot": "the memory is from before a reboot or from another machine",
    "libc": "a mutex of one libc is not a mutex of another",
    "machine": "the memory's layout differs",
    "pointer": "the memory's layout differs",
    "layout": "restart the processes that run the older version of sharedpool, or any other that cannot serve it",
}


@functools.cache
def identity() -> Mapping[str, Any]:
    """What all processes that share a segment must have in common.

    The layout is the oldest one that this version serves: so one that knows only that one takes it for its like.
    """
    return {
        "pid_namespace": _namespace("pid"),
        "time_namespace": _namespace("time"),
        "boot": _boot_id(),
        "libc": " ".join(platform.libc_ver()) or "unknown",
        "machine": platform.machine(),
        "pointer": ctypes.sizeof(ctypes.c_void_p),
        "layout": layout.SERVED[0],
    }


def _namespace(kind: str) -> str:
    try:
        status = os.stat(f"/proc/self/ns/{kind}")
    except OSError:
        return "unknown"
    return f"{status.st_dev}:{status.st_ino}"


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


def check_identity(theirs: Mapping[str, Any], who: str) -> None:
    """Compare another party's facts with ours.

    Raises:
        AttachRefused: One differs; the message names both values and why it matters.
    """
    for name, ours in identity().items():
        if name == "layout":
            _check_layout(theirs.get(name), who)
        elif theirs.get(name) != ours:
            raise AttachRefused(
                f"{who} has {name} {theirs.get(name)!r}, this process has {ours!r}: {_REASONS[name]}",
                fact=name, theirs=theirs.get(name), ours=ours,
            )  # fmt: skip


def _check_layout(theirs: object, who: str) -> None:
    if theirs not in layout.SERVED:
        ours = " and ".join(map(str, layout.SERVED))
        raise AttachRefused(
            f"{who} has layout {theirs!r}, this process serves {ours}: {_REASONS['layout']}",
            fact="layout", theirs=theirs, ours=layout.LAYOUT,
        )  # fmt: skip


@dataclasses.dataclass(slots=True)
class Segment:
    """A mapped segment. It stays mapped until the process ends: a mutex must not vanish while somebody holds it."""

    fd: int
    pool: str
    layout: int
    secret: bytes
    geometry: Geometry
    mutex: Call
    words: memoryview[int]
    marks: memoryview[int]
    words_address: int
    marks_address: int
    claimed: int = -1

    def let_go(self) -> None:
        """Close the descriptors. The memory stays mapped as long as anything here refers to it."""
        fd, self.fd = self.fd, -1
        claimed, self.claimed = self.claimed, -1
        for each in (fd, claimed):
            if each >= 0:
                os.close(each)

    def claim(self) -> bool:
        """Say that this arbiter serves the segment, until it ends or lets go; False if another one does.

        A BSD lock on an open file of the arbiter's own: workers have the file that came with their WELCOME, so a lock
        on that one would outlive the arbiter; and a record lock would go when any descriptor of the memory is closed.

        Raises:
            FileLimit: No descriptor is left.
        """
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise file_limit(error, f"serve pool {self.pool!r}", "the arbiter") from error
            return True  # without /proc nobody would find the segment either
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:  # forbidden here
            os.close(fd)
            return True
        self.claimed = fd
        return True

    def move_to(self, number: int) -> None:
        """Say that the memory has another layout now; one store, so whoever attaches reads the old or the new one."""
        os.pwrite(self.fd, struct.pack("<I", number), len(MAGIC))
        self.layout = number

    def table(self, row: int) -> Table:
        """The table, storing as `row`."""
        return Table(
            self.words, self.marks, self.mutex, self.geometry, row, finder(self.marks_address, self.geometry.slots)
        )

    def kick_address(self, cell_at: int) -> int:
        """Where the sleeper of a cell sleeps."""
        index = self.geometry.slots + (cell_at - self.geometry.cell_base) // layout.CELL
        return self.marks_address + 4 * index

    def waker(self, cell_at: int) -> Call:
        return waker(self.kick_address(cell_at))


def key_of(secret: bytes, address: tuple[Any, ...]) -> int:
    """The key of an address, as `drivers.key` gives it, in the pool with this secret; never 0.

    Keyed, so that nobody can choose addresses whose keys are the same. Nothing compares the texts: two of 10,000 keys
    are the same with a probability of 3e-12. What is written in a part cannot pass for another part.
    """
    text = json.dumps([str(part) for part in address])
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=secret).digest()
    return int.from_bytes(digest, "little") or 1


def memory_of(fd: int) -> str:
    """What tells this segment from all others until the next boot."""
    return memory_in(os.fstat(fd))


def memory_in(status: os.stat_result) -> str:
    """The same, from what `os.stat` gives."""
    return f"{status.st_dev}:{status.st_ino}"


def name(scope: str, pool: str) -> str:
    """What the kernel shows as the memfd's name."""
    return f"sharedpool:{scope}:{pool}"


def create(pool: str, geometry: Geometry, scope: str = "") -> Segment:
    """Make a segment, all of its memory allocated: a hole on a full tmpfs would be SIGBUS in somebody's worker.

    Raises:
        StartFailed: The memory is not to be had; FileLimit: nor a descriptor for it.
    """
    size = _HEADER_BYTES + geometry.size
    try:
        fd = os.memfd_create(name(scope, pool), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _no_memory(error, pool, size) from error
    try:
        return _fill(fd, size, pool, geometry)
    except OSError as error:
        os.close(fd)
        raise _no_memory(error, pool, size) from error
    except BaseException:
        os.close(fd)
        raise


def _no_memory(error: OSError, pool: str, size: int) -> SharedPoolError:
    if error.errno in NO_DESCRIPTOR:
        return file_limit(error, f"make pool {pool!r}", "the arbiter")
    return StartFailed(f"no shared memory for pool {pool!r} ({size} bytes): {error}")


def _fill(fd: int, size: int, pool: str, geometry: Geometry) -> Segment:
    """Allocate, seal and lay out a new segment."""
    os.posix_fallocate(fd, 0, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    facts = {
        **identity(),
        "layout": layout.LAYOUT,
        "pool": pool,
        "secret": os.urandom(16).hex(),
        "rows": geometry.rows,
        "slots": geometry.slots,
        "cells": geometry.cells,
        "lines": geometry.lines,
    }
    text = json.dumps(facts).encode()
    if len(text) > _HEADER_BYTES - _FACTS_AT:
        raise StartFailed(f"the header of pool {pool!r} is too long: {len(text)} bytes")
    os.pwrite(fd, text, _FACTS_AT)
    os.pwrite(fd, _HEAD.pack(MAGIC, layout.LAYOUT, len(text), size), 0)
    segment = _map(fd, size, facts, layout.LAYOUT)
    mutex.initialize(segment.words_address - _HEADER_BYTES + _MUTEX_AT)
    words = segment.words
    words[layout.VER] = 1
    words[layout.TICKET] = 1
    words[layout.GATE] = layout.EPOCH
    words[layout.MAX_WAITING] = layout.ANY_NUMBER
    return segment


def attach(fd: int) -> Segment:
    """Map a segment that somebody else made, after checking everything its header says. Takes over `fd`.

    Raises:
        AttachRefused: It is no segment, or not one for this process.
    """
    try:
        size, facts, version = _read_header(fd)
        check_identity(facts, "the pool's shared memory")
        return _map(fd, size, facts, version)
    except BaseException:
        os.close(fd)
        raise


def _read_header(fd: int) -> tuple[int, dict[str, Any], int]:
    status = os.fstat(fd)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise AttachRefused(f"what came as shared memory is no memfd: {error}") from error
    if status.st_uid != os.geteuid():
        raise AttachRefused(f"the shared memory belongs to uid {status.st_uid}, this process is uid {os.geteuid()}")
    if status.st_size < _HEADER_BYTES or seals & _SEALS != _SEALS:
        raise AttachRefused(f"what came as shared memory is no segment: {status.st_size} bytes, seals {seals:#x}")
    head = os.pread(fd, _HEAD.size, 0)
    magic, version, length, size = _HEAD.unpack(head)
    if magic != MAGIC:
        raise AttachRefused(f"what came as shared memory is no segment: it begins with {magic!r}")
    _check_layout(version, "the pool's shared memory")
    if length > _HEADER_BYTES - _FACTS_AT or size != status.st_size:
        raise AttachRefused(f"the segment's header is damaged: {length} bytes of facts, {size} of {status.st_size}")
    try:
        facts = json.loads(os.pread(fd, length, _FACTS_AT))
        numbers = (facts["rows"], facts["slots"], facts["cells"], facts.get("lines", 0))
        whole = all(type(number) is int and number >= 0 for number in numbers) and all(numbers[:3])
        whole = whole and isinstance(facts["pool"], str)
        sound = whole and _HEADER_BYTES + Geometry(*numbers).size == size and len(bytes.fromhex(facts["secret"])) == 16
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AttachRefused(f"the segment's header is damaged: {error!r}") from error
    if not sound:
        raise AttachRefused("the segment's header is damaged: its numbers do not fit its size")
    return size, facts, version


#: All that this process has mapped, with address and size.
_mapped: weakref.WeakKeyDictionary[mmap.mmap, tuple[int, int]] = weakref.WeakKeyDictionary()


def forked() -> None:
    """In a child: it keeps nothing of its parent's pools, which it could write to after it has dropped privileges.

    Addresses that something still knows lead to memory of the child's own. Nor does it hold a mutex of its parent's:
    glibc and musl give a child an empty list of robust mutexes.
    """
    for address, size in list(_mapped.values()):
        map_over(address, size, -1)
    _mapped.clear()


def _map(fd: int, size: int, facts: Mapping[str, Any], version: int) -> Segment:
    geometry = Geometry(facts["rows"], facts["slots"], facts["cells"], facts.get("lines", 0))
    memory = mmap.mmap(-1, size)  # of the file it would keep a duplicate, before 3.13
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _mapped[memory] = address, size
    map_over(address, size, fd)
    view = memoryview(memory)
    split = _HEADER_BYTES + 8 * geometry.words
    words: Any = view[_HEADER_BYTES:split].cast("Q")
    marks: Any = view[split : _HEADER_BYTES + geometry.size].cast("I")
    return Segment(
        fd=fd,
        pool=facts["pool"],
        layout=version,
        secret=bytes.fromhex(facts["secret"]),
        geometry=geometry,
        mutex=mutex.attach(address + _MUTEX_AT),
        words=words,
        marks=marks,
        words_address=address + _HEADER_BYTES,
        marks_address=address + split,
    )
