"""An arbiter is killed or stops: its work goes on, a successor takes over, and there is never a second cap."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from itertools import count

import pytest

import sharedpool
from sharedpool import AttachRefused, TooManyWaiting, control, segment, succession
from sharedpool import scope as scopes
from sharedpool.channel import Channel
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up


def kill_arbiter(scope: Scope) -> int:
    """SIGKILL; gives its pid when it is dead."""
    pid = scope.arbiter()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes.alive(pid))
    return pid


def successor(worker: Worker, old: int) -> int:
    """The next arbiter, once it answers."""

    def answers() -> int:
        answer = worker.call(commands.library, "ping", thread="ping")
        return answer["pid"] if answer and answer["pid"] != old else 0

    return int(wait_until(answers, deadline=20))


def test_its_pools_go_on_with_their_limits_counters_and_connections(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=2, idle_timeout=77.0)
    other.attach(max_connections=2, idle_timeout=77.0)
    held = one.checkout(tcp)
    other.use(tcp)
    before = one.stats()
    old = kill_arbiter(scope)
    new = successor(one, old)
    info = wait_until(lambda: one.call(commands.library, "find_pool", "default"))
    assert (info.arbiter_pid, info.options.max_connections, info.options.idle_timeout) == (new, 2, 77.0)
    after = one.stats()
    assert (after.opens, after.max_connections, after.in_use, after.idle) == (before.opens, 2, 1, 1)
    assert one.exchange(held) == 1
    assert other.use(tcp) == 2
    assert backend.accepted == 2


def test_an_operator_who_comes_before_the_successor_finds_the_pool(
    two: list[Worker], scope: Scope, tcp: Target
) -> None:
    worker, operator = two
    worker.attach(max_connections=2)
    worker.use(tcp)
    worker.stop()  # so that it cannot start one
    kill_arbiter(scope)
    operator.call(commands.library, "set_max_connections", "default", 3)
    assert operator.call(commands.library, "get_stats", "default")["max"] == 3
    worker.resume()
    worker.wait_stats(max_connections=3, idle=1)


def test_max_waiting_and_the_reserve_are_kept(two: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    one, other = two
    for worker in two:
        worker.attach(max_connections=2, max_waiting=1, reserve=1)
    held = one.checkout(tcp)
    (waiting,) = line_up(one, [(other, tcp)])
    successor(one, kill_arbiter(scope))
    one.fails(TooManyWaiting, commands.checkout, tcp, checkout_timeout=None)
    urgent = one.checkout(tcp, priority="high")
    options = one.call(commands.library, "find_pool", "default").options
    assert (options.max_waiting, options.reserve) == (1, 1)
    one.checkin(urgent)  # to nobody: it is the reserve
    one.wait_stats(idle=1, in_use=1, waiting=1)
    one.checkin(held)
    other.exchange(waiting.result())


def test_own_idle_connections_and_handoffs_need_no_arbiter(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=1)
    one.use(tcp)
    other.use(tcp)
    held = one.checkout(tcp)
    (waiting,) = line_up(other, [(other, tcp)])
    old = kill_arbiter(scope)
    one.checkin(held)
    assert other.exchange(waiting.result()) == 1
    assert backend.accepted == 1
    successor(one, old)


def test_opening_waits_for_the_successor(two: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    one, other = two
    one.attach(max_connections=3)
    held = [one.checkout(tcp)]
    other.stats()
    old = kill_arbiter(scope)
    held.append(one.checkout(tcp))
    assert other.use(tcp) == 3
    assert sorted(one.exchange(label) for label in held) == [1, 2]
    assert backend.peak == 3
    successor(one, old)


def fetch_without_limit(state: State) -> int | None:
    """Of a successor, by a channel whose events nobody follows: so it is the fetch that comes back."""
    channel = Channel(control._directory(), "api", {}, declares=True, update=True, holdings=lambda: iter(()))
    _, descriptor = channel.attach(10)
    kept = segment.attach(descriptor)  # by this a successor finds the pool
    answer = sharedpool.ping()
    assert answer is not None
    pid = answer["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes.alive(pid))
    try:
        return channel.fetch(0, 1, 1 << 62)
    finally:
        channel.close()
        del kept


def test_who_asks_without_a_limit_gets_the_successors_answer(worker: Worker) -> None:
    assert worker.call(fetch_without_limit) is None


def test_a_takeover_waits_for_the_successor(two: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    one, other = two
    other.attach(max_connections=1)
    other.stats()
    one.use(tcp)
    old = kill_arbiter(scope)
    assert other.use(tcp) == 1
    assert backend.accepted == 1
    successor(one, old)


def test_who_attaches_afterwards_shares_the_same_cap(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    one = harness.start()
    one.attach(max_connections=2)
    labels = [one.checkout(tcp) for _ in range(2)]
    old = kill_arbiter(scope)
    newcomer = harness.start()
    newcomer.attach(max_connections=2)
    (waiting,) = line_up(one, [(newcomer, tcp)])
    assert backend.peak == 2
    one.checkin(labels[0])
    assert newcomer.exchange(waiting.result()) in (1, 2)
    assert newcomer.stats().processes == 2
    successor(one, old)


def test_while_a_worker_that_is_stopped_has_not_told_what_it_holds_its_connections_count(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    sleeper, other = harness.start_many(2)
    sleeper.attach(max_connections=2)
    other.stats()
    sleeper.use(tcp)  # idle, and its only other holder is the arbiter that is about to die
    sleeper.stop()
    old = kill_arbiter(scope)
    successor(other, old)
    assert other.use(backend.listen("other")) == 2  # another key: there is room for it
    assert other.stats().idle == 2
    sleeper.resume()
    assert sleeper.use(tcp) == 1
    assert (backend.peak, backend.accepted) == (2, 2)


def test_workers_that_died_with_it_are_reaped(harness: Harness, scope: Scope, backend: Backend, tcp: Target) -> None:
    victim, survivor = harness.start_many(2)
    survivor.attach(max_connections=1)
    survivor.stats()
    victim.checkout(tcp)
    (waiting,) = line_up(survivor, [(survivor, tcp)])
    arbiter = scope.arbiter()
    os.kill(arbiter, signal.SIGKILL)
    victim.kill()
    survivor.exchange(waiting.result())
    survivor.wait_stats(processes=1, in_use=1, closing=0)
    assert backend.peak == 1


def test_what_only_the_dead_arbiter_held_is_given_up(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    """Idle connections of a dead worker, which the arbiter had adopted, go with it; their permits don't."""
    gone, other = harness.start_many(2)
    other.attach(max_connections=1)
    other.stats()
    gone.use(tcp)
    gone.kill()
    other.wait_stats(idle=1, processes=1)
    old = kill_arbiter(scope)
    backend.wait_open(0)
    assert other.use(tcp) == 2
    successor(other, old)


