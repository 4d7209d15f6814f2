"""Closing what came from others never waits, whatever it is and whatever lies in it."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from sharedpool import fdpass, foreign, wire
from sharedpool.wire import Kind, Message

from ..support.descriptors import open_descriptors
from .test_channels_fuzzed import Listening, Peer, arbiter, hello, others_are_served

__all__ = ["arbiter"]

#: What a lingering socket waits when it is closed, s, and what is surely less.
LINGER = 60
SOON = 20


@pytest.fixture
def lingering() -> Iterator[Callable[[], int]]:
    """Makes sockets with unsent data whose close waits. The peers that do not read are closed at the end."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def make() -> int:
            sock = socket.create_connection(listener.getsockname())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(b"x" * 65_536)
            return sock.detach()

        yield make
        with contextlib.suppress(BlockingIOError):
            listener.setblocking(False)
            while True:
                listener.accept()[0].close()
    assert foreign.settle()


def give(channel: socket.socket, data: bytes, *descriptors: int) -> None:
    """Send descriptors and close ours: the receiver's are the last."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    channel.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    for descriptor in descriptors:
        os.close(descriptor)


def nested(lingering: Callable[[], int], kind: int) -> int:
    """A Unix socket in which a lingering one lies unread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    give(ours, b"x", lingering())
    ours.close()
    return theirs.detach()


def pending(lingering: Callable[[], int]) -> int:
    """A listening Unix socket with a connection in which a lingering one lies unread."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")
    listener.listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(listener.getsockname())
        give(client, b"x", lingering())
    return listener.detach()


KINDS: dict[str, Callable[[Callable[[], int]], int]] = {
    "tcp": lambda lingering: lingering(),
    "in a stream": lambda lingering: nested(lingering, socket.SOCK_STREAM),
    "in a packet": lambda lingering: nested(lingering, socket.SOCK_SEQPACKET),
    "in a datagram": lambda lingering: nested(lingering, socket.SOCK_DGRAM),
    "in a connection to come": pending,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor_whose_close_waits_is_closed_without_waiting(lingering: Callable[[], int], kind: str) -> None:
    descriptor = KINDS[kind](lingering)
    began = time.monotonic()
    foreign.close(descriptor)
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("kind", [*KINDS, "twice", "many", "behind", "unasked", "in the events", "in an event channel"])
def test_the_arbiter_goes_on_whatever_it_refuses(arbiter: Listening, lingering: Callable[[], int], kind: str) -> None:
    peer = Peer(arbiter)
    if kind in KINDS:
        give(peer.channel, b"no message", KINDS[kind](lingering))
    elif kind == "twice":
        give(peer.channel, wire.pack(Message(Kind.HOLD)), lingering(), lingering())
    elif kind == "many":  # more than a message may have: the kernel must not be left to close them
        give(peer.channel, wire.pack(Message(Kind.HOLD)), *(lingering() for _ in range(12)))
    elif kind == "behind":  # what nobody reads any more
        peer.channel.send(b"no message")
        for _ in range(3):
            give(peer.channel, b"never read", lingering())
    elif kind == "unasked":
        give(peer.channel, wire.pack(Message(Kind.CALLER)), lingering())
    else:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        give(ours, wire.pack(Message(Kind.SEGMENT)), lingering())
        more = {"identity": {}} if kind == "in the events" else {}
        with theirs:
            fdpass.send(peer.channel, wire.pack(hello("ours", **more)), theirs.fileno())
        ours.close()
    began = time.monotonic()
    arbiter.step(0)
    for _, descriptor in peer.answers():
        if descriptor is not None:
            os.close(descriptor)
    peer.close()
    others_are_served(arbiter)
    assert time.monotonic() - began < SOON


def test_the_end_of_a_channel_is_seen_at_once_whatever_lies_in_it(lingering: Callable[[], int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        give(ours, b"x", lingering())
        foreign.end_channel(theirs)
        poller = select.poll()
        poller.register(ours, 0)
        assert poller.poll(0)


def test_what_does_not_wait_is_closed_when_the_call_is_over() -> None:
    before = open_descriptors()
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        for closed in (False, True):
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            if closed:
                theirs.close()
            foreign.close_socket(ours)
            theirs.close()
    foreign.close(socket.socket(socket.AF_UNIX).detach())
    foreign.close(socket.socket().detach())
    assert open_descriptors() == before
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.send(b"")  # an empty message is no end
        give(theirs, b"", os.dup(theirs.fileno()))
        foreign.close_socket(ours)
    foreign.close(os.memfd_create("any"))
    assert foreign.settle()
    assert open_descriptors() == before
