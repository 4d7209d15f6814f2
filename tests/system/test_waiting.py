"""The queue: first come, first served over processes, threads and addresses, and nobody lost in it."""

from __future__ import annotations

import random
import re
import threading
import time

import pytest

from sharedpool import PoolStopped, PoolTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture
def holder(worker: Worker, tcp: Target) -> Worker:
    """A worker that holds the only permit, as lease "held"."""
    worker.attach(max_connections=1)
    worker.checkout(tcp, label="held")
    return worker


def serve_in_turn(holder: Worker, waiters: list[Worker], queue: list[object]) -> list[int]:
    """Give the lease back and see that exactly the next in the queue gets it, and so on; the connections used."""
    numbers, last, label = [], holder, "held"
    for i, pending in enumerate(queue):
        last.checkin(label)
        last, label = waiters[i], pending.result()  # type: ignore[attr-defined]
        assert not any(later.done for later in queue[i + 1 :])  # type: ignore[attr-defined]
        numbers.append(last.exchange(label, f"waiter {i}"))
    last.checkin(label)
    return numbers


def test_the_longest_waiter_of_all_processes_is_served_first(
    holder: Worker, harness: Harness, backend: Backend, tcp: Target
) -> None:
    waiters = harness.start_many(5)
    queue = line_up(holder, [(waiter, tcp) for waiter in waiters])
    assert serve_in_turn(holder, waiters, queue) == [1] * 5
    assert (backend.accepted, holder.stats().handoffs) == (1, 5)


def test_threads_of_one_process_and_of_others_wait_in_one_queue(
    holder: Worker, harness: Harness, backend: Backend, tcp: Target
) -> None:
    first, second = harness.start_many(2)
    waiters = [first, first, second, holder, first, second, holder]
    queue = line_up(holder, [(waiter, tcp) for waiter in waiters])
    assert serve_in_turn(holder, waiters, queue) == [1] * 7
    assert backend.accepted == 1


def test_waiters_for_different_addresses_wait_in_one_queue(
    holder: Worker, harness: Harness, backend: Backend, tcp: Target, unix: Target
) -> None:
    """hackney #312, p26: a waiter for host B waited for ever while host A's checkins went by."""
    waiters = harness.start_many(5)
    targets = [unix, tcp, tcp, backend.listen("other"), tcp]
    queue = line_up(holder, list(zip(waiters, targets, strict=True)))
    assert serve_in_turn(holder, waiters, queue) == [2, 3, 3, 4, 5]
    assert backend.peak == 1


def test_a_newcomer_does_not_overtake(holder: Worker, harness: Harness, backend: Backend, tcp: Target) -> None:
    """The releasing process wants the lease again at once, and still has to wait behind the one that waited."""
    (waiter,) = harness.start_many(1)
    queue = line_up(holder, [(waiter, tcp)])
    holder.begin(commands.checkin, "held")
    again = holder.begin_checkout(tcp, checkout_timeout=None)
    label = queue[0].result()
    waiter.wait_stats(waiting=1, in_use=1)
    assert not again.done
    waiter.checkin(label)
    assert holder.exchange(again.result()) == 1


def test_a_discarded_lease_passes_its_permit_to_the_next(
    holder: Worker, harness: Harness, backend: Backend, tcp: Target
) -> None:
    """hackney #643, #661, p13b: the slot of a bad socket leaked at its checkin."""
    waiters = harness.start_many(2)
    queue = line_up(holder, [(waiter, tcp) for waiter in waiters])
    holder.discard("held")
    label = queue[0].result()
    assert waiters[0].exchange(label) == 2
    assert not queue[1].done
    waiters[0].discard(label)
    assert waiters[1].exchange(queue[1].result()) == 3
    assert backend.peak == 1


