"""C functions that CPython calls without letting go of the GIL, bound to operators so that nothing can come between.

`-call`, `+call` and `~call` run a C function at once: CPython looks neither for signals nor for other threads before
and after an operator. That is what makes a check and the act that follows it one stretch.

Linux and glibc or musl; imported only by the shared (not the local) mode.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import functools
import importlib
import mmap
import operator
import os
import platform
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from .errors import NotSupported

# Without use_errno (25 ns a call); arguments are plain ints and byref(): c_void_p objects cost 20 to 40 ns each.
_held = ctypes.PyDLL(None)
_released = ctypes.CDLL(None)

_FUTEX_NUMBERS: Final = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_FUTEX_WAIT: Final = 0
_FUTEX_WAKE: Final = 1
#: The same number on every machine; it takes the clock as an argument.
_FUTEX_WAITV: Final = 449
_FUTEX2_SIZE_U32: Final = 2

Nullary = Callable[[], int]


class Call:
    """Up to three C calls with their arguments fixed, run by `-`, `+` and `~`.

    The slots are member descriptors named like the operators: looking the operator up on the type finds the
    descriptor, which gives this object's own callable. All of it happens in C.
    """

    __slots__ = ("__invert__", "__neg__", "__pos__")

    if TYPE_CHECKING:

        def __neg__(self) -> int: ...
        def __pos__(self) -> int: ...
        def __invert__(self) -> int: ...

    def __init__(self, minus: Nullary, plus: Nullary | None = None, tilde: Nullary | None = None) -> None:
        self.__neg__ = minus  # type: ignore[method-assign]
        self.__pos__ = plus or minus  # type: ignore[method-assign]
        self.__invert__ = tilde or minus  # type: ignore[method-assign]


class Subscript:
    """`FILENO[conn]` is conn.fileno(), by subscription."""

    __slots__ = ()

    __getitem__ = staticmethod(operator.methodcaller("fileno"))


class PooledNumber:
    """`PooledNumber()[conn]` is conn.number(), which pooled sockets have: for them nothing but C, and nothing noted."""

    __slots__ = ()

    __getitem__ = staticmethod(operator.methodcaller("number"))


FILENO: Final = Subscript()


def reader_of(conn: Any) -> Any:
    """What gives the number of a connection's descriptor, by subscription."""
    compiled = calls is not None and isinstance(conn, _socket.socket)
    return PooledNumber() if hasattr(conn, "number") and not compiled else FILENO


def libpq_number(conn: Any) -> int:
    """The number of the descriptor that libpq has for a psycopg connection; -1 once it is closed."""
    try:
        return int(conn.pgconn.socket)
    except Exception:  # noqa: BLE001 - psycopg's OperationalError, which is not known here
        return -1


def original(module: str, name: str) -> Any:
    """What a module of the standard library has under a name, whatever gevent's monkey patching has put there."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(importlib.import_module(module), name) if monkey is None else monkey.get_original(module, name)


def patched() -> bool:
    """Whether gevent has patched sockets or threads: who waits then waits as a greenlet."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and (monkey.is_module_patched("socket") or monkey.is_module_patched("threading"))


#: The liveness poll switches no greenlets.
_poll: Final = original("select", "poll")


def bound(name: str, *arguments: Any) -> Nullary:
    """A libc function that keeps the GIL, with fixed ctypes arguments; gives its int."""
    return functools.partial(getattr(_held, name), *arguments)


def at(address: int) -> Any:
    """A pointer to `address` as ctypes passes it fastest."""
    return ctypes.byref(ctypes.c_char.from_address(address))


_map = ctypes.CDLL(None, use_errno=True).mmap
_map.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_map.restype = ctypes.c_void_p
_MAP_FIXED: Final = 0x10


