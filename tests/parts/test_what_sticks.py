"""What a user does to a socket is set back, or noticed, so that the next user has a connection as it was opened."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sharedpool.aio import all_said, streams_over
from sharedpool.drivers import sockets, tcp
from sharedpool.drivers.sockets import Copy, Pooled, PooledSocket, StreamDriver
from sharedpool.native import Gate

from ..support.waiting import wait_until

Both = tuple[PooledSocket, socket.socket]
LOWAT = 18  # SO_RCVLOWAT, which Python does not name


def connected(kind: str) -> Both:
    if kind == "unix":
        one, peer = socket.socketpair()
        conn = PooledSocket(fileno=one.detach())
        conn.rest()
        return conn, peer
    with socket.create_server(("127.0.0.1", 0)) as server:
        conn = tcp.TcpDriver().open("127.0.0.1", server.getsockname()[1], 5, lambda sock: None)
        peer, _ = server.accept()
    return conn, peer


@pytest.fixture(params=["tcp", "unix"])
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    conn, peer = connected(request.param)
    yield conn, peer
    peer.close()
    StreamDriver().close(conn)


@pytest.fixture
def over_tcp() -> Iterator[Both]:
    conn, peer = connected("tcp")
    yield conn, peer
    peer.close()
    StreamDriver().close(conn)


def value_of(conn: socket.socket, level: int, option: int, size: int) -> Any:
    value: Any = conn.getsockopt(level, option, size) if size else conn.getsockopt(level, option)
    return value[:4] if option == socket.SO_LINGER and size else value  # how long is remembered while it is off


def another(size: int, now: Any) -> Any:
    """A value that the option does not have."""
    if size:
        return struct.pack("ii", 1, 3) if size == 8 else struct.pack("ll", 5, 0)
    return 1 - now if now in (0, 1) else now + 7


@pytest.mark.parametrize("option", sockets._SET_BACK)
def test_an_option_that_says_everything_by_its_value_is_set_back(over_tcp: Both, option: tuple[int, int]) -> None:
    conn, _ = over_tcp
    size = sockets._SET_BACK[option]
    before = value_of(conn, *option, size)
    for _ in range(2):
        conn.setsockopt(*option, another(size, before))
        conn.setsockopt(*option, another(size, before))
        assert value_of(conn, *option, size) != before
        assert StreamDriver().clean(conn)
        assert value_of(conn, *option, size) == before


@pytest.mark.parametrize(
    ("level", "option", "value"),
    [
        (socket.SOL_SOCKET, LOWAT, 50),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 2304),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 4608),
        (socket.IPPROTO_IP, socket.IP_TTL, 1),
        (socket.IPPROTO_IP, socket.IP_TOS, 16),
        (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno"),
        (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 600),
    ],
)
def test_with_any_other_option_a_connection_is_not_lent_on(
    over_tcp: Both, level: int, option: int, value: int | bytes
) -> None:
    conn, _ = over_tcp
    with contextlib.suppress(OSError):  # a kernel may refuse it, and is not believed
        conn.setsockopt(level, option, value)
    assert not StreamDriver().clean(conn)


def test_what_clients_set_by_habit_costs_no_connection(over_tcp: Both) -> None:
    conn, _ = over_tcp
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    conn.setblocking(True)
    conn.fileno()
    assert StreamDriver().clean(conn)


def set_flags(number: int, flags: int) -> None:
    fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | flags)


def set_by_a_duplicate(number: int, level: int, option: int, value: int | bytes) -> None:
    with socket.socket(fileno=os.dup(number)) as other:
        other.setsockopt(level, option, value)


BY_NUMBER: dict[str, Callable[[int], object]] = {
    "O_NONBLOCK": lambda number: os.set_blocking(number, True),
    "O_ASYNC": lambda number: set_flags(number, os.O_ASYNC),
    "F_SETOWN": lambda number: fcntl.fcntl(number, fcntl.F_SETOWN, os.getpid()),
    "SO_RCVLOWAT": lambda number: set_by_a_duplicate(number, socket.SOL_SOCKET, LOWAT, 30),
    "SO_LINGER": lambda number: set_by_a_duplicate(
        number, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5)
    ),
    "SO_OOBINLINE": lambda number: set_by_a_duplicate(number, socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
    "SO_SNDBUF": lambda number: set_by_a_duplicate(number, socket.SOL_SOCKET, socket.SO_SNDBUF, 4608),
}
BY_NUMBER_OF_TCP: dict[str, Callable[[int], object]] = {
    "TCP_NODELAY": lambda number: set_by_a_duplicate(number, socket.IPPROTO_TCP, socket.TCP_NODELAY, 0),
    "TCP_CORK": lambda number: set_by_a_duplicate(number, socket.IPPROTO_TCP, socket.TCP_CORK, 1),
    "TCP_USER_TIMEOUT": lambda number: set_by_a_duplicate(number, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1),
}


@pytest.mark.parametrize("what", BY_NUMBER)
def test_what_was_changed_by_number_is_noticed(both: Both, what: str) -> None:
    conn, _ = both
    BY_NUMBER[what](conn.fileno())
    assert not StreamDriver().clean(conn)


@pytest.mark.parametrize("what", BY_NUMBER_OF_TCP)
def test_what_was_changed_of_tcp_by_number_is_noticed(over_tcp: Both, what: str) -> None:
    conn, _ = over_tcp
    BY_NUMBER_OF_TCP[what](conn.fileno())
    assert not StreamDriver().clean(conn)


def test_a_number_that_was_asked_for_in_an_earlier_lease_is_known_in_the_next(both: Both) -> None:
    conn, _ = both
    number = conn.fileno()
    assert StreamDriver().clean(conn)
    os.set_blocking(number, True)
    assert not StreamDriver().clean(conn)


def test_this_library_asks_for_the_number_without_a_note(both: Both) -> None:
    conn, _ = both
    assert StreamDriver().fileno(conn) == conn.number() == socket.socket.fileno(conn)
    assert (conn._touched, conn._facts) == (0, None)


@pytest.mark.parametrize(
    "end",
    [
        lambda conn: conn.dup().close(),
        lambda conn: conn.shutdown(socket.SHUT_WR),
        lambda conn: conn.shutdown(socket.SHUT_RD),
        lambda conn: conn.connect_ex(conn.getpeername() or b"none"),
    ],
)
def test_a_connection_that_was_duplicated_or_ended_is_not_lent_on(
    both: Both, end: Callable[[PooledSocket], object]
) -> None:
    conn, _ = both
    end(conn)
    assert not StreamDriver().clean(conn)


# --- threads and tasks that are left behind ---------------------------------------------------------------------------

READS: dict[str, Callable[[PooledSocket], object]] = {
    "recv": lambda conn: conn.recv(9),
    "recv_into": lambda conn: conn.recv_into(bytearray(9)),
    "recvfrom": lambda conn: conn.recvfrom(9),
    "recvfrom_into": lambda conn: conn.recvfrom_into(bytearray(9)),
    "recvmsg": lambda conn: conn.recvmsg(9),
    "recvmsg_into": lambda conn: conn.recvmsg_into([bytearray(9)]),
}
MUCH = bytes(1 << 24)
WRITES: dict[str, Callable[[PooledSocket], object]] = {
    "send": lambda conn: [conn.send(MUCH) for _ in range(99)],
    "sendall": lambda conn: conn.sendall(MUCH),
    "sendmsg": lambda conn: [conn.sendmsg([MUCH]) for _ in range(99)],
}


@pytest.mark.parametrize("call", [*READS, *WRITES])
def test_a_thread_inside_a_call_is_known_until_it_comes_out(both: Both, call: str) -> None:
    conn, peer = both

    def run() -> None:
        with contextlib.suppress(OSError):
            {**READS, **WRITES}[call](conn)

    assert not conn.inside
    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: bool(conn.inside))
    peer.sendall(b"something")
    peer.close()
    thread.join(20)
    assert not thread.is_alive()
    assert not conn.inside


def test_a_call_that_fails_is_inside_no_longer(both: Both) -> None:
    conn, _ = both
    conn.settimeout(0.0)
    for call in READS.values():
        with pytest.raises(BlockingIOError):
            call(conn)
    with pytest.raises(TypeError):
        conn.recv("nine")  # type: ignore[arg-type]
    assert not conn.inside


def test_a_task_left_in_a_loops_call_is_noticed_and_one_that_was_cancelled_is_not_there(both: Both) -> None:
    conn, peer = both
    conn.settimeout(0.0)

    async def main() -> list[bool]:
        loop = asyncio.get_running_loop()
        left = asyncio.ensure_future(loop.sock_recv(conn, 9))
        await asyncio.sleep(0)
        while_it_waits = conn.clean()
        conn.settimeout(0.0)
        left.cancel()
        await asyncio.wait([left])
        peer.sendall(b"x")
        assert await loop.sock_recv(conn, 9) == b"x"
        return [while_it_waits, conn.clean()]

    assert asyncio.run(main()) == [False, True]


def test_what_a_loop_other_than_the_callers_may_wait_for_is_not_lent_on(both: Both) -> None:
    conn, peer = both
    conn.settimeout(0.0)
    peer.sendall(b"x")

    async def main() -> None:
        await asyncio.get_running_loop().sock_recv(conn, 9)
        conn.fileno()

    asyncio.run(main())
    assert not conn.clean()


def over_streams(conn: PooledSocket, do: Callable[[asyncio.StreamWriter], object]) -> bool:
    async def main() -> bool:
        reader, writer = await streams_over(conn)
        do(writer)
        return all_said(reader, writer) and conn.clean()

    return asyncio.run(main())


def test_what_is_done_to_the_socket_of_a_stream_is_noticed(both: Both) -> None:
    conn, _ = both
    assert over_streams(conn, lambda writer: None)
    before = conn.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    keep = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1 - before)
    assert over_streams(conn, lambda writer: writer.get_extra_info("socket").setsockopt(*keep))
    assert conn.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == before
    assert over_streams(conn, lambda writer: writer.get_extra_info("socket").fileno())
    assert not over_streams(conn, lambda writer: set_flags(writer.get_extra_info("socket").fileno(), os.O_ASYNC))


@pytest.mark.parametrize(
    "do",
    [
        lambda sock: sock.setsockopt(socket.SOL_SOCKET, LOWAT, 30),
        lambda sock: sock.dup().close(),
    ],
)
def test_a_copy_tells_of_what_cannot_be_set_back(both: Both, do: Callable[[Any], object]) -> None:
    conn, _ = both
    assert not over_streams(conn, lambda writer: do(writer.get_extra_info("socket")))


def test_a_copy_of_something_else_is_a_socket(both: Both) -> None:
    conn, _ = both
    with Copy(os.dup(conn.number())) as copy:
        copy.setsockopt(socket.SOL_SOCKET, LOWAT, 2)
        copy.dup().close()
        assert copy.fileno() >= 0
    assert conn._touched == 0
    assert isinstance(conn, Pooled)


# --- the poll ---------------------------------------------------------------------------------------------------------


def test_an_urgent_byte_is_something_that_was_said(over_tcp: Both) -> None:
    conn, peer = over_tcp
    gate = Gate(conn.number(), conn.number(), -1)
    assert not gate.quiet(0)
    peer.send(b"!", socket.MSG_OOB)
    wait_until(lambda: bool(gate.quiet(0)))
