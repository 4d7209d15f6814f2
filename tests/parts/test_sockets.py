"""The sockets that users get, and how connections end. Real sockets, no pool."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import time
from collections.abc import Iterator

import pytest

from sharedpool import drivers
from sharedpool.drivers import sockets, tcp, unix
from sharedpool.drivers.permit import PermitDriver
from sharedpool.drivers.sockets import Ending, PooledSocket, StreamDriver, end
from sharedpool.errors import ConnectFailed, ConnectTimeout, OptionError
from sharedpool.options import LONGEST

from ..support.descriptors import open_descriptors
from ..support.waiting import wait_until

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def connected(kind: str) -> tuple[PooledSocket, socket.socket]:
    """A pooled socket and its peer."""
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
def both(request: pytest.FixtureRequest) -> Iterator[tuple[PooledSocket, socket.socket]]:
    conn, peer = connected(request.param)
    peer.settimeout(10)
    yield conn, peer
    peer.close()
    StreamDriver().close(conn)


Both = tuple[PooledSocket, socket.socket]


def test_a_pooled_socket_says_none_where_no_timeout_was_asked_for_and_never_blocks_the_description(both: Both) -> None:
    conn, _ = both
    assert conn.gettimeout() is None
    assert not os.get_blocking(conn.fileno())
    conn.setblocking(True)
    assert conn.gettimeout() is None
    assert not os.get_blocking(conn.fileno())
    assert socket.socket.gettimeout(conn) == LONGEST


def test_timeouts_of_the_users_are_in_force_and_gone_for_the_next(both: Both) -> None:
    conn, _ = both
    conn.settimeout(0.01)
    assert conn.gettimeout() == 0.01
    with pytest.raises(TimeoutError):
        conn.recv(1)
    assert StreamDriver().clean(conn)
    assert conn.gettimeout() is None
    conn.setblocking(False)
    with pytest.raises(BlockingIOError):
        conn.recv(1)
    assert StreamDriver().clean(conn)
    assert conn.gettimeout() is None


def test_a_socket_with_an_open_file_on_it_is_not_clean(both: Both) -> None:
    conn, peer = both
    peer.sendall(b"line\nrest")
    file = conn.makefile("rb")
    assert file.readline() == b"line\n"  # "rest" lies in the file's buffer
    assert not StreamDriver().clean(conn)
    file.close()
    assert StreamDriver().clean(conn)


def test_a_closed_or_detached_socket_is_not_clean() -> None:
    for touch in (False, True):
        conn, peer = connected("unix")
        if touch:
            conn.settimeout(1)
        os.close(conn.detach())
        assert not StreamDriver().clean(conn)
        peer.close()
    conn, peer = connected("unix")
    conn.close()
    assert not StreamDriver().clean(conn)
    peer.close()


def test_closing_ends_the_connection_although_others_hold_it(both: Both) -> None:
    conn, peer = both
    pools = os.dup(conn.fileno())
    conn.close()
    assert conn.fileno() == -1
    assert peer.recv(1) == b""
    os.close(pools)


def test_closing_twice_or_after_the_peer_does_no_harm(both: Both) -> None:
    conn, peer = both
    peer.close()
    conn.close()
    conn.close()
    StreamDriver().close(conn)
    assert conn.fileno() == -1


@forks
def test_closing_in_a_forked_child_leaves_the_parents_connection_open(both: Both) -> None:
    conn, peer = both
    pid = os.fork()
    if not pid:
        conn.close()
        os._exit(0 if conn.fileno() == -1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    conn.sendall(b"still here")
    assert peer.recv(100) == b"still here"


def test_a_driver_closes_its_object_whatever_a_file_on_it_still_holds(both: Both) -> None:
    conn, peer = both
    file = conn.makefile("rb")
    StreamDriver().close(conn)
    assert peer.recv(1) == b""
    assert conn.fileno() == -1
    file.close()


def test_an_adopted_descriptor_is_the_same_connection_at_rest(both: Both) -> None:
    conn, peer = both
    other = StreamDriver().adopt(os.dup(conn.fileno()), StreamDriver().export(conn))
    assert isinstance(other, PooledSocket)
    assert (other.family, other.gettimeout()) == (conn.family, None)
    other.sendall(b"x")
    assert peer.recv(1) == b"x"
    os.close(other.detach())


# --- opening ----------------------------------------------------------------------------------------------------------


def test_a_tcp_socket_is_registered_before_it_connects_and_sends_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[bool] = []

        def register(sock: socket.socket) -> None:
            try:
                sock.getpeername()
            except OSError:
                seen.append(True)

        conn = tcp.TcpDriver().open("127.0.0.1", server.getsockname()[1], 5, register)
        assert seen == [True]
        assert conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not os.get_inheritable(conn.fileno())
        conn.close()


def test_a_refused_connect_says_where_and_why_and_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    before = open_descriptors()
    with pytest.raises(ConnectFailed, match=rf"tcp://127\.0\.0\.1:{port}.*refused") as caught:
        tcp.TcpDriver().open("127.0.0.1", port, 5, lambda sock: None)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert not open_descriptors() - before


def test_a_connect_that_nobody_answers_ends_with_its_timeout(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        waiting = []
        with pytest.raises(ConnectTimeout, match=r"did not answer within 0\.02 s \(connect_timeout\)"):
            for _ in range(10):
                waiting.append(unix.UnixDriver().open(path, 0, 0.02, lambda sock: None))
        for conn in waiting:
            conn.close()


def test_a_unix_socket_that_is_not_there_is_a_failed_connect(tmp_path: os.PathLike[str]) -> None:
    with pytest.raises(ConnectFailed, match="No such file"):
        unix.UnixDriver().open(os.path.join(tmp_path, "none"), 0, 1, lambda sock: None)


def test_what_goes_wrong_while_registering_leaves_nothing_open(tmp_path: os.PathLike[str]) -> None:
    def register(sock: socket.socket) -> None:
        raise LookupError

    before = open_descriptors()
    with pytest.raises(LookupError):
        tcp.TcpDriver().open("127.0.0.1", 1, 1, register)
    with pytest.raises(LookupError):
        unix.UnixDriver().open(os.path.join(tmp_path, "none"), 0, 1, register)
    assert not open_descriptors() - before


def test_equal_addresses_have_one_form_and_others_are_refused() -> None:
    assert tcp.TcpDriver().address("LocalHost", 80) == ("localhost", 80)
    assert unix.UnixDriver().address("/Run/S", 0) == ("/Run/S", 0)
    assert PermitDriver().address("OpenAI", 0) == ("OpenAI", 0)
    for driver, host, port in (
        (tcp.TcpDriver(), "h", 0), (tcp.TcpDriver(), "h", 65536), (tcp.TcpDriver(), "h", True),
        (tcp.TcpDriver(), "", 80), (tcp.TcpDriver(), "a\0b", 80), (unix.UnixDriver(), "/s", 1),
    ):  # fmt: skip
        with pytest.raises(OptionError):
            driver.address(host, port)


def test_drivers_are_found_by_their_names() -> None:
    assert [drivers.find(name).name for name in ("tcp", "ssl", "unix", "permit")] == [
        "tcp", "ssl", "unix", "permit"
    ]  # fmt: skip
    for name in ("http", None):
        with pytest.raises(OptionError, match=r"'transport' .*permit, ssl, tcp, unix"):
            drivers.find(name)


# --- ending -----------------------------------------------------------------------------------------------------------


def test_a_connection_has_ended_when_the_peer_has_closed_too(both: Both) -> None:
    conn, peer = both
    ending = Ending(conn)
    ending.begin()
    assert not ending.ended()
    assert peer.recv(1) == b""
    peer.close()
    wait_until(ending.ended, 5)


def test_a_peer_that_is_busy_has_its_work_called_off_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        conn = PooledSocket(fileno=socket.create_connection(server.getsockname()).detach())
        peer, _ = server.accept()
        called: queue.Queue[tuple[object, int, bytes]] = queue.Queue()
        drivers.aborts["busy"] = lambda *facts: called.put(facts)
        try:
            ending = Ending(conn, drivers.abort_of("busy", conn, b"state"))
            ending.begin()
            for _ in range(20):
                assert not ending.ended()
            assert called.get(timeout=20) == (server.getsockname(), socket.AF_INET, b"state")
            peer.close()
            wait_until(ending.ended, 5)
            assert called.empty()
            assert drivers.abort_of("busy", conn, b"") is None, "without a state there is nothing to say"
            assert drivers.abort_of("tcp", conn, b"state") is None
        finally:
            del drivers.aborts["busy"]
            conn.close()


def test_a_peer_that_others_go_on_watching_is_not_reset_by_what_it_still_says() -> None:
    """Others watch for its end; a reset would look like one."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as conn:
        peer, _ = server.accept()
        watched = Ending(socket.socket(fileno=os.dup(conn.fileno())))
        assert not end(conn, 0.01, cut=False)
        conn.close()
        peer.sendall(b"late")
        assert not watched.ended()
        peer.sendall(b"later")
        peer.close()
        wait_until(watched.ended, 5)
        watched._sock.close()


