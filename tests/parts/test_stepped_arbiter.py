"""What the arbiter does with time, without any: its clock moves when the test says so."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import sharedpool
from sharedpool import processes, sticky, view
from sharedpool.arbiter import Client
from sharedpool.layout import (
    CELL_HIGH,
    DOOMED,
    GATE,
    GRANT,
    IDLE,
    LEASED,
    MANY_TICKETS,
    MAX,
    PAUSED,
    RESERVE,
    RESERVING,
    SINCE,
    STATE,
    STOPPED,
    TICKET,
    VER,
    generation_of,
    ticket_of,
)
from sharedpool.processes import Process
from sharedpool.served import ServedPool, options_in
from sharedpool.stats import PoolStats
from sharedpool.table import DONE
from sharedpool.testing import SteppedArbiter, SteppedWorker, check, scope


@pytest.fixture
def arbiter() -> Iterator[SteppedArbiter]:
    made = SteppedArbiter()
    yield made
    for pool in made.pools.values():
        check(pool.table)
    made.close()


def numbers(pool: ServedPool) -> PoolStats:
    return view.stats(pool.words, pool.segment.geometry, pool.name)


def wait_in_line(arbiter: SteppedArbiter, pool: ServedPool, worker: SteppedWorker, key: int = 1) -> int:
    """A cell of the worker that waits in the queue."""
    w = pool.words
    cell = worker.table.cell_at(w[CELL_HIGH])
    assert worker.table.claim_cell(cell) == DONE
    now = arbiter.clock()
    assert worker.table.enqueue(cell, key, w[GATE], w[VER], 0, 0, 0, worker.table.counter(5), now) == DONE
    return cell


def closed_by_us(peer: socket.socket) -> bool:
    peer.settimeout(5)
    return peer.recv(1) == b""


def test_an_idle_connection_lives_as_long_as_idle_timeout_and_no_longer(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(idle_timeout=10)
    worker = arbiter.worker(pool)
    at = worker.open()
    worker.leave_idle(at)
    arbiter.pass_time(9.9)
    assert (numbers(pool).idle, numbers(pool).expired) == (1, 0)
    arbiter.pass_time(0.2)
    assert (numbers(pool).idle, numbers(pool).closing, numbers(pool).expired) == (0, 1, 1)
    assert closed_by_us(worker.peer(at))
    worker.peer(at).close()
    arbiter.pass_time(0.1)
    assert (numbers(pool).used, numbers(pool).closed, numbers(pool).closed_unconfirmed) == (0, 1, 0)


def test_a_remote_that_does_not_close_holds_the_permit_for_close_timeout(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(idle_timeout=1, close_timeout=3)
    worker = arbiter.worker(pool)
    worker.leave_idle(worker.open())
    arbiter.pass_time(1.1)
    arbiter.pass_time(2.8)
    assert numbers(pool).closing == 1
    arbiter.pass_time(0.3)
    assert (numbers(pool).used, numbers(pool).closed_unconfirmed) == (0, 1)


def test_a_lease_is_never_closed_by_time(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(idle_timeout=1)
    at = arbiter.worker(pool).open()
    arbiter.pass_time(3600)
    assert pool.words[at] & 15 == LEASED


def test_a_dead_workers_leases_are_closed_and_its_idle_connections_kept(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    leased, idle = worker.open(), worker.open()
    worker.leave_idle(idle)
    worker.die()
    assert closed_by_us(worker.peer(leased))
    worker.peer(leased).close()
    arbiter.pass_time(0.1)
    assert (numbers(pool).in_use, numbers(pool).idle, numbers(pool).processes) == (0, 1, 0)
    assert (numbers(pool).reaped, numbers(pool).adopted) == (1, 1)


def test_what_a_worker_began_to_close_when_it_died_is_closed_at_once(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    at = worker.open()
    arbiter.pass_time(0.1)  # the sweep that looks for such slots has just been
    w, table = worker.table.words, worker.table
    assert table.close(at, w[at], w[at + SINCE], 0, table.counter(0), arbiter.clock()) == DONE
    worker.die()
    arbiter.pass_time(0)
    assert closed_by_us(worker.peer(at))
    worker.peer(at).close()
    arbiter.pass_time(0.1)
    assert numbers(pool).used == 0


def test_a_close_that_is_reported_while_its_connection_is_looked_for_counts_once(
    arbiter: SteppedArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = arbiter.pool(max_connections=2)
    worker = arbiter.worker(pool)
    at, w = worker.open(), worker.table.words
    index = worker.table.slot_index(at)
    table = worker.table
    assert table.close(at, w[at], w[at + SINCE], 0, table.counter(0), arbiter.clock()) == DONE
    worker.peer(at).close()
    held = pool.held.pop(index)  # its registration is still on the way, and behind it the report

    def both_arrive(_: ServedPool) -> None:
        pool.held[index] = held
        pool.begin_closing(index, arbiter.clock())

    monkeypatch.setattr(pool, "_drain", both_arrive)
    pool.begin_closing(index, arbiter.clock())  # the sweep found it
    assert (numbers(pool).opened, numbers(pool).closed, numbers(pool).connections) == (1, 1, 0)


def test_a_grant_is_left_to_its_waiter_for_a_tenth_of_a_second_and_then_goes_to_the_next(
    arbiter: SteppedArbiter,
) -> None:
    pool = arbiter.pool(max_connections=1)
    one, two, three = (arbiter.worker(pool, pid) for pid in (1, 2, 3))
    at = one.open()
    first, second = wait_in_line(arbiter, pool, two), wait_in_line(arbiter, pool, three)
    one.die()
    one.peer(at).close()
    arbiter.pass_time(0.01)
    assert (pool.words[first + GRANT], pool.words[second + GRANT]) == (at, 0)
    arbiter.pass_time(0.09)
    assert pool.words[second + GRANT] == 0
    arbiter.pass_time(0.02)
    assert (pool.words[first + GRANT], pool.words[second + GRANT]) == (0, at)
    assert numbers(pool).revoked == 1


def test_in_sticky_order_the_arbiter_leaves_idle_connections_to_their_process_for_steal_after(
    arbiter: SteppedArbiter,
) -> None:
    pool = arbiter.pool(max_connections=1, order="sticky", steal_after=5.0)
    one, two = arbiter.worker(pool), arbiter.worker(pool, 2)
    at = one.open()
    cells = [wait_in_line(arbiter, pool, two), wait_in_line(arbiter, pool, two, key=2)]
    w = pool.words
    one.leave_idle(at)  # as its process does in sticky order, although somebody waits
    for _ in range(4):
        arbiter.pass_time(1.0)
        assert w[at] & STATE == IDLE
    arbiter.pass_time(1.0)
    assert w[cells[0] + GRANT] == at
    assert w[cells[1] + GRANT] == 0


def test_in_sticky_order_an_idle_connection_of_a_dead_process_is_anybodys(
    arbiter: SteppedArbiter,
) -> None:
    pool = arbiter.pool(max_connections=1, order="sticky", steal_after=5.0)
    one, two = arbiter.worker(pool), arbiter.worker(pool, 2)
    at = one.open()
    one.leave_idle(at)
    cell = wait_in_line(arbiter, pool, two)
    arbiter.pass_time(0.02)
    assert pool.words[cell + GRANT] == 0
    one.die()
    arbiter.pass_time(0.02)
    assert pool.words[cell + GRANT] == at


def test_a_raised_limit_serves_who_waits_and_a_lowered_one_closes_the_longest_idle(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1)
    worker = arbiter.worker(pool)
    old = worker.open()
    cell = wait_in_line(arbiter, pool, arbiter.worker(pool, 2), key=2)
    arbiter.pool(max_connections=3)
    arbiter.pass_time(0)
    assert pool.words[cell + GRANT] != 0
    arbiter.pass_time(0.05)
    young = worker.open()
    worker.leave_idle(old)
    arbiter.pass_time(1)
    worker.leave_idle(young)
    arbiter.pool(max_connections=2)
    assert (pool.words[old] & 15 == IDLE, pool.words[young] & 15 == IDLE) == (False, True)
    assert numbers(pool).over_limit == 1


@pytest.mark.parametrize("mode", ["shared", "local"])
def test_a_scope_for_a_test_leaves_nothing_behind(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHAREDPOOL_APP", "outer")
    with scope(mode) as directory, sharedpool.permit("x", max_connections=1) as permit:
        assert permit.pool.stats().in_use == 1
    assert not os.path.exists(directory)
    assert os.environ["SHAREDPOOL_APP"] == "outer"


def test_a_thread_that_goes_on_after_its_process_left_the_pool_takes_nothing() -> None:
    with scope():
        pool = sharedpool.attach("left", max_connections=1).open()
        attached = pool._attached
        assert attached is not None
        route = attached.route("permit", "x", 0)
        lease = attached.checkout(route, 1, 1)
        lease.checkin()
        pool.close()
        with pytest.raises(sharedpool.PoolStopped):
            attached.checkout(route, 1, 1)
        with sharedpool.attach("left").connection("x", 0, "permit", checkout_timeout=5):
            assert sharedpool.pool_stats("left").in_use == 1


def test_without_a_linger_time_who_started_the_arbiter_still_has_time_to_come(arbiter: SteppedArbiter) -> None:
    arbiter._linger = 0.0
    assert not arbiter.over
    arbiter.pass_time(3)
    assert arbiter.over


def test_an_error_in_one_pool_does_not_end_the_others(
    arbiter: SteppedArbiter, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = arbiter.pool("broken"), arbiter.pool("sound", idle_timeout=1)
    worker = arbiter.worker(sound)
    worker.leave_idle(worker.open())
    broken.turn = lambda now: 1 // 0  # type: ignore[method-assign,assignment]
    arbiter.pass_time(1.1)
    assert numbers(sound).expired == 1
    assert "pool 'broken'" in caplog.text


def test_a_mark_for_a_connection_that_ended_does_not_reach_the_next_one_in_its_slot(arbiter: SteppedArbiter) -> None:
    """The remote's end is seen while the mutex is busy, and meanwhile the lease is opened anew on the same permit."""
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    at = worker.open()
    word = pool.words[at]
    pool._doom(at, generation_of(word) - 1)
    assert pool.words[at] == word
    pool._doom(at, generation_of(word))
    assert pool.words[at] == word | DOOMED


