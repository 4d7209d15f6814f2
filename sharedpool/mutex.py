"""A robust, error-checking, process-shared mutex in shared memory, for critical sections in `table.py` only.

Trylock only: never wait for it, neither with the GIL nor without. Its owner is a thread id of one PID namespace, so
all its users must live in one; `segment.py` sees to that.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import cast

from .errors import NotSupported
from .native import Call, at, bound, calls

#: Bytes reserved: 40 are needed on x86_64, 48 on aarch64.
RESERVED = 64

_PROCESS_SHARED = 1
_ROBUST = 1
_ERRORCHECK = 2


def initialize(address: int) -> None:
    """Make a mutex in zeroed memory at `address`.

    Raises:
        NotSupported: libc refuses one of the attributes; the message names it.
    """
    attributes = (ctypes.c_char * RESERVED)()
    place = ctypes.c_void_p(ctypes.addressof(attributes))
    for name, value in (
        ("pthread_mutexattr_init", None),
        ("pthread_mutexattr_setpshared", _PROCESS_SHARED),
        ("pthread_mutexattr_setrobust", _ROBUST),
        ("pthread_mutexattr_settype", _ERRORCHECK),
    ):
        code = bound(name, place)() if value is None else bound(name, place, ctypes.c_int(value))()
        _must(name, code)
    _must("pthread_mutex_init", bound("pthread_mutex_init", ctypes.c_void_p(address), place)())


def _must(name: str, code: int) -> None:
    if code:
        raise NotSupported(f"{name} answers {errno.errorcode.get(code, code)}: no robust process-shared mutex here")


def attach(address: int) -> Call:
    """The mutex at `address` as operators: `-` trylock, `+` unlock, `~` make consistent; each gives an errno or 0."""
    if calls is not None:
        return cast(Call, calls.Mutex(address))
    place = at(address)
    return Call(
        bound("pthread_mutex_trylock", place),
        bound("pthread_mutex_unlock", place),
        bound("pthread_mutex_consistent", place),
    )


def prove() -> None:
    """Let a forked child die with a mutex and see that the death is told. Call it with one thread only.

    Raises:
        NotSupported: The platform does not tell (an emulator, a sandbox): nothing could be recovered after a kill.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    pin = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(pin)
    initialize(address)
    mutex = attach(address)
    child = os.fork()
    if child == 0:
        try:
            -mutex
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    code = -mutex
    if code != errno.EOWNERDEAD:
        raise NotSupported(
            f"a mutex whose holder died answers {errno.errorcode.get(code, code)} instead of EOWNERDEAD: this"
            " platform has no working robust mutexes"
        )
    ~mutex
    +mutex
