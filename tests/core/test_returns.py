"""Giving back while the queue changes underneath: what was seen of a waiter is what gets the connection, or nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sharedpool import drivers
from sharedpool.held import Route
from sharedpool.layout import GRANT, KEY, LEASED, STATE, VER
from sharedpool.lines import Lines
from sharedpool.returns import Returns
from sharedpool.table import DONE

from . import operations
from .tables import ONE, TWO, A, B, World


class Quiet:
    """A waker that wakes nobody."""

    def __neg__(self) -> int:
        return 0


@pytest.mark.parametrize("way", ["straight_on", "connection"])
def test_a_waiter_that_waits_for_another_key_by_now_does_not_get_the_connection(way: str) -> None:
    world = World(maximum=1)
    at, cell = world.leased(ONE, A), world.waiting(TWO, A)

    def waker(_: int) -> Quiet:
        """In the midst of giving back: the waiter gives up, and its cell queues for another key."""
        table, w = world.table(TWO), world.words
        assert table.leave(cell, w[cell], operations.owned_by(TWO)) == DONE
        assert table.enqueue(cell, B, world.gate, w[VER], 0, 0, 0, table.counter(5), 1) == DONE
        return Quiet()

    segment: Any = SimpleNamespace(waker=waker)
    table = world.table(ONE)
    returns = Returns(table, segment, lambda slot, generation: None, Lines(table), lambda key: (0, 0))
    route = Route(drivers.find("tcp"), "127.0.0.1", 1, A, moves=True, sticky=False, counts=table.row_at)
    if way == "straight_on":
        assert not returns.straight_on(at, world.words[at], route)
        assert world.words[at] & STATE == LEASED
    else:
        returns.connection(at, world.words[at], route, 1 << 62)
    assert world.words[at + KEY] == A
    assert world.words[cell + GRANT] == 0
