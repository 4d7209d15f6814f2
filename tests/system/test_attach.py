"""Attaching: lazy, safe before a fork, and each process for itself after one."""

from __future__ import annotations

import os

import pytest

from sharedpool import LeaseError
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up


def test_attach_does_no_io_and_starts_no_thread_before_first_use(harness: Harness, scope: Scope) -> None:
    worker = harness.execute()
    assert worker.call(commands.thread_names) == ["MainThread"]  # and the library is imported
    before = processes.descriptors(worker.pid), processes.threads(worker.pid)
    worker.attach(max_connections=3)
    worker.attach("other", max_connections=4, move=False)
    assert (processes.descriptors(worker.pid), processes.threads(worker.pid)) == before
    assert processes.children(worker.pid) == set()
    assert scope.arbiters() == set()
    assert os.listdir(scope.directory) == []


def test_a_handle_made_before_the_fork_serves_every_child(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=1)
    children = [worker.fork(), worker.fork()]
    assert [children[0].use(tcp), children[1].use(tcp), worker.use(tcp)] == [1, 1, 1]
    assert backend.peak == 1
    assert worker.stat("processes") == 3


def test_the_forked_child_of_an_attached_worker_attaches_for_itself(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=1)
    assert worker.use(tcp) == 1
    child = worker.fork()
    assert child.use(tcp) == 1
    assert worker.stat("processes") == 2
    child.kill()
    worker.wait_stats(processes=1, idle=1)
    assert worker.use(tcp) == 1
    assert backend.accepted == 1


def test_a_child_cannot_give_back_what_it_inherited(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=2)
    label = worker.checkout(tcp)
    child = worker.fork()
    child.fails(LeaseError, commands.checkin, label)
    child.fails(LeaseError, commands.discard, label)
    assert worker.exchange(label) == 1
    assert worker.stats().in_use == 1
    worker.checkin(label)
    assert (worker.use(tcp), backend.accepted) == (1, 1)


def test_a_child_that_forgets_an_inherited_lease_does_not_touch_it(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=2)
    label = worker.checkout(tcp)
    child = worker.fork()
    child.call(commands.forget, label)
    assert child.use(tcp) == 2  # its own first call empties whatever it had forgotten
    child.begin(commands.leave)
    child.wait_dead()
    assert worker.exchange(label) == 1
    assert worker.stats().in_use == 1
    assert 1 in backend.ids()


def test_a_child_that_ends_does_not_end_its_parents_idle_connection(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=1)
    worker.use(tcp)
    child = worker.fork()
    child.begin(commands.leave)
    child.wait_dead()
    assert worker.use(tcp) == 1
    assert backend.accepted == 1


def test_a_fork_while_a_thread_waits_leaves_the_waiter_with_the_parent(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    holder, parent = harness.start_many(2)
    holder.attach(max_connections=1)
    label = holder.checkout(tcp)
    queue = line_up(holder, [(parent, tcp)])
    child = parent.fork()
    assert holder.stats().waiting == 1
    queue += line_up(holder, [(child, tcp)], already=1)
    holder.checkin(label)
    parent.checkin(queue[0].result())
    assert child.exchange(queue[1].result()) == 1
    assert backend.peak == 1


def use_by_two_handles(state: State, target: Target) -> tuple[int, int, int]:
    """Two handles of one pool in one process: the connections that each used, and the processes attached."""
    import sharedpool

    handles = [sharedpool.attach("default", max_connections=1) for _ in range(2)]
    numbers = []
    for handle in handles:
        with handle.connection(target.host, target.port, checkout_timeout=30) as conn:
            numbers.append(commands.exchange_over(conn, "x"))
    return numbers[0], numbers[1], handles[0].stats().processes


def test_two_handles_of_one_pool_in_one_process_are_one_attachment(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    assert worker.call(use_by_two_handles, tcp) == (1, 1, 1)
    assert backend.accepted == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_children_of_multiprocess_share_the_cap(
    harness: Harness, backend: Backend, tcp: Target, method: str
) -> None:
    parent = harness.execute(SHAREDPOOL_DEFAULT_MAX_CONNECTIONS="2")
    held = parent.checkout(tcp)
    first, second = parent.start_child(method), parent.start_child(method)
    label = first.checkout(tcp)
    waiting = line_up(parent, [(second, tcp)])[0]
    assert parent.stats().in_use == 2
    first.checkin(label)
    second.checkin(waiting.result())
    parent.checkin(held)
    assert (backend.peak, backend.accepted) == (2, 2)
    for child in (first, second):
        child.kill()
    wait_until(lambda: parent.stats().processes == 1)


def test_the_first_use_logs_one_line_that_says_what_it_attached_to(worker: Worker, tcp: Target, scope: Scope) -> None:
    worker.call(commands.collect_log)
    worker.attach(max_connections=3)
    for _ in range(3):
        worker.use(tcp)
    lines = worker.call(commands.log, "INFO")
    assert len(lines) == 1
    assert all(part in lines[0] for part in ("default", "3", str(scope.directory), str(scope.arbiter())))