def test_connections_that_were_being_closed_become_free(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=1)
    other.stats()
    label = one.checkout(tcp)
    arbiter = scope.arbiter()
    os.kill(arbiter, signal.SIGSTOP)  # so that nothing gets closed to the end
    one.discard(label)
    (waiting,) = line_up(one, [(other, tcp)])
    os.kill(arbiter, signal.SIGKILL)
    assert other.exchange(waiting.result()) == 2
    assert backend.peak == 1


def test_one_that_is_stopped_and_needed_is_killed_and_succeeded(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=1)
    other.stats()
    label = one.checkout(tcp)
    arbiter = scope.arbiter()
    os.kill(arbiter, signal.SIGSTOP)
    one.discard(label)
    waiting = other.begin_checkout(tcp, checkout_timeout=None)
    assert other.exchange(waiting.result()) == 2
    assert not processes.alive(arbiter)
    assert scope.arbiter() != arbiter
    assert backend.peak == 1


def test_a_grant_under_way_arrives(two: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    one, other = two
    one.attach(max_connections=1)
    other.stats()
    label = one.checkout(tcp)
    (waiting,) = line_up(one, [(other, tcp)])
    other.stop()
    old = kill_arbiter(scope)
    one.checkin(label)
    other.resume()
    assert other.exchange(waiting.result()) == 1
    successor(one, old)


def test_a_worker_that_became_another_program_gives_up_what_it_had(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    changed, other = harness.start_many(2)
    other.attach(max_connections=1)
    other.stats()
    changed.checkout(tcp)
    (waiting,) = line_up(other, [(other, tcp)])
    old = kill_arbiter(scope)
    changed.begin(execute, sys.executable, "-c", "import sys; sys.stdin.read()")
    other.exchange(waiting.result())
    other.wait_stats(processes=1)
    changed.kill()
    successor(other, old)


def execute(state: object, *command: str) -> None:
    os.execv(command[0], command)


@pytest.mark.parametrize("repeat", range(3))
def test_killed_again_and_again_under_load_nothing_fails(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target, repeat: int
) -> None:
    workers = harness.start_many(4)
    for worker in workers:
        worker.attach(max_connections=2, checkout_timeout=30.0)
        worker.stats()
    running = [worker.begin(commands.requests_until_told, [tcp], thread="load") for worker in workers]
    old = 0
    for number in count(1):
        new = successor(workers[0], old)
        done = workers[0].stats().checkouts
        wait_until(lambda done=done: workers[0].stats().checkouts > done + 50)  # type: ignore[misc]
        os.kill(new, signal.SIGKILL)
        old = new
        if number == 4:
            break
    successor(workers[0], old)
    for worker in workers:
        worker.call(commands.tell_to_stop)
    for pending in running:
        load = pending.result()
        assert load.errors == []
        assert load.done > 0
    workers[0].wait_stats(in_use=0, waiting=0, opening=0, closing=0, processes=4)
    assert backend.peak <= 2


def test_a_scope_without_workers_has_nothing_to_inherit(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    first = harness.start()
    first.attach(max_connections=1)
    first.use(tcp)
    old = kill_arbiter(scope)
    first.kill()
    backend.wait_open(0)
    second = harness.start()
    second.attach(max_connections=4)
    assert second.use(tcp) == 2
    assert second.stats().max_connections == 4
    successor(second, old)


def kill_and_inherit(scope: Scope, worker: Worker) -> int:
    """Kill the arbiter and wait for a successor, which somebody has to start: nobody needs one for a stopped pool."""
    kill_arbiter(scope)
    worker.call(commands.library, "start_pool", "another", max_connections=1)
    return scope.arbiter()


def test_a_worker_whose_pool_is_stopped_tells_a_successor_what_it_holds(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=1)
    label = one.checkout(tcp)
    other.call(commands.library, "stop_pool", "default")
    kill_and_inherit(scope, other)
    other.call(commands.library, "start_pool", "default", max_connections=1)
    kill_and_inherit(scope, other)
    backend.do("hold_closes")
    one.discard(label)
    one.wait_stats(closing=1, closed=0)
    backend.do("release_closes")
    stats = one.wait_stats(closing=0, in_use=0)
    assert (stats.closed, stats.closed_unconfirmed) == (1, 0), "the successor saw its end"


def leave_and_return(state: State, pid: int) -> None:
    """Leave the pool while there is no arbiter that could be told, and come again."""
    handle = commands.pool_of(state, "default")
    channel = handle.attached.channel
    channel.close()  # so that it can't come back either
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes.alive(pid))
    handle.close()
    handle.stats()


def attach_beside(state: State) -> None:
    """A second row of this process, of which it will tell no heir."""
    beside = Channel(control._directory(), "default", {}, declares=False, update=True, holdings=lambda: iter(()))
    _, descriptor = beside.attach(20)
    os.close(descriptor)
    state.things["beside"] = beside


def close_beside(state: State) -> None:
    state.things.pop("beside").close()


def test_a_row_that_its_process_has_left_behind_ends_when_it_comes_back_with_another(
    two: list[Worker], scope: Scope, tcp: Target
) -> None:
    worker, other = two
    worker.attach(max_connections=2)
    worker.use(tcp)
    worker.call(attach_beside)
    assert worker.stats().processes == 2
    kill_arbiter(scope)
    worker.wait_stats(processes=1)
    worker.call(close_beside)
    assert other.use(tcp) == 1


def test_who_left_while_there_was_no_arbiter_and_came_again_has_one_row(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, other = two
    other.attach(max_connections=1)
    other.stats()
    label = one.checkout(tcp)
    one.call(leave_and_return, scope.arbiter())
    backend.wait_open(0)  # the lease ended, although its user still has the object
    assert other.use(tcp) == 2
    other.wait_stats(processes=2, in_use=0, closing=0)
    assert label


def test_who_attaches_afterwards_does_not_undo_what_an_operator_had_set(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    one, newcomer = harness.start_many(2)
    one.attach(max_connections=5, idle_timeout=60.0)
    one.stats()
    one.call(commands.library, "set_max_connections", "default", 3)
    one.call(commands.library, "set_timeout", "default", 30.0)
    successor(one, kill_arbiter(scope))
    newcomer.attach(max_connections=5, idle_timeout=60.0)  # which is no change, but what has always been declared
    assert newcomer.stats().max_connections == 3
    assert newcomer.call(commands.library, "timeout", "default") == 30.0
    harness.start().call(commands.library, "start_pool", "default", max_connections=4)
    assert one.stats().max_connections == 4


PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, CAP_SYS_PTRACE = 1, 4, 24, 19


def hide(state: State) -> None:
    """From now on /proc shows nobody what this process has open, as if it had dropped root without an exec.

    Not even an arbiter that this process starts, which would be root's where the tests are.
    """
    only_see_ones_own(state)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


def only_see_ones_own(state: State) -> None:
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0)  # fails where there is nothing to drop


def hidden(harness: Harness, number: int) -> list[Worker]:
    workers = harness.start_many(number)
    for worker in workers:
        worker.call(hide)
        worker.attach(max_connections=2)
    return workers


def lose_roster(scope: Scope) -> None:
    """Take it away while the arbiter stands still, as it would write it anew."""
    os.kill(scope.arbiter(), signal.SIGSTOP)
    (scope.directory / "sharedpool" / scopes.ROSTER).unlink()


def newcomer_to(harness: Harness) -> Worker:
    worker = harness.start()
    worker.call(only_see_ones_own)
    worker.attach(max_connections=2)
    return worker


@pytest.mark.parametrize("roster", ["whole", "lost"])
def test_what_proc_does_not_show_is_brought_by_those_who_come_back(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target, roster: str
) -> None:
    one, other = hidden(harness, 2)
    held = [one.checkout(tcp), other.checkout(tcp)]
    old = scope.arbiter()
    if roster == "lost":
        lose_roster(scope)
    kill_arbiter(scope)
    successor(one, old)
    one.wait_stats(processes=2, in_use=2)
    newcomer = newcomer_to(harness)
    (waiting,) = line_up(one, [(newcomer, tcp)])
    assert sorted([one.exchange(held[0]), other.exchange(held[1])]) == [1, 2]
    one.checkin(held[0])
    assert newcomer.exchange(waiting.result()) in (1, 2)
    assert newcomer.stats().processes == 3
    assert backend.peak == 2


def test_nobody_gets_the_pool_of_a_process_that_proc_does_not_show_before_it_comes_back(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    (owner,) = hidden(harness, 1)
    held = [owner.checkout(tcp) for _ in range(2)]
    owner.stop()
    newcomer = newcomer_to(harness)
    for _ in range(2):  # a second heir knows what the first one knew
        kill_arbiter(scope)
        error = newcomer.fails(AttachRefused, commands.use, tcp)
        assert f"in use by the processes {owner.pid}" in str(error)
        newcomer.fails(AttachRefused, commands.library, "start_pool", "default", max_connections=2)
        newcomer.fails(AttachRefused, commands.library, "get_stats", "default")
        newcomer.call(commands.library, "start_pool", "another", max_connections=1)
    owner.resume()
    wait_until(lambda: newcomer.call(commands.library, "find_pool", "default", thread="ask") is not None)
    (waiting,) = line_up(owner, [(newcomer, tcp)])
    owner.checkin(held.pop())
    assert newcomer.exchange(waiting.result()) in (1, 2)
    assert owner.exchange(held.pop()) in (1, 2)
    assert backend.peak == 2


def test_after_the_end_of_a_process_that_proc_does_not_show_its_pool_is_made_anew(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    (owner,) = hidden(harness, 1)
    owner.checkout(tcp)
    owner.stop()
    newcomer = newcomer_to(harness)
    old = kill_arbiter(scope)
    newcomer.fails(AttachRefused, commands.use, tcp)
    owner.kill()
    backend.wait_open(0)
    assert newcomer.use(tcp) == 2
    assert newcomer.stats().processes == 1
    successor(newcomer, old)


def test_who_left_a_pool_that_is_waited_for_and_comes_again_gets_a_new_one(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    (one,) = hidden(harness, 1)
    one.checkout(tcp)
    one.call(leave_and_return, scope.arbiter())
    backend.wait_open(0)
    assert one.use(tcp) == 2
    one.wait_stats(processes=1, in_use=0)


def test_a_hidden_worker_that_is_stopped_keeps_its_row_under_an_heir(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    sleeper, other = hidden(harness, 2)
    held = sleeper.checkout(tcp)
    other.stats()
    sleeper.stop()
    old = kill_arbiter(scope)
    successor(other, old)
    other.wait_stats(processes=2, in_use=1)
    other.use(tcp)
    other.use(backend.listen("other"))  # evicts: there is one permit
    assert (other.stats().processes, other.stats().in_use) == (2, 1)
    sleeper.resume()
    assert sleeper.exchange(held) == 1
    assert backend.peak == 2


def test_an_arbiter_that_is_told_to_end_leaves_word_of_hidden_leases_and_of_nothing_else(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    (owner,) = hidden(harness, 1)
    held = owner.checkout(tcp)
    owner.call(commands.library, "stop")
    wait_until(lambda: not scope.arbiters())
    assert [os.path.basename(name) for name in scope.files()] == [scopes.ROSTER]
    owner.stop()
    newcomer = newcomer_to(harness)
    newcomer.fails(AttachRefused, commands.use, tcp)
    owner.resume()
    wait_until(lambda: owner.exchange(held) == 1 and newcomer.call(commands.library, "ping"))
    owner.checkin(held)
    assert newcomer.use(tcp) == 2
    owner.use(tcp)
    newcomer.call(commands.library, "stop")
    wait_until(lambda: not scope.arbiters())
    assert scope.files() == []


def damage_header(state: State, what: bytes, at: int) -> None:
    os.pwrite(commands.pool_of(state, "default").attached.segment.fd, what, at)


@pytest.mark.parametrize(("what", "at"), [(b"XXXXXXXX", 0), (b"?" * 40, 256)])
@pytest.mark.parametrize("shown", [True, False])
def test_a_pool_whose_header_is_damaged_is_refused_until_its_processes_have_gone(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target, what: bytes, at: int, shown: bool
) -> None:
    if shown:
        owner = harness.start()
        owner.attach(max_connections=1)
    else:
        (owner,) = hidden(harness, 1)
    held = owner.checkout(tcp)
    newcomer = newcomer_to(harness)
    owner.call(damage_header, what, at)
    old = kill_arbiter(scope)
    error = newcomer.fails(AttachRefused, commands.use, tcp)
    assert f"in use by the processes {owner.pid}" in str(error)
    wait_until(lambda: "segment" in str(newcomer.fails(AttachRefused, commands.use, tcp)), what="it says why")
    assert owner.exchange(held) == 1
    assert backend.peak == 1
    owner.kill()
    backend.wait_open(0)
    assert newcomer.use(tcp) == 2
    successor(newcomer, old)


def look_alike(state: State, uid: int, copies: int) -> int:
    """A child of another user that has a memfd of the pool's name open many times; gives its pid."""
    name = segment.name(succession.scope_id(control._directory()), "default")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresuid(uid, uid, uid)
        fd = os.memfd_create(name)
        for _ in range(copies):
            os.dup(fd)
        for _ in range(3):
            if os.fork() == 0:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                while True:
                    signal.pause()
        os.write(writing, b"x")
        while True:
            signal.pause()
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


def end_child(state: State, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("roster", ["whole", "lost"])
def test_what_another_user_names_alike_does_not_count(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target, roster: str
) -> None:
    worker, child_of = harness.start_many(2)
    worker.attach(max_connections=1)
    held = worker.checkout(tcp)
    child = child_of.call(look_alike, 12345, 20)
    old = scope.arbiter()
    if roster == "lost":
        lose_roster(scope)
    kill_arbiter(scope)
    successor(worker, old)
    other = harness.start()
    other.attach(max_connections=1)
    (waiting,) = line_up(worker, [(other, tcp)])
    worker.checkin(held)
    assert other.exchange(waiting.result()) == 1
    assert backend.peak == 1
    child_of.call(end_child, child)


if os.geteuid() != 0:  # being somebody else needs root
    del test_what_another_user_names_alike_does_not_count
