"""An arbiter that takes over another one's pool, step by step."""

from __future__ import annotations

import os
from contextlib import closing

from sharedpool.layout import (
    BARE,
    CELL_HIGH,
    CLOSING,
    DIRTY,
    FREE,
    GATE,
    GRANT,
    LAYOUT,
    MAX_PER_KEY,
    SERVED,
    SINCE,
    STATE,
    VER,
    granted_word,
)
from sharedpool.table import DONE
from sharedpool.testing import SteppedArbiter

from ..support.segments import fork_with


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


def test_what_a_worker_had_that_died_before_it_told_may_still_be_open_at_the_remote_for_close_timeout() -> None:
    with closing(SteppedArbiter()) as dead, closing(SteppedArbiter()) as heir:
        old = dead.pool(max_connections=2, close_timeout=3)
        worker = dead.worker(old, os.getpid())
        at = worker.open()
        heir.inherit("default", old.segment)
        heir.pass_time(0.1)
        heir.pools["default"].handle_info(("DOWN", worker.table.row))
        heir.pass_time(2.5)
        assert old.words[at] & STATE == CLOSING, "the kernel has said goodbye for it, but nobody sees the answer"
        heir.pass_time(1)
        assert old.words[at] & STATE == FREE


def test_what_a_stopped_arbiter_had_not_closed_when_it_was_killed_may_be_open_at_the_remote_for_close_timeout() -> None:
    """Its descriptor was the last one: the kernel said goodbye when it was killed, however long it had been due."""
    with closing(SteppedArbiter()) as dead, closing(SteppedArbiter()) as heir:
        old = dead.pool(max_connections=2, close_timeout=3)
        worker = dead.worker(old, os.getpid())
        at = worker.open()
        w, table = worker.table.words, worker.table
        assert table.close(at, w[at], w[at + SINCE], 0, table.counter(0), dead.clock()) == DONE
        heir.pass_time(10)
        heir.inherit("default", old.segment)
        heir.pass_time(0.1)
        heir.pools["default"].registered(worker.table.row, heir.clock())
        heir.pass_time(2.5)
        assert w[at] & STATE == CLOSING
        heir.pass_time(1)
        assert w[at] & STATE == FREE


def test_a_grant_that_a_killed_arbiter_had_only_begun_to_give_is_known_to_its_waiter() -> None:
    """Nobody else enters a section: the waiter sleeps, and all there is has been given."""
    with closing(SteppedArbiter()) as dead, closing(SteppedArbiter()) as heir:
        old = dead.pool(max_connections=1)
        worker = dead.worker(old, os.getpid())
        w, table, at = old.words, worker.table, worker.open()
        cell = table.cell_at(w[CELL_HIGH])
        assert table.claim_cell(cell) == DONE
        assert table.enqueue(cell, 1, w[GATE], w[VER], 0, 0, 0, table.counter(5), dead.clock()) == DONE
        assert table.close(at, w[at], w[at + SINCE], 0, table.counter(0), dead.clock()) == DONE
        granted = granted_word(w[at], table.cell_index(cell)) | BARE
        killed = fork_with(old.segment)
        if killed == 0:  # in the midst of `hand`: the grant is committed, and what is derived not yet
            -old.table.mutex
            w[DIRTY] = old.table.row
            w[at] = granted
            os._exit(0)
        os.waitpid(killed, 0)
        heir.inherit("default", old.segment)
        heir.pass_time(0.1)
        assert (w[DIRTY], w[cell + GRANT]) == (0, at)
