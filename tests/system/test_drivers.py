"""Drivers of one's own: session states that travel with a connection, resets, and what stays in its process."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import pytest

from sharedpool import OptionError
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.session_driver import HangingDriver, HearingDriver, SessionDriver, StallingDriver
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker


@dataclasses.dataclass(frozen=True)
class Used:
    """What one lease had: the connection's number at the back end, its state, its object, how often that was reset."""

    number: int
    session: bytes
    thing: int
    resets: int


def driver_of(state: State, label: str) -> SessionDriver:
    """The worker's driver of that label; a plain one at its first use."""
    found: SessionDriver = state.things.setdefault(f"driver {label}", SessionDriver())
    return found


def make_driver(state: State, label: str, kind: type[SessionDriver] = SessionDriver, **options: Any) -> None:
    state.things[f"driver {label}"] = kind(**options)


def take(state: State, target: Target, label: str = "a", lease: str = "", **options: Any) -> Used:
    """Lease through the driver of that label, talk, and give back; or keep it, under the lease's label."""
    pool = commands.pool_of(state, "default")
    found = pool.checkout(target.host, target.port, driver_of(state, label), **options)
    conn = found.conn
    used = Used(commands.exchange_over(conn, "hello"), conn.session, id(conn), conn.resets)
    if lease:
        state.leases[lease] = found
    else:
        found.checkin()
    return used


def closed_objects(state: State, label: str = "a") -> int:
    return len(driver_of(state, label).closed)


@pytest.fixture
def pair(two: list[Worker]) -> list[Worker]:
    two[0].attach(max_connections=1, max_foreign=8)
    return two


def test_a_session_state_goes_with_its_connection_and_others_use_is_reset(pair: list[Worker], tcp: Target) -> None:
    one, other = pair
    first = one.call(take, tcp)
    assert first.session == f"{one.pid}/1 \xff\0".encode("latin-1")
    assert one.call(take, tcp) == first, "nobody else has used it: as it was left"
    second = other.call(take, tcp)
    assert (second.number, second.session, second.resets) == (first.number, first.session, 1)
    assert other.call(take, tcp).resets == 1
    third = one.call(take, tcp)
    assert (third.number, third.thing, third.resets) == (first.number, first.thing, 1), "the same object, reset"
    assert one.call(take, tcp).resets == 1
    fourth = other.call(take, tcp)
    assert (fourth.thing, fourth.resets) == (second.thing, 2)


def test_a_handoff_is_reset_in_another_process_but_not_in_the_same(pair: list[Worker], tcp: Target) -> None:
    one, other = pair
    one.call(take, tcp, lease="held")
    waits = other.begin(take, tcp)
    one.wait_stats(waiting=1)
    one.checkin("held")
    assert waits.result().resets == 1
    one.call(take, tcp, lease="held")
    again = one.begin(take, tcp, thread="second")
    one.wait_stats(waiting=1)
    one.checkin("held")
    assert again.result().resets == 1, "once, for the other process's use"


