"""max_waiting, priority and reserve, over real processes and in local mode."""

from __future__ import annotations

import random

import pytest

import sharedpool
from sharedpool import OptionError, PoolTimeout, TooManyWaiting
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending, Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient", "unhurried")


@pytest.fixture(params=["shared", "local"])
def solo(request: pytest.FixtureRequest, harness: Harness) -> Worker:
    """One worker, in both modes."""
    return harness.start(SHAREDPOOL_MODE=str(request.param))


# --- max_waiting ------------------------------------------------------------------------------------------------------


def test_who_would_have_to_queue_while_max_waiting_wait_is_told_at_once(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=1, max_waiting=2)
    held = solo.checkout(tcp)
    first, second = line_up(solo, [(solo, tcp)] * 2)
    error = solo.fails(TooManyWaiting, commands.checkout, tcp, checkout_timeout=None)
    assert "2 checkouts wait already" in str(error)
    assert "(max=1 leased=1 idle=0 opening=0 closing=0 waiting=2)" in str(error)
    assert (error.stats.waiting, error.pool) == (2, "default")  # type: ignore[attr-defined]
    solo.checkin(held)
    solo.checkin(first.result())
    solo.checkin(second.result())
    assert solo.use(tcp) == 1


def test_max_waiting_is_over_all_processes(three: list[Worker], backend: Backend, tcp: Target) -> None:
    for worker in three:
        worker.attach(max_connections=1, max_waiting=1)
    held = three[0].checkout(tcp)
    (waiting,) = line_up(three[0], [(three[1], tcp)])
    three[2].fails(TooManyWaiting, commands.checkout, tcp, checkout_timeout=None)
    three[0].checkin(held)
    three[1].checkin(waiting.result())
    assert three[2].use(tcp) == 1


def test_max_waiting_changes_while_the_pool_runs(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    held = solo.checkout(tcp)
    queue = line_up(solo, [(solo, tcp)] * 2)
    solo.call(commands.library, "start_pool", "default", max_waiting=1)
    solo.fails(TooManyWaiting, commands.checkout, tcp, checkout_timeout=None)
    solo.call(commands.library, "start_pool", "default", max_waiting=3)
    queue.append(solo.begin_checkout(tcp, thread="third", checkout_timeout=None))
    solo.wait_stats(waiting=3)
    solo.fails(TooManyWaiting, commands.checkout, tcp, checkout_timeout=None)
    solo.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0)  # would not have queued
    solo.call(commands.library, "start_pool", "default", max_waiting=None)
    queue.append(solo.begin_checkout(tcp, thread="fourth", checkout_timeout=None))
    solo.wait_stats(waiting=4)
    for pending in queue:
        solo.checkin(held)
        held = pending.result()
    assert backend.peak == 1


def test_a_wrong_max_waiting_is_an_error_at_once(solo: Worker) -> None:
    assert "max_waiting" in str(solo.fails(OptionError, commands.attach, max_waiting=0))


# --- priority ---------------------------------------------------------------------------------------------------------


