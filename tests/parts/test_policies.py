"""What the arbiter closes, marks and reports by rule, and its operations; its clock moves when the test says so."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool import view
from sharedpool.layout import (
    CELL_HIGH,
    CLOSING,
    DOOMED,
    GATE,
    GRANT,
    GRANTED,
    HEAD,
    HOLDER_SHIFT,
    IDLE,
    LEASED,
    STATE,
    VER,
    generation_of,
    opening_word,
    with_state,
)
from sharedpool.native import Sleeper
from sharedpool.policies import lifetime_of
from sharedpool.served import ServedPool
from sharedpool.stats import PoolStats
from sharedpool.table import DONE
from sharedpool.testing import SteppedArbiter, SteppedWorker, check
from tests.support.waiting import wait_until


@pytest.fixture
def arbiter() -> Iterator[SteppedArbiter]:
    made = SteppedArbiter()
    yield made
    for pool in made.pools.values():
        check(pool.table)
    made.close()


def numbers(pool: ServedPool) -> PoolStats:
    return view.stats(pool.words, pool.segment.geometry, pool.name, 0)


def state(pool: ServedPool, at: int) -> int:
    return pool.words[at] & STATE


def wait_in_line(arbiter: SteppedArbiter, pool: ServedPool, worker: SteppedWorker, key: int = 1) -> int:
    """A cell of the worker that waits in the queue."""
    w = pool.words
    cell = worker.table.cell_at(w[CELL_HIGH])
    assert worker.table.claim_cell(cell) == DONE
    now = arbiter.clock()
    assert worker.table.enqueue(cell, key, w[GATE], w[VER], 0, 0, 0, worker.table.counter(5), now) == DONE
    return cell


def hand_over(arbiter: SteppedArbiter, pool: ServedPool, worker: SteppedWorker, at: int) -> int:
    """The worker gives its lease to the head of the queue, and dies before it wakes it. Gives the cell."""
    w = pool.words
    cell = w[HEAD]
    new = w[at] & ~(STATE | 0xFFFF << HOLDER_SHIFT) | worker.table.cell_index(cell) << HOLDER_SHIFT | GRANTED
    assert worker.table.hand(at, w[at], new, w[GATE], cell, w[cell], 0, arbiter.clock()) == DONE
    return cell


def ended(peer: socket.socket) -> bool:
    peer.settimeout(5)
    return peer.recv(1) == b""


def idle_ones(arbiter: SteppedArbiter, worker: SteppedWorker, number: int, key: int = 1) -> list[int]:
    """Idle connections, the first one the longest."""
    places = [worker.open(key) for _ in range(number)]
    for at in places:
        arbiter.pass_time(0.001)
        worker.leave_idle(at)
    return places


# --- max_idle ---------------------------------------------------------------------------------------------------------


def test_max_idle_closes_the_longest_unused_at_once_when_it_is_set(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    places = idle_ones(arbiter, arbiter.worker(pool), 5)
    arbiter.pool(max_idle=2)
    assert [state(pool, at) == IDLE for at in places] == [False, False, False, True, True]
    assert numbers(pool).over_idle == 3


def test_what_comes_back_beyond_max_idle_is_closed_within_a_tenth_of_a_second(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_idle=1)
    worker = arbiter.worker(pool)
    places = [worker.open() for _ in range(3)]
    arbiter.pass_time(0)
    for at in places:
        worker.leave_idle(at)
    assert numbers(pool).idle == 3
    arbiter.pass_time(0.1)
    assert (numbers(pool).idle, numbers(pool).over_idle) == (1, 2)


def test_leases_do_not_count_for_max_idle_and_without_it_nothing_is_closed(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_idle=2)
    worker = arbiter.worker(pool)
    leased = [worker.open() for _ in range(3)]
    places = idle_ones(arbiter, worker, 2)
    arbiter.pass_time(1)
    assert (numbers(pool).idle, numbers(pool).in_use) == (2, 3)
    arbiter.pool(max_idle=None)
    for at in leased:
        worker.leave_idle(at)
    arbiter.pass_time(1)
    assert numbers(pool).idle == 5
    arbiter.pool(max_idle=0)
    assert [state(pool, at) for at in (*places, *leased)] == [CLOSING] * 5


def test_the_arbiter_sleeps_long_while_no_more_are_open_than_may_be_idle(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_idle=2)
    worker = arbiter.worker(pool)
    places = [worker.open(), worker.open()]
    arbiter.pass_time(0)
    assert arbiter.step(0) > 0.5
    places.append(worker.open())
    assert arbiter.step(0) <= 0.1
    assert len(places) == 3


# --- max_lifetime -----------------------------------------------------------------------------------------------------


def test_connections_opened_together_end_within_the_last_tenth_of_their_lifetime_and_not_together() -> None:
    limit = 600_000_000_000
    times = [lifetime_of(limit, index, 1) for index in range(1000)]
    assert all(0.9 * limit < time <= limit for time in times)
    assert len(set(times)) > 990
    tenths = [sum(0.9 + 0.01 * n <= time / limit < 0.91 + 0.01 * n for time in times) for n in range(10)]
    assert min(tenths) > 50, f"not spread: {tenths}"
    assert times == [lifetime_of(limit, index, 1) for index in range(1000)]
    assert lifetime_of(limit, 1, 1) != lifetime_of(limit, 1, 2)


def test_an_idle_connection_is_closed_at_its_age_however_often_it_was_used(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_lifetime=100, idle_timeout=None)
    worker = arbiter.worker(pool)
    (at,) = idle_ones(arbiter, worker, 1)
    life = lifetime_of(100_000_000_000, pool.table.slot_index(at), generation_of(pool.words[at])) / 1e9
    arbiter.pass_time(life - 0.5)
    assert state(pool, at) == IDLE
    arbiter.pass_time(0.6)
    assert (state(pool, at), numbers(pool).max_lifetime) == (CLOSING, 1)


def test_a_lease_is_not_closed_at_the_connections_age_but_marked_for_its_checkin(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_lifetime=10)
    worker = arbiter.worker(pool)
    at = worker.open()
    arbiter.pass_time(8)
    assert not pool.words[at] & DOOMED
    arbiter.pass_time(2.1)
    assert (state(pool, at), bool(pool.words[at] & DOOMED), numbers(pool).max_lifetime) == (LEASED, True, 0)


def test_a_lifetime_set_later_is_in_force_at_once_and_one_taken_away_is_not(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(idle_timeout=None)
    worker = arbiter.worker(pool)
    old, young = worker.open(), 0
    worker.leave_idle(old)
    arbiter.pass_time(1000)
    young = worker.open()
    worker.leave_idle(young)
    arbiter.pool(max_lifetime=100)
    arbiter.pass_time(0)
    assert (state(pool, old), state(pool, young)) == (CLOSING, IDLE)
    arbiter.pool(max_lifetime=None)
    arbiter.pass_time(1000)
    assert state(pool, young) == IDLE


def test_a_slots_next_connection_has_an_age_of_its_own(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_lifetime=10, idle_timeout=None)
    worker = arbiter.worker(pool)
    at = worker.open()
    arbiter.pass_time(20)
    ours, theirs = socket.socketpair()
    table, lease, counter = worker.table, arbiter_nobody(), worker.table.counter(0)
    opening = opening_word(pool.words[at], table.row)  # opened anew on the same permit
    assert table.reopen(at, pool.words[at], opening, lease, 0, counter, counter, arbiter.clock()) == DONE
    pool.register(table.row, table.slot_index(at), generation_of(opening), ours)
    assert table.connected(at, opening, with_state(opening, LEASED), lease, opening, counter, arbiter.clock()) == DONE
    worker.leave_idle(at)
    pool.policies.changed()  # so that it is looked at earlier than it need be
    arbiter.pass_time(8)
    assert state(pool, at) == IDLE
    arbiter.pass_time(3)
    assert state(pool, at) == CLOSING
    theirs.close()


def arbiter_nobody() -> object:
    from sharedpool.table import NoLease

    return NoLease()


# --- lease_timeout ----------------------------------------------------------------------------------------------------


def test_a_lease_that_lasts_too_long_is_reported_once_and_goes_on(
    arbiter: SteppedArbiter, caplog: pytest.LogCaptureFixture
) -> None:
    pool = arbiter.pool("api", lease_timeout=5)
    worker = arbiter.worker(pool, pid=4711)
    at = worker.open()
    arbiter.pass_time(4.9)
    assert caplog.records == []
    for _ in range(3):
        arbiter.pass_time(1)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("sharedpool.pool.api", logging.WARNING)
    assert all(part in record.getMessage() for part in ("abandoned", "4711", "5.9 s"))
    assert (state(pool, at), numbers(pool).abandoned, numbers(pool).reclaimed_leases) == (LEASED, 1, 0)


def test_another_lease_of_the_same_connection_is_reported_by_itself(
    arbiter: SteppedArbiter, caplog: pytest.LogCaptureFixture
) -> None:
    pool = arbiter.pool(lease_timeout=5)
    worker = arbiter.worker(pool)
    at = worker.open()
    arbiter.pass_time(6)
    worker.leave_idle(at)
    w = pool.words
    lease = arbiter_nobody()
    new = (w[at] & ~STATE | LEASED) + (1 << 52)
    assert worker.table.take_idle(at, w[at], new, w[GATE], lease, worker.table.counter(0), arbiter.clock()) == DONE
    arbiter.pass_time(4)
    assert numbers(pool).abandoned == 1
    arbiter.pass_time(2)
    assert numbers(pool).abandoned == 2


def test_a_reclaimed_lease_is_shut_down_and_its_permit_goes_to_the_next(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1, lease_timeout=5, reclaim=True)
    worker = arbiter.worker(pool)
    at = worker.open()
    cell = wait_in_line(arbiter, pool, arbiter.worker(pool, 2))
    arbiter.pass_time(5.1)
    assert ended(worker.peer(at))
    worker.peer(at).close()
    arbiter.pass_time(0.1)
    assert pool.words[cell + GRANT] == at
    assert (numbers(pool).abandoned, numbers(pool).reclaimed_leases, numbers(pool).in_use) == (1, 1, 0)


def test_a_lease_timeout_set_later_finds_the_leases_that_last_too_long_already(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    arbiter.worker(pool).open()
    arbiter.pass_time(100)
    assert numbers(pool).abandoned == 0
    arbiter.pool(lease_timeout=50)
    arbiter.pass_time(0)
    assert numbers(pool).abandoned == 1


# --- pause, drain, kill, reset_stats ----------------------------------------------------------------------------------


def test_while_paused_a_permit_that_becomes_free_is_given_to_nobody(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1)
    worker = arbiter.worker(pool)
    at = worker.open()
    cell = wait_in_line(arbiter, pool, arbiter.worker(pool, 2))
    pool.pause()
    worker.die()
    worker.peer(at).close()
    arbiter.pass_time(0.1)
    arbiter.pass_time(1)
    assert (numbers(pool).used, numbers(pool).waiting, pool.words[cell + GRANT]) == (0, 1, 0)
    pool.resume()
    assert pool.words[cell + GRANT] == at


def test_options_that_change_while_paused_leave_it_paused(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1)
    arbiter.worker(pool).open()
    pool.pause()
    cell = wait_in_line(arbiter, pool, arbiter.worker(pool, 2))
    arbiter.pool(max_connections=2)
    arbiter.pass_time(0.1)
    assert pool.words[cell + GRANT] == 0
    pool.resume()
    assert pool.words[cell + GRANT] != 0


def test_a_drain_closes_idle_ones_and_marks_leased_ones_and_no_other(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    idle, leased = idle_ones(arbiter, worker, 2), worker.open()
    drain = pool.drain(None, None)
    young = worker.open()
    arbiter.pass_time(0.1)
    assert drain.number == 3
    assert [state(pool, at) for at in idle] == [CLOSING, CLOSING]
    assert [bool(pool.words[at] & DOOMED) for at in (leased, young)] == [True, False]
    assert (numbers(pool).drained, pool.policies.drains) == (2, [])


def test_what_is_on_its_way_to_a_waiter_is_drained_when_it_has_arrived(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1)
    giver, taker = arbiter.worker(pool), arbiter.worker(pool, 2)
    at = giver.open()
    wait_in_line(arbiter, pool, taker)
    cell = hand_over(arbiter, pool, giver, at)
    assert pool.drain(None, None).number == 1
    w = pool.words
    new = w[at] & ~(STATE | 0xFFFF << HOLDER_SHIFT) | taker.table.row << HOLDER_SHIFT | LEASED
    lease = arbiter_nobody()
    assert taker.table.take_grant(at, w[at], new, cell, lease, 1, taker.table.counter(2), arbiter.clock()) == DONE
    arbiter.pass_time(0.02)
    assert w[at] & DOOMED


def test_a_drain_that_somebody_waits_for_is_done_when_the_remotes_have_closed(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    idle_ones(arbiter, worker, 1)
    leased = worker.open()
    drain = pool.drain(None, 10.0)
    arbiter.pass_time(2)
    assert (list(drain.left), drain.done.is_set()) == ([pool.table.slot_index(leased)], False)
    assert pool.policies.holders(drain) == [1]
    pool.reap(worker.table.row, arbiter.clock())
    worker.peer(leased).close()
    arbiter.pass_time(0.1)
    assert drain.done.is_set()


def test_a_kill_ends_a_leased_connection_and_leaves_the_lease_in_force(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    at = worker.open()
    assert pool.drain(None, None, kill=True).number == 1
    assert ended(worker.peer(at))
    assert (state(pool, at), bool(pool.words[at] & DOOMED)) == (LEASED, True)


def test_after_a_reset_every_counter_starts_from_zero_and_the_dead_still_count(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(idle_timeout=1)
    one, two = arbiter.worker(pool), arbiter.worker(pool, 2)
    idle_ones(arbiter, one, 3)
    arbiter.pass_time(2)
    pool.reset_stats()
    after = numbers(pool)
    assert (after.attempts, after.closed) == (0, 0)
    assert after.expired == sum(after.closes.values()) == after.closing == 3, "what is being closed has a reason"
    assert after.opened == after.connections, "what is open was opened"
    two.open()
    assert (numbers(pool).attempts, numbers(pool).opened) == (1, after.opened + 1)
    one.die()  # what it had counted before the reset is taken from the row of the dead again
    arbiter.pass_time(2)
    assert (numbers(pool).attempts, numbers(pool).opened) == (1, after.opened + 1)
    two.die()
    arbiter.pass_time(2)
    assert (numbers(pool).attempts, numbers(pool).reaped) == (1, 1)
    assert numbers(pool).opened - numbers(pool).closed == numbers(pool).connections


# --- what used to be lost ---------------------------------------------------------------------------------------------


def test_an_idle_connection_that_ends_while_the_mutex_is_busy_is_closed_as_soon_as_it_is_free(
    arbiter: SteppedArbiter,
) -> None:
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    (at,) = idle_ones(arbiter, worker, 1)
    mutex = worker.table.mutex
    assert -mutex == 0
    try:
        worker.peer(at).close()  # told once: epoll says nothing of it again
        arbiter.step(0)
        assert state(pool, at) == IDLE
        assert arbiter.step(0) < 0.01
    finally:
        +mutex
    arbiter.pass_time(0.001)
    assert (numbers(pool).remote_closed, numbers(pool).idle) == (1, 0)


def test_the_last_waiter_is_woken_although_who_gave_to_it_died_before_waking_it(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool(max_connections=1)
    giver, taker = arbiter.worker(pool), arbiter.worker(pool, 2)
    at = giver.open()
    cell = wait_in_line(arbiter, pool, taker)
    arbiter.step(0)
    sleeping = Sleeping(pool, cell)
    assert hand_over(arbiter, pool, giver, at) == cell
    assert pool.words[HEAD] == 0
    assert arbiter.step(0) <= 0.02
    assert sleeping.thread.is_alive()
    arbiter.pass_time(0.02)
    sleeping.thread.join(5)
    assert not sleeping.thread.is_alive()
    arbiter.pass_time(1)
    assert arbiter.step(0) > 0.5, "it goes on kicking"


class Sleeping:
    """A thread that sleeps on a cell's kick, as its waiter does, and is known to sleep."""

    def __init__(self, pool: ServedPool, cell: int) -> None:
        address = pool.segment.kick_address(cell)
        value = pool.table.marks[pool.table.kick_index(cell)]
        sleeper = Sleeper(address)
        self.thread = threading.Thread(target=lambda: sleeper.sleep(value, 30_000_000_000), daemon=True)
        self.thread.start()
        file = Path(f"/proc/self/task/{self.thread.native_id}/syscall")
        wait_until(lambda: f"{address:#x}" in file.read_text(), what="the thread sleeps on the kick")


