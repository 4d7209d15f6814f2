"""Opening a connection: what happens when the other side refuses, hangs, or the opener dies."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from sharedpool import ConnectFailed, ConnectTimeout, PoolTimeout, SharedPoolError
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.workers import Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture
def hanging(backend: Backend) -> Target:
    """An address whose connects get no answer."""
    target = backend.listen("hanging")
    backend.do("hang", name="hanging")
    return target


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_refused_connect_says_so_and_frees_its_permit(
    worker: Worker, backend: Backend, tcp: Target, unix: Target, transport: str
) -> None:
    """hackney #643, p18: the slot leaked when the connect failed."""
    target = tcp if transport == "tcp" else unix
    worker.attach(max_connections=1)
    backend.do("refuse", name=transport)
    for _ in range(3):
        error = worker.fails(ConnectFailed, commands.checkout, target)
        assert isinstance(error, ConnectionError)
        assert target.host in str(error)
    stats = worker.wait_stats(opening=0, closing=0, in_use=0, idle=0)
    assert stats.open_failures == 3
    backend.do("accept_again", name=transport)
    assert worker.use(target) == 1


def test_a_refused_connect_passes_its_permit_to_the_next_waiter(
    three: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    backend.do("refuse", name="tcp")
    three[0].attach(max_connections=1)
    label = three[0].checkout(unix)
    refused, served = line_up(three[0], [(three[1], tcp), (three[2], unix)])
    three[0].discard(label)
    refused.error(ConnectFailed)
    assert three[2].exchange(served.result()) == 2
    assert backend.peak == 1


def test_a_hanging_connect_ends_in_its_time_and_frees_its_permit(
    worker: Worker, backend: Backend, tcp: Target, hanging: Target
) -> None:
    """hackney #661, #927-#929."""
    worker.attach(max_connections=1)
    begun = time.monotonic()
    error = worker.fails(ConnectTimeout, commands.checkout, hanging, connect_timeout=0.3)
    assert time.monotonic() - begun >= 0.3
    assert isinstance(error, TimeoutError)
    assert isinstance(error, ConnectionError)
    worker.wait_stats(opening=0, closing=0, in_use=0)
    assert worker.use(tcp) == 1


def test_a_hanging_connect_to_a_unix_socket_frees_its_permit(worker: Worker, backend: Backend, tcp: Target) -> None:
    target = backend.listen_unix("stuck")
    backend.do("hang", name="stuck")
    worker.attach(max_connections=1)
    worker.fails(ConnectTimeout, commands.checkout, target, connect_timeout=0.3)
    worker.wait_stats(opening=0, closing=0, in_use=0)
    assert worker.use(tcp) == 1


def test_a_hanging_connect_passes_its_permit_to_the_next_waiter(
    two: list[Worker], backend: Backend, tcp: Target, hanging: Target
) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    (opening,) = line_up(two[0], [(two[0], hanging)], connect_timeout=0.3)
    (waiting,) = line_up(two[0], [(two[1], tcp)], already=1)
    two[0].discard(label)
    opening.error(ConnectTimeout)
    assert two[1].exchange(waiting.result()) == 2
    assert two[0].wait_stats(in_use=1, opening=0).open_failures == 1


def test_a_hanging_connect_holds_nobody_else_up(
    two: list[Worker], backend: Backend, tcp: Target, hanging: Target
) -> None:
    """hackney #775, #780, #788: a slow connect blocked the whole pool."""
    two[0].attach(max_connections=2)
    opening = two[0].begin_checkout(hanging, connect_timeout=30, thread="opener")
    two[0].wait_stats(opening=1)
    assert [worker.use(tcp) for worker in two * 10] == [1] * 20
    assert not opening.done
    two[1].fails(PoolTimeout, two_at_once, tcp)
    assert backend.peak == 1


def two_at_once(state: State, target: Target) -> None:
    """Needs two permits where only one is free."""
    with commands.pool_of(state, "default").connection(target.host, target.port):
        commands.pool_of(state, "default").checkout(target.host, target.port, checkout_timeout=0.1)


def test_a_process_killed_while_it_connects_frees_its_permit(
    two: list[Worker], backend: Backend, tcp: Target, hanging: Target
) -> None:
    """hackney #462, #675, #680, p08: the slot of a process that died while connecting leaked."""
    opener, other = two
    opener.attach(max_connections=1)
    opener.begin_checkout(hanging, connect_timeout=60)
    other.wait_stats(opening=1)
    (waiting,) = line_up(other, [(other, tcp)])
    opener.kill()
    other.wait_stats(waiting=0, in_use=1, opening=0)
    assert other.exchange(waiting.result()) == 1


def close_pool(state: State) -> None:
    commands.pool_of(state, "default").close()


def test_a_process_that_leaves_while_it_connects_to_a_full_unix_socket_does_not_connect_any_more(
    two: list[Worker], tmp_path: Path
) -> None:
    leaver, other = two
    path = str(tmp_path / "full.sock")
    other.attach(max_connections=1)
    other.stats()
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(path)
        listener.listen(0)
        listener.setblocking(False)
        fillers = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                filler = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                filler.setblocking(False)
                filler.connect(path)
                fillers += 1
        opening = leaver.begin_checkout(Target(path, 0, "unix"), connect_timeout=20, thread="opener")
        other.wait_stats(opening=1)
        leaver.call(close_pool)
        other.wait_stats(processes=1, opening=0, closing=0)  # its permit is free
        accepted = [sockets.enter_context(listener.accept()[0]) for _ in range(fillers)]
        opening.error(SharedPoolError)
        with contextlib.suppress(BlockingIOError):
            accepted.append(sockets.enter_context(listener.accept()[0]))
        assert len(accepted) == fillers


def test_a_hanging_connect_that_ends_well_is_a_lease_like_any_other(
    worker: Worker, backend: Backend, hanging: Target
) -> None:
    opening = worker.begin_checkout(hanging, connect_timeout=30, thread="opener")
    worker.wait_stats(opening=1)
    backend.do("accept_again", name="hanging")
    label = opening.result()
    number = worker.exchange(label)
    worker.checkin(label)
    assert worker.use(hanging) == number


def test_running_out_of_descriptors_is_an_error_that_names_the_limit_and_frees_its_permit(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.attach(max_connections=50)
    worker.use(tcp)
    worker.call(commands.limit_descriptors, 40)
    error = worker.fails(SharedPoolError, many_checkouts, tcp)
    assert "RLIMIT_NOFILE" in str(error)
    worker.call(commands.limit_descriptors, 1000)
    worker.wait_stats(opening=0, closing=0, in_use=0)
    assert worker.use(tcp) in backend.ids()


def many_checkouts(state: State, target: Target) -> None:
    with contextlib.ExitStack() as leases:
        for _ in range(50):
            leases.enter_context(commands.pool_of(state, "default").checkout(target.host, target.port))


def test_an_unknown_transport_is_an_error_before_anything_is_taken(worker: Worker, tcp: Target) -> None:
    worker.fails(SharedPoolError, commands.checkout, Target(tcp.host, tcp.port, "carrier-pigeon"))
    stats = worker.stats()
    assert stats.in_use + stats.opening + stats.closing == 0
