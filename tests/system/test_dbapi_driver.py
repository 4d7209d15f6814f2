"""Connections of a library that makes its own: they stay where they are, and the permit waits until they are closed.

`close_timeout` is a minute: nothing here goes on because the arbiter has lost its patience.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import Any

import pytest

from sharedpool import PoolTimeout, testing
from sharedpool.drivers.dbapi import DbapiDriver
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Worker


class ToyError(Exception):
    """What the toy library raises."""


class Toy:
    """A connection of a library that shows nobody its socket."""

    def __init__(self, target: Target) -> None:
        if target.port == 0:
            raise ToyError("no such place")
        self._sock = socket.create_connection((target.host, target.port), timeout=20)
        self.closed = False

    def ask(self, text: str = "hello") -> int:
        return commands.exchange_over(self._sock, text)

    def close(self) -> None:
        """Waits for the other side: a server may take the next connection before it notices that this one has ended."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(4096):
                pass
        self._sock.close()
        self.closed = True


def toys(target: Target) -> DbapiDriver:
    return DbapiDriver("toy", lambda: Toy(target), clean=lambda toy: not toy.closed)


def driver_of(state: State, target: Target, label: str = "") -> DbapiDriver:
    found: DbapiDriver = state.things.setdefault(f"toys {label}", toys(target))
    return found


def take(state: State, target: Target, lease: str = "", label: str = "", **options: Any) -> int:
    """Lease a toy and use it; the connection's number. Keep the lease, or give it back."""
    pool = commands.pool_of(state, "default")
    found = pool.checkout("toyland", 0, driver_of(state, target, label), **options)
    number = int(found.conn.connection.ask())
    if lease:
        state.leases[lease] = found
    else:
        found.checkin()
    return number


def close_toy(state: State, lease: str) -> None:
    state.leases[lease].conn.connection.close()


@pytest.fixture
def pair(two: list[Worker]) -> list[Worker]:
    for worker in two:
        worker.attach(max_connections=1, close_timeout=60, steal_after=0.05, checkout_timeout=10)
    return two


def test_it_never_goes_to_another_process_and_its_owner_closes_it_first(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    assert [pair[i // 2 % 2].call(take, tcp) for i in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    stats = pair[0].stats()
    assert (backend.peak, stats.takeovers, stats.closed_unconfirmed) == (1, 0, 0)
    closes = {reason: number for reason, number in stats.closes.items() if number}
    assert sum(closes.values()) == 3
    assert set(closes) <= {"evicted", "reclaimed"}, "by who waited, or by the arbiter for him"


def test_while_it_is_used_others_wait_and_then_get_the_permit(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    pair[0].call(take, tcp, lease="held")
    waits = pair[1].begin(take, tcp)
    pair[0].wait_stats(waiting=1)
    pair[0].checkin("held")
    assert waits.result() == 2
    assert backend.peak == 1


def test_its_own_process_goes_on_with_it_until_others_have_waited_long(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    for worker in two:
        worker.attach(max_connections=1, close_timeout=60, steal_after=60, checkout_timeout=1)
    two[0].call(take, tcp, lease="held")
    waits = two[1].begin(take, tcp)
    two[0].wait_stats(waiting=1)
    two[0].checkin("held")
    assert [two[0].call(take, tcp) for _ in range(20)] == [1] * 20
    assert not waits.done
    assert isinstance(waits.error(PoolTimeout), PoolTimeout)


def test_an_idle_one_is_closed_by_its_owner_when_its_time_is_over(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    two[0].attach(max_connections=2, close_timeout=60, idle_timeout=0.2)
    two[0].call(take, tcp)
    wait_until(lambda: backend.open == 0)
    assert two[0].wait_stats(used=0).closed_unconfirmed == 0


def test_a_lowered_limit_closes_what_is_idle(two: list[Worker], backend: Backend, tcp: Target) -> None:
    two[0].attach(max_connections=2, close_timeout=60)
    two[0].call(take, tcp, lease="a")
    two[0].call(take, tcp, lease="b")
    two[0].checkin("a")
    two[0].checkin("b")
    two[0].call(commands.library, "set_max_connections", "default", 1)
    wait_until(lambda: backend.open == 1)
    two[0].wait_stats(used=1)


@pytest.mark.parametrize("leased", [False, True])
def test_of_a_killed_process_the_permit_goes_on(
    pair: list[Worker], backend: Backend, tcp: Target, leased: bool
) -> None:
    pair[0].call(take, tcp, lease="held" if leased else "")
    os.kill(pair[0].pid, signal.SIGKILL)
    assert pair[1].call(take, tcp) == 2
    assert pair[1].stats().closed_unconfirmed == 0


def test_a_forked_child_does_not_make_it_look_open_and_does_not_close_it(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    pair[0].call(take, tcp, lease="held")
    child = pair[0].fork()
    child.call(commands.forget, "held")
    assert pair[0].call(ask_held, "held") == 1
    os.kill(pair[0].pid, signal.SIGKILL)
    pair[1].call(take, tcp)
    assert child.call(commands.environment, "SHAREDPOOL_SPEED"), "it lives"


def ask_held(state: State, lease: str) -> int:
    return int(state.leases[lease].conn.connection.ask())


def test_what_cannot_be_opened_says_so_and_keeps_no_permit(pair: list[Worker], backend: Backend, tcp: Target) -> None:
    nowhere = Target("nowhere", 0)
    for _ in range(3):
        assert "no such place" in str(pair[0].fails(ToyError, take, nowhere, label="nowhere"))
    assert pair[1].call(take, tcp) == 1
    assert pair[1].stats().open_failures == 3


def test_one_that_is_not_clean_is_closed_at_its_checkin(pair: list[Worker], backend: Backend, tcp: Target) -> None:
    pair[0].call(take, tcp, lease="held")
    pair[0].call(close_toy, "held")
    pair[0].checkin("held")
    assert pair[0].call(take, tcp) == 2
    assert pair[0].stats().closes["unclean"] == 1


def test_another_driver_of_the_same_process_does_not_get_its_objects(
    pair: list[Worker], backend: Backend, tcp: Target
) -> None:
    assert pair[0].call(take, tcp, label="one") == 1
    assert pair[0].call(take, tcp, label="other") == 2
    assert backend.peak == 1
    assert pair[0].stats().closed_unconfirmed == 0


def test_a_pool_that_is_left_closes_what_was_idle(pair: list[Worker], backend: Backend, tcp: Target) -> None:
    pair[0].call(take, tcp)
    pair[0].call(close_pool)
    wait_until(lambda: backend.open == 0)
    assert pair[1].call(take, tcp) == 2


def close_pool(state: State) -> None:
    state.pools["default"].close()


def test_in_local_mode_too(backend: Backend, tcp: Target) -> None:
    import sharedpool

    with testing.local_mode():
        pool = sharedpool.attach("toys", max_connections=1, close_timeout=60, checkout_timeout=10)
        driver = toys(tcp)
        for expected in (1, 1):
            with pool.connection("toyland", 0, driver) as session:
                assert session.connection.ask() == expected
        with pytest.raises(ZeroDivisionError), pool.connection("toyland", 0, driver) as session:
            raise ZeroDivisionError
        with pool.connection("toyland", 0, driver) as session:
            assert session.connection.ask() == 2
        assert backend.peak == 1
