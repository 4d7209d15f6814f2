"""Sticky order: how long a process goes on with its own connections while others wait."""

from __future__ import annotations

from typing import Final

from .layout import CONNECT_TIME, STEAL_AFTER

#: What stays in its process is closed for others after this many connect times, within these bounds, ns. What may move
#: is handed over after the least of them: a handoff is 0.1 ms of a processor, so two thousandths of the time go there.
_CONNECTS: Final = 20
_LEAST: Final = 50_000_000
_MOST: Final = 500_000_000
#: What was idle for a part of that time, two connect times, goes at once: to wait longer costs more than to open anew.
_UNUSED: Final = 10
_UNUSED_LEAST: Final = 1_000_000


def steal_after(w: memoryview[int], stays: int) -> int:
    """How long the longest waiter waits, ns, for connections that stay in their process or, with 0, may move."""
    given = w[STEAL_AFTER]
    if given:
        return given
    if not stays:
        return _LEAST
    measured = _CONNECTS * w[CONNECT_TIME]
    return _LEAST if measured < _LEAST else _MOST if measured > _MOST else measured


def unused_after(w: memoryview[int], stays: int) -> int:
    """How long a connection has to be idle, ns, for the longest waiter to have it, or its permit, at once."""
    unused = steal_after(w, stays) // _UNUSED
    return unused if unused > _UNUSED_LEAST else _UNUSED_LEAST
