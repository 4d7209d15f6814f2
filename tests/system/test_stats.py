"""The numbers add up, over processes, threads, deaths and every way in which a lease can end."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import socket
from typing import Any

import pytest

import sharedpool
from sharedpool import KeyStats, PoolStats, PoolTimeout, SharedPoolError, TooManyWaiting, inspection
from sharedpool.stats import KEY_COUNTERS
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.cli import good
from tests.system.lineup import line_up
from tests.system.test_succession import kill_arbiter, successor

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["shared", "local"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ways_to_use(state: State, targets: list[Target], number: int, seed: int, **options: Any) -> int:
    """So many checkouts, their leases ended in any way; gives how many succeeded."""
    chance = random.Random(seed)
    pool = commands.pool_of(state, "default")
    done = 0
    for _ in range(number):
        target = chance.choice(targets)
        try:
            lease = pool.checkout(target.host, target.port, target.transport, **options)
        except SharedPoolError:
            continue
        done += 1
        way = chance.randrange(8)
        if way == 0:
            lease.discard()
        elif way == 1:
            with contextlib.suppress(OSError):
                lease.conn.shutdown(socket.SHUT_WR)
                lease.conn.settimeout(20)
                lease.conn.recv(1)  # the remote has closed: found at the checkin, or by the arbiter
            lease.checkin()
        elif way == 2:
            lease.conn.close()
            lease.checkin()
        elif way == 3:
            del lease
            gc.collect()
        elif way == 4:
            file = lease.conn.makefile("rb")
            lease.checkin()
            file.close()
        else:
            with contextlib.suppress(OSError), lease:  # the remote may close it in this very moment
                commands.exchange_over(lease.conn, "hello")
    return done


def check_laws(stats: PoolStats, backend: Backend) -> None:
    """Nothing is under way."""
    assert stats.checkouts == stats.reuses + stats.takeovers + stats.handoffs + stats.opens
    assert stats.opened - stats.closed == stats.connections == stats.idle + stats.in_use == backend.open
    assert sum(stats.closes.values()) == stats.closed
    assert stats.opened == backend.accepted == stats.connect_seconds.count
    assert stats.waits == stats.wait_seconds.count


def key_stats(state: State) -> dict[str, KeyStats]:
    return commands.pool_of(state, "default").key_stats()


def check_keys(worker: Worker, stats: PoolStats, targets: list[Target]) -> None:
    """Nothing is under way, and the worker has used every address."""
    keys = worker.call(key_stats)
    assert set(keys) == {where(target) for target in targets}, "nothing was counted apart from the addresses"
    for key in keys.values():
        assert key.checkouts == key.reuses + key.takeovers + key.handoffs + key.opens
        assert key.opened - key.closed == key.connections == key.idle + key.in_use
        assert sum(key.closes.values()) == key.closed
    for name in KEY_COUNTERS:
        assert sum(getattr(key, name) for key in keys.values()) == getattr(stats, name), name
    assert {reason: sum(key.closes[reason] for key in keys.values()) for reason in stats.closes} == stats.closes


def where(target: Target) -> str:
    return target.url if target.transport == "tcp" else f"unix:{target.host}"


def at_rest(worker: Worker, **expected: int) -> PoolStats:
    stats = worker.wait_stats(opening=0, granted=0, closing=0, waiting=0, **expected)
    assert isinstance(stats, PoolStats)
    return stats


def settled(worker: Worker, backend: Backend, **expected: int) -> PoolStats:
    """At rest, and nothing that the back end has closed is still to be found out."""

    def reached() -> PoolStats | None:
        stats = at_rest(worker, **expected)
        return stats if stats.connections == backend.open else None

    return wait_until(reached)


@pytest.mark.parametrize("seed", [1, 2])
def test_checkouts_and_closes_add_up_over_workers_threads_and_deaths(
    harness: Harness, backend: Backend, tcp: Target, unix: Target, seed: int
) -> None:
    workers = harness.start_many(4)
    observer, victim, *_ = workers
    for worker in workers:
        worker.attach(max_connections=4)
    begun = [
        worker.begin(ways_to_use, [tcp, unix], 60, 100 * seed + number, thread=f"thread {number % 2}")
        for number, worker in enumerate(workers * 2)
    ]
    wait_until(lambda: backend.accepted > 20)
    for number in range(5):
        backend.close(ids=backend.ids()[number::2])
    done = sum(each.result(60) for each in begun)
    victim.checkout(tcp)
    done += 1
    before = settled(observer, backend, in_use=1)
    check_laws(before, backend)
    check_keys(observer, before, [tcp, unix])
    assert before.checkouts == done
    victim.kill()
    after = settled(observer, backend, in_use=0, processes=3)
    check_laws(after, backend)
    check_keys(observer, after, [tcp, unix])
    assert (after.checkouts, after.closes["reaped"]) == (done, before.closes["reaped"] + 1)
    assert after.lease_seconds.count == done - 1  # whose holder was killed has no end


def test_what_was_opened_and_closed_adds_up_whoever_is_killed_at_whatever_moment(
    harness: Harness, backend: Backend, tcp: Target, unix: Target
) -> None:
    observer = harness.start()
    observer.attach(max_connections=3)
    observer.stats()
    chance = random.Random(7)
    for _ in range(4):
        workers = harness.start_many(4)
        begun = [worker.begin(ways_to_use, [tcp, unix], 100_000, chance.random()) for worker in workers]
        before = observer.stats().checkouts
        enough = before + chance.randrange(20, 200)
        wait_until(lambda: observer.stats().checkouts >= enough)  # noqa: B023
        for worker in workers:
            worker.kill()
        stats = settled(observer, backend, in_use=0, processes=1)
        assert stats.opened - stats.closed == stats.connections == stats.idle == backend.open
        assert sum(stats.closes.values()) == stats.closed
        assert stats.checkouts >= enough
        assert len(begun) == len(workers)


def test_a_checkout_that_found_its_connection_ended_counts_once(worker: Worker, backend: Backend, tcp: Target) -> None:
    """It is an open, not a reuse as well."""
    worker.use(tcp)
    for _ in range(20):
        backend.close()
        worker.use(tcp)
    stats = at_rest(worker, idle=1)
    assert stats.checkouts == stats.opens == stats.opened == 21
    assert stats.closes["ended"] + stats.closes["remote_closed"] == 20
    check_laws(stats, backend)


def test_a_permit_handed_over_and_opened_counts_once(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[0], [(two[1], unix)])
    two[0].checkin(label)
    two[1].checkin(waiting.result())
    stats = at_rest(two[0], idle=1)
    assert (stats.checkouts, stats.opens, stats.handoffs, stats.closes["evicted"]) == (2, 2, 0, 1)
    check_laws(stats, backend)


def unread(state: State, label: str) -> None:
    file = state.leases[label].conn.makefile("rb")
    state.leases[label].checkin()
    file.close()


def user_closes(state: State, label: str) -> None:
    state.leases[label].conn.close()
    state.leases[label].checkin()


def remote_first(state: State, label: str) -> None:
    state.leases[label].checkin()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (commands.discard, "discarded"),
        (unread, "unclean"),
        (user_closes, "unclean"),
        (commands.forget, "dropped"),
        (remote_first, "doomed"),
        (commands.leave, "reaped"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_close_has_one_reason(two: list[Worker], backend: Backend, tcp: Target, end: Any, reason: str) -> None:
    observer, worker = two
    observer.attach(max_connections=2)
    observer.stats()
    label = worker.checkout(tcp)
    if end is remote_first:
        # The arbiter has seen it once another connection that ended after it is gone.
        observer.use(tcp)
        backend.close(ids=[1])
        backend.close(ids=[2])
        observer.wait_stats(idle=0, closing=0)
    if end is commands.leave:
        worker.begin(commands.leave)
    else:
        worker.begin(end, label)
    if end is commands.forget:
        observer.wait_stats(in_use=0)
    stats = at_rest(observer, in_use=0, connections=0)
    assert stats.closes[reason] == 1
    assert sum(stats.closes.values()) == stats.closed == stats.opened == backend.accepted


def test_what_the_arbiter_closes_has_its_reasons_too(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=3, idle_timeout=100)
    labels = [worker.checkout(tcp) for _ in range(3)]
    for label in labels:
        worker.checkin(label)
    worker.call(commands.library, "start_pool", max_connections=2)
    at_rest(worker, idle=2)
    worker.call(commands.library, "start_pool", idle_timeout=0.05)
    stats = at_rest(worker, idle=0)
    assert (stats.closes["over_limit"], stats.closes["expired"]) == (1, 2)
    assert (stats.over_limit, stats.expired) == (1, 2)
    check_laws(stats, backend)


def test_permits_are_checkouts_without_connections(worker: Worker) -> None:
    for _ in range(3):
        worker.call(commands.hold_permit, "some", "one", max_connections=2)
        worker.call(commands.release_permit, "one")
    stats = worker.stats("some")
    assert (stats.checkouts, stats.opens, stats.opened, stats.connections) == (3, 3, 0, 0)


def test_who_gave_up_has_waited_too(two: list[Worker], tcp: Target) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    two[1].fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.06)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    two[0].checkin(label)
    waiting.result()
    stats = two[0].stats()
    assert (stats.waits, stats.wait_seconds.count, stats.timeouts) == (2, 2, 1)
    assert stats.wait_seconds.sum >= 0.06


def test_the_longest_lease_and_the_longest_wait_are_told_with_their_processes(three: list[Worker], tcp: Target) -> None:
    holder, waiter, observer = three
    observer.attach(max_connections=1)
    nobody = observer.stats()
    assert (nobody.longest_lease, nobody.longest_lease_pid, nobody.longest_wait_pid) == (0.0, 0, 0)
    holder.checkout(tcp)
    line_up(observer, [(waiter, tcp)])
    first = observer.stats()
    assert (first.longest_lease_pid, first.longest_wait_pid) == (holder.pid, waiter.pid)
    assert first.longest_lease >= first.longest_wait > 0
    assert observer.stats().longest_wait > first.longest_wait


def told_everywhere(state: State, target: Target) -> dict[str, dict[str, Any]]:
    """The numbers by each way to ask for them, in one process that holds a lease and waits for another."""
    pool = commands.pool_of(state, "default")
    where = (target.host, target.port, target.transport)
    found = {
        "Pool.stats": dataclasses.asdict(pool.stats()),
        "pool_stats": dataclasses.asdict(sharedpool.pool_stats("default")),
        "inspection.pools": dataclasses.asdict(inspection.pools()[0]),
    }
    facts = inspection.overview()[0]
    found["overview"] = {**dataclasses.asdict(facts["stats"]), **{name: facts[name] for name in AGES}}
    if os.environ["SHAREDPOOL_MODE"] == "shared":
        found["status --json"] = good(None, "status", "--json", **dict(os.environ)).json[0]
    with pytest.raises(TooManyWaiting) as refused:
        pool.checkout(*where, checkout_timeout=30)
    found["TooManyWaiting"] = dataclasses.asdict(refused.value.stats)
    with pytest.raises(PoolTimeout) as late:
        pool.checkout(*where, checkout_timeout=0)
    stats = late.value.stats  # the error counts itself
    found["PoolTimeout"] = dataclasses.asdict(
        dataclasses.replace(stats, waiting=stats.waiting - 1, timeouts=stats.timeouts - 1)
    )
    return found


AGES = ("longest_lease", "longest_wait")


def test_every_way_to_ask_gives_every_number(harness: Harness, tcp: Target, mode: str) -> None:
    solo = harness.start(SHAREDPOOL_MODE=mode)
    solo.attach(max_connections=1, max_waiting=1)
    solo.use(tcp)
    solo.checkout(tcp)
    line_up(solo, [(solo, tcp)])
    found = solo.call(told_everywhere, tcp)
    first = found["Pool.stats"]
    assert (first["longest_lease_pid"], first["longest_wait_pid"], first["reuses"]) == (solo.pid, solo.pid, 1)
    assert min(first[name] for name in AGES) > 0
    for way, numbers in found.items():
        assert all(numbers[name] >= first[name] for name in AGES), way
        told = {name: numbers[name] for name in first} | {name: first[name] for name in AGES}
        assert json.dumps(told) == json.dumps(first), way  # JSON, because the command has no tuples


def test_a_workers_counts_are_the_ones_it_has_itself(harness: Harness, tcp: Target, mode: str) -> None:
    solo = harness.start(SHAREDPOOL_MODE=mode)
    solo.use(tcp)
    solo.discard(solo.checkout(tcp))
    found = solo.call(commands.library, "worker_stats")[solo.pid]
    own = solo.call(commands.worker_stats)
    assert own["discards"] == 1
    assert {name: found[name] for name in own} == own


def test_every_workers_counts_can_be_had_from_any_process(two: list[Worker], tcp: Target) -> None:
    two[0].attach(max_connections=2)
    two[0].use(tcp)
    two[0].use(tcp)
    two[1].call(commands.discard, two[1].checkout(tcp))
    found = two[1].call(commands.library, "worker_stats")
    assert set(found) == {worker.pid for worker in two}
    names = ("checkouts", "opens", "reuses", "takeovers")
    ways = [tuple(found[worker.pid][name] for name in names) for worker in two]
    assert ways == [(2, 1, 1, 0), (1, 0, 0, 1)]
    assert found[two[1].pid]["closes"]["discarded"] == 1


def test_the_states_are_counted_by_key_too(harness: Harness, tcp: Target, unix: Target, mode: str) -> None:
    solo = harness.start(SHAREDPOOL_MODE=mode)
    solo.attach(max_connections=3)
    for target in (tcp, tcp, unix):
        solo.checkout(target)
    found = solo.call(key_stats)
    assert {address: stats.in_use for address, stats in found.items()} == {tcp.url: 2, where(unix): 1}
    assert {address: (stats.opens, stats.checkouts, stats.connections) for address, stats in found.items()} == {
        tcp.url: (2, 2, 2), where(unix): (1, 1, 1),
    }  # fmt: skip


def test_the_laws_hold_in_local_mode(harness: Harness, backend: Backend, tcp: Target, unix: Target) -> None:
    solo = harness.start(SHAREDPOOL_MODE="local")
    solo.attach(max_connections=3)
    begun = [solo.begin(ways_to_use, [tcp, unix], 60, number, thread=f"thread {number}") for number in range(4)]
    done = sum(each.result(60) for each in begun)
    stats = settled(solo, backend, in_use=0)
    check_laws(stats, backend)
    check_keys(solo, stats, [tcp, unix])
    assert (stats.checkouts, stats.lease_seconds.count) == (done, done - stats.dropped)


def test_counts_of_a_process_that_was_killed_are_the_pools_for_ever(harness: Harness, tcp: Target) -> None:
    observer = harness.start()
    observer.attach(max_connections=2)
    expected = 0
    for _ in range(4):
        worker = harness.start()
        for _ in range(5):
            worker.use(tcp)
        expected += 5
        worker.kill()
        stats = observer.wait_stats(processes=1)
        assert (stats.checkouts, stats.lease_seconds.count) == (expected, expected)
    assert os.getpid() not in observer.call(commands.library, "worker_stats")


def test_a_keys_counts_survive_the_process_the_arbiter_and_a_reset(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target, unix: Target
) -> None:
    observer, victim = harness.start_many(2)
    observer.attach(max_connections=3)
    for target in (tcp, tcp, unix):
        observer.use(target)
        victim.use(target)
    victim.kill()
    observer.wait_stats(processes=1)
    before = settled(observer, backend, in_use=0)
    check_keys(observer, before, [tcp, unix])
    keys = observer.call(key_stats)
    successor(observer, kill_arbiter(scope))
    assert observer.call(key_stats) == keys
    observer.call(commands.library, "reset_stats", "default")
    observer.use(tcp)
    after = settled(observer, backend, in_use=0)
    check_keys(observer, after, [tcp, unix])
    found = observer.call(key_stats)
    assert (found[tcp.url].checkouts, found[where(unix)].checkouts, found[where(unix)].opened) == (1, 0, 1)


def test_evictions_are_counted_for_the_address_that_was_closed(
    worker: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    worker.attach(max_connections=1)
    for target in (tcp, unix, tcp):
        worker.use(target)
    check_keys(worker, settled(worker, backend, idle=1), [tcp, unix])
    keys = worker.call(key_stats)
    assert {address: numbers.closes["evicted"] for address, numbers in keys.items()} == {tcp.url: 1, where(unix): 1}
    assert (keys[tcp.url].waits, keys[where(unix)].waits) == (1, 1)
