"""Operations from any process: pause, resume, drain, kill, reset_stats, ping; and what the arbiter says meanwhile."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

import sharedpool
from sharedpool import DrainTimeout, LeaseError, OptionError, PoolNotFound, PoolTimeout, RegistryTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


def do(worker: Worker, function: str, *arguments: Any, **options: Any) -> Any:
    return worker.call(commands.library, function, *arguments, **options)


def key(target: Target) -> tuple[str, int]:
    return (target.host, target.port)


# --- pause ------------------------------------------------------------------------------------------------------------


def test_while_paused_nobody_gets_anything_and_leases_go_on(three: list[Worker], backend: Backend, tcp: Target) -> None:
    holder, waiter, operator = three
    holder.attach(max_connections=5)
    holder.use(tcp)
    label = holder.checkout(tcp)
    do(operator, "pause")
    (waiting,) = line_up(holder, [(waiter, tcp)])
    error = waiter.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.05)
    assert "paused" in str(error)
    assert holder.exchange(label) == 1
    holder.checkin(label)
    holder.wait_stats(in_use=0, idle=1, waiting=1)
    assert (backend.open, waiting.done) == (1, False)
    do(operator, "resume")
    assert waiter.exchange(waiting.result()) == 1
    assert (backend.open, waiter.stat("evictions")) == (1, 0)


def test_resume_serves_those_who_wait_in_their_order(three: list[Worker], backend: Backend, tcp: Target) -> None:
    holder, waiter, other = three
    holder.attach(max_connections=2)
    holder.stats()
    do(holder, "pause")
    queue = line_up(holder, [(waiter, tcp), (other, tcp), (waiter, tcp), (other, tcp)])
    do(holder, "resume")
    labels = [queue[0].result(), queue[1].result()]
    assert [queue[2].done, queue[3].done] == [False, False]
    waiter.checkin(labels[0], thread="waiter 0")
    queue[2].result()
    assert not queue[3].done
    assert backend.peak <= 2


def test_a_pause_closes_no_idle_connection_for_who_waits(two: list[Worker], backend: Backend, tcp: Target) -> None:
    other = backend.listen("other")
    two[0].attach(max_connections=1)
    two[0].use(tcp)
    do(two[0], "pause")
    (waiting,) = line_up(two[0], [(two[1], other)])
    assert (two[0].stat("idle"), backend.open) == (1, 1)
    do(two[0], "resume")
    waiting.result()
    assert backend.peak == 1


@pytest.mark.parametrize("operation", ["pause", "resume", "drain", "kill", "reset_stats"])
def test_an_operation_on_a_pool_that_is_not_there_says_so(worker: Worker, operation: str) -> None:
    worker.fails(PoolNotFound, commands.library, operation, "nobody")  # and starts no arbiter
    do(worker, "start")
    worker.fails(PoolNotFound, commands.library, operation, "nobody")


# --- drain ------------------------------------------------------------------------------------------------------------


def test_a_drain_closes_idle_ones_now_and_leased_ones_at_their_checkin_and_the_pool_goes_on(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, two, operator = three
    one.attach(max_connections=5)
    labels = [one.checkout(tcp) for _ in range(2)]
    one.checkin(labels[0])
    leased = two.checkout(tcp)  # a takeover
    one.use(tcp)
    assert (backend.open, do(operator, "drain")) == (3, 3)
    backend.wait_open(2)
    assert [one.exchange(labels[1]), two.exchange(leased)] == [2, 1]
    assert operator.use(tcp) == 4
    one.checkin(labels[1])
    two.checkin(leased)
    backend.wait_open(1)
    one.wait_stats(idle=1, in_use=0, closing=0, drained=1)


def test_a_drain_of_one_key_leaves_the_others_alone(two: list[Worker], backend: Backend, tcp: Target) -> None:
    other, unix = backend.listen("other"), backend.listen_unix()
    for target in (tcp, other, unix):
        two[0].use(target)
    assert do(two[1], "drain", "default", key(other), wait=20) == 1
    assert backend.ids() == [1, 3]
    assert do(two[1], "drain", "default", (unix.host, 0, "unix"), wait=20) == 1
    assert backend.ids() == [1]
    assert do(two[1], "drain", "default", f"tcp://{tcp.host}:{tcp.port}", wait=20) == 1
    assert do(two[1], "drain", "default", key(tcp), wait=20) == 0


def test_a_drain_that_waits_returns_when_the_back_end_has_seen_the_end_of_all(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, two, operator = three
    labels = [one.checkout(tcp) for _ in range(4)]
    for label in labels[:2]:
        one.checkin(label)
    leased = two.checkout(tcp)
    waiting = operator.begin(commands.library, "drain", "default", key(tcp), wait=30)
    one.wait_stats(idle=0, in_use=3, drained=1, closing=0)
    for label in labels[2:]:
        one.checkin(label)
    one.wait_stats(in_use=1, closing=0)
    assert not waiting.done
    two.checkin(leased)
    assert waiting.result() == 4
    assert backend.open == 0


def test_a_drain_that_is_not_done_in_time_names_who_holds_it_up(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    two[0].use(tcp)
    label = two[0].checkout(tcp)
    error = two[1].fails(DrainTimeout, commands.library, "drain", wait=0.1)
    assert (error.pids, error.left, str(two[0].pid) in str(error)) == ([two[0].pid], 1, True)
    two[0].checkin(label)
    backend.wait_open(0)


@pytest.mark.parametrize("wrong", [5, ("h",), ("h", 0), ("h", "x"), "h:80", ("h", 1, "carrier pigeon")])
def test_a_key_that_is_none_is_refused(worker: Worker, wrong: object) -> None:
    for operation in ("drain", "kill"):
        worker.fails(OptionError, commands.library, operation, "default", wrong)


# --- kill -------------------------------------------------------------------------------------------------------------


def begin_to_read(state: State, label: str) -> bytes:
    state.leases[label].conn.settimeout(20)
    return bytes(state.leases[label].conn.recv(1))


def test_a_kill_ends_leased_connections_under_their_users_hands(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, two, operator = three
    one.attach(max_connections=3)
    idle, leased = one.checkout(tcp), one.checkout(tcp)
    other = two.checkout(tcp)
    one.checkin(idle)
    reading = one.begin(begin_to_read, leased, thread="reader")
    assert do(operator, "kill") == 3
    backend.wait_open(0)
    assert reading.result() == b""
    two.fails(ConnectionError, commands.exchange, other)
    one.checkin(leased)
    two.checkin(other)
    one.wait_stats(in_use=0, idle=0, closing=0, killed=1)
    assert one.use(tcp) == 4


# --- statistics, ping -------------------------------------------------------------------------------------------------


def test_after_a_reset_the_counters_of_all_processes_start_from_zero(two: list[Worker], tcp: Target) -> None:
    for worker in two:
        worker.use(tcp)
    assert two[0].stat("checkouts") == 2
    do(two[1], "reset_stats")
    stats = two[0].stats()
    assert (stats.checkouts, stats.opens, stats.idle) == (0, 0, 1)
    two[1].use(tcp)
    assert (two[0].stat("checkouts"), do(two[0], "pool_stats").checkouts) == (1, 1)
    two[1].kill()
    two[0].wait_stats(processes=1)
    assert two[0].stat("checkouts") == 1


def test_a_ping_is_answered_by_the_arbiter_and_starts_none(worker: Worker, scope: Scope) -> None:
    assert do(worker, "ping") is None
    do(worker, "start")
    assert do(worker, "ping") == {"pid": scope.arbiter(), "incarnation": 1}


def test_an_arbiter_that_is_stopped_answers_no_ping_and_no_call_waits_for_ever(worker: Worker, scope: Scope) -> None:
    do(worker, "start")
    os.kill(scope.arbiter(), signal.SIGSTOP)
    try:
        assert do(worker, "ping", timeout=0.2) is None
        worker.fails(RegistryTimeout, call_registry, 0.2)
    finally:
        os.kill(scope.arbiter(), signal.SIGCONT)
    assert do(worker, "ping") is not None


def call_registry(state: State, seconds: float) -> object:
    from sharedpool import control, manager

    return manager.call(control._directory(make=False), "names", start=False, seconds=seconds)


def test_operations_reach_the_scope_that_they_name(harness: Harness, scope: Scope, tcp: Target) -> None:
    worker = harness.start(XDG_RUNTIME_DIR=str(scope.directory))
    worker.call(attach_in, "default", "two")
    assert worker.use(tcp) == 1
    assert do(worker, "drain", app="two") == 1
    worker.fails(PoolNotFound, commands.library, "drain")
    assert do(worker, "ping", app="two") is not None


def attach_in(state: State, name: str, app: str) -> None:
    state.pools[name] = sharedpool.attach(name, app=app)


# --- leases that last too long ----------------------------------------------------------------------------------------


def note_abandoned(state: State, pool: str = "default") -> None:
    """Call the hook from now on; the first one fails."""
    state.things["abandoned"] = []
    attached = state.pools[pool].open()._attached
    attached.on_abandoned += [lambda found: 1 // 0, state.things["abandoned"].append]


def thing(state: State, label: str) -> Any:
    return state.things[label]


def test_an_abandoned_lease_is_reported_with_its_thread_and_the_line_that_took_it(
    two: list[Worker], tcp: Target
) -> None:
    holder, other = two
    for worker in two:
        worker.call(commands.collect_log)
    other.use(tcp)
    holder.attach(lease_timeout=0.1)
    holder.call(note_abandoned)
    label = holder.checkout(tcp, thread="forgetful")
    (found,) = wait_until(lambda: holder.call(thing, "abandoned"))
    assert (found.pool, found.thread_name, found.noted, found.reclaimed) == ("default", "forgetful", True, False)
    assert "commands.py" in found.where
    assert "in checkout" in found.where
    assert found.seconds >= 0.1
    (text,) = [text for text in holder.call(commands.log, "WARNING") if "forgetful" in text]
    assert found.where in text
    assert any("hook" in text for text in holder.call(commands.log, "ERROR"))
    wait_until(lambda: [text for text in other.call(commands.log, "WARNING") if f"process {holder.pid}" in text])
    assert holder.exchange(label) == 1
    holder.checkin(label)
    assert other.stat("abandoned") == 1


def test_a_lease_taken_before_the_time_out_was_set_is_reported_with_the_line_its_thread_is_at(
    two: list[Worker], tcp: Target
) -> None:
    holder, operator = two
    holder.attach()
    holder.call(note_abandoned)
    label = holder.checkout(tcp, thread="forgetful")
    do(operator, "start_pool", lease_timeout=0.1)
    (found,) = wait_until(lambda: holder.call(thing, "abandoned"))
    assert (found.thread_name, found.noted) == ("forgetful", False)
    assert "in SimpleQueue" in found.where or "_serve_thread" in found.where
    holder.checkin(label)
    do(operator, "start_pool", lease_timeout=None)
    assert holder.call(checkout_is_plain)


def checkout_is_plain(state: State) -> bool:
    attached = state.pools["default"]._attached
    wait_until(lambda: not attached.noting)
    return attached.places == {}


def test_a_reclaimed_lease_passes_its_permit_on_and_its_checkin_says_so(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    holder, waiter = two
    holder.attach(max_connections=1, lease_timeout=0.2, reclaim=True)
    label = holder.checkout(tcp)
    mine = waiter.begin_checkout(tcp, checkout_timeout=20).result()
    assert waiter.exchange(mine) == 2
    holder.fails(LeaseError, commands.checkin, label)
    waiter.checkin(mine)
    assert (backend.open, backend.peak, waiter.stat("reclaimed_leases")) == (1, 1, 1)


# --- policies ---------------------------------------------------------------------------------------------------------


def test_max_idle_holds_over_all_processes_and_reaches_what_is_idle_already(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    for worker in two:
        for label in [worker.checkout(tcp) for _ in range(3)]:
            worker.checkin(label)
    assert backend.open == 3
    do(two[0], "start_pool", max_idle=1)
    backend.wait_open(1)
    labels = [two[1].checkout(tcp) for _ in range(3)]
    assert backend.open == 3
    for label in labels:
        two[1].checkin(label)
    backend.wait_open(1)


def test_max_lifetime_closes_idle_connections_and_leased_ones_at_their_checkin(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_lifetime=1000)
    leased = worker.checkout(tcp)
    worker.use(tcp)
    do(worker, "start_pool", max_lifetime=0.001)  # shorter than the call takes: both are too old when it arrives
    backend.wait_open(1)
    assert worker.exchange(leased) == 1
    do(worker, "start_pool", max_lifetime=1000)
    worker.checkin(leased)
    backend.wait_open(0)


def test_that_the_cap_is_reached_reaches_a_workers_logging(two: list[Worker], tcp: Target) -> None:
    two[0].call(commands.collect_log)
    two[0].attach("api", max_connections=1)
    label = two[0].checkout(tcp, pool="api")
    (waiting,) = line_up_in("api", two[0], two[1], tcp)
    (text,) = wait_until(lambda: two[0].call(commands.log, "WARNING"))
    assert all(part in text for part in ("'api'", "cap reached", "1 in the queue", "max=1"))
    two[0].checkin(label)
    waiting.result()


def line_up_in(pool: str, observer: Worker, worker: Worker, target: Target) -> list[Any]:
    waiting = worker.begin_checkout(target, thread="waiter", checkout_timeout=None, pool=pool)
    observer.wait_stats(pool, waiting=1)
    return [waiting]


def test_a_limit_lowered_from_fifty_to_five_is_seen_by_the_back_end_long_before_the_idle_timeout(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=50, idle_timeout=3600)
    for label in [worker.checkout(tcp) for _ in range(50)]:
        worker.checkin(label)
    assert backend.open == 50
    do(worker, "start_pool", max_connections=5)
    backend.wait_open(5)