def test_one_that_cannot_be_reset_is_closed_and_the_permit_opens_another(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, other = pair
    other.call(make_driver, "a", fails=True)
    first = one.call(take, tcp)
    second = other.call(take, tcp)
    assert second.number != first.number
    assert second.session.startswith(str(other.pid).encode())
    assert one.stats().closes["check_failed"] == 1
    assert backend.peak == 1


def test_a_driver_may_reset_at_every_lease(pair: list[Worker], tcp: Target) -> None:
    one, _ = pair
    one.call(make_driver, "a", always=True)
    assert [one.call(take, tcp).resets for _ in range(3)] == [0, 1, 2]


def test_objects_of_one_driver_are_never_lent_through_another(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, _ = pair
    first = one.call(take, tcp, label="a")
    second = one.call(take, tcp, label="b")
    assert second.number == first.number, "the same session"
    assert second.thing != first.thing
    assert second.session == first.session
    assert second.resets == 1
    assert backend.accepted == 1


def test_what_cannot_be_exported_stays_in_its_process(two: list[Worker], backend: Backend, tcp: Target) -> None:
    one, other = two
    one.attach(max_connections=2)
    for worker in two:
        worker.call(make_driver, "a", exports=False)
    first = one.call(take, tcp)
    second = other.call(take, tcp)
    assert second.number != first.number
    assert one.call(take, tcp) == first
    assert other.call(take, tcp) == second
    assert one.stats().takeovers == 0
    assert backend.peak == 2


def test_the_owner_of_one_that_stays_closes_its_object_when_somebody_else_needs_the_permit(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=1, steal_after=0.05)
    for worker in two:
        worker.call(make_driver, "a", exports=False, parks=False)
    first = one.call(take, tcp)
    second = other.call(take, tcp, checkout_timeout=20)
    assert second.number != first.number
    assert backend.peak == 1
    wait_until(lambda: one.call(closed_objects) == 1)
    assert one.call(take, tcp, checkout_timeout=20).number not in (first.number, second.number)


def test_one_drivers_object_that_stays_is_closed_for_another_driver_of_the_process(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, _ = pair
    one.call(make_driver, "a", exports=False)
    one.call(make_driver, "b", exports=False)
    first = one.call(take, tcp, label="a")
    second = one.call(take, tcp, label="b", checkout_timeout=20)
    assert second.number != first.number
    assert backend.peak == 1


def test_what_an_idle_connection_says_is_for_its_driver_to_judge(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, _ = pair
    one.call(make_driver, "a", HearingDriver)
    first = one.call(take, tcp)
    backend.say("ticket", [first.number])
    wait_until(lambda: one.call(readable, "a"))
    assert one.call(take, tcp) == first
    backend.say("!", [first.number])
    wait_until(lambda: one.call(readable, "a"))
    assert one.call(take, tcp).number != first.number
    assert one.stats().closes["ended"] == 1


def readable(state: State, label: str) -> bool:
    attached: Any = commands.pool_of(state, "default").attached
    return any(entry.gate.quiet(0) for entry in attached.entries.values())


def test_a_successor_learns_the_session_states(pair: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    one, other = pair
    first = one.call(take, tcp)
    before = scope.arbiter()
    os.kill(before, 9)
    second = other.call(take, tcp, checkout_timeout=20)
    assert scope.arbiter() != before
    assert (second.number, second.session, second.resets) == (first.number, first.session, 1)


def test_a_dead_workers_session_is_adopted_with_its_state(harness: Harness, backend: Backend, tcp: Target) -> None:
    one, other = harness.start_many(2)
    one.attach(max_connections=1)
    first = one.call(take, tcp)
    other.stats()
    os.kill(one.pid, signal.SIGKILL)
    second = other.call(take, tcp, checkout_timeout=20)
    assert (second.number, second.session, second.resets) == (first.number, first.session, 1)
    assert other.stats().adopted == 1


def leave_pool(state: State) -> None:
    """Close the pool; the opening that this breaks off comes to its end first."""
    pool = commands.pool_of(state, "default")
    attached: Any = pool.attached
    state.things["driver a"].over = lambda: not attached.opening
    pool.close()


def test_a_process_that_leaves_while_it_opens_keeps_its_permit_until_the_remote_has_closed(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    leaver, other = two
    other.attach(max_connections=1, close_timeout=60)
    other.stats()
    leaver.call(make_driver, "a", StallingDriver)
    backend.do("hold_closes")
    opening = leaver.begin(take, tcp, connect_timeout=30, thread="opening")
    wait_until(lambda: backend.open == 1)
    leaver.call(leave_pool)
    opening.error()
    other.wait_stats(processes=1)
    waits = other.begin(commands.use, tcp, thread="waits")
    other.wait_stats(waiting=1, closing=1)
    assert backend.peak == 1
    backend.do("release_closes")
    waits.result()
    assert backend.peak == 1


def prewarm(state: State, target: Target, label: str) -> None:
    commands.pool_of(state, "default").prewarm(target.host, target.port, driver_of(state, label), count=1)


def test_an_opening_that_is_broken_off_for_a_waiter_keeps_its_permit_until_the_remote_has_closed(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    warmer, other = two
    other.attach(max_connections=1, close_timeout=60)
    warmer.call(make_driver, "a", HangingDriver)
    backend.do("hold_closes")
    warmer.call(prewarm, tcp, "a")
    wait_until(lambda: backend.open == 1)
    waits = other.begin(commands.use, tcp, thread="waits")
    other.wait_stats(waiting=1, closing=1)
    assert backend.peak == 1
    backend.do("release_closes")
    waits.result()
    assert backend.peak == 1


def test_a_transport_that_is_no_driver_is_refused(pair: list[Worker], tcp: Target) -> None:
    error = pair[0].fails(OptionError, nonsense, tcp)
    assert "or a driver" in str(error)


def nonsense(state: State, target: Target) -> None:
    commands.pool_of(state, "default").checkout(target.host, target.port, object())
