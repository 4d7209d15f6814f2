"""Processes that fork while they use a pool: threads in a checkout, daemonic children, subprocesses."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

import sharedpool
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_a_pool_declared_before_the_fork_is_used_by_the_master_before_and_after_it_and_by_its_workers(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    master = harness.execute()
    master.attach(max_connections=2)
    first = master.use(tcp)
    children = [master.fork() for _ in range(3)]
    begun = [worker.begin(commands.requests, [tcp], 30) for worker in (master, *children)]
    for pending in begun:
        load = pending.result()
        assert (load.done, load.errors) == (30, [])
    assert backend.peak <= 2
    assert first in backend.ids()
    assert master.wait_stats(in_use=0, waiting=0).processes == 4
    for child in children:
        child.kill()
    master.wait_stats(processes=1)
    assert master.use(tcp) in backend.ids()


def by_fork(target: Target) -> None:
    """A child that uses the pool at once, by a handle that its parent's threads are using."""
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.dump_traceback_later(20, exit=True)  # a hanging child is an error
        try:
            with sharedpool.attach().connection(target.host, target.port, checkout_timeout=20) as conn:
                commands.exchange_over(conn, f"child {os.getpid()}")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def by_subprocess(target: Target) -> None:
    subprocess.run(["/bin/true"], check=True)
    subprocess.run(["/bin/true"], check=True, close_fds=False, preexec_fn=os.getpid)  # which makes it a real fork


def use_by_module(target: Target) -> None:
    with sharedpool.checkout(target.host, target.port, checkout_timeout=20) as lease:
        commands.exchange_over(lease.conn, f"by multiprocessing {os.getpid()}")


