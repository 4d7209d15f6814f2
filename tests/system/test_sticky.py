"""Connections that may not move: each process keeps its own, and only the permit goes over, after a while."""

from __future__ import annotations

import time

import pytest

from sharedpool import PoolTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.workers import Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


def attach(workers: list[Worker], **options: object) -> None:
    for worker in workers:
        worker.attach(max_connections=1, move=False, **options)


def test_a_socket_never_goes_to_another_process(two: list[Worker], backend: Backend, tcp: Target) -> None:
    attach(two)
    assert [two[i % 2].use(tcp) for i in range(6)] == [1, 2, 3, 4, 5, 6]
    assert backend.peak == 1
    assert two[0].stats().takeovers == 0


def test_below_the_cap_each_process_keeps_its_own(two: list[Worker], backend: Backend, tcp: Target) -> None:
    for worker in two:
        worker.attach(max_connections=2, move=False)
    assert [two[i % 2].use(tcp) for i in range(6)] == [1, 2, 1, 2, 1, 2]
    assert backend.accepted == 2


def test_its_own_process_goes_on_with_it_while_another_waits(two: list[Worker], backend: Backend, tcp: Target) -> None:
    attach(two, steal_after=60)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    two[0].checkin(label)
    assert [two[0].use(tcp) for _ in range(20)] == [1] * 20
    assert not waiting.done
    assert two[0].stats().waiting == 1


def test_its_own_processs_waiters_come_first(two: list[Worker], backend: Backend, tcp: Target) -> None:
    attach(two, steal_after=60)
    label = two[0].checkout(tcp)
    foreign, own = line_up(two[0], [(two[1], tcp), (two[0], tcp)])
    two[0].checkin(label)
    assert two[0].exchange(own.result()) == 1
    assert not foreign.done


def use_until_refused(state: State, label: str, target: Target) -> set[int]:
    """Checkin, then checkout, exchange, checkin until none is to be had; the connections that were used."""
    numbers = set()
    commands.checkin(state, label)
    while True:
        try:
            numbers.add(commands.use(state, target, checkout_timeout=0.05))
        except PoolTimeout:
            return numbers


#: What may not move is closed, so the waiter opens another; what could move is handed over, and stays the first.
MOVING = pytest.mark.parametrize(("moving", "then"), [({"move": False}, 2), ({"order": "sticky"}, 1)])


@pytest.mark.parametrize("busy", [False, True])
@MOVING
def test_after_steal_after_the_permit_goes_to_the_longest_waiter(
    two: list[Worker], backend: Backend, tcp: Target, moving: dict[str, object], then: int, busy: bool
) -> None:
    for worker in two:
        # a tenth is what it may be idle for, also on a machine that lets it run now and then only
        worker.attach(max_connections=1, steal_after=8 if busy else 1.5, **moving)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    if busy:
        assert two[0].call(use_until_refused, label, tcp) == {1}
    else:
        two[0].checkin(label)
    assert two[1].exchange(waiting.result()) == then
    assert (backend.peak, backend.accepted, backend.ids()) == (1, then, [then])
    assert sum(two[0].stats().closes.values()) == then - 1


@MOVING
def test_what_its_process_does_not_use_goes_over_long_before_steal_after(
    two: list[Worker], backend: Backend, tcp: Target, moving: dict[str, object], then: int
) -> None:
    for worker in two:
        worker.attach(max_connections=1, steal_after=20, **moving)
    label = two[0].checkout(tcp)
    began = time.monotonic()
    first, second = line_up(two[0], [(two[1], tcp), (two[1], tcp)])
    two[0].checkin(label)
    label = first.result()
    assert 2 <= time.monotonic() - began < 20  # a tenth: it was idle for so long
    two[1].checkin(label)
    assert two[1].exchange(second.result()) == then
    assert two[0].stats().closes["evicted"] == then - 1
    assert (backend.peak, backend.accepted) == (1, then)


def test_sticky_order_can_be_chosen_for_what_could_move(two: list[Worker], backend: Backend, tcp: Target) -> None:
    for worker in two:
        worker.attach(max_connections=1, order="sticky", steal_after=60)
    label = two[0].checkout(tcp)
    foreign, own = line_up(two[0], [(two[1], tcp), (two[0], tcp)])
    two[0].checkin(label)
    two[0].checkin(own.result())
    assert [two[0].use(tcp) for _ in range(20)] == [1] * 20
    assert not foreign.done
    assert (backend.accepted, two[0].stats().waiting) == (1, 1)


def test_where_another_address_is_wanted_what_could_move_is_closed_at_once(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    for worker in two:
        worker.attach(max_connections=1, order="sticky", steal_after=60)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[0], [(two[1], unix)])
    two[0].checkin(label)
    assert two[1].exchange(waiting.result()) == 2
    assert two[0].stats().closes["evicted"] == 1
    assert (backend.peak, backend.accepted) == (1, 2)


def test_strict_order_can_be_chosen_for_what_may_not_move(two: list[Worker], backend: Backend, tcp: Target) -> None:
    attach(two, order="fifo")
    label = two[0].checkout(tcp)
    foreign, own = line_up(two[0], [(two[1], tcp), (two[0], tcp)])
    two[0].checkin(label)
    label = foreign.result()
    assert two[1].exchange(label) == 2
    assert not own.done
    two[1].checkin(label)
    assert two[0].exchange(own.result()) == 3
    assert backend.peak == 1
