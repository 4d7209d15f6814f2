"""A lease ends exactly once, however it ends, and by whomever it is ended."""

from __future__ import annotations

import gc
import threading

import pytest

from sharedpool import LeaseError
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.workers import Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


def test_a_second_checkin_raises_and_changes_nothing(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """hackney p14: it crashed the pool, made it spin, or closed the new user's socket."""
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    two[0].checkin(label)
    other = two[1].checkout(tcp)
    two[0].fails(LeaseError, commands.checkin, label)
    two[0].fails(LeaseError, commands.discard, label)
    two[0].fails(LeaseError, commands.checkin_by_pool, label)
    assert two[1].exchange(other) == 1
    stats = two[1].stats()
    assert (stats.in_use, stats.idle) == (1, 0)


def test_a_stale_lease_cannot_end_the_next_lease_of_the_same_connection(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    """The same process, slot and connection, one lease later."""
    worker.attach(max_connections=1)
    stale = worker.checkout(tcp)
    worker.checkin(stale)
    fresh = worker.checkout(tcp)
    worker.fails(LeaseError, commands.checkin, stale)
    worker.fails(LeaseError, commands.discard, stale)
    assert worker.exchange(fresh) == 1
    worker.checkin(fresh)
    worker.fails(LeaseError, commands.checkin, fresh)
    assert backend.accepted == 1


@pytest.mark.parametrize("first", ["checkin", "discard"])
def test_a_lease_that_was_given_back_cannot_be_discarded(
    worker: Worker, backend: Backend, tcp: Target, first: str
) -> None:
    label = worker.checkout(tcp)
    worker.call(getattr(commands, first), label)
    worker.fails(LeaseError, commands.discard, label)
    worker.wait_stats(in_use=0, closing=0)
    assert worker.stats().discards == (first == "discard")


def test_pool_checkin_is_lease_checkin(worker: Worker, backend: Backend, tcp: Target) -> None:
    label = worker.checkout(tcp)
    worker.call(commands.checkin_by_pool, label)
    assert (worker.use(tcp), worker.stats().in_use) == (1, 0)


def checkin_by_two_threads(state: State, target: Target, rounds: int) -> list[int]:
    """Two threads give the same lease back at the same time; how many succeeded, per round."""
    handle = commands.pool_of(state, "default")
    successes = []
    for _ in range(rounds):
        lease, good, barrier = handle.checkout(target.host, target.port), [], threading.Barrier(2)

        def give_back(lease: object = lease, good: list[int] = good, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(20)
            try:
                lease.checkin()  # type: ignore[attr-defined]
                good.append(1)
            except LeaseError:
                pass

        threads = [threading.Thread(target=give_back) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        successes.append(len(good))
    return successes


def test_of_two_threads_that_give_one_lease_back_exactly_one_succeeds(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=2)
    assert worker.call(checkin_by_two_threads, tcp, 100) == [1] * 100
    assert (backend.accepted, worker.stats().idle) == (1, 1)


def test_a_forgotten_lease_is_discarded_counted_and_its_permit_served(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    two[0].call(commands.forget, label)
    assert two[1].exchange(waiting.result()) == 2
    assert two[1].wait_stats(in_use=1, closing=0).dropped == 1
    assert backend.peak == 1


def forget_in_a_cycle(state: State, target: Target) -> None:
    """Leave a lease to the cyclic collector, which may run anywhere, and then go on using the pool."""
    handle = commands.pool_of(state, "default")
    cycle: list[object] = [handle.checkout(target.host, target.port)]
    cycle.append(cycle)
    del cycle
    gc.collect()


def test_leases_collected_anywhere_lose_no_permit(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=2)
    for _ in range(20):
        worker.call(forget_in_a_cycle, tcp)
    worker.wait_stats(in_use=0, closing=0, idle=0)
    assert worker.stats().dropped == 20
    assert backend.peak <= 2
    backend.wait_open(0)


def leave_block(state: State, target: Target, way: str) -> int:
    """Leave `with pool.connection()` or `with pool.checkout()` by a return or by an exception."""
    handle = commands.pool_of(state, "default")
    manager = handle.connection if "connection" in way else handle.checkout
    number = 0
    try:
        with manager(target.host, target.port) as given:
            number = commands.exchange_over(given if "connection" in way else given.conn, way)
            if "raise" in way:
                raise KeyError(way)
    except KeyError:
        assert "raise" in way
    return number


@pytest.mark.parametrize("manager", ["connection", "checkout"])
def test_leaving_the_block_checks_in_and_an_exception_discards(
    worker: Worker, backend: Backend, tcp: Target, manager: str
) -> None:
    assert worker.call(leave_block, tcp, manager) == 1
    assert worker.call(leave_block, tcp, manager + " raise") == 1
    worker.wait_stats(in_use=0, idle=0, closing=0, discards=1)
    assert worker.call(leave_block, tcp, manager) == 2
    assert (worker.stats().idle, backend.open) == (1, 1)


def checkin_inside(state: State, target: Target, way: str) -> int:
    """Give the lease back inside its own block."""
    handle = commands.pool_of(state, "default")
    with handle.checkout(target.host, target.port) as lease:
        number = commands.exchange_over(lease.conn, "x")
        getattr(lease, way)()
    return number


def test_a_lease_given_back_inside_its_block_is_fine(worker: Worker, backend: Backend, tcp: Target) -> None:
    assert worker.call(checkin_inside, tcp, "checkin") == 1
    assert worker.call(checkin_inside, tcp, "discard") == 1
    assert worker.call(checkin_inside, tcp, "checkin") == 2
    assert worker.wait_stats(in_use=0, closing=0, idle=1).discards == 1


def test_a_worker_that_ends_by_itself_leaves_nothing_in_use(two: list[Worker], backend: Backend, tcp: Target) -> None:
    two[0].attach(max_connections=2)
    two[0].checkout(tcp)
    two[0].begin(commands.leave)
    two[0].wait_dead()
    two[1].wait_stats(in_use=0, closing=0, idle=0, processes=1)
    backend.wait_open(0)
    assert two[0].stderr() == ""


def test_the_worker_counts_its_own_leases_and_the_pool_everybodys(two: list[Worker], tcp: Target) -> None:
    two[0].attach(max_connections=2)
    for _ in range(3):
        two[0].use(tcp)
    two[1].use(tcp)
    own = [worker.call(commands.worker_stats) for worker in two]
    assert [(each["opens"], each["reuses"], each["takeovers"]) for each in own] == [(1, 2, 0), (0, 0, 1)]
    total = two[0].stats()
    assert (total.opens, total.reuses, total.takeovers, total.processes) == (1, 2, 1, 2)


def test_counters_survive_the_death_of_the_worker_that_counted(two: list[Worker], tcp: Target) -> None:
    two[0].attach(max_connections=2)
    two[0].use(tcp)
    two[1].use(tcp)
    two[0].kill()
    stats = two[1].wait_stats(processes=1)
    assert (stats.opens, stats.takeovers) == (1, 1)
