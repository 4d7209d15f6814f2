"""Only a live and silent connection is leased: the remote closes, half-closes, or says something nobody asked for."""

from __future__ import annotations

import select

import pytest

from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.workers import Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["tcp", "unix"])
def target(request: pytest.FixtureRequest, backend: Backend) -> Target:
    return backend.tcp if request.param == "tcp" else backend.listen_unix()


def wait_readable(state: State, label: str) -> None:
    """Until something lies there unread."""
    poll = select.poll()
    poll.register(state.leases[label].conn, select.POLLIN)
    assert poll.poll(20_000)


@pytest.mark.parametrize("how", ["told", "rst"])
def test_an_idle_connection_that_the_remote_closes_is_closed_without_any_call(
    worker: Worker, backend: Backend, target: Target, how: str
) -> None:
    worker.use(target)
    assert backend.close(how=how) == 1
    worker.wait_stats(idle=0, closing=0, remote_closed=1)
    assert worker.use(target) == 2


def test_an_idle_connection_that_the_remote_has_just_closed_is_not_leased(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    for i in range(20):
        number = two[i % 2].use(target)
        assert backend.close(ids=[number]) == 1
        assert two[(i // 2) % 2].use(target) == number + 1
    assert backend.peak == 1


def test_a_half_closed_connection_is_not_leased(two: list[Worker], backend: Backend, target: Target) -> None:
    """hackney #230, p41: half-closed sockets were kept and handed over."""
    two[0].attach(max_connections=1)
    two[0].use(target)
    assert backend.half_close() == 1
    assert two[1].use(target) == 2
    assert backend.peak == 1


def test_a_connection_that_the_remote_closed_during_its_lease_is_not_leased_again(
    worker: Worker, backend: Backend, target: Target
) -> None:
    label = worker.checkout(target)
    backend.close()
    worker.call(wait_readable, label)
    worker.checkin(label)
    assert worker.use(target) == 2
    worker.wait_stats(idle=1, closing=0)


def test_a_half_close_during_the_lease_is_remembered_at_its_checkin(
    worker: Worker, backend: Backend, target: Target
) -> None:
    """The edge of a remote close comes once; if it falls into a lease, the checkin has to know."""
    label = worker.checkout(target)
    backend.half_close()
    worker.call(wait_readable, label)
    worker.checkin(label)
    worker.wait_stats(idle=0, closing=0)
    backend.wait_open(0)


def test_a_waiter_gets_a_fresh_connection_when_the_one_checked_in_is_dead(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    """hackney p32: the slot leaked when the checkin found a bad socket."""
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    (waiting,) = line_up(two[0], [(two[1], target)])
    backend.close()
    two[0].checkin(label)
    assert two[1].exchange(waiting.result()) == 2
    assert backend.peak == 1


def test_unread_bytes_at_the_checkin_never_reach_another(two: list[Worker], backend: Backend, target: Target) -> None:
    """hackney p42, #884, #886, #888: the rest of one answer was given to the next user."""
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    two[0].call(commands.send, label, b"whose is this\n")
    two[0].call(wait_readable, label)
    two[0].checkin(label)
    assert two[1].use(target, "mine") == 2
    assert backend.peak == 1


def test_unread_bytes_at_the_checkin_pass_the_permit_to_the_waiter_but_not_the_connection(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    (waiting,) = line_up(two[0], [(two[1], target)])
    two[0].call(commands.send, label, b"whose is this\n")
    two[0].call(wait_readable, label)
    two[0].checkin(label)
    assert two[1].exchange(waiting.result(), "mine") == 2
    assert backend.peak == 1


def test_bytes_that_come_while_idle_never_reach_the_next_user(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    for i in range(10):
        label = two[0].checkout(target)
        two[0].call(commands.send, label, b"!late answer\n")
        backend_has_it = two[0].exchange(label, f"so the back end has read it {i}")
        two[0].checkin(label)
        assert backend.answer(ids=[backend_has_it]) == 1
        assert two[1].use(target, f"mine {i}") > backend_has_it
    assert backend.peak == 1


def test_bytes_that_come_after_the_handoff_never_reach_the_waiter(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    two[0].call(commands.send, label, b"!late answer\n")
    number = two[0].exchange(label, "so the back end has read it")
    (waiting,) = line_up(two[0], [(two[1], target)])
    two[1].stop()
    two[0].checkin(label)
    assert backend.answer(ids=[number]) == 1
    two[1].resume()
    assert two[1].exchange(waiting.result(), "mine") == 2
    assert backend.peak == 1


def test_unsolicited_bytes_close_the_idle_connection(two: list[Worker], backend: Backend, target: Target) -> None:
    two[0].attach(max_connections=1)
    two[0].use(target)
    assert backend.say("server says hello\n") == 1
    assert two[1].use(target, "mine") == 2
    assert backend.peak == 1


def test_when_the_last_used_connection_is_dead_the_checkout_still_succeeds(
    worker: Worker, backend: Backend, target: Target
) -> None:
    """hackney #850, #869, #914: a connection that died in the liveness check failed the checkout."""
    worker.attach(max_connections=3)
    labels = [worker.checkout(target) for _ in range(3)]
    for label in labels:
        worker.checkin(label)
    assert backend.close(ids=[2, 3]) == 2
    assert worker.use(target) in (1, 4)
    assert backend.peak == 3


def test_a_restarted_back_end_costs_no_error(two: list[Worker], backend: Backend, target: Target) -> None:
    two[0].attach(max_connections=4)
    labels = [(worker, worker.checkout(target)) for worker in two * 2]
    for worker, label in labels:
        worker.checkin(label)
    backend.do("refuse", name=target.transport)
    assert backend.close() == 4
    backend.do("accept_again", name=target.transport)
    assert all(worker.use(target) > 4 for worker in two * 3)
    assert backend.peak == 4
