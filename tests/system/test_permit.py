"""Permits: the cap without a connection."""

from __future__ import annotations

import pytest

from sharedpool import PoolTimeout
from tests.support import commands, processes
from tests.support.state import State
from tests.support.workers import Worker

pytestmark = pytest.mark.usefixtures("patient")


def test_permits_are_counted_over_processes(two: list[Worker]) -> None:
    for worker in two:
        worker.call(commands.hold_permit, "openai", "p", max_connections=2)
    two[0].fails(PoolTimeout, commands.hold_permit, "openai", "q", max_connections=2, checkout_timeout=0.1)
    stats = two[0].stats("openai")
    assert (stats.max_connections, stats.in_use, stats.idle) == (2, 2, 0)
    two[1].call(commands.release_permit, "p")
    two[0].call(commands.hold_permit, "openai", "q", max_connections=2, checkout_timeout=20)


def test_permits_are_given_in_the_order_of_asking(three: list[Worker]) -> None:
    holder, *waiters = three
    options = {"max_connections": 1, "checkout_timeout": None}
    holder.call(commands.hold_permit, "openai", "p", **options)
    queue = []
    for worker in waiters:
        queue.append(worker.begin(commands.hold_permit, "openai", "p", thread="t", **options))
        holder.wait_stats("openai", waiting=len(queue))
    holder.call(commands.release_permit, "p")
    queue[0].result()
    assert not queue[1].done
    waiters[0].call(commands.release_permit, "p")
    queue[1].result()
    holder.wait_stats("openai", in_use=1, waiting=0)


def test_a_killed_holders_permit_is_free_again(two: list[Worker]) -> None:
    options = {"max_connections": 1, "checkout_timeout": None}
    two[0].call(commands.hold_permit, "openai", "p", **options)
    waiting = two[1].begin(commands.hold_permit, "openai", "p", thread="t", **options)
    two[1].wait_stats("openai", waiting=1)
    two[0].kill()
    waiting.result()
    two[1].wait_stats("openai", in_use=1, waiting=0, closing=0, processes=1)


def test_a_live_holders_permit_is_never_taken_away(two: list[Worker]) -> None:
    options = {"max_connections": 1}
    two[0].call(commands.hold_permit, "openai", "p", **options)
    two[0].stop()
    two[1].fails(PoolTimeout, commands.hold_permit, "openai", "p", checkout_timeout=0.5, **options)
    two[0].resume()
    two[0].call(commands.release_permit, "p")
    two[1].call(commands.hold_permit, "openai", "p", checkout_timeout=20, **options)


def decorate(state: State, name: str) -> list[object]:
    """A decorated function, called, failing, and asked for its name; and the permits in use inside and after."""
    import sharedpool

    permit = sharedpool.permit(name, max_connections=1, checkout_timeout=30)
    pool = sharedpool.attach(name, max_connections=1)

    @permit
    def request(value: int) -> tuple[int, int]:
        """Docs."""
        if value < 0:
            raise ValueError(value)
        return value, pool.stats().in_use

    found: list[object] = [request.__name__, request.__doc__, request(1), request(2)]
    with pytest.raises(ValueError, match="-1"):
        request(-1)
    return [*found, pool.stats().in_use]


def test_a_permit_is_a_decorator(worker: Worker) -> None:
    assert worker.call(decorate, "openai") == ["request", "Docs.", (1, 1), (2, 1), 0]


def nest(state: State, name: str, depth: int) -> int:
    """One permit object, entered again before it was left, by this thread."""
    import sharedpool

    permit = sharedpool.permit(name, max_connections=depth, checkout_timeout=30)
    pool = sharedpool.attach(name, max_connections=depth)

    def enter(left: int) -> int:
        if not left:
            return int(pool.stats().in_use)
        with permit:
            return enter(left - 1)

    inside = enter(depth)
    assert pool.stats().in_use == 0
    return inside


def test_one_permit_object_can_be_entered_many_times(worker: Worker) -> None:
    assert worker.call(nest, "openai", 3) == 3


def permits_made_anew(state: State, name: str, number: int) -> int:
    """The documented form, a new permit object for every use; the pool's processes as counted after them."""
    import sharedpool

    for _ in range(number):
        with sharedpool.permit(name, max_connections=2, checkout_timeout=30):
            pass
    return int(sharedpool.attach(name, max_connections=2).stats().processes)


def test_a_permit_made_anew_for_every_use_costs_no_attachment_of_its_own(worker: Worker) -> None:
    assert worker.call(permits_made_anew, "openai", 1) == 1
    before = processes.threads(worker.pid), len(processes.descriptors(worker.pid))
    assert worker.call(permits_made_anew, "openai", 30) == 1
    assert (processes.threads(worker.pid), len(processes.descriptors(worker.pid))) == before


def fail_inside(state: State, name: str) -> int:
    import sharedpool

    with pytest.raises(KeyError), sharedpool.permit(name, max_connections=1, checkout_timeout=30):
        raise KeyError
    return int(sharedpool.attach(name).stats().in_use)


def test_an_exception_inside_frees_the_permit(worker: Worker) -> None:
    assert worker.call(fail_inside, "openai") == 0
    assert worker.call(fail_inside, "openai") == 0
