"""Local mode: the same API within one process. Most tests here run in both modes, on the same back end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from sharedpool import (
    ConnectFailed,
    LeaseError,
    OptionError,
    PoolNotFound,
    PoolOptionsDiffer,
    PoolStopped,
    PoolTimeout,
)
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker, clean_environment
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["shared", "local"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def solo(harness: Harness, mode: str) -> Worker:
    """One worker in the mode."""
    return harness.start(SHAREDPOOL_MODE=mode)


def use_url(state: State, url: str) -> int:
    with commands.pool_of(state, "default").connection(url, checkout_timeout=30) as conn:
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
    assert f"s old, of process {solo.pid}" in str(error)
    assert "this thread holds 1 lease of this pool itself" in str(error)
    other = solo.begin_checkout(tcp, thread="other", checkout_timeout=0).error(PoolTimeout)
    assert "this thread holds no leases" in str(other)
    assert (solo.stats().timeouts, solo.stats().waits) == (2, 1)


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


def test_a_lease_that_is_forgotten_while_others_wait_serves_them(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    queue = line_up(solo, [(solo, tcp)] * 2)
    solo.call(commands.forget, label)
    solo.call(commands.forget, queue[0].result())
    assert solo.exchange(queue[1].result()) == 3
    assert (solo.stats().dropped, backend.peak) == (2, 1)


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
    solo.call(commands.hold_permit, "openai", "q", max_connections=1, checkout_timeout=30)


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


# -- the cap, as the back end counts -----------------------------------------------------------------------------------


def close_it(state: State, label: str) -> None:
    state.leases[label].conn.close()


def detach_it(state: State, label: str) -> None:
    os.close(state.leases[label].conn.detach())


def test_a_permit_is_taken_until_the_remote_has_closed_too(
    solo: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    solo.attach(max_connections=2, close_timeout=60)
    backend.do("hold_closes")
    for target in (tcp, unix):
        solo.discard(solo.checkout(target))
    solo.wait_stats(closing=2, in_use=0)
    queue = line_up(solo, [(solo, unix), (solo, tcp)])
    wait_until(lambda: all(each["ended"] for each in backend.do("connections")))
    solo.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.1)
    assert not any(pending.done for pending in queue)
    assert backend.do("release_closes") == 2
    assert {solo.exchange(pending.result()) for pending in queue} == {3, 4}
    stats = solo.wait_stats(closing=0, in_use=2, closed=2)
    assert (stats.closed_unconfirmed, backend.peak) == (0, 2)


def test_a_remote_that_never_closes_holds_its_permit_for_close_timeout_only(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    backend.do("hold_closes")
    solo.attach(max_connections=1, close_timeout=0.3)
    label = solo.checkout(tcp)
    (waiting,) = line_up(solo, [(solo, tcp)])
    solo.discard(label)
    assert solo.exchange(waiting.result()) == 2
    assert solo.wait_stats(closing=0, in_use=1).closed_unconfirmed == 1


@pytest.mark.parametrize("end", [close_it, detach_it])
def test_a_connection_that_the_user_closes_counts_until_the_remote_has_closed_too(
    solo: Worker, backend: Backend, tcp: Target, end: object
) -> None:
    backend.do("hold_closes")
    solo.attach(max_connections=1, close_timeout=60)
    label = solo.checkout(tcp)
    solo.call(end, label)  # type: ignore[arg-type]
    solo.checkin(label)
    (waiting,) = line_up(solo, [(solo, tcp)])
    wait_until(lambda: backend.do("connections")[0]["ended"])
    assert not waiting.done
    backend.do("release_closes")
    assert solo.exchange(waiting.result()) == 2
    assert backend.peak == 1


def test_an_idle_connection_to_elsewhere_is_closed_for_its_permit(
    solo: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    solo.attach(max_connections=2)
    labels = [solo.checkout(tcp) for _ in range(2)]
    for label in labels:
        solo.checkin(label)
    assert solo.use(unix) == 3
    backend.wait_open(2)
    assert backend.ids() == [2, 3]  # 1 was unused for longer
    assert (solo.stats().evictions, backend.peak) == (1, 2)


def test_a_waiter_that_times_out_passes_on_what_it_was_granted(
    solo: Worker, backend: Backend, tcp: Target, seeded: random.Random
) -> None:
    solo.attach(max_connections=1)
    taken = 0
    for _ in range(40):
        label = solo.checkout(tcp, checkout_timeout=20)
        moment = time.monotonic() + 0.02
        giving = solo.begin(commands.checkin_at, label, moment + seeded.uniform(-0.002, 0.002), thread="giver")
        first = solo.begin_checkout(tcp, thread="first", checkout_timeout=moment - time.monotonic())
        second = solo.begin_checkout(tcp, thread="second", checkout_timeout=20)
        giving.result()
        try:
            solo.checkin(first.result())
            taken += 1
        except PoolTimeout:
            pass
        solo.checkin(second.result())
    stats = solo.wait_stats(in_use=0, granted=0, waiting=0, closing=0, opening=0)
    assert stats.used == stats.idle == backend.open
    assert stats.timeouts == 40 - taken
    assert backend.peak == 1


# -- pools by name -----------------------------------------------------------------------------------------------------


def use_two_handles(state: State, target: Target) -> tuple[int, int]:
    """Connections used by two handles on one pool, one after the other."""
    numbers = []
    for label in ("one", "two"):
        commands.attach(state, "api", max_connections=1)
        state.things[label] = state.pools["api"]
        numbers.append(commands.use(state, target, pool="api"))
    return numbers[0], numbers[1]


def close_handle(state: State, label: str) -> None:
    state.things[label].close()


def test_handles_on_one_name_share_one_pool(solo: Worker, backend: Backend, tcp: Target) -> None:
    assert solo.call(use_two_handles, tcp) == (1, 1)
    label = solo.checkout(tcp, pool="api")
    solo.call(close_handle, "one")
    assert solo.exchange(label) == 1
    solo.checkin(label)
    label = solo.checkout(tcp, pool="api")
    solo.call(close_handle, "two")
    solo.fails(LeaseError, commands.checkin, label)
    backend.wait_open(0)


def test_options_given_later_are_applied_with_a_warning(solo: Worker, tcp: Target) -> None:
    solo.call(commands.collect_log)
    solo.attach("api", max_connections=1)
    solo.use(tcp, pool="api")
    assert solo.call(commands.log, "WARNING") == []
    solo.attach("api", max_connections=2, idle_timeout=60, connect_timeout=3)
    solo.use(tcp, pool="api")
    by = f"by process {solo.pid}"
    expected = [f"max_connections: 1 ({by}) -> 2 ({by})", f"idle_timeout: 150.0 ({by}) -> 60.0 ({by})"]
    assert solo.call(commands.log, "WARNING") == [f"pool 'api': option {text}" for text in expected]
    assert solo.stats("api").max_connections == 2
    for options in ({"move": False}, {"max_connections": 3, "update": False}):
        solo.attach("api", **options)
        assert next(iter(options)) in str(solo.fails(PoolOptionsDiffer, commands.use, tcp, pool="api"))


def test_a_pool_that_nobody_declared_is_not_made_by_using_it(solo: Worker, tcp: Target) -> None:
    solo.fails(PoolNotFound, commands.use, tcp, pool="api")
    solo.fails(PoolNotFound, commands.library, "get_stats", "api")
    assert solo.use(tcp) == 1


def test_pools_of_different_apps_are_different(harness: Harness, backend: Backend, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_MODE="local")  # in shared mode an app's directory is not the test's
    for app in ("one", "two"):
        worker.attach(app=app, max_connections=1)
        worker.checkout(tcp)
    assert backend.open == 2
    worker.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0)


def test_a_lowered_limit_closes_exactly_what_is_too_many(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=10)
    labels = [solo.checkout(tcp) for _ in range(10)]
    solo.call(commands.library, "start_pool", "default", max_connections=8)
    for label in labels:
        solo.checkin(label)
    backend.wait_open(8)
    stats = solo.wait_stats(closing=0, in_use=0)
    assert (stats.idle, stats.over_limit) == (8, 2)


def test_a_lowered_limit_closes_what_was_idle_longest(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=4)
    labels = [solo.checkout(tcp) for _ in range(4)]
    for label in labels[:3]:
        solo.checkin(label)
    solo.call(commands.library, "start_pool", "default", max_connections=2)
    backend.wait_open(2)
    assert backend.ids() == [3, 4]
    solo.call(commands.library, "start_pool", "default", max_connections=1)
    backend.wait_open(1)
    assert solo.wait_stats(closing=0, in_use=1).over_limit == 3
    (waiting,) = line_up(solo, [(solo, tcp)])
    solo.checkin(labels[3])
    assert solo.exchange(waiting.result()) == 4
    assert backend.peak == 4


def test_stop_sends_the_waiting_away(solo: Worker, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.checkout(tcp)
    (waiting,) = line_up(solo, [(solo, tcp)])
    solo.call(commands.library, "stop")
    waiting.error(PoolStopped)
    assert solo.call(commands.library, "find_pool") is None


def test_stop_closes_what_was_leased_when_it_comes_back(harness: Harness, backend: Backend, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_MODE="local")
    worker.attach(max_connections=1)
    label = worker.checkout(tcp)
    worker.call(commands.library, "stop")
    (waiting,) = line_up(worker, [(worker, tcp)])  # the pool runs again, but the connection of before counts
    assert worker.exchange(label) == 1
    worker.checkin(label)
    assert worker.exchange(waiting.result()) == 2
    assert backend.peak == 1


def test_a_stopped_pool_stays_stopped_until_it_is_declared_again(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.use(tcp)
    solo.call(commands.library, "stop_pool", "default")
    backend.wait_open(0)
    solo.fails(PoolStopped, commands.use, tcp)
    solo.call(commands.library, "start_pool", "default", max_connections=1)
    assert solo.use(tcp) == 2


# -- processes and platforms -------------------------------------------------------------------------------------------


def test_a_childs_end_leaves_the_parents_connections_alone(harness: Harness, backend: Backend, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_MODE="local")
    worker.attach(max_connections=2)
    leased, idle = worker.checkout(tcp), worker.checkout(tcp)
    worker.checkin(idle)
    child = worker.fork()
    assert child.use(tcp) == 3
    child.kill()
    backend.wait_open(2)
    assert worker.exchange(leased) == 1
    assert worker.use(tcp) == 2
    assert backend.ids() == [1, 2]


ELSEWHERE = r"""
import logging, os, select, socket, sys, tempfile, urllib.parse  # as they are on this platform
for name in ("fcntl", "resource", "termios", "grp", "pwd", "_posixshmem"):
    sys.modules[name] = None
for module, names in (
    (os, "fork register_at_fork geteuid getuid eventfd memfd_create pidfd_open"),
    (select, "poll epoll"),
    (socket, "AF_UNIX TCP_INFO SO_PEERCRED MSG_NOSIGNAL MSG_CMSG_CLOEXEC SCM_RIGHTS socketpair"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = sys.argv[1]
import sharedpool
pool = sharedpool.attach(max_connections=1)
numbers = []
for _ in range(2):
    with pool.connection("127.0.0.1", int(sys.argv[2])) as conn:
        conn.sendall(b"x\n")
        numbers.append(conn.recv(100))
lease = pool.checkout("127.0.0.1", int(sys.argv[2]))
lease.discard()
with sharedpool.permit("openai", max_connections=1):
    pass
print(numbers, pool.stats().closing)
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_it_imports_and_works_where_unix_modules_are_missing(platform: str, backend: Backend, tcp: Target) -> None:
    script = [sys.executable, "-c", ELSEWHERE, platform, str(tcp.port)]
    done = subprocess.run(script, env=clean_environment({}), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[b'1 x\\n', b'1 x\\n'] 0\n", done.stderr
    assert f"local mode on {platform}" in done.stderr
