"""How commands end: exit codes, and which error gives which."""

from __future__ import annotations

import enum

from ..errors import ArbiterLost
from ..inspection import NoArbiter


class Exit(enum.IntEnum):
    """The exit codes of `sharedpool`."""

    OK = 0
    FAILED = 1  # the user's mistake, nothing found, or a problem that doctor found
    USAGE = 2  # an unknown command or option
    NO_ARBITER = 3  # no arbiter runs in the scope
    NO_ANSWER = 4  # the arbiter does not answer, or something was not done in time


def exit_for(error: Exception) -> Exit:
    """The code for an error that was raised on purpose."""
    if isinstance(error, NoArbiter):
        return Exit.NO_ARBITER
    if isinstance(error, ArbiterLost | TimeoutError):
        return Exit.NO_ANSWER
    return Exit.FAILED
