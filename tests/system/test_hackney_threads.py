"""What hackney's users suffered, row by row: each test names the threads it comes from, and uses hackney's functions.

A row's finer points are tested where they belong; here each defect is shown not to be there, from a user's side.
"""

from __future__ import annotations

import ast
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool import ConnectFailed, LeaseError, PoolTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system import hackney
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")

THREADS = [
    "p42", "#884", "#886", "#888", "#230", "p41", "#312", "p26", "#462", "#675", "#680", "p08", "#643", "#661", "p13b",
    "p18", "p32", "#419", "#420", "#440", "p07", "p25", "p14", "#648", "p24", "p27", "#183", "#683", "#686", "#717",
    "p17", "#510", "#541", "#547", "p40", "#775", "#780", "#788", "#927-#929", "#659", "p12", "#850", "#869", "#914",
    "#322", "#355", "#566", "#570",
]  # fmt: skip


def test_every_thread_has_a_test_that_names_it() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    named = " ".join(texts).replace(",", " ").replace(":", " ").split()
    assert [thread for thread in THREADS if thread not in named] == []


def call(worker: Worker, function: str, *arguments: object, **options: object) -> Any:
    return worker.call(commands.library, function, *arguments, **options)


def all_free(worker: Worker) -> Any:
    """Wait until nothing of the pool is in use or on its way."""
    return worker.wait_stats(in_use=0, opening=0, granted=0, closing=0, waiting=0)


