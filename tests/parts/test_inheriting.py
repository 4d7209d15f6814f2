"""An arbiter that takes over another one's pool, step by step."""

from __future__ import annotations

import os
from contextlib import closing

from sharedpool.layout import CLOSING, FREE, LAYOUT, MAX_PER_KEY, SERVED, SINCE, STATE
from sharedpool.table import DONE
from sharedpool.testing import SteppedArbiter


def test_a_limit_per_key_that_is_noted_only_is_inherited_and_put_in_force_later() -> None:
    with closing(SteppedArbiter()) as dead, closing(SteppedArbiter()) as heir:
        old = dead.pool(max_connections=2)
        row = dead.worker(old, os.getpid()).table.row
        old.segment.move_to(SERVED[0])
        dead.declare("default", {"max_per_key": 1}, os.getpid())
        heir.inherit("default", old.segment)
        pool = heir.pools["default"]
        heir.pass_time(1)
        assert (pool.options.max_per_key, pool.words[MAX_PER_KEY], pool.old_rows()) == (1, 0, [row])
        pool.layouts[row] = LAYOUT
        heir.pass_time(1)
        assert (pool.segment.layout, pool.words[MAX_PER_KEY]) == (LAYOUT, 1)


def test_nothing_becomes_free_before_every_live_row_has_told_what_it_holds() -> None:
    with closing(SteppedArbiter()) as dead, closing(SteppedArbiter()) as heir:
        old = dead.pool(max_connections=2)
        worker = dead.worker(old, os.getpid())  # a live process that has the segment open
        at = worker.open()
        w, table = worker.table.words, worker.table
        assert table.close(at, w[at], w[at + SINCE], 0, table.counter(0), dead.clock()) == DONE
        heir.inherit("default", old.segment)
        pool = heir.pools["default"]
        heir.pass_time(30)
        heir.pass_time(30)
        assert w[at] & STATE == CLOSING, "its row has not told yet whether it holds the connection"
        pool.registered(table.row, heir.clock())
        heir.pass_time(2)
        assert w[at] & STATE == FREE
