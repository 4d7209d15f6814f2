"""The arbiter as a process: what it has of its starter (nothing), and what works while it stands still."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.processes import Watched
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up


def make_surroundings(state: State, path: str) -> None:
    """What a starter may have that nobody wants in a process that outlives it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    os.set_inheritable(descriptor, True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    os.umask(0)


def signals(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status") as lines:
        return int(next(line.split()[1] for line in lines if line.startswith(name + ":")), 16)


@pytest.fixture
def started(harness: Harness, scope: Scope, tcp: Target, directory: object) -> tuple[Worker, int]:
    worker = harness.execute()
    worker.call(make_surroundings, f"{directory}/inherited")
    worker.use(tcp)
    return worker, scope.arbiter()


def test_it_has_a_session_of_its_own_and_is_nobodys_child(started: tuple[Worker, int]) -> None:
    worker, arbiter = started
    assert processes.session(arbiter) != processes.session(worker.pid)
    assert processes.children(worker.pid) == set()
    assert processes.parent(arbiter) == os.getpid()  # to us come the orphans


def test_it_has_nothing_open_of_its_starters(started: tuple[Worker, int], directory: object) -> None:
    _, arbiter = started
    targets = processes.descriptors(arbiter)
    assert f"{directory}/inherited" not in targets.values()
    assert [targets.get(number) for number in (0, 1, 2)] == ["/dev/null"] * 3
    assert os.readlink(f"/proc/{arbiter}/cwd") == "/"


def test_it_ignores_and_blocks_no_signal_of_its_starters(started: tuple[Worker, int]) -> None:
    _, arbiter = started
    wanted = 1 << (signal.SIGTERM - 1) | 1 << (signal.SIGCHLD - 1)
    assert signals(arbiter, "SigIgn") & wanted == 0
    assert signals(arbiter, "SigBlk") & wanted == 0
    os.kill(arbiter, signal.SIGTERM)
    started[0].kill()
    wait_until(lambda: not processes.alive(arbiter))


def test_a_program_whose_output_is_awaited_ends_although_its_arbiter_lives_on(
    harness: Harness, scope: Scope, tcp: Target
) -> None:
    worker = harness.execute()
    worker.use(tcp)
    arbiter = scope.arbiter()
    assert not any(target.startswith("pipe:") and target in processes.descriptors(worker.pid).values()
                   for target in processes.descriptors(arbiter).values())  # fmt: skip
    worker.begin(commands.leave)
    worker.wait_dead()
    assert processes.alive(arbiter)


def test_it_is_not_needed_for_what_workers_have_had_before(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target
) -> None:
    two[0].attach(max_connections=1)
    assert [worker.use(tcp) for worker in two * 2] == [1] * 4
    arbiter = Watched(scope.arbiter())
    arbiter.stop()
    try:
        assert [worker.use(tcp) for worker in two * 5] == [1] * 10
        label = two[0].checkout(tcp)
        (waiting,) = line_up(two[0], [(two[1], tcp)])
        two[0].checkin(label)
        assert two[1].exchange(waiting.result()) == 1
    finally:
        arbiter.resume()
        arbiter.close()
    assert backend.accepted == 1


def test_its_descriptors_do_not_grow_with_use(two: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    two[0].attach(max_connections=2)

    def round_of_everything() -> None:
        for worker in two:
            worker.use(tcp)
            worker.discard(worker.checkout(tcp))
        two[0].wait_stats(closing=0, in_use=0)

    def settled() -> dict[str, int]:
        two[0].wait_stats(closing=0, idle=0)
        return {who: len(processes.descriptors(pid)) for who, pid in
                [("first", two[0].pid), ("second", two[1].pid), ("arbiter", scope.arbiter())]}  # fmt: skip

    round_of_everything()
    before = settled()
    for _ in range(20):
        round_of_everything()
    wait_until(lambda: settled() == before, what=f"as many descriptors as {before}")
    assert backend.peak <= 2