def test_after_very_many_tickets_the_arbiter_has_those_who_wait_numbered_anew(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1, reserve=0)
    worker = arbiter.worker(pool)
    worker.open()
    pool.words[TICKET] = MANY_TICKETS
    first, second = (wait_in_line(arbiter, pool, worker) for _ in range(2))
    arbiter.pass_time(1.1)
    arbiter.pass_time(1.1)
    assert pool.words[TICKET] == 3
    assert [ticket_of(pool.words[cell]) for cell in (first, second)] == [1, 2]


def test_with_a_reserve_the_arbiter_counts_what_it_closes_adopts_and_serves(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=4, reserve=1, idle_timeout=10)
    one, two = arbiter.worker(pool), arbiter.worker(pool, 2)
    places = [one.open(), one.open()]
    for at in places:
        one.leave_idle(at)
    two.open()
    one.die()
    assert (numbers(pool).idle, numbers(pool).adopted) == (2, 2)
    check(pool.table)
    arbiter.pass_time(10.1)
    for at in places:
        one.peer(at).close()
    arbiter.pass_time(0.1)
    assert (numbers(pool).idle, numbers(pool).expired, numbers(pool).used) == (0, 2, 1)
    check(pool.table)
    two.open()
    two.open()
    cell = wait_in_line(arbiter, pool, two)
    arbiter.pass_time(0.1)
    assert (numbers(pool).waiting, numbers(pool).rescued) == (1, 0), "what is left is the reserve"
    arbiter.declare("default", {"reserve": 0}, os.getpid())
    arbiter.pass_time(0.1)
    assert pool.words[cell + GRANT]
    assert (numbers(pool).waiting, numbers(pool).rescued) == (0, 1)


