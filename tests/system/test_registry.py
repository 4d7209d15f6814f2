"""The control plane: start, start_pool, find_pool, get_stats, stop_pool, stop, and options that change at run time."""

from __future__ import annotations

import dataclasses

import pytest

from sharedpool import PoolNotFound, PoolOptionsDiffer, PoolStopped
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.workers import Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


def start_pool(worker: Worker, name: str = "default", **options: object) -> object:
    return worker.call(commands.library, "start_pool", name, **options)


def test_an_arbiter_answers_when_start_returns_and_a_second_start_changes_nothing(
    two: list[Worker], scope: Scope
) -> None:
    two[0].call(commands.library, "start")
    arbiter = scope.arbiter()
    assert two[0].call(commands.library, "find_pool", "nobody") is None
    for worker in two:
        worker.call(commands.library, "start")
    assert scope.arbiter() == arbiter


def test_start_pool_says_what_it_started(two: list[Worker], scope: Scope) -> None:
    info = start_pool(two[0], "api", max_connections=7, idle_timeout=12)
    assert (info.name, info.arbiter_pid) == ("api", scope.arbiter())
    assert (info.options.max_connections, info.options.idle_timeout) == (7, 12.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "other"
    assert two[1].call(commands.library, "find_pool", "api") == info


def test_start_pool_takes_hackneys_names(worker: Worker) -> None:
    options = start_pool(worker, "api", pool_size=7, timeout=12).options
    assert (options.max_connections, options.idle_timeout) == (7, 12.0)


def test_a_pool_is_declared_by_its_first_user_and_found_by_the_others(two: list[Worker], tcp: Target) -> None:
    two[0].attach("api", max_connections=3)
    assert two[1].call(commands.library, "find_pool", "api") is None
    two[0].use(tcp, pool="api")
    assert two[1].call(commands.library, "find_pool", "api").options.max_connections == 3


def test_get_stats_counts_what_is_in_use_free_and_queued(two: list[Worker], tcp: Target) -> None:
    start_pool(two[0], max_connections=2)
    labels = [two[0].checkout(tcp) for _ in range(2)]
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    numbers = {"name": "default", "max": 2, "in_use_count": 2, "free_count": 0, "queue_count": 1}
    assert two[0].call(commands.library, "get_stats", "default") == numbers
    two[0].checkin(labels[0])
    two[1].checkin(waiting.result())
    numbers.update(in_use_count=1, free_count=1, queue_count=0)
    assert two[1].call(commands.library, "get_stats", "default") == numbers


def test_the_statistics_of_a_pool_that_is_not_there_are_an_error(worker: Worker) -> None:
    worker.call(commands.library, "start")
    worker.fails(PoolNotFound, commands.library, "get_stats", "nobody")


def test_two_pools_of_a_scope_have_one_arbiter_and_a_cap_each(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    for name in ("a", "b"):
        two[0].attach(name, max_connections=1)
        two[1].attach(name, max_connections=1)
    two[0].checkout(tcp, pool="a")
    two[1].checkout(tcp, pool="b")
    assert scope.arbiter() == two[0].call(commands.library, "find_pool", "a").arbiter_pid
    assert (two[1].stats("a").in_use, two[0].stats("b").in_use) == (1, 1)
    assert backend.open == 2


def test_stopping_a_pool_that_is_not_there_is_fine(worker: Worker) -> None:
    worker.call(commands.library, "start")
    worker.call(commands.library, "stop_pool", "nobody")


def test_stop_pool_sends_the_waiting_away_and_leaves_leases_usable_until_their_checkin(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    holder, waiter, stopper = three
    holder.attach(max_connections=2)
    labels = [holder.checkout(tcp) for _ in range(2)]
    queue = line_up(holder, [(waiter, tcp), (waiter, tcp)])
    stopper.call(commands.library, "stop_pool", "default")
    for pending in queue:
        pending.error(PoolStopped)
    assert stopper.call(commands.library, "find_pool", "default") is None
    assert [holder.exchange(label) for label in labels] == [1, 2]
    holder.checkin(labels[0])
    backend.wait_open(1)
    holder.checkin(labels[1])
    backend.wait_open(0)


def test_stop_pool_closes_idle_connections_of_every_process(two: list[Worker], backend: Backend, tcp: Target) -> None:
    labels = [worker.checkout(tcp) for worker in two]
    for worker, label in zip(two, labels, strict=True):
        worker.checkin(label)
    assert backend.open == 2
    two[0].call(commands.library, "stop_pool", "default")
    backend.wait_open(0)


def test_leases_of_a_stopped_pool_count_in_the_pool_that_is_started_again_under_its_name(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    start_pool(two[0], max_connections=2)
    label = two[0].checkout(tcp)
    two[0].call(commands.library, "stop_pool", "default")
    start_pool(two[1], max_connections=2)
    second = two[1].checkout(tcp)
    pending = two[1].begin_checkout(tcp, thread="t", checkout_timeout=None)
    two[1].wait_stats(waiting=1, in_use=2)
    two[0].checkin(label)
    assert two[1].exchange(pending.result(), thread="t") == 3
    assert two[1].exchange(second) == 2
    assert backend.peak == 2


def test_a_later_declaration_that_differs_is_applied_with_a_warning_that_names_both(
    two: list[Worker], tcp: Target
) -> None:
    for worker in two:
        worker.call(commands.collect_log)
    start_pool(two[0], max_connections=3)
    info = start_pool(two[1], max_connections=5)
    assert info.options.max_connections == 5
    assert two[0].stats().max_connections == 5
    (line,) = two[1].call(commands.log, "WARNING")
    assert all(part in line for part in ("default", "max_connections", "3", "5", str(two[0].pid), str(two[1].pid)))


def test_a_later_attach_that_differs_is_applied_with_a_warning(two: list[Worker], tcp: Target) -> None:
    for worker, cap in zip(two, (3, 5), strict=True):
        worker.call(commands.collect_log)
        worker.attach(max_connections=cap)
        worker.use(tcp)
    assert two[0].stats().max_connections == 5
    assert two[0].call(commands.log, "WARNING") == []
    (line,) = two[1].call(commands.log, "WARNING")
    assert "max_connections" in line


def test_the_same_declaration_again_is_silent(two: list[Worker]) -> None:
    for worker in two:
        worker.call(commands.collect_log)
        start_pool(worker, max_connections=3)
        start_pool(worker, max_connections=3, update=False)
        start_pool(worker)
        assert worker.call(commands.log, "WARNING") == []
    assert two[0].stats().max_connections == 3


def test_a_declaration_that_may_not_update_raises_and_changes_nothing(two: list[Worker]) -> None:
    start_pool(two[0], max_connections=3)
    error = two[1].fails(PoolOptionsDiffer, commands.library, "start_pool", "default", max_connections=5, update=False)
    assert all(part in str(error) for part in ("max_connections", "3", "5"))
    assert two[0].stats().max_connections == 3


@pytest.mark.parametrize("options", [{"move": False}, {"order": "sticky"}])
def test_what_is_laid_down_for_a_pools_life_raises_when_it_differs(
    two: list[Worker], options: dict[str, object]
) -> None:
    start_pool(two[0], max_connections=3)
    error = two[1].fails(PoolOptionsDiffer, commands.library, "start_pool", "default", max_connections=5, **options)
    assert next(iter(options)) in str(error)
    assert two[0].stats().max_connections == 3


def test_a_raised_limit_serves_the_waiting_in_order_without_any_checkin(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney p12: raising the limit woke nobody, and newcomers overtook."""
    holder, waiter, other = three
    start_pool(holder, max_connections=1)
    holder.checkout(tcp)
    queue = line_up(holder, [(waiter, tcp), (other, tcp), (waiter, tcp), (other, tcp)])
    start_pool(holder, max_connections=3)
    labels = [queue[0].result(), queue[1].result()]
    holder.wait_stats(in_use=3, waiting=2)
    assert [waiter.exchange(labels[0]), other.exchange(labels[1])] in ([2, 3], [3, 2])
    assert not queue[2].done
    assert not queue[3].done
    assert backend.peak == 3


def test_a_lowered_limit_evicts_the_idle_at_once_and_the_leased_at_their_checkin(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    start_pool(two[0], max_connections=6)
    idle = [two[0].checkout(tcp) for _ in range(3)]
    leased = [two[1].checkout(tcp) for _ in range(3)]
    for label in idle:
        two[0].checkin(label)
    assert backend.open == 6
    start_pool(two[0], max_connections=2)
    backend.wait_open(3)
    assert [two[1].exchange(label) for label in leased] == [4, 5, 6]
    two[1].checkin(leased[0])
    two[0].wait_stats(in_use=2, closing=0, idle=0)
    assert backend.open == 2
    two[1].checkin(leased[1])
    two[1].checkin(leased[2])
    two[0].wait_stats(idle=2, in_use=0, closing=0)
    assert backend.open == 2


@pytest.mark.parametrize("idle", [0, 1, 4])
def test_a_lowered_limit_closes_exactly_what_is_too_many(
    three: list[Worker], backend: Backend, tcp: Target, idle: int
) -> None:
    start_pool(three[0], max_connections=10)
    labels = [(worker, worker.checkout(tcp)) for worker in (*three, *three, *three, three[0])]
    for worker, label in labels[:idle]:
        worker.checkin(label)
    for limit in (9, 7, 8):
        start_pool(three[0], max_connections=limit)
    ends = [worker.begin(commands.checkin, label) for worker, label in labels[idle:]]
    for end in ends:
        end.result()
    # With several idle ones, those of the lowest limit of the three were closed at once.
    left = 8 if idle < 2 else 7
    stats = three[0].wait_stats(in_use=0, closing=0)
    assert (stats.idle, stats.over_limit, backend.open) == (left, 10 - left, left)


def test_while_the_limit_is_lowered_nobody_opens_another(two: list[Worker], backend: Backend, tcp: Target) -> None:
    start_pool(two[0], max_connections=3)
    labels = [two[0].checkout(tcp) for _ in range(3)]
    start_pool(two[0], max_connections=1)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    for label in labels[:2]:
        two[0].checkin(label)
    two[0].wait_stats(in_use=1, waiting=1, closing=0)
    assert not waiting.done
    two[0].checkin(labels[2])
    assert two[1].exchange(waiting.result()) == 3
    assert (backend.open, backend.peak) == (1, 3)


def test_an_idle_timeout_set_later_reaches_connections_that_are_idle_already(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    start_pool(worker, idle_timeout=1000)
    worker.use(tcp)
    assert backend.open == 1
    start_pool(worker, idle_timeout=0.1)
    backend.wait_open(0)