def test_a_peer_that_closed_first_has_ended_at_once(both: Both) -> None:
    conn, peer = both
    peer.close()
    wait_until(lambda: conn.recv(1) == b"", 5)
    ending = Ending(conn)
    ending.begin()
    wait_until(ending.ended, 5)


def test_what_the_peer_still_says_does_not_keep_its_end_from_being_seen(both: Both) -> None:
    conn, peer = both
    peer.sendall(b"x" * 1000)
    ending = Ending(conn)
    ending.begin()
    assert conn.family != socket.AF_UNIX or not ending.ended()
    peer.close()
    wait_until(ending.ended, 5)


def test_what_a_user_may_still_read_is_not_read_away(both: Both) -> None:
    conn, peer = both
    watched = socket.socket(fileno=os.dup(conn.fileno()))
    with watched:
        ending = Ending(watched, lent=True)
        ending.begin()
        peer.sendall(b"the rest")
        assert not ending.ended()
        peer.close()
        assert (conn.recv(100), conn.recv(100)) == (b"the rest", b"")
        wait_until(ending.ended)


def test_a_peer_that_still_answers_has_not_ended_before_it_closes(both: Both) -> None:
    """Reset, it would be taken for closed while its process still holds the connection, and counts it."""
    conn, peer = both
    ending = Ending(conn)
    ending.begin()
    assert peer.recv(1) == b""
    for _ in range(3):
        peer.sendall(b"an answer under way")
        assert not ending.ended()
    peer.close()
    wait_until(ending.ended)


