"""Every deliberate error of sharedpool. All of them pickle, fields and all.

One root, named after the condition that a caller can react to. Errors of the operating system are translated in the
one place where they happen, with `raise ... from`.
"""

from __future__ import annotations

import errno
from typing import Any


class SharedPoolError(Exception):
    """The root of all errors raised on purpose by sharedpool.

    The message is the only positional argument; what else is known is kept as attributes, so that every error can be
    pickled and unpickled without help.
    """

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)


class OptionError(SharedPoolError, ValueError):
    """An option has a wrong name, type or range. Fields: option, value, source, allowed."""


class PoolTimeout(SharedPoolError, TimeoutError):
    """No connection or permit became free within checkout_timeout. Field: stats (a PoolStats)."""


class ConnectTimeout(SharedPoolError, ConnectionError, TimeoutError):
    """The remote did not answer within connect_timeout. The permit has been given back."""


class ConnectFailed(SharedPoolError, ConnectionError):
    """The remote refused, or could not be reached or resolved. The permit has been given back."""


class TooManyWaiting(SharedPoolError):
    """As many checkouts wait as may: max_waiting, or all waiting places. Fields: stats (a PoolStats), pool."""


class PoolStopped(SharedPoolError):
    """The pool was stopped. Field: waited, True if that was while this checkout waited."""

    waited = False


class PoolNotFound(SharedPoolError, LookupError):
    """Nobody declared a pool of that name, and no options were given to declare it with."""


class PoolOptionsDiffer(SharedPoolError):
    """A pool of that name exists with options that cannot be changed to the ones given."""


class LeaseError(SharedPoolError):
    """The lease is not in force here: checked in already, taken away, or of another process."""


class SessionNotKept(SharedPoolError):
    """A statement is about its session, and the next statement would have another one. Field: statement.

    It is no error of a database library, because callers ignore those where they expect a broken transaction.
    """

    statement: str = ""


class PoolBroken(SharedPoolError):
    """The pool's shared memory can no longer be used; it needs a new start."""


class ArbiterLost(SharedPoolError, ConnectionError):
    """The arbiter has gone or does not answer, and the call could not be completed without it."""


class StartFailed(SharedPoolError):
    """No arbiter could be started, or no usable runtime directory was found; the message says what was tried."""


class AttachRefused(SharedPoolError):
    """The arbiter or its segment does not fit this process: other user, namespace, libc, layout or version.

    Fields, where one fact differs: fact, theirs, ours.
    """

    fact: str = ""


class RegistryTimeout(SharedPoolError, TimeoutError):
    """The arbiter runs and did not answer in time: it is stopped or overloaded. Whether the call was done is open."""


class DrainTimeout(SharedPoolError, TimeoutError):
    """Not everything was closed in time. Fields: left (connections), pids (processes that still lease some)."""


class FileLimit(SharedPoolError):
    """No descriptor is left: the process's limit of open files (RLIMIT_NOFILE), or the system's. Nothing is lost."""


class NotSupported(SharedPoolError):
    """This platform or interpreter lacks what the call needs; the message names it."""


#: What the system answers where no descriptor is left, in the process, in the system, or on the way between two.
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)


def file_limit(error: OSError, act: str, who: str = "this process") -> SharedPoolError:
    """An operating system error while descriptors were made, in our words."""
    if error.errno in NO_DESCRIPTOR:
        return FileLimit(
            f"{who} has no descriptor left to {act}: raise its limit of open files (RLIMIT_NOFILE): {error}"
        )
    return SharedPoolError(f"the system refused to {act}: {error}")
