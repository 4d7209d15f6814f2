"""The counting back end, tested by itself: what it says must be what happened."""

from __future__ import annotations

import errno
import socket

import pytest

from tests.support.backend import Backend, Target
from tests.support.commands import exchange_over, read_line
from tests.support.waiting import wait_until


def connect(target: Target) -> socket.socket:
    if target.transport == "unix":
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(target.host)
        except OSError:
            sock.close()
            raise
        return sock
    return socket.create_connection(target[:2])


@pytest.fixture(params=["tcp", "unix"])
def target(request: pytest.FixtureRequest, backend: Backend) -> Target:
    return backend.tcp if request.param == "tcp" else backend.listen_unix()


def test_counts_connections_that_are_open_and_the_most_there_ever_were(backend: Backend, target: Target) -> None:
    first, second = connect(target), connect(target)
    assert (backend.open, backend.peak, backend.accepted) == (2, 2, 2)
    first.close()
    backend.wait_open(1)
    second.close()
    backend.wait_open(0)
    assert (backend.peak, backend.accepted) == (2, 2)
    backend.do("reset_peak")
    assert backend.peak == 0


def test_sees_two_when_a_client_opens_before_its_first_connection_was_closed_here(backend: Backend) -> None:
    backend.pause_process()
    connect(backend.tcp).close()
    second = connect(backend.tcp)
    backend.resume_process()
    assert backend.peak == 2
    second.close()


def test_answers_with_the_number_of_the_connection(backend: Backend, target: Target) -> None:
    with connect(target) as first, connect(target) as second:
        assert [exchange_over(first, "a"), exchange_over(second, "b"), exchange_over(first, "c")] == [1, 2, 1]
        assert backend.ids() == [1, 2]
        assert backend.received(1) == "a\nc\n"


def test_a_late_answer_comes_when_told(backend: Backend) -> None:
    with connect(backend.tcp) as sock:
        sock.sendall(b"!late x\ny\n")
        assert read_line(sock) == b"1 y"
        assert backend.do("answer") == 1
        assert read_line(sock) == b"1 !late x"


def test_sends_bytes_that_nobody_asked_for(backend: Backend) -> None:
    with connect(backend.tcp) as sock:
        assert backend.do("send", data="surprise\n") == 1
        assert read_line(sock) == b"surprise"


def test_refuses_and_accepts_again_at_the_same_address(backend: Backend, target: Target) -> None:
    name = target.transport
    backend.do("refuse", name=name)
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        connect(target)
    backend.do("accept_again", name=name)
    connect(target).close()
    assert backend.accepted == 1


def test_a_connect_hangs_when_the_backlog_is_full_and_succeeds_after(backend: Backend) -> None:
    backend.do("hang", name="tcp")
    with socket.socket() as sock:
        sock.setblocking(False)
        assert sock.connect_ex(backend.tcp[:2]) == errno.EINPROGRESS
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        assert state == 2  # SYN_SENT: nobody has answered
    backend.do("accept_again", name="tcp")
    connect(backend.tcp).close()
    assert backend.accepted == 1


def test_a_unix_connect_hangs_when_the_backlog_is_full(backend: Backend) -> None:
    target = backend.listen_unix()
    backend.do("hang", name="unix")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        assert sock.connect_ex(target.host) == errno.EAGAIN


def test_while_paused_connects_succeed_and_are_not_counted(backend: Backend) -> None:
    backend.do("pause", name="tcp")
    with connect(backend.tcp):
        assert backend.open == 0
        backend.do("resume", name="tcp")
        assert backend.open == 1


def test_holds_its_close_back_until_released(backend: Backend, target: Target) -> None:
    backend.do("hold_closes")
    connect(target).close()
    wait_until(lambda: backend.do("connections")[0]["ended"])
    assert backend.open == 1
    assert backend.do("release_closes") == 1
    assert backend.open == 0


def test_closes_what_it_is_told_to(backend: Backend) -> None:
    with connect(backend.tcp) as first, connect(backend.tcp) as second, connect(backend.tcp) as third:
        wait_until(lambda: backend.open == 3)
        assert backend.do("close", ids=[1]) == 1
        assert first.recv(1) == b""
        assert backend.do("close", ids=[2], how="rst") == 1
        with pytest.raises(ConnectionResetError):
            second.recv(1)
        assert backend.do("half_close", ids=[3]) == 1
        assert third.recv(1) == b""
        assert backend.ids() == [3]
        assert backend.counts()["closed"] == {"told": 1, "rst": 1}


def test_an_unknown_connection_or_command_is_an_error(backend: Backend) -> None:
    with pytest.raises(AssertionError, match="no_such"):
        backend.do("no_such")