def test_high_priority_is_served_before_normal_and_in_order_among_itself(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    queue = [begin(solo, tcp, number, priority) for number, priority in enumerate(("normal", "normal", "high", "high"))]
    turns = [2, 3, 0, 1]
    for number, turn in enumerate(turns):
        solo.checkin(label)
        label = queue[turn].result()
        assert not any(queue[later].done for later in turns[number + 1 :])
    assert backend.accepted == 1


def begin(worker: Worker, target: Target, number: int, priority: str, **options: object) -> Pending:
    """Let a thread of the worker queue as the number-th."""
    pending = worker.begin_checkout(
        target, thread=f"waiter {number}", **{"checkout_timeout": None, "priority": priority, **options}
    )
    worker.wait_stats(waiting=number + 1)
    return pending


def test_high_priority_is_served_first_over_all_processes_and_addresses(
    three: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    for worker in three:
        worker.attach(max_connections=1)
    held = three[0].checkout(tcp)
    normal = begin(three[1], tcp, 0, "normal")
    high = begin(three[2], unix, 1, "high")
    three[0].checkin(held)
    label = high.result()
    assert not normal.done
    three[2].checkin(label)
    three[1].checkin(normal.result())
    assert backend.peak == 1


def test_of_high_priority_so_many_are_served_while_one_of_normal_waits_and_no_more(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    queue = [begin(solo, tcp, number, "high" if number else "normal") for number in range(9)]
    turns = [*range(1, 8), 0, 8]
    for number, turn in enumerate(turns):
        solo.checkin(label)
        label = queue[turn].result()
        assert not any(queue[later].done for later in turns[number + 1 :])
    assert backend.accepted == 1


def test_where_nobody_waits_priority_makes_no_difference(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=2)
    for priority in ("normal", "high", "normal", "high"):
        assert solo.use(tcp, priority=priority) == 1
    assert (solo.stats().reuses, backend.accepted) == (3, 1)


def use_permit(state: State, name: str, priority: str) -> None:
    with sharedpool.permit(name, checkout_timeout=None, priority=priority):
        state.things.setdefault("order", []).append(priority)


def order(state: State) -> list[str]:
    return list(state.things["order"])


def test_a_permit_has_a_priority_too(solo: Worker) -> None:
    solo.call(commands.hold_permit, "api", "held", max_connections=1)
    queue = []
    for number, priority in enumerate(("normal", "high")):
        queue.append(solo.begin(use_permit, "api", priority, thread=f"waiter {number}"))
        solo.wait_stats("api", waiting=number + 1)
    solo.call(commands.release_permit, "held")
    for pending in queue:
        pending.result()
    assert solo.call(order) == ["high", "normal"]


def test_a_wrong_priority_is_an_error_at_once(solo: Worker, tcp: Target) -> None:
    assert "'urgent'" in str(solo.fails(OptionError, commands.checkout, tcp, priority="urgent"))
    assert "priority" in str(solo.fails(OptionError, use_permit, "api", "urgent"))


def use_by_name(state: State, target: Target, priority: str) -> None:
    sharedpool.checkout(target.host, target.port, target.transport, checkout_timeout=0, priority=priority).checkin()


def test_the_function_checkout_passes_the_priority_on(solo: Worker, tcp: Target) -> None:
    solo.attach(max_connections=2, reserve=1)
    solo.checkout(tcp)
    solo.fails(PoolTimeout, use_by_name, tcp, "normal")
    solo.call(use_by_name, tcp, "high")
    assert "'urgent'" in str(solo.fails(OptionError, use_by_name, tcp, "urgent"))


# --- reserve ----------------------------------------------------------------------------------------------------------


def test_normal_priority_waits_before_the_reserve_and_high_does_not(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=3, reserve=1)
    first, _ = solo.checkout(tcp), solo.checkout(tcp)
    normal = begin(solo, tcp, 0, "normal")
    solo.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0)
    urgent = solo.checkout(tcp, priority="high")
    assert (backend.open, normal.done) == (3, False)
    solo.checkin(urgent)  # to nobody: it is the reserve
    solo.wait_stats(idle=1, waiting=1)
    assert solo.exchange(solo.checkout(tcp, priority="high", label="again")) == 3
    solo.checkin("again")
    solo.checkin(first)
    assert solo.exchange(normal.result()) == 1
    assert backend.accepted == 3


def test_an_idle_connection_is_not_for_normal_priority_while_the_reserve_is_all_there_is(
    solo: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    solo.attach(max_connections=2, reserve=1)
    first, second = solo.checkout(tcp), solo.checkout(tcp, priority="high")
    solo.checkin(first)
    for target in (tcp, unix):
        solo.fails(PoolTimeout, commands.checkout, target, checkout_timeout=0.05)
    assert (solo.stats().idle, solo.stats().evictions, backend.open) == (1, 0, 2)
    solo.checkin(second)
    assert solo.use(tcp) in (1, 2)
    assert solo.use(unix) == 3


def test_high_priority_that_waits_is_served_before_all_others_with_a_reserve(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=2, reserve=1)
    first, second = solo.checkout(tcp), solo.checkout(tcp, priority="high")
    queue = [begin(solo, tcp, number, "high" if number else "normal") for number in range(10)]
    label = second
    for pending in queue[1:]:
        solo.checkin(label)
        label = pending.result()
        assert not queue[0].done
    solo.checkin(first)
    solo.wait_stats(idle=1, waiting=1)
    solo.checkin(label)
    assert solo.exchange(queue[0].result()) in (1, 2)


def test_a_reserve_is_over_all_processes(three: list[Worker], backend: Backend, tcp: Target) -> None:
    for worker in three:
        worker.attach(max_connections=3, reserve=2)
    held = three[0].checkout(tcp)
    normal = begin(three[1], tcp, 0, "normal")
    urgent = [three[2].checkout(tcp, priority="high"), three[2].checkout(tcp, priority="high")]
    three[0].checkin(held)
    three[0].wait_stats(idle=1, waiting=1)
    three[2].checkin(urgent[0])
    three[0].wait_stats(idle=2, waiting=1)
    three[2].checkin(urgent[1])
    three[1].checkin(normal.result())
    assert three[0].wait_stats(idle=3, waiting=0).rescued == 0


def test_permits_have_a_reserve_too(solo: Worker) -> None:
    limits = {"max_connections": 2, "reserve": 1, "checkout_timeout": 0}
    solo.call(commands.hold_permit, "api", "first", **limits)
    solo.fails(PoolTimeout, commands.hold_permit, "api", "second", **limits)
    solo.call(commands.hold_permit, "api", "urgent", priority="high", **limits)
    waiting = solo.begin(use_permit, "api", "normal", thread="waiter")
    solo.wait_stats("api", waiting=1)
    solo.call(commands.release_permit, "urgent")
    assert solo.wait_stats("api", waiting=1, in_use=1).used == 1
    solo.call(commands.release_permit, "first")
    waiting.result()


def test_a_reserve_changes_while_the_pool_runs(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=3)
    labels = [solo.checkout(tcp) for _ in range(2)]
    for label in labels:
        solo.checkin(label)
    first = solo.checkout(tcp)
    solo.call(commands.library, "start_pool", "default", reserve=2)
    normal = begin(solo, tcp, 0, "normal")
    assert solo.stats().idle == 1
    solo.call(commands.library, "start_pool", "default", reserve=1)
    second = normal.result()
    normal = begin(solo, tcp, 0, "normal")
    solo.call(commands.library, "start_pool", "default", reserve=0)
    third = normal.result()
    assert backend.accepted == 3
    for label in (first, second, third):
        solo.checkin(label)
    assert solo.use(tcp) == 3


def test_a_wrong_reserve_is_an_error_at_once(solo: Worker, tcp: Target) -> None:
    assert "max_connections, which is 3" in str(
        solo.fails(OptionError, commands.attach, "a", max_connections=3, reserve=3)
    )
    solo.attach(max_connections=3, reserve=2)
    solo.use(tcp)
    solo.fails(OptionError, commands.library, "start_pool", "default", max_connections=2)
    assert solo.stats().max_connections == 3


def test_the_reserve_is_kept_under_load(three: list[Worker], backend: Backend, tcp: Target, unix: Target) -> None:
    for worker in three:
        worker.attach(max_connections=4, reserve=2)
    begun = [
        worker.begin(commands.requests, [tcp, unix], 60, thread=priority, checkout_timeout=30, priority=priority)
        for worker in three
        for priority in ("normal", "high")
    ]
    assert sum((pending.result() for pending in begun), commands.Load()) == commands.Load(done=360)
    assert backend.peak <= 4
    stats = three[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    assert backend.open == stats.idle


def test_a_worker_killed_with_the_reserve_gives_it_back(two: list[Worker], backend: Backend, tcp: Target) -> None:
    for worker in two:
        worker.attach(max_connections=2, reserve=1)
    two[1].checkout(tcp)
    two[1].checkout(tcp, priority="high")
    normal = begin(two[0], tcp, 0, "normal")
    two[1].kill()
    two[0].checkin(normal.result())
    two[0].wait_stats(idle=1, used=1)


def test_with_a_reserve_and_priorities_a_storm_of_kills_settles_at_zero_and_then_serves(
    harness: Harness, backend: Backend, tcp: Target, unix: Target, seeded: random.Random
) -> None:
    watcher = harness.start()
    watcher.attach(max_connections=3, reserve=1)
    for _ in range(6):
        workers = harness.start_many(4)
        for number, worker in enumerate(workers):
            worker.attach(max_connections=3, reserve=1)
            for thread in range(2):
                priority = "high" if (number + thread) % 2 else "normal"
                worker.begin(
                    commands.requests_until_told, [tcp, unix], thread=f"load {thread}", checkout_timeout=30,
                    priority=priority,
                )  # fmt: skip
        reached = watcher.stats().checkouts + seeded.randint(50, 300)
        wait_until(lambda: watcher.stats().checkouts >= reached)  # noqa: B023
        for worker in workers:
            worker.kill()
    stats = watcher.wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    backend.wait_open(stats.idle)
    assert backend.peak <= 3
    assert watcher.use(tcp) > 0
    assert watcher.use(unix, priority="high") > 0