def by_multiprocessing(target: Target) -> None:
    process = multiprocessing.get_context("fork").Process(target=use_by_module, args=(target,), daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == 0


WAYS = {way.__name__: way for way in (by_fork, by_subprocess, by_multiprocessing)}


def fork_beside_threads(state: State, target: Target, way: str, times: int) -> list[str]:
    """Fork again and again while three threads lease, wait and give back; gives what went wrong."""
    wrong: list[str] = []
    over = threading.Event()
    done = [0, 0, 0]

    def work(number: int) -> None:
        while not over.is_set():
            load = commands.requests(state, [target], 5, checkout_timeout=20)
            done[number] += load.done
            wrong.extend(load.errors)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(times):
            before = list(done)
            WAYS[way](target)
            wait_until(lambda before=before: all(now > then for now, then in zip(done, before, strict=True)))  # type: ignore[misc]
    except BaseException as error:
        wrong.append("".join(traceback.format_exception(error)))
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    return [*wrong, *[f"{thread.name} hangs" for thread in threads if thread.is_alive()]]


@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_forks_while_its_threads_are_in_checkouts_harms_neither_side(
    harness: Harness, backend: Backend, tcp: Target, way: str
) -> None:
    worker, other = harness.execute(PYTHONWARNINGS="ignore"), harness.start()
    worker.attach(max_connections=2)
    busy = other.begin(commands.requests, [tcp], 200, checkout_timeout=20)
    assert worker.call(fork_beside_threads, tcp, way, 12) == [], worker.stderr()
    assert busy.result().errors == []
    stats = other.wait_stats(in_use=0, waiting=0, opening=0, closing=0, processes=2)
    assert (stats.dropped, stats.timeouts) == (0, 0)
    assert backend.peak <= 2
    assert backend.accepted <= 4, "connections go on from process to process"


def hold_and_wait(target: Target, ready: Any) -> None:
    lease = sharedpool.checkout(target.host, target.port)
    commands.exchange_over(lease.conn, "held by a daemon")
    ready.set()
    time.sleep(600)


def start_daemons(state: State, target: Target, number: int) -> None:
    """Daemonic children that hold leases; they end with this process."""
    context = multiprocessing.get_context("fork")
    for _ in range(number):
        ready = context.Event()
        process = context.Process(target=hold_and_wait, args=(target, ready), daemon=True)
        process.start()
        state.things[str(process.pid)] = process
        assert ready.wait(30)


def test_daemonic_children_end_with_their_parent_and_their_leases_with_them(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    parent, observer = harness.execute(PYTHONWARNINGS="ignore"), harness.start()
    parent.attach(max_connections=3)
    parent.use(tcp)
    parent.call(start_daemons, tcp, 3)
    assert observer.stats().in_use == 3
    waiting = observer.begin_checkout(tcp, checkout_timeout=None, thread="waiter")
    observer.wait_stats(waiting=1)
    parent.begin(commands.leave)
    parent.wait_dead()
    observer.exchange(waiting.result())
    observer.wait_stats(processes=1, in_use=1, closing=0)
    assert backend.peak <= 3


def in_child(work: Callable[[], object]) -> str:
    """Carry something out in a forked child; gives what it gave, or what was raised, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            said = repr(work())
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def misuse(conn: Any) -> list[str]:
    """What a child can do with its copy of a connection; what each attempt gave."""
    outcomes = []
    for attempt in (lambda: conn.recv(100), lambda: conn.sendall(b"from the child\n"), conn.close):
        try:
            outcomes.append(repr(attempt()))
        except OSError as error:
            outcomes.append(type(error).__name__)
    return outcomes


def let_a_child_misuse(state: State, label: str) -> str:
    state.leases[label].conn.settimeout(5)
    return in_child(lambda: misuse(state.leases[label].conn))


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_childs_copy_of_a_connection_neither_reads_nor_writes_nor_ends_it(
    harness: Harness, backend: Backend, transport: str, parked: bool
) -> None:
    target = backend.tcp if transport == "tcp" else backend.listen_unix()
    worker = harness.execute(PYTHONWARNINGS="ignore")
    worker.attach(max_connections=1)
    label = worker.checkout(target)
    worker.call(commands.send, label, b"!late\n")
    wait_until(lambda: backend.received(1).endswith("!late\n"))
    backend.answer()
    if parked:
        assert worker.call(commands.receive_line, label) == b"1 !late"
        worker.checkin(label)
    said = worker.call(let_a_child_misuse, label)
    assert said == "['OSError', 'OSError', 'None']"
    if not parked:
        assert worker.call(commands.receive_line, label) == b"1 !late"
        assert worker.exchange(label) == 1
        worker.checkin(label)
    assert worker.use(target) == 1
    assert "child" not in backend.received(1)


def what_a_child_maps() -> tuple[int, int]:
    """How many mappings and descriptors it has of its parent's pools; a thing of its parent's is still looked at."""
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:sharedpool" in line for line in maps)
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return mapped, sum("memfd:sharedpool" in link for link in links)


def let_a_child_look(state: State) -> list[str]:
    words = state.pools["default"]._attached.words
    before = words[0]
    said = in_child(lambda: (what_a_child_maps(), list(words[:4]), words.__setitem__(0, 99)))
    return [said, repr(words[0] == before), repr(what_a_child_maps())]


def test_a_child_keeps_no_memory_of_its_parents_pools(harness: Harness, tcp: Target) -> None:
    """It could drop privileges that they are protected by."""
    worker = harness.execute(PYTHONWARNINGS="ignore")
    worker.use(tcp)
    assert worker.call(let_a_child_look) == ["((0, 0), [0, 0, 0, 0], None)", "True", "(1, 1)"]
    worker.use(tcp)


def become_a_daemon(directory: str) -> list[str]:
    """Close all that was inherited, as daemons do, and open files; gives those of whom something was closed."""
    os.closerange(3, 1024)
    logs = [open(f"{directory}/{i}", "wb", buffering=0) for i in range(30)]  # noqa: SIM115
    gc.collect()
    wrong = []
    for log in logs:
        try:
            os.fstat(log.fileno())
            log.write(b"line")
        except OSError as error:
            wrong.append(f"{log.name}: {error}")
    return wrong


def let_a_child_become_a_daemon(state: State, label: str, directory: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        faulthandler.dump_traceback_later(20, exit=True)
        state.leases.clear()
        said = become_a_daemon(directory)
        os.write(2, repr(said).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said_by_child = pipe.read().decode()
    os.waitpid(child, 0)
    return said_by_child


def test_a_child_that_becomes_a_daemon_has_no_file_closed_by_what_it_inherited(
    harness: Harness, tcp: Target, backend: Backend, tmp_path: Any
) -> None:
    worker = harness.execute(PYTHONWARNINGS="ignore")
    worker.attach(max_connections=4)
    leases = [worker.checkout(target) for target in (tcp, backend.listen_unix(), tcp)]
    worker.checkin(leases[0])
    assert worker.call(let_a_child_become_a_daemon, leases[1], str(tmp_path)) == "[]"
    worker.exchange(leases[1])
