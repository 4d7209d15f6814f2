"""What a user may do to a socket, during its lease and after it, without harm to anybody else."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from sharedpool import LeaseError
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Worker


@pytest.fixture(params=["tcp", "unix"])
def target(request: pytest.FixtureRequest, backend: Backend) -> Target:
    return backend.tcp if request.param == "tcp" else backend.listen_unix()


def close_connection(state: State, label: str) -> int:
    """Close it as a user would; returns the number that it had."""
    conn = state.leases[label].conn
    number = int(conn.fileno())
    conn.close()
    return number


def detach_connection(state: State, label: str) -> int:
    return int(state.leases[label].conn.detach())


def keep_connection(state: State, label: str) -> None:
    """Remember the object itself, as a user with a stale reference does."""
    state.things["kept"] = state.leases[label].conn


def close_kept(state: State) -> int:
    number = int(state.things["kept"].fileno())
    state.things["kept"].close()
    return number


def use_kept(state: State, data: bytes) -> list[str]:
    """Try everything a stale reference could do; what each raised or returned."""
    conn = state.things["kept"]
    outcomes = []
    for attempt in (lambda: conn.send(data), lambda: conn.recv(100), lambda: conn.shutdown(socket.SHUT_RDWR)):
        try:
            outcomes.append(repr(attempt()))
        except OSError as error:
            outcomes.append(type(error).__name__)
    return outcomes


def open_log_with_number(state: State, path: str, number: int) -> None:
    """Open a file that gets this descriptor's number, as any other thread's file might."""
    while True:
        log = open(path, "ab", buffering=0)  # noqa: SIM115
        state.things.setdefault("logs", []).append(log)
        if log.fileno() == number:
            state.things["log"] = log
            return
        assert log.fileno() < number, "the number is not free"


def write_log(state: State, text: bytes) -> None:
    state.things["log"].write(text)


def close_number(state: State, number: int) -> None:
    os.close(number)


def test_a_connection_closed_by_its_user_is_closed_for_all_and_no_strangers_file_is_touched(
    worker: Worker, backend: Backend, target: Target, directory: object
) -> None:
    worker.attach(max_connections=1)
    label = worker.checkout(target)
    number = worker.call(close_connection, label)
    worker.call(open_log_with_number, f"{directory}/log", number)
    worker.checkin(label)
    backend.wait_open(0)
    assert worker.use(target) == 2
    worker.call(write_log, b"a line\n")
    with open(f"{directory}/log", "rb") as log:
        assert log.read() == b"a line\n"
    worker.wait_stats(idle=1, closing=0, in_use=0)
    assert backend.peak == 1


def test_a_connection_closed_while_idle_is_not_laid_over_a_strangers_file(
    worker: Worker, backend: Backend, target: Target, directory: object
) -> None:
    worker.attach(max_connections=1)
    label = worker.checkout(target)
    worker.call(keep_connection, label)
    worker.checkin(label)
    worker.call(open_log_with_number, f"{directory}/log", worker.call(close_kept))
    worker.use(target, "for the back end only")
    worker.call(write_log, b"password\n")
    with open(f"{directory}/log", "rb") as log:
        assert log.read() == b"password\n"
    assert all("password" not in each["received"] for each in backend.do("connections"))
    assert backend.peak == 1


def test_a_detached_descriptor_is_worth_nothing_after_the_checkin(
    worker: Worker, backend: Backend, target: Target
) -> None:
    worker.attach(max_connections=1)
    label = worker.checkout(target)
    number = worker.call(detach_connection, label)
    worker.checkin(label)
    backend.wait_open(0)
    assert number in processes.descriptors(worker.pid)  # still the user's own number, and open
    assert worker.use(target) == 2
    assert backend.peak == 1
    worker.call(close_number, number)


def test_a_stale_reference_can_neither_read_nor_write_nor_shut_down(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    two[0].call(keep_connection, label)
    two[0].checkin(label)
    other = two[1].checkout(target)
    outcomes = two[0].call(use_kept, b"not mine any more\n")
    assert outcomes[0] in ("BrokenPipeError", "ConnectionResetError", "OSError")
    assert outcomes[1] in ("b''", "ConnectionResetError", "OSError", "BlockingIOError")
    assert two[1].exchange(other, "mine") == 1
    assert backend.received(1) == "mine\n"


def test_closing_a_stale_reference_does_not_close_the_next_lease(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    two[0].call(keep_connection, label)
    two[0].checkin(label)
    other = two[1].checkout(target)
    two[0].call(close_kept)
    assert two[1].exchange(other) == 1
    two[1].checkin(other)
    assert two[0].use(target) in backend.ids()
    assert backend.peak == 1


def receive_in_thread(state: State, label: str) -> None:
    """Leave a thread behind in recv, without a timeout, as long as the lease goes and longer."""
    conn = state.leases[label].conn
    conn.settimeout(None)
    got: list[object] = []

    def receive() -> None:
        try:
            got.append(conn.recv(100))
        except OSError as error:
            got.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    state.things["receiver"] = (thread, got)
    wait_until(lambda: sleeps_in_the_kernel(thread))


def sleeps_in_the_kernel(thread: threading.Thread) -> bool:
    with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread.native_id}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"
    return False


def received_in_thread(state: State) -> object:
    thread, got = state.things["receiver"]
    thread.join(20)
    assert not thread.is_alive()
    return got[0]


def test_a_thread_left_in_recv_never_gets_the_next_users_answer(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    for i in range(20):
        label = two[0].checkout(target)
        two[0].call(receive_in_thread, label)
        two[0].checkin(label)
        # `use` checks that the answer is the whole and only answer to its own line.
        two[1].use(target, f"secret {i}")
        got = two[0].call(received_in_thread)
        assert got == b"" or isinstance(got, OSError)
    assert backend.peak == 1


CALLS: dict[str, Callable[[Any], object]] = {
    "recv": lambda conn: conn.recv(100),
    "recv_into": lambda conn: conn.recv_into(bytearray(100)),
    "recvmsg": lambda conn: conn.recvmsg(100),
    "readline": lambda conn: conn.makefile("rb").readline(),
    "sendall": lambda conn: conn.sendall(b"not the next user's" * (1 << 20)),
}


def leave_in_call(state: State, label: str, call: str) -> None:
    """Leave a thread behind inside a call that waits."""
    conn = state.leases[label].conn
    got: list[object] = []

    def run() -> None:
        try:
            got.append(CALLS[call](conn))
        except (OSError, ValueError) as error:
            got.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    state.things["receiver"] = (thread, got)
    wait_until(lambda: bool(conn.inside) and sleeps_in_the_kernel(thread))


@pytest.mark.parametrize("call", CALLS)
def test_a_thread_left_in_a_call_has_nothing_of_the_next_user_of_its_own_process(
    worker: Worker, backend: Backend, target: Target, call: str
) -> None:
    worker.attach(max_connections=1, close_timeout=30)
    for i in range(3):
        label = worker.checkout(target)
        if call == "sendall":
            backend.pause_process()
        try:
            worker.call(leave_in_call, label, call)
            worker.checkin(label)
        finally:
            backend.resume_process()
        worker.use(target, f"secret {i}")
        got = worker.call(received_in_thread)
        assert not got or isinstance(got, Exception | tuple), got
        assert "secret" not in repr(got)
    assert backend.peak == 1
    worker.wait_stats(idle=1, in_use=0, closing=0)


def test_a_thread_that_reads_a_parked_object_keeps_it_from_being_lent_meanwhile(
    worker: Worker, backend: Backend, target: Target
) -> None:
    worker.attach(max_connections=1)
    assert worker.use(target) == 1
    label = worker.checkout(target)
    worker.call(be_inside, label)
    worker.checkin(label)
    assert worker.use(target) == 2
    assert backend.peak == 1


def be_inside(state: State, label: str) -> None:
    """As a thread that has come into a call and has not got to the kernel yet."""
    state.leases[label].conn.inside.append(None)


def set_options(state: State, label: str, options: list[tuple[int, int, int]]) -> None:
    for option in options:
        state.leases[label].conn.setsockopt(*option)


def options(state: State, label: str, names: list[tuple[int, int]]) -> list[int]:
    return [state.leases[label].conn.getsockopt(*name) for name in names]


KEEPALIVE = (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
LOWAT = (socket.SOL_SOCKET, 18)


def test_the_options_that_one_user_set_are_not_the_next_ones(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    before = two[0].call(options, label, [KEEPALIVE])
    two[0].call(set_options, label, [(*KEEPALIVE, 1 - before[0])])
    two[0].checkin(label)
    label = two[1].checkout(target)
    assert two[1].call(options, label, [KEEPALIVE]) == before
    assert two[1].exchange(label) == 1, "what can be set back costs no connection"
    two[1].call(set_options, label, [(*LOWAT, 50)])
    two[1].checkin(label)
    label = two[0].checkout(target)
    assert two[0].call(options, label, [LOWAT]) == [1]
    assert two[0].exchange(label) == 2
    assert backend.peak == 1


def hide_unread_bytes(state: State, label: str) -> None:
    """Set by number what keeps poll from seeing a few bytes."""
    conn = state.leases[label].conn
    with socket.socket(fileno=os.dup(conn.fileno())) as other:
        other.setsockopt(*LOWAT, 50)


def test_unread_bytes_that_poll_does_not_see_never_reach_another(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    two[0].exchange(label)
    two[0].call(hide_unread_bytes, label)
    backend.say("not yours\n")
    two[0].checkin(label)
    assert two[1].use(target) == 2


def duplicate(state: State, label: str) -> None:
    state.things["kept"] = state.leases[label].conn.dup()


def test_a_duplicate_neither_reads_nor_ends_the_next_lease(two: list[Worker], backend: Backend, target: Target) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    two[0].call(duplicate, label)
    two[0].checkin(label)
    other = two[1].checkout(target)
    assert two[1].exchange(other) == 2
    two[0].call(close_kept)
    assert two[1].exchange(other) == 2


def test_who_only_asks_for_the_number_keeps_the_connection(worker: Worker, backend: Backend, target: Target) -> None:
    worker.attach(max_connections=1)
    for _ in range(5):
        label = worker.checkout(target)
        worker.call(mode, label)
        assert worker.exchange(label) == 1
        worker.checkin(label)
    assert backend.accepted == 1


def set_mode(state: State, label: str, timeout: float | None) -> None:
    state.leases[label].conn.settimeout(timeout)


def mode(state: State, label: str) -> tuple[float | None, bool]:
    conn = state.leases[label].conn
    return conn.gettimeout(), os.get_blocking(conn.fileno())


def receive_all(state: State, label: str, length: int) -> int:
    """Read so many bytes in one call that waits for all of them, in the mode that the connection was leased with."""
    conn, got = state.leases[label].conn, 0
    while got < length:
        data = conn.recv(length - got)
        if not data:
            raise ConnectionError("end of stream")
        got += len(data)
    return got


@pytest.mark.parametrize("timeout", [0.05, 0.0, None])
def test_the_timeout_that_one_user_set_is_not_the_next_ones(
    two: list[Worker], backend: Backend, target: Target, timeout: float | None
) -> None:
    """The mode belongs to the description that all processes share, the timeout to each process's object."""
    two[0].attach(max_connections=1)
    label = two[0].checkout(target)
    fresh = two[0].call(mode, label)
    assert fresh[1] is False  # a thread left in recv must not be able to hold on to the description
    for user, next_user in ((two[0], two[1]), (two[1], two[1]), (two[1], two[0])):
        user.call(set_mode, label, timeout)
        user.checkin(label)
        label = next_user.checkout(target)
        assert next_user.call(mode, label) == fresh
        next_user.call(commands.send, label, b"!late\n")
        answer = next_user.begin(commands.receive_line, label, timeout=None)
        wait_until(lambda: backend.received(1).endswith("!late\n"))
        assert not answer.done  # it waits; nobody's non-blocking mode makes it fail
        assert backend.do("answer") == 1
        assert answer.result() == b"1 !late"
    assert backend.accepted == 1


