"""max_per_key over real processes and in local mode: the limit, who is passed over, changes at run time, deaths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool import OptionError, PoolTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending, Worker
from tests.system.lineup import line_up
from tests.system.test_prewarm import prewarm
from tests.system.test_succession import kill_arbiter

pytestmark = pytest.mark.usefixtures("patient", "unhurried")


@pytest.fixture(params=["shared", "local"])
def solo(request: pytest.FixtureRequest, harness: Harness) -> Worker:
    """One worker, in both modes."""
    return harness.start(SHAREDPOOL_MODE=str(request.param))


@pytest.fixture
def other(directory: Path, nothing_left_behind: None) -> Iterator[Backend]:
    """A second back end: each counts the connections to its own address."""
    (directory / "other").mkdir()
    with Backend(directory / "other") as running:
        yield running


def change(worker: Worker, **options: object) -> None:
    worker.call(commands.library, "start_pool", "default", **options)


def queue(worker: Worker, target: Target, number: int) -> Pending:
    """Let a thread of the worker queue, as the number-th."""
    pending = worker.begin_checkout(target, thread=f"waiter {number}", checkout_timeout=None)
    worker.wait_stats(waiting=number)
    return pending


def test_an_address_has_no_more_than_max_per_key_and_others_are_not_held_up(
    solo: Worker, backend: Backend, other: Backend
) -> None:
    solo.attach(max_connections=4, max_per_key=2)
    first, second = solo.checkout(backend.tcp), solo.checkout(backend.tcp)
    error = solo.fails(PoolTimeout, commands.checkout, backend.tcp, checkout_timeout=0.05)
    assert "its address has all that it may (max_per_key=2)" in str(error)
    waiting = queue(solo, backend.tcp, 1)
    for _ in range(2):
        solo.checkin(solo.checkout(other.tcp))
    solo.checkin(first)
    solo.checkin(waiting.result())
    solo.checkin(second)
    assert (backend.accepted, other.accepted) == (2, 1)


def test_the_longest_waiter_who_may_have_it_gets_it(solo: Worker, backend: Backend, other: Backend) -> None:
    solo.attach(max_connections=2, max_per_key=1)
    ours, theirs = solo.checkout(backend.tcp), solo.checkout(other.tcp)
    waiters = [queue(solo, target, number + 1) for number, target in enumerate([backend.tcp, other.tcp, backend.tcp])]
    solo.checkin(theirs)
    solo.checkin(waiters[1].result())
    assert (waiters[0].done, waiters[2].done) == (False, False)
    solo.checkin(ours)
    label = waiters[0].result()
    assert not waiters[2].done
    solo.discard(label)
    solo.checkin(waiters[2].result())
    assert (backend.peak, other.peak) == (1, 1)


def test_it_holds_over_all_processes(three: list[Worker], backend: Backend, other: Backend) -> None:
    for worker in three:
        worker.attach(max_connections=4, max_per_key=1)
    held = three[0].checkout(backend.tcp)
    waiting = line_up(three[0], [(three[1], backend.tcp), (three[2], backend.tcp)])
    three[2].checkin(three[2].checkout(other.tcp))
    three[0].checkin(held)
    for worker, pending in zip(three[1:], waiting, strict=True):
        worker.checkin(pending.result())
    assert (backend.accepted, other.accepted) == (1, 1)
    assert three[0].stats().rescued == 0


def test_a_key_below_its_limit_evicts_an_idle_connection_of_another(
    solo: Worker, backend: Backend, other: Backend
) -> None:
    solo.attach(max_connections=2, max_per_key=2)
    for label in [solo.checkout(backend.tcp) for _ in range(2)]:
        solo.checkin(label)
    held = solo.checkout(other.tcp)
    backend.wait_open(1)
    solo.checkin(held)
    assert solo.wait_stats(idle=2).evictions == 1


def test_a_key_at_its_limit_leaves_the_idle_connections_of_others(
    solo: Worker, backend: Backend, other: Backend
) -> None:
    solo.attach(max_connections=3, max_per_key=1)
    solo.use(other.tcp)
    held = solo.checkout(backend.tcp)
    solo.fails(PoolTimeout, commands.checkout, backend.tcp, checkout_timeout=0.1)
    solo.checkin(held)
    assert (solo.stats().evictions, other.open) == (0, 1)


def test_what_cannot_move_is_closed_for_a_waiter_of_its_own_full_key(
    two: list[Worker], backend: Backend, other: Backend
) -> None:
    for worker in two:
        worker.attach(max_connections=3, max_per_key=1, move=False)
    two[0].use(other.tcp)
    two[0].use(backend.tcp)
    assert two[1].use(backend.tcp) == 2
    assert (backend.peak, other.open) == (1, 1)


def test_it_can_be_lowered_and_raised_while_the_pool_runs(solo: Worker, backend: Backend, other: Backend) -> None:
    solo.attach(max_connections=8)
    labels = [solo.checkout(backend.tcp) for _ in range(4)]
    kept = [solo.checkout(other.tcp) for _ in range(2)]
    for label in labels[2:]:
        solo.checkin(label)
    change(solo, max_per_key=1)
    backend.wait_open(2)
    waiting = queue(solo, backend.tcp, 1)
    solo.checkin(labels[0])
    backend.wait_open(1)
    assert not waiting.done
    change(solo, max_per_key=3)
    more = [waiting.result(), solo.checkout(backend.tcp)]
    solo.fails(PoolTimeout, commands.checkout, backend.tcp, checkout_timeout=0.05)
    change(solo, max_per_key=None)
    more.append(solo.checkout(backend.tcp))
    for label in (labels[1], *more, *kept):
        solo.checkin(label)
    stats = solo.wait_stats(closing=0, in_use=0)
    assert (stats.idle, backend.open, other.open) == (6, 4, 2)


def test_lowered_it_closes_exactly_what_is_too_many_of_a_key(solo: Worker, backend: Backend, other: Backend) -> None:
    solo.attach(max_connections=12, max_per_key=8)
    labels = [solo.checkout(target) for target in (backend.tcp, other.tcp) for _ in range(6)]
    change(solo, max_per_key=4)
    for label in labels:
        solo.checkin(label)
    stats = solo.wait_stats(in_use=0, closing=0)
    assert (stats.idle, stats.over_limit, backend.open, other.open) == (8, 4, 4, 4)


def test_permits_have_it_by_their_names(solo: Worker) -> None:
    limits = {"max_connections": 3, "max_per_key": 1, "checkout_timeout": 0}
    solo.call(commands.hold_permit, "api", "first", **limits)
    solo.fails(PoolTimeout, commands.hold_permit, "api", "second", **limits)
    solo.call(commands.release_permit, "first")
    solo.call(commands.hold_permit, "api", "third", **limits)


@pytest.mark.parametrize("value", [0, -1, True, "2", 40_000])
def test_a_wrong_max_per_key_is_an_error_at_once(solo: Worker, value: object) -> None:
    error = solo.fails(OptionError, commands.attach, max_per_key=value)
    assert "max_per_key" in str(error)
    assert "a whole number from 1" in str(error)


def test_it_is_kept_under_load(three: list[Worker], backend: Backend, other: Backend, unix: Target) -> None:
    for worker in three:
        worker.attach(max_connections=4, max_per_key=2)
    begun = [
        worker.begin(
            commands.requests, [backend.tcp, other.tcp], 60, thread=f"load {number}", checkout_timeout=30,
            priority="high" if number else "normal",
        )
        for worker in three for number in range(2)
    ]  # fmt: skip
    assert sum((pending.result() for pending in begun), commands.Load()) == commands.Load(done=360)
    assert backend.peak <= 2
    assert other.peak <= 2
    stats = three[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    assert backend.open + other.open == stats.idle


def test_it_changes_under_load_and_nobody_waits_for_ever(
    three: list[Worker], backend: Backend, other: Backend, seeded: random.Random
) -> None:
    for worker in three:
        worker.attach(max_connections=3)
    begun = [
        worker.begin(
            commands.requests, [backend.tcp, other.tcp], 80, thread=f"load {number}", checkout_timeout=30,
            priority=seeded.choice(["normal", "high"]),
        )
        for worker in three for number in range(2)
    ]  # fmt: skip
    while not all(pending.done for pending in begun):
        change(three[0], max_per_key=seeded.choice([1, 2, None]), reserve=seeded.choice([0, 0, 1]))
    assert sum((pending.result() for pending in begun), commands.Load()) == commands.Load(done=480)
    change(three[0], max_per_key=1, reserve=0)
    for target in (backend.tcp, other.tcp):  # of which one may have been evicted for the other in the end
        three[0].use(target)
    three[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0, idle=2)
    assert (backend.open, other.open) == (1, 1)


@pytest.mark.parametrize("mode", ["shared", "local"])
def test_prewarming_keeps_no_more_than_an_address_may_have(
    harness: Harness, backend: Backend, tcp: Target, mode: str
) -> None:
    worker = harness.start(SHAREDPOOL_MODE=mode)
    worker.attach(max_connections=5, max_per_key=2)
    worker.call(prewarm, tcp, 4)
    assert worker.wait_stats(idle=2, opening=0).prewarmed == 2
    worker.checkin(worker.checkout(tcp))
    assert backend.accepted == 2


def test_it_survives_the_arbiter_and_its_holders(
    harness: Harness, backend: Backend, other: Backend, scope: Scope
) -> None:
    first, second = harness.start_many(2)
    for worker in (first, second):
        worker.attach(max_connections=4, max_per_key=1)
    first.checkout(backend.tcp)
    waiting = queue(second, backend.tcp, 1)
    kill_arbiter(scope)
    second.checkin(second.checkout(other.tcp))
    assert not waiting.done
    first.kill()
    second.checkin(waiting.result())
    assert (backend.peak, other.peak) == (1, 1)


def test_in_a_storm_of_kills_it_holds_and_then_the_pool_serves(
    harness: Harness, backend: Backend, other: Backend, seeded: random.Random
) -> None:
    watcher = harness.start()
    watcher.attach(max_connections=3, max_per_key=2)
    for _ in range(5):
        workers = harness.start_many(4)
        for worker in workers:
            worker.attach(max_connections=3, max_per_key=2)
            for thread in range(2):
                worker.begin(
                    commands.requests_until_told, [backend.tcp, other.tcp], thread=f"load {thread}", checkout_timeout=30
                )
        reached = watcher.stats().checkouts + seeded.randint(50, 300)
        wait_until(lambda: watcher.stats().checkouts >= reached)  # noqa: B023
        for worker in workers:
            worker.kill()
    stats = watcher.wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    wait_until(lambda: backend.open + other.open == stats.idle)
    assert backend.peak <= 2
    assert other.peak <= 2
    for target in (backend.tcp, other.tcp):
        assert watcher.use(target) > 0