def map_over(address: int, size: int, fd: int) -> None:
    """Map a file, shared, over memory that is mapped already; -1: zeros that are this process's own.

    Raises:
        OSError: It cannot be mapped.
    """
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if _map(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags | _MAP_FIXED, fd, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def futex_number() -> int:
    """The system call's number on this machine.

    Raises:
        NotSupported: This machine's is not known.
    """
    machine = platform.machine()
    if machine not in _FUTEX_NUMBERS or sys.maxsize < 2**32:
        raise NotSupported(f"the futex system call's number is not known for {machine}; known: {[*_FUTEX_NUMBERS]}")
    return _FUTEX_NUMBERS[machine]


def waker(address: int) -> Call:
    """`-waker(address)` wakes one thread that sleeps on the 32-bit word there, in whatever process."""
    return Call(bound("syscall", ctypes.c_long(futex_number()), at(address), _FUTEX_WAKE, 1))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Sleeper:
    """Sleeps on one 32-bit word in shared memory; one thread at a time.

    A futex needs no descriptor, no buffer and no name: nothing can fill up, go stale, or be left behind by a death.
    """

    __slots__ = ("_call", "_time", "_value")

    def __init__(self, address: int) -> None:
        self._time = _Timespec(0, 0)
        self._value = ctypes.c_uint(0)
        self._call = functools.partial(
            _released.syscall, ctypes.c_long(futex_number()), at(address), _FUTEX_WAIT, self._value,
            ctypes.byref(self._time),
        )  # fmt: skip

    def sleep(self, value: int, nanoseconds: int) -> None:
        """Sleep until woken, a signal, or the time is over; return at once if the word is not `value`."""
        time = self._time
        time.seconds = nanoseconds // 1_000_000_000
        time.nanoseconds = nanoseconds % 1_000_000_000
        self._value.value = value
        self._call()


class _Watched(ctypes.Structure):
    """struct futex_waitv."""

    _fields_ = (
        ("value", ctypes.c_uint64), ("address", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("none", ctypes.c_uint32),
    )  # fmt: skip


class ManySleeper:
    """Sleeps on many 32-bit words at once: FUTEX_WAITV, of Linux 5.16 and later. One thread at a time.

    Raises:
        NotSupported: The kernel has no such call, or forbids it.
    """

    #: So many words at most (FUTEX_WAITV_MAX).
    MOST: Final = 128

    def __init__(self) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._words = (_Watched * self.MOST)()
        for word in self._words:
            word.flags = _FUTEX2_SIZE_U32
        self._until = _Timespec(0, 0)
        own = ctypes.c_uint(0)
        self.sleep([(ctypes.addressof(own), 1)], 0)  # another value than that: it returns at once

    def sleep(self, words: Sequence[tuple[int, int]], nanoseconds: int) -> int:
        """Sleep until one of the words is woken, or the time is over.

        Args:
            words: Address and value of each; if one has another value, this returns at once.
            nanoseconds: How long at most.

        Returns:
            The index of the word that was woken; -1: something else.
        """
        table = self._words
        for index, (address, value) in enumerate(words):
            word = table[index]
            word.address, word.value = address, value
        until = time.monotonic_ns() + nanoseconds
        self._until.seconds, self._until.nanoseconds = divmod(until, 1_000_000_000)
        woken = self._call(
            ctypes.c_long(_FUTEX_WAITV), table, len(words), 0, ctypes.byref(self._until), time.CLOCK_MONOTONIC
        )
        if woken < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EINVAL):
            raise NotSupported(f"FUTEX_WAITV: {os.strerror(ctypes.get_errno())}")
        return int(woken)


def any_set(address: int, words: int) -> Call:
    """`-any_set(...)` is 0 while all of the 32-bit words at `address` are 0. 4 kB cost 0.06 us."""
    zeros = ctypes.create_string_buffer(4 * words)
    return Call(bound("memcmp", at(address), zeros, 4 * words))


def finder(address: int, marks: int) -> Callable[[int, int, int], int]:
    """find(tag, start, stop) over so many 32-bit marks at `address`: the first equal one's index, or -1.

    wmemchr looks at 8 marks per instruction: 1,000 cost 0.2 us more than one. A wchar_t of 32 bits is checked once.
    """
    if ctypes.sizeof(ctypes.c_wchar) != 4:
        raise NotSupported("this platform's wchar_t has no 32 bits")
    function = _held.wmemchr
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t)
    function.restype = ctypes.c_void_p

    def find(tag: int, start: int, stop: int) -> int:
        if stop > marks:  # damaged, and to be mended by whoever finds it
            stop = marks
        if stop <= start:
            return -1
        found = function(address + 4 * start, tag, stop - start)
        return -1 if found is None else (found - address) >> 2

    return find


class Gate:
    """What a pooled descriptor needs, bound: `quiet(0)` polls it, `+gate` unparks, `-gate` parks.

    Args:
        real: The connection's own descriptor, which stays with the pool.
        number: The descriptor that the user's object holds.
        dead: A descriptor at which nothing can happen; -1: the object is not parked.

    `quiet(0)` is empty while the connection is open and has said nothing, not even an urgent byte. It lets go of the
    GIL for a moment, which is harmless: the lease is held already; through ctypes it would cost 0.9 us instead of 0.5.
    The other two give `number`, or -1, and keep the GIL: no other thread may get between the check of the number and
    the dup.
    """

    __slots__ = ("__neg__", "__pos__", "quiet")

    def __init__(self, real: int, number: int, dead: int) -> None:
        poller = _poll()
        poller.register(real, select.POLLIN | select.POLLPRI)
        self.quiet = poller.poll
        if dead < 0:
            self.__pos__ = self.__neg__ = functools.partial(int, number)
            return
        self.__pos__ = functools.partial(_held.dup3, real, number, os.O_CLOEXEC)
        self.__neg__ = functools.partial(_held.dup3, dead, number, os.O_CLOEXEC)


def disconnect(number: int) -> None:
    """Reset a TCP connection, whoever else has its socket: connect(2) to no address. Of others nothing becomes.

    A socket that is only shut down says nothing before its peer speaks, and a peer that waits for room does not.
    """
    _held.connect(number, bytes(16), 16)  # AF_UNSPEC is 0


def heed() -> None:
    """Nothing; but on entering a Python function CPython runs signal handlers and raises what other threads asked for.

    Compiled loops call it between two sleeps: they would never be interrupted otherwise.
    """


#: The same calls without ctypes, which costs 0.15 us each (speed/_calls.pyx); None where nothing is compiled.
calls: Any = None
with contextlib.suppress(ImportError):
    calls = importlib.import_module("._calls", __package__)
if not TYPE_CHECKING and calls is not None:
    any_set, finder, waker, Gate, Sleeper = calls.AnySet, calls.Finder, calls.Waker, calls.Gate, calls.Sleeper
    FILENO = calls.FileNumber()
    libpq_number = calls.libpq_number