def test_a_look_at_a_peer_that_keeps_talking_comes_to_an_end() -> None:
    conn, peer = connected("unix")
    with conn, peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        peer.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while sent < 8 << 20:
                sent += peer.send(b"x" * 8192)
        assert sent > 2 * sockets._DRAIN
        ending = Ending(conn)
        ending.begin()
        assert not ending.ended()
        left = 0
        with contextlib.suppress(BlockingIOError):
            left = len(conn.recv(1))
        assert left, "one look drained it all: a peer that sends as fast would keep the arbiter in it for ever"


def test_a_peer_with_very_much_to_say_is_cut_off_and_has_a_moment_to_notice(both: Both) -> None:
    conn, peer = both
    peer.setblocking(False)
    ending = Ending(conn)
    ending.begin()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            with contextlib.suppress(BlockingIOError):
                peer.send(b"x" * 65536)
                continue
            assert not ending.ended()
    assert [ending.ended() for _ in range(5)] == [False] * 4 + [True]


def test_a_peer_that_had_very_much_to_say_and_has_closed_has_ended(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_LONG_ANSWER", 4)
    conn, peer = both
    peer.sendall(b"more than four bytes")
    peer.shutdown(socket.SHUT_WR)
    ending = Ending(conn)
    ending.begin()
    peer.close()
    wait_until(ending.ended)
    assert ending.asked < 4


def test_a_peer_that_does_not_close_is_cut_off_when_the_time_is_over(both: Both) -> None:
    conn, peer = both
    began = time.monotonic()
    assert end(conn, 0.03) is False
    assert time.monotonic() - began >= 0.03
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        for _ in range(3):
            peer.send(b"x")


def test_looks_come_less_and_less_often_but_never_seldom(both: Both) -> None:
    conn, _ = both
    ending = Ending(conn)
    pauses = []
    for _ in range(12):
        ending.asked += 1
        pauses.append(ending.pause())
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.001, 0.05)