def test_pausing_and_resuming_leave_the_reserve_as_it_is(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=2, reserve=1)
    for change in (pool.pause, pool.resume):
        change()
        assert (pool.words[RESERVE], pool.words[GATE] & RESERVING) == (1, RESERVING)
        check(pool.table)


def test_no_wait_before_stealing_is_not_the_same_as_none_given(arbiter: SteppedArbiter) -> None:
    assert sticky.steal_after(arbiter.pool(steal_after=0).words, 0) <= 1
    assert sticky.steal_after(arbiter.pool("other").words, 0) >= 50_000_000


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_connections": 4, "max_waiting": 9, "reserve": 2, "min_idle": 3, "max_idle": 2, "reclaim": True},
        {"check": "active", "check_after": 5.0, "max_lifetime": 8.0, "lease_timeout": 7.0, "order": "fifo"},
        {"check": "none", "idle_timeout": None, "order": "sticky", "move": False, "steal_after": 0.5},
        {"steal_after": 0},
    ],
)
def test_an_heir_finds_the_options_in_the_table(arbiter: SteppedArbiter, given: dict[str, Any]) -> None:
    pool = arbiter.pool(**given)
    assert options_in(pool.words) == pool.options


@pytest.mark.parametrize(("flags", "left", "reason"), [(0, 1, "over_limit"), (STOPPED, 0, "stopped")])
def test_an_heir_closes_what_an_arbiter_killed_after_lowering_the_limit_or_stopping_would_have(
    arbiter: SteppedArbiter, flags: int, left: int, reason: str
) -> None:
    pool = arbiter.pool(max_connections=3)
    worker = arbiter.worker(pool)
    for at in [worker.open() for _ in range(3)]:
        worker.leave_idle(at)
    assert pool.table.set_limit(1, flags) == DONE  # and no more
    pool._flags = flags  # as an heir finds them
    arbiter.pass_time(0.01)
    assert (numbers(pool).idle, numbers(pool).closes[reason]) == (left, 3 - left)


