"""Descriptors and memory: bounded, given back, and where the limit is hit, an error that names it and nothing lost."""

from __future__ import annotations

import itertools
import os
import resource
import time
from pathlib import Path

import pytest

from sharedpool import FileLimit, SharedPoolError, StartFailed
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

OPENS = int(os.environ.get("SHAREDPOOL_TEST_OPENS", "3000"))


def sockets(pid: int) -> int:
    return sum(target.startswith("socket:") for target in processes.descriptors(pid).values())


def fill(worker: Worker, target: Target, number: int) -> None:
    """So many idle connections, left by this worker."""
    for label in [worker.checkout(target) for _ in range(number)]:
        worker.checkin(label)


# --- what a worker keeps ----------------------------------------------------------------------------------------------


def test_a_worker_keeps_so_many_connections_of_others_and_those_it_used_last(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    owner, other = two
    owner.attach(max_connections=10, max_foreign=3)
    other.use(tcp)
    fill(owner, tcp, 10)
    for worker in (owner, other):  # each has them all once, and in the end they are the owner's
        labels = [worker.checkout(tcp) for _ in range(10)]
        for label in labels:
            worker.checkin(label)
    labels = [owner.checkout(tcp) for _ in range(10)]
    before = sockets(other.pid)
    owner.checkin(labels[0])
    wait_until(lambda: sockets(other.pid) <= before, what="the rest has been let go")
    assert backend.accepted == 10

    def fetched() -> int:
        return int(other.call(commands.library, "worker_stats", "default")[other.pid]["fetches"])

    def held() -> int:
        entries = other.call(entries_of)
        return len(entries)

    wait_until(lambda: held() <= 3, what="three at most are kept")
    known = other.call(entries_of)
    for label in labels[1:]:
        owner.checkin(label)
    assert len(known) == 3
    count = fetched()
    other.use(tcp)
    assert fetched() - count <= 1


def entries_of(state: State) -> list[int]:
    """The slots of the connections at hand."""
    attached = state.pools["default"]._attached
    return [attached.table.slot_index(at) for at in attached.entries]


def test_no_foreign_one_is_kept_where_none_may_be_and_takeovers_work(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    owner, other = two
    owner.attach(max_connections=1, max_foreign=0)
    assert [worker.use(tcp) for worker in (owner, other) * 5] == [1] * 10
    wait_until(lambda: owner.call(entries_of) == [], what="the owner has let its copy go")
    assert (owner.use(tcp), backend.accepted) == (1, 1)


def test_taking_and_letting_go_at_once_never_crosses_answers(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """max_foreign below what goes round: every takeover lets another one go, under many threads."""
    three[0].attach(max_connections=6, max_foreign=1)
    three[0].stats()  # it makes the pool, before one of the others makes it with the default's cap
    begun = [
        worker.begin(commands.requests, [tcp], 60, thread=f"thread {i}", checkout_timeout=30)
        for worker, i in itertools.product(three, range(4))
    ]
    for pending in begun:
        load = pending.result()
        assert (load.done, load.errors) == (60, [])
    assert backend.peak <= 6


def test_copies_of_connections_that_have_ended_are_gone_within_a_second_also_where_the_news_did_not_fit(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    """A stopped process's queue of events holds 11 of them; the rest it finds out by itself."""
    owner, sleeper = two
    owner.attach(max_connections=40)
    sleeper.use(tcp)
    base = sockets(sleeper.pid) - 2  # its one connection: the object's descriptor and the pool's
    fill(owner, tcp, 40)
    for label in [sleeper.checkout(tcp) for _ in range(40)]:
        sleeper.checkin(label)
    assert sockets(sleeper.pid) >= base + 80
    sleeper.stop()
    owner.call(commands.library, "drain", "default")
    owner.wait_stats(idle=0, closing=0)
    sleeper.resume()
    wait_until(lambda: sockets(sleeper.pid) <= base, what="no copy is left")
    assert sleeper.use(tcp) > 40


# --- the limit of open files, in a worker -----------------------------------------------------------------------------


def with_descriptors(state: State, free: int, target: Target, *, close: bool) -> str:
    """A use of the pool with so many descriptors to be had; what came of it. With the limit back it works."""
    pool = commands.pool_of(state, "default")
    if close:
        pool.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))
    numbers = (number for number in itertools.count() if number not in taken or number == max(taken))
    limit = next(itertools.islice(numbers, free, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        commands.use(state, target, checkout_timeout=2)
        return "good"
    except FileLimit as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("moment", ["attach", "open", "takeover"])
def test_wherever_a_worker_has_no_descriptor_left_it_says_so_and_loses_nothing(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target, moment: str
) -> None:
    worker, other = two
    other.attach(max_connections=2, max_foreign=0)
    other.use(tcp)
    worker.use(tcp)
    wait_until(lambda: worker.stats().in_use == 0)
    errors = 0
    for free in range(20):
        if moment == "takeover":
            other.use(tcp)
            wait_until(lambda: worker.call(entries_of) == [])
        elif moment == "open":
            other.call(commands.library, "drain", "default")
            other.wait_stats(idle=0, closing=0)
        result = worker.call(with_descriptors, free, tcp, close=moment == "attach")
        if result == "good":
            break
        errors += 1
        assert "RLIMIT_NOFILE" in result
    assert result == "good"
    assert errors >= 1
    other.wait_stats(in_use=0, opening=0, closing=0, processes=2)
    before = sockets(worker.pid)
    assert worker.use(tcp) in backend.ids()
    assert worker.stats().dropped == 0
    assert sockets(worker.pid) <= before + 2
    assert backend.peak <= 2


# --- and in the arbiter -----------------------------------------------------------------------------------------------


def common_sockets(*pids: int) -> set[str]:
    """The sockets of which all of these processes have a descriptor."""
    targets = [set(processes.descriptors(pid).values()) for pid in pids]
    return {target for target in set.intersection(*targets) if target.startswith("socket:")}


def leave_no_descriptor(pid: int) -> None:
    """No number is free below the limit; what was open above it stays so."""
    taken = processes.descriptors(pid)
    free = next(number for number in itertools.count() if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_arbiter_without_a_descriptor_left_says_so_to_who_comes_and_serves_the_others(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    first, late = harness.start_many(2)
    first.attach(max_connections=4)
    first.call(commands.collect_log)
    assert first.use(tcp) == 1
    arbiter = scope.arbiter()
    _, hard = resource.prlimit(arbiter, resource.RLIMIT_NOFILE)
    wait_until(lambda: common_sockets(first.pid, arbiter), what="the arbiter has the first connection's descriptor")
    leave_no_descriptor(arbiter)
    try:
        error = late.fails(SharedPoolError, commands.use, tcp)
        assert isinstance(error, FileLimit), error
        assert "the arbiter" in str(error)
        assert "RLIMIT_NOFILE" in str(error)
        late.fails(FileLimit, commands.use, tcp)
        assert first.use(tcp) == 1
        leave_no_descriptor(arbiter)
        labels = [first.checkout(tcp) for _ in range(3)]  # no descriptor of the new ones gets to it
        assert [first.exchange(label) for label in labels] == [1, 2, 3]
        for label in labels:
            first.checkin(label)
        first.wait_stats(in_use=0, closing=0)
        wait_until(lambda: first.stats().closes["doomed"] >= 1, what="such a one is lent once")
        assert backend.peak <= 4
        before, began = cpu_ticks(arbiter), time.monotonic()
        time.sleep(0.5)  # what it does with its time, while somebody knocks
        assert cpu_ticks(arbiter) - before <= 20 * (time.monotonic() - began), "it does not spin"
        wait_until(lambda: any("RLIMIT_NOFILE" in text for text in first.call(commands.log, "ERROR")))
    finally:
        resource.prlimit(arbiter, resource.RLIMIT_NOFILE, (hard, hard))
    assert late.use(tcp) in backend.ids(), "whichever the arbiter had a descriptor of"
    assert first.stats().processes == 2


# --- memory -----------------------------------------------------------------------------------------------------------


def limit_files(state: State, size: int) -> None:
    """As a full tmpfs: no file of this process, nor of those it starts, may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_memory_that_is_not_to_be_had_at_the_start_is_an_error_and_not_a_signal(
    harness: Harness, scope: Scope, tcp: Target
) -> None:
    worker = harness.execute()
    worker.call(limit_files, 1 << 20)
    error = worker.fails(StartFailed, commands.use, tcp)
    assert "no shared memory for pool 'default'" in str(error)
    arbiter = scope.arbiter()
    before = len(processes.descriptors(arbiter))
    worker.fails(StartFailed, commands.use, tcp)
    wait_until(lambda: len(processes.descriptors(arbiter)) <= before)
    assert scope.arbiter() == arbiter
    resource.prlimit(arbiter, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert worker.use(tcp) == 1


def open_and_close(state: State, target: Target, number: int) -> None:
    pool = commands.pool_of(state, "default")
    for _ in range(number):
        pool.checkout(target.host, target.port, checkout_timeout=30).discard()


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def segment_bytes(pid: int) -> list[tuple[int, int]]:
    found = []
    for number, target in processes.descriptors(pid).items():
        if target.startswith("/memfd:sharedpool"):
            status = os.stat(f"/proc/{pid}/fd/{number}")
            found.append((status.st_size, status.st_blocks))
    return sorted(found)


def test_the_arbiters_memory_does_not_grow_with_connections_nor_the_segment_with_use(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    two[0].attach(max_connections=4)
    begun = [worker.begin(open_and_close, tcp, OPENS // 4) for worker in two]
    for pending in begun:
        pending.result(3600)
    arbiter = scope.arbiter()
    before, size = resident(arbiter), segment_bytes(arbiter)
    begun = [worker.begin(open_and_close, tcp, OPENS // 2) for worker in two]
    for pending in begun:
        pending.result(3600)
    two[0].wait_stats(in_use=0, closing=0)
    assert resident(arbiter) - before < 1 << 20, f"{before} bytes after {OPENS // 2} opens, {resident(arbiter)} now"
    assert segment_bytes(arbiter) == size
    assert backend.accepted >= OPENS
