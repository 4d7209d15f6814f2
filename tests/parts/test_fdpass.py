"""One message with at most one descriptor: close-on-exec, and nothing left open of what was not asked for."""

from __future__ import annotations

import array
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from sharedpool import fdpass

from ..support.descriptors import open_descriptors

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        other.settimeout(10)
        yield one, other


def send_many(channel: socket.socket, data: bytes, count: int) -> None:
    rights = array.array("i", [0] * count)
    channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def test_a_message_comes_whole_and_alone(pair: Pair) -> None:
    one, other = pair
    fdpass.send(one, b"first")
    fdpass.send(one, b"second")
    assert [fdpass.receive(other, 100), fdpass.receive(other, 100)] == [(b"first", None), (b"second", None)]


def test_a_descriptor_comes_as_the_same_file_and_closed_on_exec(pair: Pair, tmp_path: object) -> None:
    one, other = pair
    reading, writing = os.pipe()
    try:
        fdpass.send(one, b"here", writing)
        data, got = fdpass.receive(other, 100)
        assert got is not None
        try:
            assert data == b"here"
            assert os.fstat(got) == os.fstat(writing)
            assert got != writing
            assert not os.get_inheritable(got)
        finally:
            os.close(got)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("count", [2, 8, 9, 30])
def test_more_descriptors_than_one_are_refused_and_closed(pair: Pair, count: int) -> None:
    one, other = pair
    before = open_descriptors()
    send_many(one, b"too many", count)
    with pytest.raises(fdpass.PassError):
        fdpass.receive(other, 100)
    assert not open_descriptors() - before
    fdpass.send(one, b"next")
    assert fdpass.receive(other, 100) == (b"next", None)


def test_a_message_cut_off_is_refused_and_its_descriptor_closed(pair: Pair) -> None:
    one, other = pair
    before = open_descriptors()
    fdpass.send(one, b"x" * 101, 0)
    with pytest.raises(fdpass.PassError, match="cut off"):
        fdpass.receive(other, 100)
    assert not open_descriptors() - before


def test_a_descriptor_above_the_limit_is_refused_with_the_limits_name(pair: Pair) -> None:
    one, other = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fdpass.send(one, b"here", 0)
    spare = os.dup(0)  # the lowest free number: with the limit just below nothing more can be received
    os.close(spare)
    before = open_descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        with pytest.raises(fdpass.PassError, match="RLIMIT_NOFILE"):
            fdpass.receive(other, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not open_descriptors() - before


def test_the_other_sides_end_is_an_empty_message(pair: Pair) -> None:
    one, other = pair
    one.close()
    assert fdpass.receive(other, 100) == (b"", None)


@pytest.mark.parametrize("timeout", [None, 0.05, 0.0])
def test_a_full_channel_raises_instead_of_waiting(pair: Pair, timeout: float | None) -> None:
    one, _ = pair
    one.settimeout(timeout)
    sent = 0
    with pytest.raises(BlockingIOError):
        while sent < 100_000:
            fdpass.send(one, b"x" * 1000)
            sent += 1
    assert sent > 1


@pytest.mark.parametrize("timeout", [None, 0.05, 0.0])
def test_nothing_there_raises_where_it_is_not_to_wait(pair: Pair, timeout: float | None) -> None:
    _, other = pair
    other.settimeout(timeout)
    with pytest.raises(BlockingIOError):
        fdpass.receive(other, 100, wait=False)


def test_a_closed_channel_raises_and_sends_no_signal(pair: Pair) -> None:
    one, other = pair
    other.close()
    with pytest.raises(OSError, match=r"Broken pipe|Connection"):
        fdpass.send(one, b"x")


def test_the_kernel_says_who_is_at_the_other_end(pair: Pair) -> None:
    one, _ = pair
    assert fdpass.credentials(one) == (os.getpid(), os.getuid(), os.getgid())