def test_an_heir_of_an_arbiter_killed_between_cap_and_reserve_has_options_that_fit(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=8, reserve=5)
    pool.words[MAX] = 3
    found = options_in(pool.words)
    assert (found.max_connections, found.reserve) == (3, 2)
    pool.apply(found)
    assert (pool.words[MAX], pool.words[RESERVE]) == (3, 2)


def test_one_that_was_idle_before_the_arbiter_learned_that_it_has_no_descriptor_is_closed_by_its_process(
    arbiter: SteppedArbiter,
) -> None:
    pool = arbiter.pool(close_timeout=1)
    worker = arbiter.worker(pool)
    at = worker.open()
    index, generation = pool.table.slot_index(at), generation_of(pool.words[at])
    worker.leave_idle(at)
    pool.forget(index)  # no descriptor was left for it, which is found when the message is read at last
    told: list[tuple[set[int], int, int]] = []
    pool._tell_closed = lambda _, rows, slot, version, reason: told.append((set(rows), slot, version))  # type: ignore[assignment]
    pool.unheld(worker.table.row, index, generation, arbiter.clock())
    assert told == [({worker.table.row}, index, generation)]
    arbiter.pass_time(0.9)
    assert (numbers(pool).closing, numbers(pool).used) == (1, 1), "nobody sees its end: the permit waits"
    arbiter.pass_time(0.2)
    assert (numbers(pool).closing, numbers(pool).used) == (0, 0)


@pytest.mark.parametrize("state", ["started", "paused", "stopped"])
@pytest.mark.parametrize("flag", [STOPPED, PAUSED, STOPPED | PAUSED])
def test_a_pool_is_neither_stopped_nor_paused_nor_the_opposite_by_a_stray_store(
    arbiter: SteppedArbiter, state: str, flag: int
) -> None:
    pool = arbiter.pool(max_connections=3)
    worker = arbiter.worker(pool)
    idle, _ = worker.open(), worker.open()  # the other one stays leased
    worker.leave_idle(idle)
    if state == "paused":
        pool.pause()
    if state == "stopped":
        pool.stop()
    arbiter.pass_time(2)
    w, before = pool.words, (pool.words[GATE] & (STOPPED | PAUSED), numbers(pool).idle, pool.stopped)
    w[GATE] ^= flag
    arbiter.pass_time(1)
    arbiter.pass_time(1)
    assert (w[GATE] & (STOPPED | PAUSED), numbers(pool).idle, pool.stopped) == before
    pool.apply(pool.options)
    arbiter.pass_time(1)
    assert w[GATE] & PAUSED == before[0] & PAUSED


def test_where_there_are_no_pidfds_a_process_is_known_by_its_start(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=3)
    ours = processes.find(os.getpid())
    clients = []
    for start in (ours.start, 0, ours.start + 1):
        row = pool.claim_row(ours.pid, 1, arbiter.clock())
        assert row is not None
        clients.append(Client(None, ours.pid, pool=pool, row=row, process=Process(ours.pid, start)))
    arbiter._clients.update(clients)
    arbiter.pass_time(0.2)
    assert arbiter._clients & set(clients) == set(clients[:2])