def test_without_a_descriptor_left_nobody_is_accepted_for_a_tenth_of_a_second_and_then_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    from sharedpool.arbiter import Arbiter
    from sharedpool.testing import FakeClock

    clock = FakeClock()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = str(tmp_path / "s")
    listener.bind(path)
    listener.listen(8)
    arbiter = Arbiter(listener, b"", 3600.0, clock)
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller.connect(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), limits[1]))
    try:
        assert 0.05 < arbiter.step(0) <= 0.1
        assert listener.fileno() not in arbiter._by_fd, "it would be told at once again, without end"
        clock.advance(0.11)
        arbiter.step(0)
        arbiter.step(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [record.levelno for record in caplog.records] == [logging.ERROR], "once in a second is enough"
    clock.advance(0.11)
    arbiter.step(0)
    arbiter.step(0)
    assert [client.pid for client in arbiter._clients] != []
    for client in arbiter._clients:
        assert client.channel is not None
        client.channel.close()
    arbiter.close()
    caller.close()
    listener.close()


def lowest_free() -> int:
    """No descriptor from this number on is free below: with it as the limit, none can be made."""
    import os

    number = os.open("/dev/null", os.O_RDONLY)
    os.close(number)
    return number


def test_that_the_cap_is_reached_is_said_once_a_minute_with_the_queues_length(
    arbiter: SteppedArbiter, caplog: pytest.LogCaptureFixture
) -> None:
    pool = arbiter.pool("api", max_connections=1)
    arbiter.worker(pool).open()
    for pid in (2, 3):
        wait_in_line(arbiter, pool, arbiter.worker(pool, pid))
    for _ in range(5):
        arbiter.pass_time(10)
    (record,) = caplog.records
    assert (record.name, "cap reached" in record.getMessage(), "2 in the queue" in record.getMessage()) == (
        "sharedpool.pool.api", True, True
    )  # fmt: skip
    arbiter.pass_time(30)
    assert len(caplog.records) == 2