def test_a_checkout_that_waits_too_long_leaves_the_queue(
    holder: Worker, two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #419, #420, #440, p07, p25: a departed waiter got the socket, and the pool was wedged."""
    impatient, patient = two
    for worker in two:
        worker.stats()  # attached, which is none of its time
    begun = time.monotonic()
    (given_up,) = line_up(holder, [(impatient, tcp)], checkout_timeout=2)
    impatient.stop()  # it does not give up before the second one waits, too
    (patiently,) = line_up(holder, [(patient, tcp)], already=1)
    impatient.resume()
    given_up.error(PoolTimeout)
    assert time.monotonic() - begun >= 2
    assert holder.wait_stats(waiting=1).timeouts == 1
    holder.checkin("held")
    label = patiently.result()
    assert patient.exchange(label) == 1
    patient.checkin(label)
    holder.wait_stats(waiting=0, in_use=0, granted=0, idle=1)
    assert impatient.use(tcp) == 1


def test_a_timeout_tells_the_numbers_the_longest_lease_and_its_holder(
    holder: Worker, two: list[Worker], tcp: Target
) -> None:
    line_up(holder, [(two[1], tcp), (two[1], tcp)])
    error = two[0].fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.1)
    text = str(error)
    assert re.search(r"\(max=1 leased=1 idle=0 opening=0 closing=0 waiting=[23]\)", text), text
    assert "default" in text
    assert f"{tcp.host}:{tcp.port}" in text
    assert re.search(rf"longest lease is \d+\.\d+ s old.*\b{holder.pid}\b", text), text
    assert "this thread holds no lease" in text
    assert isinstance(error, TimeoutError)


def test_a_timeout_tells_a_thread_that_it_waited_for_itself(holder: Worker, tcp: Target) -> None:
    error = holder.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.1)
    assert "this thread holds 1 lease" in str(error)
    error = holder.begin_checkout(tcp, checkout_timeout=0.1, thread="other").error(PoolTimeout)
    assert "this thread holds no lease" in str(error)


def test_a_checkout_timeout_not_given_is_the_connect_timeout_and_none_is_no_limit(
    holder: Worker, two: list[Worker], tcp: Target
) -> None:
    two[0].attach(connect_timeout=0.3)
    (for_ever,) = line_up(holder, [(two[0], tcp)], checkout_timeout=None)
    begun = time.monotonic()
    two[0].begin_checkout(tcp, thread="limited").error(PoolTimeout)
    assert time.monotonic() - begun >= 0.3
    two[0].begin_checkout(tcp, thread="limited", connect_timeout=0.2).error(PoolTimeout)
    assert holder.stats().waiting == 1
    holder.checkin("held")
    assert two[0].exchange(for_ever.result()) == 1


def test_a_checkout_that_may_not_wait_fails_at_once_or_succeeds(
    holder: Worker, two: list[Worker], backend: Backend, tcp: Target
) -> None:
    two[0].fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0)
    assert holder.stats().waiting == 0
    holder.checkin("held")
    assert two[0].exchange(two[0].checkout(tcp, checkout_timeout=0)) == 1


def checkout_until(state: State, target: Target, moment: float) -> str | None:
    """Wait for a lease until a moment of the monotonic clock; None if it didn't come."""
    try:
        return commands.checkout(state, target, checkout_timeout=max(0.0, moment - time.monotonic()))
    except PoolTimeout:
        return None


def test_a_timeout_that_races_its_grant_loses_neither_permit_nor_connection(
    holder: Worker, two: list[Worker], backend: Backend, tcp: Target, seeded: random.Random
) -> None:
    outcomes = set()
    for _ in range(60):
        moment = time.monotonic() + 0.03
        waiting = [waiter.begin(checkout_until, tcp, moment) for waiter in two]
        holder.call(commands.checkin_at, "held", moment + seeded.uniform(-0.002, 0.001))
        labels = [pending.result() for pending in waiting]
        assert labels.count(None) >= 1  # there is one permit, and who gets it keeps it until both have answered
        for waiter, label in zip(two, labels, strict=True):
            if label is not None:
                waiter.checkin(label)
        outcomes.add(tuple(label is not None for label in labels))
        # The only permit must be there again: were it lost, this would time out.
        holder.checkout(tcp, label="held", checkout_timeout=20)
        stats = holder.stats()
        assert (stats.in_use, stats.granted, stats.waiting, stats.idle) == (1, 0, 0, 0)
    print("who got the lease:", outcomes)
    assert (backend.accepted, backend.peak) == (1, 1)


def test_a_stopped_waiter_loses_its_grant_to_the_next_and_keeps_its_place(
    holder: Worker, three: list[Worker], backend: Backend, tcp: Target
) -> None:
    stopped, second, third = three
    queue = line_up(holder, [(stopped, tcp), (second, tcp), (third, tcp)])
    stopped.stop()
    holder.checkin("held")
    label = queue[1].result()
    assert holder.stats().revoked >= 1
    stopped.resume()
    holder.wait_stats(waiting=2, in_use=1)
    second.checkin(label)
    label = queue[0].result()
    assert stopped.exchange(label) == 1
    assert not queue[2].done
    stopped.checkin(label)
    assert third.exchange(queue[2].result()) == 1
    assert backend.accepted == 1


