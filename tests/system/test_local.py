"""Local mode: the same API within one process. Each test here runs in both modes, on the same back end."""

from __future__ import annotations

import os

import pytest

from sharedpool import ConnectFailed, LeaseError, OptionError, PoolOptionsDiffer, PoolStopped, PoolTimeout
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up


@pytest.fixture(params=["shared", "local"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def solo(harness: Harness, mode: str) -> Worker:
    """One worker in the mode."""
    return harness.start(SHAREDPOOL_MODE=mode)


def use_url(state: State, url: str) -> int:
    with commands.pool_of(state, "default").connection(url, checkout_timeout=5) as conn:
        return commands.exchange_over(conn, "by url")


def test_connections_are_reused_lifo(solo: Worker, backend: Backend, tcp: Target, unix: Target) -> None:
    for target, numbers in ((tcp, (1, 2)), (unix, (3, 4))):
        labels = [solo.checkout(target) for _ in range(2)]
        for label in labels:
            solo.checkin(label)
        assert [solo.exchange(solo.checkout(target)) for _ in range(2)] == list(reversed(numbers))
    assert backend.accepted == 4


def test_a_connection_by_url(solo: Worker, backend: Backend, tcp: Target) -> None:
    assert solo.call(use_url, tcp.url) == solo.use(tcp) == 1


def test_the_cap_holds_over_threads(solo: Worker, backend: Backend, tcp: Target, unix: Target) -> None:
    solo.attach(max_connections=2)
    begun = [solo.begin(commands.requests, [tcp, unix], 40, thread=f"load {i}", checkout_timeout=30) for i in range(6)]
    assert sum((pending.result() for pending in begun), commands.Load()) == commands.Load(done=240)
    assert backend.peak <= 2
    stats = solo.wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    assert backend.open == stats.idle


def test_waiters_are_served_in_order(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    queue = line_up(solo, [(solo, tcp)] * 4)
    for i, pending in enumerate(queue):
        solo.checkin(label)
        label = pending.result()
        assert not any(later.done for later in queue[i + 1 :])
        assert solo.exchange(label) == 1
    assert backend.accepted == 1


def test_waiters_for_different_addresses_are_served_in_order(
    solo: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    queue = line_up(solo, [(solo, unix), (solo, tcp)])
    solo.checkin(label)
    label = queue[0].result()
    assert solo.exchange(label) == 2
    solo.checkin(label)
    assert solo.exchange(queue[1].result()) == 3
    assert backend.peak == 1


def test_a_full_pool_times_out_with_its_numbers(solo: Worker, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.checkout(tcp)
    error = solo.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.1)
    assert "(max=1 leased=1 idle=0 opening=0 closing=0 waiting=" in str(error)
    assert "this thread holds 1 lease" in str(error)
    assert solo.stats().timeouts == 1


def test_an_unread_or_dead_connection_is_not_leased_again(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.use(tcp)
    backend.close()
    assert solo.use(tcp) == 2
    backend.say("surprise")
    assert solo.use(tcp) == 3
    assert backend.peak == 1


def test_a_second_checkin_is_an_error(solo: Worker, tcp: Target) -> None:
    label = solo.checkout(tcp)
    solo.checkin(label)
    solo.fails(LeaseError, commands.checkin, label)
    assert solo.stats().idle == 1


def test_a_refused_connect_frees_its_permit(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    backend.do("refuse", name="tcp")
    for _ in range(2):
        solo.fails(ConnectFailed, commands.checkout, tcp)
    backend.do("accept_again", name="tcp")
    assert solo.use(tcp) == 1


def test_a_discard_and_a_forgotten_lease_close(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.discard(solo.checkout(tcp))
    backend.wait_open(0)
    solo.call(commands.forget, solo.checkout(tcp))
    assert solo.use(tcp) == 3
    assert backend.peak == 1
    assert solo.stats().dropped == 1


def test_an_idle_connection_expires(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1, idle_timeout=0.2)
    solo.use(tcp)
    wait_expired(solo, tcp, backend)
    assert solo.use(tcp) == 2


def wait_expired(solo: Worker, tcp: Target, backend: Backend) -> None:
    """Without an arbiter nobody watches between calls, so the calls themselves have to look."""
    solo.wait_stats(idle=0, expired=1)
    backend.wait_open(0)


def test_permits_work(solo: Worker) -> None:
    solo.call(commands.hold_permit, "openai", "p", max_connections=1)
    solo.fails(PoolTimeout, commands.hold_permit, "openai", "q", max_connections=1, checkout_timeout=0.1)
    solo.call(commands.release_permit, "p")
    solo.call(commands.hold_permit, "openai", "q", max_connections=1, checkout_timeout=5)


def test_the_functions_of_the_module_work(solo: Worker, tcp: Target) -> None:
    solo.call(commands.library, "start")
    assert solo.call(commands.library, "find_pool", "api") is None
    info = solo.call(commands.library, "start_pool", "api", max_connections=2)
    assert (info.name, info.options.max_connections) == ("api", 2)
    assert solo.call(commands.library, "find_pool", "api") == info
    solo.checkout(tcp, pool="api")
    numbers = {"name": "api", "max": 2, "in_use_count": 1, "free_count": 0, "queue_count": 0}
    assert solo.call(commands.library, "get_stats", "api") == numbers
    error = solo.fails(PoolOptionsDiffer, commands.library, "start_pool", "api", max_connections=3, update=False)
    assert "max_connections" in str(error)
    assert solo.call(commands.library, "start_pool", "api", max_connections=3).options.max_connections == 3
    solo.call(commands.library, "stop_pool", "api")
    assert solo.call(commands.library, "find_pool", "api") is None
    solo.call(commands.library, "stop")


def test_stop_pool_sends_the_waiting_away(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    (waiting,) = line_up(solo, [(solo, tcp)])
    solo.call(commands.library, "stop_pool", "default")
    waiting.error(PoolStopped)
    assert solo.exchange(label) == 1
    solo.checkin(label)
    backend.wait_open(0)


def test_a_raised_limit_serves_the_waiting(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.checkout(tcp)
    queue = line_up(solo, [(solo, tcp)] * 3)
    solo.call(commands.library, "start_pool", "default", max_connections=3)
    assert {solo.exchange(queue[0].result()), solo.exchange(queue[1].result())} == {2, 3}
    assert not queue[2].done


def test_a_wrong_option_is_an_error_at_once(solo: Worker) -> None:
    solo.fails(OptionError, commands.attach, max_connections=0)


def test_a_child_has_a_pool_of_its_own_or_shares_but_never_a_connection_twice(
    solo: Worker, backend: Backend, tcp: Target, mode: str
) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    child = solo.fork()
    child.fails(LeaseError, commands.checkin, label)
    if mode == "local":
        assert child.use(tcp) == 2
    assert solo.exchange(label) == 1


def test_local_mode_starts_no_process_and_writes_no_file(harness: Harness, scope: Scope, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_MODE="local")
    worker.use(tcp)
    assert processes.children(worker.pid) == set()
    assert scope.arbiters() == set()
    assert os.listdir(scope.directory) == []


def test_a_mode_that_does_not_exist_is_an_error(harness: Harness, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_MODE="galactic")
    error = worker.fails(OptionError, commands.use, tcp)
    assert "SHAREDPOOL_MODE" in str(error)
    assert "galactic" in str(error)
