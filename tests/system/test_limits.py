"""max_waiting, priority and reserve, over real processes and in local mode."""

from __future__ import annotations

import pytest

from sharedpool import OptionError, PoolTimeout, TooManyWaiting
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up


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
