"""The cap, as the back end counts it, while everybody wants more."""

from __future__ import annotations

import random
import select
import threading

import pytest

from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.commands import Load
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

pytestmark = pytest.mark.usefixtures("unhurried")


def all_requests(workers: list[Worker], targets: list[Target], number: int, threads: int, **options: object) -> Load:
    """So many requests in so many threads of every worker, all at once."""
    begun = [
        worker.begin(commands.requests, targets, number, thread=f"load {i}", checkout_timeout=30, **options)
        for worker in workers
        for i in range(threads)
    ]
    return sum((pending.result() for pending in begun), Load())


def fill(worker: Worker, target: Target, number: int) -> None:
    """Open so many connections and leave them idle, so that the cap is reached for certain."""
    labels = [worker.checkout(target) for _ in range(number)]
    for label in labels:
        worker.checkin(label)


def test_many_processes_and_threads_never_have_more_connections_than_the_cap(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    """hackney #648, p24, p27: idle connections did not count, and idle hits passed the limit by."""
    workers = harness.start_many(4)
    workers[0].attach(max_connections=3)
    fill(workers[0], tcp, 3)
    load = all_requests(workers, [tcp], 200, threads=2)
    assert load == Load(done=1600)
    assert backend.peak == 3
    workers[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0, idle=3)
    assert backend.open == 3


def test_the_cap_is_over_all_addresses_together(harness: Harness, backend: Backend, tcp: Target, unix: Target) -> None:
    workers = harness.start_many(4)
    workers[0].attach(max_connections=3)
    workers[0].use(tcp)
    load = all_requests(workers, [tcp, backend.listen("second"), unix, backend.listen("third")], 80, threads=2)
    assert load == Load(done=640)
    assert backend.peak <= 3, backend.story()
    stats = workers[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    assert backend.open == stats.idle


def discarding_requests(state: State, target: Target, number: int, seed: int) -> int:
    """Requests of which some end by a discard, some by an exception, some by a close of the user's own."""
    chance = random.Random(seed)
    handle = commands.pool_of(state, "default")
    for i in range(number):
        text = f"{seed}-{threading.get_ident()}-{i}"
        lease = handle.checkout(target.host, target.port, transport=target.transport, checkout_timeout=30)
        commands.exchange_over(lease.conn, text)
        end = chance.randrange(4)
        if end == 0:
            lease.discard()
        elif end == 1:
            lease.conn.close()
            lease.checkin()
        elif end == 2:
            lease.conn.sendall(b"not read\n")
            assert select.select([lease.conn], [], [], 20)[0]
            lease.checkin()
        else:
            lease.checkin()
    return number


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_the_cap_holds_while_leases_end_in_every_way(
    harness: Harness, backend: Backend, tcp: Target, unix: Target, transport: str, seeded: random.Random
) -> None:
    workers = harness.start_many(4)
    target = tcp if transport == "tcp" else unix
    workers[0].attach(max_connections=3)
    workers[0].use(target)
    begun = [
        worker.begin(discarding_requests, target, 60, seeded.randrange(10**9), thread=f"load {i}")
        for worker in workers
        for i in range(2)
    ]
    assert sum(pending.result() for pending in begun) == 480
    assert backend.peak <= 3, backend.story()
    stats = workers[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    backend.wait_open(stats.idle)


def test_the_cap_holds_while_the_back_end_closes_whatever_it_likes(
    harness: Harness, backend: Backend, tcp: Target, seeded: random.Random
) -> None:
    """hackney #850, #869, #914: connections that die at any moment, also in the middle of the liveness check."""
    workers = harness.start_many(3)
    workers[0].attach(max_connections=2)
    workers[0].use(tcp)
    begun = [
        worker.begin(commands.requests_until_told, [tcp], thread="load", checkout_timeout=30) for worker in workers
    ]
    for _ in range(150):
        backend.do("close", ids=[seeded.choice(backend.ids() or [0])], how=seeded.choice(["told", "rst"]))
    for worker in workers:
        worker.call(commands.tell_to_stop)
    load = sum((pending.result() for pending in begun), Load())
    # A connection that dies in the middle of its request is the request's own error; the pool's are none.
    own = ("the stream ended", "ConnectionResetError", "BrokenPipeError")
    assert [error for error in load.errors if not any(each in error for each in own)] == []
    assert load.done > 0
    assert backend.peak <= 2, backend.story()
    workers[0].wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0)
    assert workers[0].use(tcp) in backend.ids()


def test_every_request_gets_its_own_answer_and_none_of_another(harness: Harness, backend: Backend, tcp: Target) -> None:
    workers = harness.start_many(4)
    workers[0].attach(max_connections=1)
    workers[0].use(tcp)
    load = all_requests(workers, [tcp], 100, threads=4)
    assert load == Load(done=1600)
    assert (backend.peak, backend.accepted) == (1, 1)
    lines = backend.received(1).split()
    assert len(lines) == len(set(lines)) == 1601


def nested_requests(state: State, target: Target, number: int) -> int:
    """Each takes one lease, gives it back, and takes the next for another part of the same job."""
    handle = commands.pool_of(state, "default")
    for i in range(number):
        for part in ("page", "redirect"):
            with handle.connection(target.host, target.port, checkout_timeout=30) as conn:
                commands.exchange_over(conn, f"{part} {i}")
    return number


def test_redirects_on_a_pool_of_two_return_the_counts_to_their_start(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    """hackney's suite: redirects on a pool of 2; 5 concurrent on a small pool."""
    workers = harness.start_many(5)
    workers[0].attach(max_connections=2)
    fill(workers[0], tcp, 2)
    begun = [worker.begin(nested_requests, tcp, 20) for worker in workers]
    assert [pending.result() for pending in begun] == [20] * 5
    workers[0].wait_stats(in_use=0, waiting=0, granted=0, opening=0, closing=0, idle=2)
    assert (backend.peak, backend.accepted) == (2, 2)


def test_fifty_clients_on_a_pool_of_four_have_no_errors(harness: Harness, backend: Backend, tcp: Target) -> None:
    """hackney's stress test: 50 x 20 on a pool of 4 with zero errors."""
    workers = harness.start_many(5)
    workers[0].attach(max_connections=4)
    fill(workers[0], tcp, 4)
    load = all_requests(workers, [tcp], 20, threads=10)
    assert load == Load(done=1000)
    assert (backend.peak, backend.accepted) == (4, 4)
    wait_until(lambda: workers[0].stats().idle == 4)