def test_a_connection_of_another_process_is_closed_by_its_close_too(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    """The arbiter and others have duplicates; still the user's close has to reach the back end at the checkin."""
    two[0].attach(max_connections=2)
    two[0].use(target)
    label = two[1].checkout(target)
    two[1].call(close_connection, label)
    two[1].checkin(label)
    backend.wait_open(0)
    two[0].wait_stats(idle=0, closing=0, in_use=0)


def replace_connection(state: State, label: str, target: Target) -> None:
    """What a driver does that reconnects by itself: another socket under the same number."""
    conn = state.leases[label].conn
    other = socket.create_connection((target.host, target.port))
    os.dup2(other.fileno(), conn.fileno())
    other.close()


def test_another_socket_under_the_same_number_does_not_enter_the_pool(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    two[0].call(replace_connection, label, tcp)
    assert two[0].exchange(label) == 2
    two[0].checkin(label)
    assert two[1].use(tcp) in (1, 3)
    two[0].wait_stats(idle=1, closing=0, in_use=0)
    backend.wait_open(1)
    assert backend.ids() != [2]


def test_a_lease_given_back_cannot_be_used_through_its_own_connection(
    worker: Worker, backend: Backend, target: Target
) -> None:
    label = worker.checkout(target)
    worker.exchange(label, "first")
    worker.checkin(label)
    worker.fails((OSError, AttributeError, LeaseError), commands.exchange, label, "second")  # type: ignore[arg-type]
    assert backend.received(1) == "first\n"
