"""What the arbiter does about max_per_key, step by step."""

from __future__ import annotations

from contextlib import closing

import pytest

from sharedpool.layout import CLOSING, IDLE, KEYS_OVER, LEASED, STATE
from sharedpool.testing import SteppedArbiter, SteppedWorker


def idle(worker: SteppedWorker, key: int) -> int:
    at = worker.open(key)
    worker.leave_idle(at)
    return at


def test_lowered_it_closes_surplus_idle_ones_and_checkins_look_until_no_key_has_a_surplus() -> None:
    with closing(SteppedArbiter()) as arbiter:
        pool = arbiter.pool(max_connections=9)
        worker = arbiter.worker(pool)
        w = worker.table.words
        leased = [worker.open(1), worker.open(1)]
        mine = [idle(worker, 1), idle(worker, 1)]
        others = [idle(worker, 2), idle(worker, 2)]
        arbiter.declare("default", {"max_per_key": 1}, 1)
        assert [w[at] & STATE for at in (*leased, *mine)] == [LEASED, LEASED, CLOSING, CLOSING]
        assert sorted(w[at] & STATE for at in others) == [IDLE, CLOSING]
        arbiter.pass_time(2)
        assert w[KEYS_OVER] == 1, "one that is leased is too many"
        table = worker.table
        table.close(leased[0], w[leased[0]], w[leased[0] + 2], 0, table.counter(0), arbiter.clock())
        arbiter.pass_time(2)
        assert w[KEYS_OVER] == 0
        assert [w[at] & STATE for at in (leased[1], others[1])] == [LEASED, IDLE]


def test_a_key_at_its_limit_opens_no_more_until_it_is_raised() -> None:
    with closing(SteppedArbiter()) as arbiter:
        pool = arbiter.pool(max_connections=9, max_per_key=1)
        worker = arbiter.worker(pool)
        worker.open(1)
        with pytest.raises(AssertionError, match="as many as it may"):
            worker.open(1)
        worker.open(2)
        arbiter.declare("default", {"max_per_key": 2}, 1)
        worker.open(1)
        arbiter.declare("default", {"max_per_key": None}, 1)
        worker.open(1)
