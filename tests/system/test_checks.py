"""What is asked of an idle connection before it is leased: a look, nothing, or the driver's own check."""

from __future__ import annotations

import pytest

from sharedpool import PoolOptionsDiffer
from sharedpool.drivers import register
from sharedpool.drivers.tcp import TcpDriver
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.workers import Harness, Worker


class CheckedDriver(TcpDriver):
    """TCP with a check of its own."""

    name = "checked"

    def __init__(self, state: State) -> None:
        self.state = state
        state.things["checked"] = 0
        state.things["answer"] = True

    def check(self, conn: object) -> bool:
        self.state.things["checked"] += 1
        if self.state.things["answer"] is None:
            raise OSError("no answer")
        return bool(self.state.things["answer"])


def use_checked(state: State) -> None:
    register(CheckedDriver(state))


def answer(state: State, value: bool | None) -> None:
    state.things["answer"] = value


def checked(state: State) -> int:
    return int(state.things["checked"])


@pytest.fixture(params=["shared", "local"])
def solo(harness: Harness, request: pytest.FixtureRequest) -> Worker:
    worker = harness.start(SHAREDPOOL_MODE=str(request.param))
    worker.call(use_checked)
    return worker


@pytest.fixture
def target(tcp: Target) -> Target:
    return Target(tcp.host, tcp.port, "checked")


def test_the_drivers_check_is_asked_for_what_was_idle_for_long(solo: Worker, target: Target) -> None:
    solo.attach(max_connections=1, check="active", check_after=0)
    assert [solo.use(target) for _ in range(3)] == [1, 1, 1]
    assert solo.call(checked) == 2
    assert solo.stats().reuses == 2


def test_it_is_not_asked_for_what_was_in_use_a_moment_ago(solo: Worker, target: Target) -> None:
    solo.attach(max_connections=1, check="active", check_after=3600)
    assert [solo.use(target) for _ in range(3)] == [1, 1, 1]
    assert solo.call(checked) == 0


@pytest.mark.parametrize("value", [False, None], ids=["it says no", "it fails"])
def test_what_it_refuses_is_closed_and_opened_anew_on_the_same_permit(
    solo: Worker, backend: Backend, target: Target, value: bool | None
) -> None:
    solo.attach(max_connections=1, check="active", check_after=0)
    solo.use(target)
    solo.call(answer, value)
    assert solo.use(target) == 2
    stats = solo.wait_stats(closing=0, in_use=0)
    assert (stats.closes["check_failed"], stats.checkouts, stats.opens, backend.peak) == (1, 2, 2, 1)
    assert stats.opened - stats.closed == stats.connections == backend.open


def test_by_default_only_the_look_is_taken(solo: Worker, target: Target) -> None:
    solo.attach(max_connections=1, check_after=0)
    assert [solo.use(target), solo.use(target)] == [1, 1]
    assert solo.call(checked) == 0


def test_a_transport_without_a_check_of_its_own_is_only_looked_at(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1, check="active", check_after=0)
    assert [solo.use(tcp), solo.use(tcp)] == [1, 1]
    backend.close()
    assert solo.use(tcp) == 2


def test_a_takeover_is_checked_too(two: list[Worker], target: Target) -> None:
    for worker in two:
        worker.call(use_checked)
    two[0].attach(max_connections=1, check="active", check_after=0)
    two[0].use(target)
    assert two[1].use(target) == 1
    assert [worker.call(checked) for worker in two] == [0, 1]


def test_without_any_check_what_lies_there_unread_is_leased_as_it_is(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=1, check="none")
    label = solo.checkout(tcp)
    number = solo.exchange(label)
    solo.checkin(label)
    backend.say("hello\n")
    label = solo.checkout(tcp)
    assert solo.call(commands.receive_line, label) == b"hello"
    assert solo.exchange(label) == number


def test_how_it_is_checked_is_laid_down_when_the_pool_is_made(worker: Worker, tcp: Target) -> None:
    worker.attach(max_connections=1, check="none")
    worker.use(tcp)
    worker.fails(PoolOptionsDiffer, commands.library, "start_pool", check="poll")
