"""Connections kept ready in the background: as many as wanted, never at anybody's cost."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sharedpool import OptionError
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


def prewarm(state: State, target: Target, count: int | None = None, **options: Any) -> None:
    commands.pool_of(state, "default").prewarm(target.host, target.port, target.transport, count=count, **options)


@pytest.fixture
def hanging(backend: Backend) -> Target:
    target = backend.listen("hanging")
    backend.do("hang", name="hanging")
    return target


@pytest.mark.parametrize("mode", ["shared", "local"])
def test_as_many_as_asked_for_are_opened_and_used(harness: Harness, backend: Backend, tcp: Target, mode: str) -> None:
    worker = harness.start(SHAREDPOOL_MODE=mode)
    worker.attach(max_connections=5)
    worker.call(prewarm, tcp, 3)
    worker.wait_stats(idle=3, opening=0)
    assert worker.use(tcp) in (1, 2, 3)
    stats = worker.stats()
    assert (stats.prewarmed, stats.opened, stats.opens, stats.checkouts, backend.accepted) == (3, 3, 0, 1, 3)


def test_over_several_processes_no_more_than_asked_for(three: list[Worker], backend: Backend, tcp: Target) -> None:
    three[0].attach(max_connections=20)
    for worker in three:
        worker.begin(prewarm, tcp, 6)
    three[0].wait_stats(idle=6, opening=0)
    assert (backend.accepted, backend.peak) == (6, 6)


def test_the_pools_option_says_how_many_and_can_change(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=5, min_idle=2)
    worker.call(prewarm, tcp)
    worker.wait_stats(idle=2, opening=0)
    worker.call(commands.library, "start_pool", min_idle=4)
    worker.wait_stats(idle=4, opening=0)
    assert backend.accepted == 4


def test_they_are_opened_anew_when_they_have_gone(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=5)
    worker.call(prewarm, tcp, 2)
    worker.wait_stats(idle=2, opening=0)
    backend.close()
    worker.wait_stats(idle=2, opening=0, closing=0, closed=2)
    assert backend.open == 2


def test_never_beyond_the_cap(worker: Worker, backend: Backend, tcp: Target, unix: Target) -> None:
    worker.attach(max_connections=3)
    worker.checkout(unix)
    worker.call(prewarm, tcp, 10)
    worker.wait_stats(idle=2, in_use=1, opening=0)
    assert backend.peak == 3


def has_room(state: State) -> bool:
    attached: Any = commands.pool_of(state, "default").attached
    return bool(attached.has_room())


def test_with_a_reserve_it_goes_ahead_within_the_share_of_normal_priority(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=4, reserve=1)
    held = [worker.checkout(tcp) for _ in range(3)]
    assert not worker.call(has_room), "what is left is the reserve"
    worker.checkin(held[0])
    assert worker.call(has_room)
    worker.call(prewarm, tcp, 10)
    worker.wait_stats(idle=2, in_use=2, opening=0)
    assert (worker.stats().prewarmed, backend.accepted) == (1, 4)


def test_nothing_is_closed_for_it(worker: Worker, backend: Backend, tcp: Target, unix: Target) -> None:
    worker.attach(max_connections=2)
    labels = [worker.checkout(unix), worker.checkout(unix)]
    for label in labels:
        worker.checkin(label)
    worker.call(prewarm, tcp, 2)
    worker.call(commands.discard, worker.checkout(unix))
    worker.wait_stats(prewarmed=1, opening=0, closing=0)
    assert sorted(backend.ids()) == [1, 3] or sorted(backend.ids()) == [2, 3]


def test_it_gives_way_to_who_waits_while_it_connects(
    two: list[Worker], backend: Backend, tcp: Target, hanging: Target
) -> None:
    two[0].attach(max_connections=1)
    two[0].call(prewarm, hanging, 1)
    two[0].wait_stats(opening=1)
    assert two[1].use(tcp, checkout_timeout=10) == 1
    assert two[1].stats().open_failures == 1


def test_it_takes_no_permit_that_anybody_waits_for(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    queue = line_up(two[0], [(two[1], tcp)] * 3)
    two[0].call(prewarm, unix, 1)
    two[0].call(commands.discard, label)
    for waiting in queue:
        two[1].call(commands.discard, waiting.result())
    two[0].wait_stats(prewarmed=1, idle=1)  # afterwards
    assert backend.peak == 1
    assert two[0].stats().handoffs + two[0].stats().opens == 4


def test_a_remote_that_refuses_is_not_asked_all_the_time(worker: Worker, backend: Backend) -> None:
    target = backend.listen("refusing")
    backend.do("refuse", name="refusing")
    worker.attach(max_connections=2)
    began = time.monotonic()
    worker.call(prewarm, target, 2)
    wait_until(lambda: worker.stat("open_failures") >= 2)
    attempts = worker.stat("attempts")
    assert attempts <= 3 + (time.monotonic() - began) / 0.5  # the first break; each is longer than the one before
    backend.do("accept_again", name="refusing")
    worker.wait_stats(idle=2)


def test_it_ends_with_its_handle(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=2)
    worker.call(prewarm, tcp, 1)
    worker.wait_stats(idle=1)
    worker.call(close_pool)
    wait_until(lambda: not [name for name in worker.call(commands.thread_names) if name.startswith("sharedpool")])


def close_pool(state: State) -> None:
    state.pools["default"].close()


def test_what_cannot_be_kept_ready_is_an_error(worker: Worker, tcp: Target) -> None:
    assert "'permit'" in str(worker.fails(OptionError, prewarm, Target("x", 0, "permit"), 1))
    assert "'min_idle'" in str(worker.fails(OptionError, prewarm, tcp, -1))
