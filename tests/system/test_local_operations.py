"""Operations and policies in one process, in both modes: what they do must not depend on the mode."""

from __future__ import annotations

from typing import Any

import pytest

from sharedpool import DrainTimeout, LeaseError, OptionError, PoolNotFound, PoolTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["shared", "local"])
def solo(request: pytest.FixtureRequest, harness: Harness) -> Worker:
    """One worker in the mode."""
    return harness.start(SHAREDPOOL_MODE=str(request.param))


def do(worker: Worker, function: str, *arguments: Any, **options: Any) -> Any:
    return worker.call(commands.library, function, *arguments, **options)


def idle_ones(worker: Worker, target: Target, number: int) -> None:
    for label in [worker.checkout(target) for _ in range(number)]:
        worker.checkin(label)


def test_a_pause_keeps_everybody_waiting_and_a_resume_serves_them_in_order(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    solo.attach(max_connections=1)
    label = solo.checkout(tcp)
    do(solo, "pause")
    solo.checkin(label)
    queue = line_up(solo, [(solo, tcp), (solo, tcp)])
    assert "paused" in str(solo.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.05))
    assert [solo.stat("idle"), queue[0].done, queue[1].done] == [1, False, False]
    do(solo, "resume")
    first = queue[0].result()
    assert (solo.exchange(first), queue[1].done) == (1, False)
    solo.checkin(first)
    assert solo.exchange(queue[1].result()) == 1


def test_a_drain_of_a_key_waits_for_the_back_end_or_says_who_holds_it_up(
    solo: Worker, backend: Backend, tcp: Target
) -> None:
    other = backend.listen("other")
    idle_ones(solo, tcp, 2)
    solo.use(other)
    assert do(solo, "drain", "default", (tcp.host, tcp.port), wait=20) == 2
    assert backend.ids() == [3]
    label = solo.checkout(other)
    error = solo.fails(DrainTimeout, commands.library, "drain", wait=0.05)
    assert (error.pids, error.left) == ([solo.pid], 1)
    solo.checkin(label)
    backend.wait_open(0)
    assert (solo.stat("drained"), solo.use(tcp)) == (2, 4)


def test_a_kill_ends_leased_connections_and_their_checkin_closes_them(
    solo: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    labels = [solo.checkout(target) for target in (tcp, unix)]
    solo.use(tcp)
    assert do(solo, "kill") == 3
    backend.wait_open(0)
    for label in labels:
        solo.fails(ConnectionError, commands.exchange, label)
        solo.checkin(label)
    solo.wait_stats(in_use=0, idle=0, closing=0, killed=1)


def test_permits_are_nobodys_connections(solo: Worker) -> None:
    solo.call(commands.hold_permit, "reports", "held", max_connections=1)
    assert (do(solo, "drain", "reports", wait=1), do(solo, "kill", "reports")) == (0, 0)
    solo.call(commands.release_permit, "held")


def test_counters_start_anew_after_a_reset(solo: Worker, tcp: Target) -> None:
    idle_ones(solo, tcp, 2)
    do(solo, "reset_stats")
    solo.use(tcp)
    stats = solo.stats()
    assert (stats.checkouts, stats.reuses, stats.idle) == (1, 1, 2)


def test_a_ping_is_answered(solo: Worker, tcp: Target) -> None:
    solo.use(tcp)
    assert do(solo, "ping")["incarnation"] == 1


def test_wrong_arguments_are_refused(solo: Worker, tcp: Target) -> None:
    solo.use(tcp)
    solo.fails(OptionError, commands.library, "drain", "default", wait=-1)
    solo.fails(OptionError, commands.library, "drain", "default", "not a url")
    solo.fails(OptionError, commands.library, "kill", "a b")
    solo.fails(OptionError, commands.library, "ping", timeout="soon")
    solo.fails(PoolNotFound, commands.library, "pause", "nobody")


def test_max_idle_closes_what_is_too_much(solo: Worker, backend: Backend, tcp: Target) -> None:
    idle_ones(solo, tcp, 4)
    do(solo, "start_pool", max_idle=2)
    backend.wait_open(2)
    idle_ones(solo, tcp, 4)
    backend.wait_open(2)
    solo.wait_stats(idle=2, closing=0, over_idle=4)
    do(solo, "start_pool", max_idle=None)
    idle_ones(solo, tcp, 4)
    assert backend.open == 4


def test_max_lifetime_ends_idle_connections_and_marks_leased_ones(solo: Worker, backend: Backend, tcp: Target) -> None:
    idle_ones(solo, tcp, 2)
    label = solo.checkout(tcp)
    do(solo, "start_pool", max_lifetime=0.001)  # shorter than the call takes: both are too old when it arrives
    solo.wait_stats(idle=0, in_use=1, closing=0, max_lifetime=1)
    assert backend.open == 1
    do(solo, "start_pool", max_lifetime=None)
    solo.checkin(label)
    backend.wait_open(0)


def test_an_abandoned_lease_is_logged_once(solo: Worker, tcp: Target) -> None:
    solo.call(commands.collect_log)
    solo.attach(lease_timeout=0.05)
    label = solo.checkout(tcp)
    solo.wait_stats(abandoned=1)
    wait_until(lambda: solo.call(commands.log, "WARNING"))
    solo.stats()
    assert all("abandoned" in text for text in solo.call(commands.log, "WARNING"))
    assert solo.stat("abandoned") == 1
    solo.checkin(label)


def test_a_reclaimed_permit_goes_to_the_next(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=1, lease_timeout=0.1, reclaim=True)
    label = solo.checkout(tcp)
    other = solo.checkout(tcp, checkout_timeout=20, thread="other")
    assert solo.exchange(other) == 2
    solo.fails(LeaseError, commands.checkin, label)
    solo.checkin(other)
    assert (backend.peak, solo.stat("reclaimed_leases")) == (1, 1)