def test_unread_bytes_of_one_request_never_reach_the_next_user(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney p42, #884, #886, #888"""
    label = two[0].call(hackney.checkout, tcp, max_connections=1)
    two[0].exchange(label)
    backend.say("1 the rest of somebody's answer\n")
    two[0].call(hackney.checkin, label)
    assert two[1].call(hackney.use, tcp, "mine") == 2
    assert backend.peak == 1


def test_a_half_closed_socket_is_neither_kept_nor_handed_over(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """hackney #230, p41"""
    two[0].call(hackney.use, tcp, max_connections=1)
    backend.half_close()
    assert two[1].call(hackney.use, tcp) == 2
    label = two[0].call(hackney.checkout, tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    backend.half_close()
    two[0].call(hackney.checkin, label)
    assert two[1].exchange(waiting.result()) == 3


def test_a_waiter_for_another_host_gets_the_permit_when_it_is_first(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #312, p26"""
    other = backend.listen("other")
    label = three[0].call(hackney.checkout, tcp, max_connections=1)
    queue = line_up(three[0], [(three[1], other), (three[2], tcp)])
    three[0].call(hackney.checkin, label)
    label = queue[0].result()
    assert three[1].exchange(label) == 2
    assert not queue[1].done
    three[1].checkin(label)
    assert three[2].exchange(queue[1].result()) == 3
    assert backend.peak == 1


@pytest.mark.parametrize("what", ["leased", "connecting", "queued"])
def test_no_permit_is_lost_when_its_owner_dies(two: list[Worker], backend: Backend, tcp: Target, what: str) -> None:
    """hackney #462, #675, #680, p08"""
    dying, other = two
    other.call(hackney.use, tcp, max_connections=1)
    if what == "leased":
        dying.call(hackney.checkout, tcp)
    elif what == "connecting":
        hanging = backend.listen("hanging")
        backend.do("hang", name="hanging")
        dying.begin(hackney.checkout, hanging, connect_timeout=60.0)
        other.wait_stats(opening=1)
    else:
        held = other.call(hackney.checkout, tcp)
        line_up(other, [(dying, tcp)])
    dying.kill()
    if what == "queued":
        other.wait_stats(waiting=0)
        other.call(hackney.checkin, held)
    other.call(hackney.use, tcp)
    assert all_free(other).idle == 1


def test_no_permit_is_lost_when_a_connect_fails_or_a_checkin_finds_a_bad_socket(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #643, #661, p13b, p18, p32"""
    refusing, hanging = backend.listen("refusing"), backend.listen("hanging")
    backend.do("refuse", name="refusing")
    backend.do("hang", name="hanging")
    two[0].call(hackney.use, tcp, max_connections=1)
    for target in (refusing, hanging, refusing):
        two[0].fails(sharedpool.SharedPoolError, hackney.checkout, target, connect_timeout=0.1)
        assert two[1].call(hackney.use, tcp)
    label = two[0].call(hackney.checkout, tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    backend.close()
    two[0].call(hackney.checkin, label)
    two[1].checkin(waiting.result())
    assert all_free(two[0]).idle == 1


@pytest.mark.parametrize("how", ["timed out", "killed"])
def test_a_waiter_that_has_left_gets_nothing_and_the_next_one_does(
    three: list[Worker], backend: Backend, tcp: Target, how: str
) -> None:
    """hackney #419, #420, #440, p07, p25"""
    holder, leaving, staying = three
    label = holder.call(hackney.checkout, tcp, max_connections=1)
    leaving.stats()  # attached, which is none of its time
    gone = leaving.begin_checkout(tcp, checkout_timeout=2 if how == "timed out" else None)
    holder.wait_stats(waits=1)
    leaving.stop()  # it does not leave before the next one waits, too
    waiting = staying.begin_checkout(tcp, checkout_timeout=None)
    holder.wait_stats(waits=2)
    if how == "timed out":
        leaving.resume()
        gone.error(PoolTimeout)
    else:
        leaving.kill()
    holder.wait_stats(waiting=1)
    holder.call(hackney.checkin, label)
    staying.checkin(waiting.result())
    assert all_free(holder).idle == 1
    assert backend.accepted == 1


def test_a_double_checkin_raises_and_the_new_users_socket_is_untouched(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney p14"""
    label = two[0].call(hackney.checkout, tcp, max_connections=1)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    two[0].call(hackney.checkin, label)
    new = waiting.result()
    for _ in range(3):
        two[0].fails(LeaseError, hackney.checkin, label)
    assert two[1].exchange(new) == 1
    two[1].checkin(new)
    assert (call(two[0], "count"), all_free(two[0]).idle) == (1, 1)


def test_idle_connections_and_idle_hits_count_against_the_cap(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #648, p24, p27"""
    others = [backend.listen(f"other {i}") for i in range(3)]
    for round_ in range(3):
        for worker in three:
            for target in (tcp, *others):
                worker.call(hackney.use, target, f"round {round_}", max_connections=2)
    assert backend.peak == 2
    labels = [three[0].call(hackney.checkout, tcp), three[1].call(hackney.checkout, tcp)]
    three[2].fails(PoolTimeout, hackney.checkout, tcp, checkout_timeout=0.05)
    assert len(set(labels)) <= 2
    assert backend.peak == 2


def test_nobody_waits_beside_a_free_permit_after_leases_ended_in_every_way(
    three: list[Worker], backend: Backend, tcp: Target, seeded: random.Random
) -> None:
    """hackney #183, #683, #686, #717: after days all waited, with nothing in use."""
    other = backend.listen("other")
    three[0].call(hackney.use, tcp, max_connections=3)
    ways = ["checkin", "discard", "unread", "closed", "reset", "forget", "timeout"]
    for number in range(28):
        worker = seeded.choice(three)
        label = worker.call(hackney.checkout, seeded.choice([tcp, other]), checkout_timeout=20.0)
        end_lease(worker, label, ways[number % len(ways)], backend, tcp)
    assert all_free(three[0]).used <= 3
    labels = [worker.call(hackney.checkout, tcp, checkout_timeout=20.0) for worker in three]
    assert call(three[0], "get_stats")["in_use_count"] == 3
    assert len(labels) == 3
    assert backend.peak <= 3


def end_lease(worker: Worker, label: str, way: str, backend: Backend, tcp: Target) -> None:
    """End a lease in one of the ways in which leases end."""
    number = worker.exchange(label)
    if way == "unread":
        backend.say("unread", [number])
    elif way in ("closed", "reset"):
        backend.close([number], "rst" if way == "reset" else "told")
    elif way == "timeout":
        rest = [worker.call(hackney.checkout, tcp, checkout_timeout=20.0) for _ in range(2)]
        worker.fails(PoolTimeout, hackney.checkout, tcp, checkout_timeout=0.01)
        for each in rest:
            worker.call(hackney.checkin, each)
    if way == "discard":
        worker.discard(label)
    elif way == "forget":
        worker.call(commands.forget, label)
    else:
        worker.call(hackney.checkin, label)


def test_after_the_arbiters_death_start_comes_back_with_a_new_one(two: list[Worker], scope: Scope) -> None:
    """hackney p17: the registry was lost, and start went round for ever."""
    call(two[0], "start_pool", "api", max_connections=3)
    killed = two[0].call(hackney.kill_arbiter, "api")
    assert call(two[0], "find_pool", "api") is None
    for worker in two:
        call(worker, "start")
    assert scope.arbiter() != killed
    assert call(two[1], "start_pool", "api", max_connections=4).arbiter_pid == scope.arbiter()


def test_a_queue_of_three_hundred_is_served_by_handoffs_alone(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """hackney #510, #541, #547, p40: a mailbox of 300,000, and a checkout cost more with every one that waited."""
    holder, waiting = two
    held = holder.call(hackney.checkout, tcp, max_connections=1)
    pending = [waiting.begin(commands.use, tcp, thread=f"t{number}", checkout_timeout=None) for number in range(300)]
    holder.wait_stats(waiting=300)
    holder.call(hackney.checkin, held)
    assert {each.result() for each in pending} == {1}
    stats = all_free(holder)
    assert (stats.waits, stats.handoffs, stats.opens) == (300, 300, 1)
    assert backend.accepted == 1


def test_neither_an_expiry_nor_a_slow_connect_holds_anybody_up(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney #775, #780, #788, #927-#929"""
    hanging = backend.listen("hanging")
    backend.do("hang", name="hanging")
    two[0].call(hackney.use, tcp, max_connections=3, idle_timeout=0.05)
    slow = two[0].begin(hackney.checkout, hanging, connect_timeout=60.0, thread="slow")
    two[1].wait_stats(opening=1)
    for worker in two * 10:
        worker.call(hackney.use, tcp)
    assert not slow.done
    two[1].wait_stats(idle=0, closing=0, opening=1)
    assert two[1].stats().expired >= 1
    backend.do("accept_again", name="hanging")
    two[0].discard(slow.result())
    two[1].wait_stats(idle=0, closing=0, opening=0, in_use=0)


def test_counts_are_counts_of_states_and_never_below_zero(harness: Harness, backend: Backend, tcp: Target) -> None:
    """hackney #183, #510, #659: counts of -1, and 3492 in the queue of 1000 workers."""
    observer, *workers = harness.start_many(4)
    held = observer.call(hackney.checkout, tcp, max_connections=1)
    for worker in workers:
        for number in range(20):
            worker.begin(commands.requests_until_told, [tcp], thread=f"t{number}", checkout_timeout=None)
    observer.wait_stats(waiting=60)
    assert call(observer, "get_stats")["queue_count"] == 60
    call(observer, "set_max_connections", "default", 2)
    observer.call(hackney.checkin, held)
    for victim in workers:
        for _ in range(60):
            numbers = call(observer, "get_stats")
            assert 0 <= numbers["queue_count"] <= 60
            assert 0 <= numbers["in_use_count"] <= 2
            assert 0 <= numbers["free_count"] <= 2
        victim.kill()
    stats = all_free(observer)
    assert call(observer, "get_stats") == {
        "name": "default", "max": 2, "in_use_count": 0, "free_count": stats.idle, "queue_count": 0,
    }  # fmt: skip


def test_a_raised_limit_serves_in_order_and_no_newcomer_first(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney p12"""
    three[0].call(hackney.checkout, tcp, max_connections=1)
    first, second = line_up(three[0], [(three[1], tcp), (three[2], tcp)])
    call(three[0], "set_max_connections", "default", 2)
    (newcomer,) = line_up(three[0], [(three[0], tcp)], already=1)
    label = first.result()
    assert not second.done
    three[1].checkin(label)
    three[2].checkin(second.result())
    assert three[0].exchange(newcomer.result(), thread="waiter 0") in (1, 2)
    assert backend.peak == 2


def test_connections_that_die_at_any_moment_are_replaced(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """hackney #850, #869, #914: a connection died in the middle of the liveness check."""
    stop = threading.Event()
    two[0].call(hackney.use, tcp, max_connections=2)

    def reset_idle_ones() -> int:
        done = 0
        while not stop.is_set():
            done += int(backend.do("close", ids=backend.ids()[:1], how="rst"))
        return done

    errors = two[0].begin(check_out_and_in, tcp, 300)
    also = two[1].begin(check_out_and_in, tcp, 300)
    killer = threading.Thread(target=reset_idle_ones)
    killer.start()
    try:
        assert (errors.result(), also.result()) == ([], [])
    finally:
        stop.set()
        killer.join()
    assert backend.peak <= 2


def check_out_and_in(state: State, target: Target, number: int) -> list[str]:
    """So many leases that nobody uses; gives what went wrong with the pool."""
    errors = []
    for _ in range(number):
        try:
            sharedpool.checkin(sharedpool.checkout(target.host, target.port, checkout_timeout=20.0))
        except ConnectFailed:  # reset while it was being opened: the server's refusal, and no idle connection
            pass
        except Exception as error:
            errors.append(repr(error))
    return errors


def test_another_address_or_transport_is_another_connection(
    worker: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    """hackney #322, #355, #566, #570: a socket went to a request for another server, or with other options."""
    other = backend.listen("other")
    for _ in range(3):
        assert [worker.call(hackney.use, target) for target in (tcp, other, unix)] == [1, 2, 3]
    loud = Target(tcp.host.upper(), tcp.port)
    assert worker.call(hackney.use, loud) == 1  # hosts have no case
    wait_until(lambda: call(worker, "count", "default", other.url) == 1)
    assert backend.counts()["accepted_by"] == {"tcp": 1, "other": 1, "unix": 1}