def test_a_grant_that_nobody_takes_becomes_idle_again(
    holder: Worker, two: list[Worker], backend: Backend, tcp: Target
) -> None:
    stopped, newcomer = two
    stopped.stats()  # attached, which is none of its time
    (pending,) = line_up(holder, [(stopped, tcp)], checkout_timeout=2)
    over = time.monotonic() + 2
    stopped.stop()
    holder.checkin("held")
    assert newcomer.use(tcp) == 1
    wait_until(lambda: time.monotonic() > over)
    stopped.resume()
    # Its time was over while it stood still: it may take what is free now, or give up, but nothing may be lost.
    try:
        stopped.checkin(pending.result())
    except PoolTimeout:
        pass
    holder.wait_stats(idle=1, waiting=0, granted=0, in_use=0)
    assert backend.accepted == 1


def test_a_waiter_whose_process_is_killed_leaves_the_queue(
    holder: Worker, two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #462, #675, #680: the place of a dead requester in the queue was served for ever."""
    queue = line_up(holder, [(two[0], tcp), (two[0], tcp), (two[1], tcp)])
    two[0].kill()
    holder.wait_stats(waiting=1)
    holder.checkin("held")
    assert two[1].exchange(queue[2].result()) == 1
    assert backend.accepted == 1


def test_a_waiter_whose_thread_fails_while_it_waits_leaves_the_queue(
    holder: Worker, two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """An exception from outside (a signal handler's, as with a soft time limit) in the midst of a wait."""
    interrupted, other = two
    interrupted.call(raise_at_alarm)
    pending = interrupted.begin_checkout(tcp, checkout_timeout=None)
    holder.wait_stats(waiting=1)
    (later,) = line_up(holder, [(other, tcp)], already=1)
    interrupted.signal(ALARM)
    pending.error(Interruption)
    holder.wait_stats(waiting=1)
    holder.checkin("held")
    label = later.result()
    assert other.exchange(label) == 1
    other.checkin(label)
    assert interrupted.use(tcp) == 1


ALARM = 14


class Interruption(Exception):
    """What the signal handler raises."""


def raise_at_alarm(state: State) -> None:
    import signal

    def handler(*_: object) -> None:
        raise Interruption

    signal.signal(ALARM, handler)


def hold_both(state: State, target: Target) -> list[int]:
    """Two threads of one process, each with a lease, at the same time."""
    barrier = threading.Barrier(2)
    numbers: list[int] = []

    def one() -> None:
        with commands.pool_of(state, "default").connection(target.host, target.port) as conn:
            barrier.wait(20)
            numbers.append(commands.exchange_over(conn, threading.current_thread().name))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(numbers)


def test_threads_of_a_process_have_leases_of_their_own(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=2)
    assert worker.call(hold_both, tcp) == [1, 2]
    assert backend.peak == 2


def test_a_long_queue_is_served_to_its_end(holder: Worker, harness: Harness, backend: Backend, tcp: Target) -> None:
    """hackney #510, #541, #547: the cost of a checkout grew with the queue."""
    workers = harness.start_many(4)
    begun = [
        worker.begin(commands.use, tcp, f"request {i}", thread=f"t{i}", checkout_timeout=None)
        for worker in workers
        for i in range(50)
    ]
    holder.wait_stats(waiting=200)
    holder.checkin("held")
    assert {pending.result() for pending in begun} == {1}
    holder.wait_stats(waiting=0, in_use=0, granted=0, idle=1)


def close_pool(state: State) -> None:
    state.pools["default"].close()


def test_closing_a_pool_sends_the_threads_away_that_wait_in_it(holder: Worker, harness: Harness, tcp: Target) -> None:
    """Their cells have been given up by the arbiter when they look up, and that is no damage."""
    (other,) = harness.start_many(1)
    (waiting,) = line_up(holder, [(other, tcp)])
    other.call(close_pool)
    holder.wait_stats(waiting=0, processes=1)
    assert waiting.error(PoolStopped).waited
