"""SIGKILL at every moment of a lease's life: nothing stays taken, the next in the queue is served, the cap holds."""

from __future__ import annotations

import os
import random
import signal
import sys
from time import monotonic

import pytest

from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up


def test_killed_with_a_lease_its_connection_is_closed_and_the_next_waiter_served(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #462, #675, #680, p08: the slot of a dead owner leaked."""
    victim, waiter, observer = three
    observer.attach(max_connections=1)
    observer.stats()
    victim.checkout(tcp)
    (waiting,) = line_up(observer, [(waiter, tcp)])
    victim.kill()
    assert waiter.exchange(waiting.result()) == 2
    assert (backend.peak, backend.ids()) == (1, [2])
    assert observer.wait_stats(processes=2, in_use=1, closing=0, waiting=0).reaped >= 1


def test_killed_in_the_midst_of_an_answer_its_connection_is_closed(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    two[0].call(commands.send, label, b"!late answer\n")
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    two[0].kill()
    backend.answer([1])
    assert two[1].exchange(waiting.result(), "mine") == 2
    assert backend.peak == 1


def test_killed_in_the_queue_it_is_passed_over(three: list[Worker], backend: Backend, tcp: Target) -> None:
    holder, victim, waiter = three
    holder.attach(max_connections=1)
    label = holder.checkout(tcp)
    queue = line_up(holder, [(victim, tcp), (waiter, tcp)])
    victim.kill()
    holder.wait_stats(waiting=1, processes=2)  # else it may be granted what it can no longer take
    holder.checkin(label)
    assert waiter.exchange(queue[1].result()) == 1
    holder.wait_stats(waiting=0, granted=0, in_use=1, processes=2)


def test_killed_with_a_grant_not_yet_taken_the_next_one_gets_it(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    holder, victim, waiter = three
    holder.attach(max_connections=1)
    label = holder.checkout(tcp)
    queue = line_up(holder, [(victim, tcp), (waiter, tcp)])
    victim.stop()
    holder.checkin(label)  # to the victim, which can't take it
    victim.kill()
    waiter.exchange(queue[1].result())
    holder.wait_stats(waiting=0, granted=0, in_use=1, processes=2)
    assert backend.peak == 1


def test_killed_idle_its_connections_serve_the_others(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """Warm connections survive the recycling of workers."""
    victim, heir = two
    heir.attach(max_connections=3)
    heir.stats()
    labels = [victim.checkout(tcp) for _ in range(3)]
    for label in labels:
        victim.checkin(label)
    victim.kill()
    stats = heir.wait_stats(processes=1)
    assert (stats.idle, stats.adopted, stats.closing) == (3, 3, 0)
    labels = [heir.checkout(tcp) for _ in range(3)]
    assert {heir.exchange(label) for label in labels} == {1, 2, 3}
    assert backend.accepted == 3


def test_the_last_workers_idle_connection_serves_the_first_of_the_next_generation(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    for _ in range(3):
        worker = harness.start()
        assert worker.use(tcp) == 1
        worker.kill()
    assert backend.accepted == 1


def test_killed_idle_what_may_not_move_is_closed(two: list[Worker], backend: Backend, tcp: Target) -> None:
    victim, other = two
    for worker in two:
        worker.attach(max_connections=1, move=False)
    other.stats()
    victim.use(tcp)
    victim.kill()
    backend.wait_open(0)
    other.wait_stats(idle=0, closing=0, processes=1)
    assert other.use(tcp) == 2


def test_a_dead_ones_connection_is_closed_although_its_forked_child_inherited_it(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    parent, other = two
    other.attach(max_connections=1)
    other.stats()
    parent.checkout(tcp)
    child = parent.fork()
    (waiting,) = line_up(other, [(other, tcp)])
    parent.kill()
    assert other.exchange(waiting.result()) == 2
    assert backend.ids() == [2]
    assert child.call(commands.environment, "HOME") == os.environ.get("HOME")  # it lives
    assert backend.peak == 1


def execute_another_program(state: State) -> None:
    os.execv(sys.executable, [sys.executable, "-S", "-c", "import signal; signal.pause()"])


def test_a_process_that_executes_another_program_is_reaped_like_a_dead_one(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """Its number and its start time stay the same, and no pidfd fires."""
    two[0].attach(max_connections=1)
    two[0].checkout(tcp)
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    two[0].begin(execute_another_program)
    assert two[1].exchange(waiting.result()) == 2
    two[1].wait_stats(processes=1, in_use=1, closing=0)
    assert not two[0].dead
    assert backend.peak == 1


def lose_channel_and_stand_still(state: State) -> None:
    """As if it were stopped just when a request of it had failed: it cannot come back."""
    state.pools["default"].attached.channel._broken()
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_process_that_lost_its_channel_and_is_stopped_keeps_its_leases_until_it_comes_back(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=1)
    label = one.checkout(tcp)
    number = one.exchange(label)
    other.stats()
    standing = one.begin(lose_channel_and_stand_still)
    wait_until(lambda: processes.state(one.pid) == "T")
    began = monotonic()
    wait_until(lambda: monotonic() > began + 1.5)  # longer than the arbiter waits for who was exec'd
    assert other.stats().in_use == 1
    one.resume()
    standing.result()
    assert one.exchange(label) == number
    one.checkin(label)
    assert other.exchange(other.checkout(tcp)) == number
    assert backend.accepted == 1


@pytest.mark.parametrize("leave", [commands.leave, commands.leave_at_once])
def test_a_process_that_ends_by_itself_is_reaped_like_a_killed_one(
    two: list[Worker], backend: Backend, tcp: Target, leave: object
) -> None:
    two[0].attach(max_connections=1)
    two[0].checkout(tcp)
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    two[0].begin(leave)  # type: ignore[arg-type]
    assert two[1].exchange(waiting.result()) == 2
    assert backend.peak == 1


def test_everybody_killed_at_once_leaves_a_pool_that_serves(harness: Harness, backend: Backend, tcp: Target) -> None:
    workers = harness.start_many(6)
    observer, *others = workers
    observer.attach(max_connections=3)
    observer.stats()
    for worker in others:
        worker.begin(commands.requests_until_told, [tcp], checkout_timeout=30)
    wait_until(lambda: observer.stats().checkouts > 200)
    for worker in others:
        worker.kill()
    stats = observer.wait_stats(processes=1, in_use=0, opening=0, granted=0, waiting=0, closing=0)
    assert backend.open == stats.idle
    assert backend.peak <= 3
    labels = [observer.checkout(tcp, checkout_timeout=20) for _ in range(3)]
    assert len({observer.exchange(label) for label in labels}) == 3


def test_five_hundred_and_fifty_requesters_whose_parents_die_return_every_counter_to_zero(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    """hackney's test_deadlock: 11 parents with 50 requesters each, all gone while nearly all of them wait."""
    observer, *parents = harness.start_many(12)
    observer.attach(max_connections=10)
    labels = [observer.checkout(tcp) for _ in range(5)]
    for parent in parents:
        for i in range(50):
            parent.begin(commands.checkout, tcp, thread=f"requester {i}", checkout_timeout=None)
    observer.wait_stats(in_use=10, waiting=545)
    for parent in parents[:5]:
        parent.kill()
    for label in labels:
        observer.checkin(label)
    for parent in parents[5:]:
        parent.kill()
    stats = observer.wait_stats(in_use=0, waiting=0, granted=0, opening=0, closing=0, processes=1)
    assert backend.open == stats.idle
    assert backend.peak <= 10
    again = [observer.checkout(tcp, checkout_timeout=20) for _ in range(10)]
    assert len({observer.exchange(label) for label in again}) == 10


def abuse_until_killed(state: State, targets: list[Target], seed: int) -> None:
    """Requests of which one in ten never gives its lease back."""
    chance = random.Random(seed)
    kept = []
    while True:
        target = chance.choice(targets)
        handle = commands.pool_of(state, "default")
        lease = handle.checkout(target.host, target.port, transport=target.transport, checkout_timeout=None)
        commands.exchange_over(lease.conn, f"{os.getpid()}")
        if chance.random() < 0.1:
            kept.append(lease)
        elif chance.random() < 0.3:
            lease.discard()
        else:
            lease.checkin()


def test_a_storm_of_kills_settles_at_zero_and_then_serves(
    harness: Harness, backend: Backend, tcp: Target, unix: Target, seeded: random.Random
) -> None:
    """hackney's chaos and storm: clients that are killed, or never give back, at any moment (seeded)."""
    observer, *workers = harness.start_many(5)
    observer.attach(max_connections=4)
    observer.stats()
    targets = [tcp, unix]
    for worker in workers:
        worker.begin(abuse_until_killed, targets, seeded.randrange(10**9), thread="abuse")
    for _ in range(20):
        before = observer.stats().checkouts
        # Kill when things move again, or when everything is kept for ever and only a death can move it.
        enough = seeded.randrange(1, 40)
        wait_until(lambda b=before, e=enough: observer.stats().checkouts >= b + e or observer.stats().in_use == 4)
        victim = workers.pop(seeded.randrange(len(workers)))
        victim.kill()
        workers.append(harness.start())
        workers[-1].begin(abuse_until_killed, targets, seeded.randrange(10**9), thread="abuse")
    for worker in workers:
        worker.kill()
    stats = observer.wait_stats(in_use=0, waiting=0, granted=0, opening=0, closing=0, processes=1)
    assert backend.open == stats.idle
    assert backend.peak <= 4, backend.story()
    labels = [observer.checkout(tcp, checkout_timeout=20) for _ in range(4)]
    assert len({observer.exchange(label) for label in labels}) == 4
