"""Whatever comes over a channel, the arbiter goes on: it answers others, and gives nothing away of another pool."""

from __future__ import annotations

import array
import contextlib
import gc
import json
import logging
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharedpool import fdpass, foreign, segment, wire
from sharedpool.channel import Channel
from sharedpool.layout import LAYOUT
from sharedpool.testing import SteppedArbiter
from sharedpool.wire import Kind, Message

from ..support.descriptors import open_descriptors

HEAD = struct.Struct("<HHIQQ")


class Listening(SteppedArbiter):
    """A stepped arbiter that listens."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.path = str(directory / "a.sock")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.path)
        self.listener.listen(64)
        self.listener.setblocking(False)
        self._watch(self.listener.fileno(), select.EPOLLIN, self._accept)

    def close(self) -> None:
        for client in list(self._clients):
            self._gone(client)
        self.listener.close()  # type: ignore[union-attr]
        super().close()


class Peer:
    """A process's end of a channel, in this process; nothing here waits for the arbiter, it is stepped."""

    def __init__(self, arbiter: Listening) -> None:
        self.arbiter = arbiter
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.connect(arbiter.path)
        self.channel.setblocking(False)
        self.events: socket.socket | None = None
        arbiter.step(0)

    def send(self, data: bytes, *descriptors: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        with contextlib.suppress(OSError):  # the arbiter has had enough of it
            self.channel.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        self.arbiter.step(0)

    def answers(self) -> list[tuple[Message, int | None]]:
        """What has come, its descriptors open; ends with what ended the channel."""
        found = []
        with contextlib.suppress(OSError):
            while (got := fdpass.receive(self.channel, wire.LONGEST, wait=False))[0]:
                found.append((wire.unpack(got[0]), got[1]))
        return found

    def ask(self, message: Message, *descriptors: int) -> Message:
        self.send(wire.pack(message), *descriptors)
        ((answer, descriptor),) = self.answers()
        if descriptor is not None:
            os.close(descriptor)
        return answer

    def hello(self, pool: str, **more: Any) -> Message:
        self.events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            return self.ask(hello(pool, **more), theirs.fileno())

    @property
    def ended(self) -> bool:
        poller = select.poll()
        poller.register(self.channel, 0)
        return bool(poller.poll(0))

    def close(self) -> None:
        self.channel.close()
        if self.events is not None:
            self.events.close()
        self.arbiter.step(0)


def hello(pool: str, **more: Any) -> Message:
    body = {"pool": pool, "pid": os.getpid(), "options": {"max_connections": 4}, "declares": True, "layout": LAYOUT}
    return Message(Kind.HELLO, 7, body={**body, "identity": dict(segment.identity()), **more})


@pytest.fixture
def arbiter(tmp_path: Path) -> Iterator[Listening]:
    before = open_descriptors()
    made = Listening(tmp_path)
    yield made
    made.close()
    made.pools.clear()
    made._workers.clear()
    assert foreign.settle()
    gc.collect()  # a pool is mapped as long as anything refers to it
    # What is open now and was not before; what an earlier test's thread has closed meanwhile is not this test's affair.
    assert not open_descriptors() - before


def sockets() -> Counter[str]:
    assert foreign.settle()
    return Counter({name: count for name, count in open_descriptors().items() if name.startswith("socket:")})


def others_are_served(arbiter: Listening) -> None:
    peer = Peer(arbiter)
    assert peer.ask(Message(Kind.HOLD, 3)) == Message(Kind.OK, 3)
    assert peer.ask(Message(Kind.CALLER, 4)).kind is Kind.KEY
    peer.close()


def lease_of(arbiter: Listening, pool: str, row: int) -> tuple[int, int, socket.socket]:
    """A connection that the row has leased, registered: its slot, generation, and the remote's end."""
    served = arbiter.pools[pool]
    table = served.segment.table(row)
    worker = arbiter.worker(served)  # a row of its own, which only lends its hands
    worker.table = table
    at = worker.open()
    return table.slot_index(at), served.words[at] >> 24 & 0xFFF_FFFF, worker.peer(at)


OPENERS: list[Callable[[contextlib.ExitStack], int]] = [
    lambda stack: stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).fileno(),
    lambda stack: stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).fileno(),
    lambda stack: stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).fileno(),
    lambda stack: stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)).fileno(),
    lambda stack: stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno(),
    lambda stack: stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).fileno(),
    lambda stack: stack.enter_context(os.fdopen(os.memfd_create("any"))).fileno(),
    lambda stack: stack.enter_context(select.epoll()).fileno(),
    lambda stack: closed_with(stack, os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)),
    lambda stack: closed_with(stack, os.open("/", os.O_RDONLY | os.O_DIRECTORY)),
    lambda stack: closed_with(stack, os.open("/proc/self/mem", os.O_RDWR)),
    lambda stack: closed_with(stack, os.pidfd_open(os.getpid())),
    lambda stack: stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)).fileno(),
    lambda stack: stack.enter_context(full_of_descriptors()).fileno(),
    *(
        lambda stack, family=family, kind=kind: rare_socket(stack, family, kind)  # type: ignore[misc]
        for family, kind in ((40, socket.SOCK_STREAM), (38, socket.SOCK_SEQPACKET), (30, socket.SOCK_SEQPACKET))
    ),
]


def rare_socket(stack: contextlib.ExitStack, family: int, kind: int) -> int:
    """A socket of AF_VSOCK, AF_ALG or AF_TIPC; where the kernel has none of that family, a pipe."""
    try:
        return stack.enter_context(socket.socket(family, kind)).fileno()
    except OSError:
        reading, writing = os.pipe()
        os.close(writing)
        return closed_with(stack, reading)


def closed_with(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def full_of_descriptors() -> socket.socket:
    """An end of a channel in which a descriptor lies unread, and an empty message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(b"")
        fdpass.send(ours, b"x", ours.fileno())
    return theirs


numbers = st.sampled_from([0, 1, 2, 3, 1023, 1024, 2**31, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
bodies = st.dictionaries(
    st.sampled_from(
        ["pool", "pid", "options", "declares", "update", "identity", "row", "nonce", "name", "message", "brings"]
    ),
    values
    | st.sampled_from(["ours", "other", os.getpid(), dict(segment.identity())])
    | st.dictionaries(st.sampled_from(["max_connections", "order", "move", "idle_timeout", "reserve"]), values),
)
messages = st.builds(
    lambda kind, request, slot, generation, body, bad: (
        HEAD.pack(kind, 0, request & 0xFFFF_FFFF, slot, generation) + (json.dumps(body).encode() if body else b"") + bad
    ),
    st.sampled_from(list(Kind)) | st.integers(0, 2**16 - 1), numbers, numbers, numbers, bodies,
    st.just(b"") | st.binary(max_size=3),
)  # fmt: skip
well_formed_hellos = st.builds(
    lambda body: wire.pack(Message(Kind.HELLO, 1, body={**hello("ours").body, **body})), bodies
)
sent = st.tuples(
    st.binary(max_size=60) | messages | well_formed_hellos,
    st.lists(st.integers(0, len(OPENERS) - 1), max_size=3),
    st.booleans(),
)


@settings(
    max_examples=100, deadline=None, database=None, print_blob=True, derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.lists(sent, min_size=1, max_size=6))
def test_whatever_comes_over_a_channel_harms_nobody_else(
    arbiter: Listening, caplog: pytest.LogCaptureFixture, script: list[tuple[bytes, list[int], bool]]
) -> None:
    caplog.set_level(logging.ERROR)
    caplog.clear()
    sockets_before = sockets()
    peers = {greeted: Peer(arbiter) for greeted in (False, True)}
    assert peers[True].hello("ours").kind is Kind.WELCOME
    for data, kinds, greeted in script:
        with contextlib.ExitStack() as stack:
            peers[greeted].send(data, *(OPENERS[kind](stack) for kind in kinds))
        for message, descriptor in peers[greeted].answers():
            if descriptor is not None:
                assert message.kind in (Kind.WELCOME, Kind.CONNECTION)
                os.close(descriptor)
    others_are_served(arbiter)
    for peer in peers.values():
        peer.close()
    arbiter.pass_time(1.1)  # rows that nobody comes back for
    for served in arbiter.pools.values():
        for index in list(served.held):
            served.forget(index)
    assert not caplog.records, caplog.text
    assert not sockets() - sockets_before


@pytest.mark.parametrize("data", [b"", b"x", b"x" * 100, HEAD.pack(999, 0, 0, 0, 0)])
def test_a_descriptor_with_bytes_that_are_no_message_is_closed(arbiter: Listening, data: bytes) -> None:
    peer = Peer(arbiter)
    before = open_descriptors()
    one, other = socket.socketpair()
    with one, other:
        peer.send(data, one.fileno())
    assert peer.ended
    assert not open_descriptors() - before
    assert len(before - open_descriptors()) == 1  # the arbiter's end of the channel
    peer.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"identity": "x"}, {"identity": [1]}, {"options": "abc"}, {"options": [["max_connections", 3]]},
        {"options": 3}, {"identity": True},
    ],
)  # fmt: skip
def test_a_hello_of_a_wrong_shape_ends_its_channel_at_once(arbiter: Listening, wrong: dict[str, Any]) -> None:
    peer = Peer(arbiter)
    peer.events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        peer.send(wire.pack(hello("x", **wrong)), theirs.fileno())
    assert peer.ended
    peer.close()


def test_a_connection_of_a_pool_goes_to_those_of_that_pool_and_to_its_holder_only(arbiter: Listening) -> None:
    ours, colleague, stranger = Peer(arbiter), Peer(arbiter), Peer(arbiter)
    row = ours.hello("ours").body["row"]
    colleague.hello("ours")
    assert stranger.hello("other").body["row"] == row, "the same number in another pool"
    slot, generation, _ = lease_of(arbiter, "ours", row)
    for peer, kind in ((stranger, Kind.GONE), (colleague, Kind.GONE), (ours, Kind.CONNECTION)):
        assert peer.ask(Message(Kind.FETCH, 1, slot, generation)).kind is kind
    for peer in (ours, colleague, stranger):
        peer.close()


def test_who_asks_plainly_is_answered_plainly_and_the_pools_take_their_turn_when_it_is_due(
    arbiter: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Peer(arbiter)
    row = ours.hello("ours").body["row"]
    slot, generation, _ = lease_of(arbiter, "ours", row)
    held = arbiter.pools["ours"].held[slot]
    held.driver, held.state = "postgres", b"S\0\xff{"
    turns: list[int] = []
    monkeypatch.setattr(arbiter.pools["ours"], "turn", lambda now: turns.append(now) or now + 10**9)
    arbiter.step(0)
    turns.clear()
    for again in range(3):
        ours.send(wire.pack_plainly(Kind.FETCH, again, slot, generation))
        data, descriptor = fdpass.receive(ours.channel, wire.LONGEST)
        assert (data, descriptor is not None) == (
            wire.pack_plainly(Kind.CONNECTION, again, slot, generation, held.state), True
        )  # fmt: skip
        os.close(descriptor)  # type: ignore[arg-type]
        assert turns == []
        assert wire.unpack(data) == Message(Kind.CONNECTION, again, slot, generation), "for who does not wait for it"
    old = ours.ask(Message(Kind.FETCH, 9, slot, generation))  # of a version that knows nothing of that
    assert (wire.state_of(old), len(turns)) == (held.state, 1)
    ours.send(wire.pack_plainly(Kind.FETCH, 10, slot, generation + 1))
    assert [answer.kind for answer, _ in ours.answers()] == [Kind.GONE]
    arbiter.clock.now += 10**10
    ours.send(wire.pack_plainly(Kind.FETCH, 11, slot, generation))
    ((answer, descriptor),) = ours.answers()
    os.close(descriptor)  # type: ignore[arg-type]
    assert (answer.kind, turns[-1]) == (Kind.CONNECTION, arbiter.clock())
    monkeypatch.undo()
    ours.close()


def test_an_answer_is_understood_in_either_form_and_what_else_comes_is_dropped() -> None:
    before = open_descriptors()
    channel = Channel.__new__(Channel)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        late = [
            wire.pack_plainly(Kind.CONNECTION, 1, 3, 4, b"{"), wire.pack_plainly(Kind.CONNECTION, 2, 3, 5, b"{"),
            wire.pack(Message(Kind.CONNECTION, 1, 3, 4, wire.with_state("postgres", b"late"))),
        ]  # fmt: skip
        body = wire.with_state("postgres", b"\0state")
        for answer in (
            wire.pack_plainly(Kind.CONNECTION, 2, 3, 4, b"\0state"),
            wire.pack(Message(Kind.CONNECTION, 2, 3, 4, body)),
        ):
            for data in (*late, answer):
                fdpass.send(theirs, data, theirs.fileno())
            found = channel._hear(ours, 2, 3, 4, 0)
            assert found is not None
            os.close(found[0])
            assert found[1] == b"\0state"
        for data in (HEAD.pack(Kind.CONNECTION, 0, 2, 3, 4) + b"{", b"short", HEAD.pack(99, 1, 2, 3, 4)):
            fdpass.send(theirs, data, theirs.fileno())
            with pytest.raises(wire.WireError):
                channel._hear(ours, 2, 3, 4, 0)
        with pytest.raises(TimeoutError):
            channel._hear(ours, 2, 3, 4, 0)
    assert not open_descriptors() - before


def test_a_nonce_of_a_row_in_one_pool_is_none_in_another(arbiter: Listening) -> None:
    ours, other, again = Peer(arbiter), Peer(arbiter), Peer(arbiter)
    welcome = ours.hello("ours").body
    other.hello("other")
    refused = again.hello("other", row=welcome["row"], nonce=welcome["nonce"])
    assert (refused.kind, refused.body["error"]) == (Kind.REFUSED, "AttachRefused")
    for peer in (ours, other, again):
        peer.close()


def test_of_a_flood_so_many_messages_are_read_in_a_turn_and_the_others_have_theirs(arbiter: Listening) -> None:
    flooding, other = Peer(arbiter), Peer(arbiter)
    flooding.hello("ours")
    other.hello("ours")
    data = wire.pack(Message(Kind.WATCH))
    flooding.channel.setblocking(True)
    flooding.channel.settimeout(0)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            flooding.channel.send(data)
            sent += 1
    assert sent > 8
    other.channel.send(wire.pack(Message(Kind.FETCH, 9, 0, 0)))
    arbiter.step(0)
    ((answer, _),) = other.answers()  # in the same turn, however long the flood is
    assert (answer.kind, answer.request) == (Kind.GONE, 9)
    for peer in (flooding, other):
        peer.close()


def hold_the_mutex(arbiter: Listening, pool: str) -> Callable[[], object]:
    """As a process that was stopped inside a section; gives what lets it go."""
    table = arbiter.pools[pool].table
    free = table.mutex

    class Busy:
        def __neg__(self) -> int:
            return 16  # EBUSY

        __pos__ = __invert__ = __neg__

    table.mutex = Busy()
    return lambda: setattr(table, "mutex", free)


def test_a_hello_to_a_pool_whose_mutex_is_busy_is_answered_when_it_is_free(arbiter: Listening) -> None:
    first, late, gone = Peer(arbiter), Peer(arbiter), Peer(arbiter)
    first.hello("ours")
    let_go = hold_the_mutex(arbiter, "ours")
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for peer, (events, theirs) in zip((late, gone), pairs, strict=True):
        peer.events = events
        with theirs:
            peer.send(wire.pack(hello("ours")), theirs.fileno())
    assert (late.answers(), late.ended) == ([], False)
    assert arbiter.step(0) < 0.01
    gone.close()
    let_go()
    arbiter.step(0)
    ((welcome, descriptor),) = late.answers()
    assert descriptor is not None
    os.close(descriptor)
    assert (welcome.kind, welcome.request) == (Kind.WELCOME, 7)
    assert len(arbiter._rows(arbiter.pools["ours"])) == 2
    for peer in (first, late):
        peer.close()


def test_a_declaration_to_a_pool_whose_mutex_is_busy_is_refused_with_the_reason(arbiter: Listening) -> None:
    peer = Peer(arbiter)
    peer.hello("ours")
    let_go = hold_the_mutex(arbiter, "ours")
    change = Message(Kind.DECLARE, 5, body={"options": {"max_connections": 9}, "update": True})
    answer = peer.ask(change)
    assert (answer.kind, answer.request) == (Kind.REFUSED, 5)
    assert "mutex" in answer.body["text"]
    let_go()
    assert peer.ask(change).kind is Kind.OK
    peer.close()


def test_the_key_is_for_those_who_attach_to_nothing(arbiter: Listening) -> None:
    """An attached process may have changed its user since it connected."""
    for kind in (Kind.CALLER, Kind.HOLD):
        peer = Peer(arbiter)
        assert peer.hello("ours").kind is Kind.WELCOME
        peer.send(wire.pack(Message(kind, 5)))
        assert peer.answers() == []
        assert peer.ended
        peer.close()


@pytest.mark.parametrize("kind", [Kind.CALLER, Kind.HOLD])
@pytest.mark.parametrize("wrong", [{"pid_namespace": "4:1"}, {"pid_namespace": None}, {"pid": 1}])
def test_who_says_that_it_is_of_another_namespace_gets_nothing(
    arbiter: Listening, kind: Kind, wrong: dict[str, Any]
) -> None:
    peer = Peer(arbiter)
    body = {"pid_namespace": segment.identity()["pid_namespace"], "pid": os.getpid()}
    answer = peer.ask(Message(kind, 5, body={**body, **wrong}))
    assert (answer.kind, answer.body["error"]) == (Kind.REFUSED, "AttachRefused")
    assert "namespace" in answer.body["text"]
    assert peer.ended
    peer.close()


def brings(arbiter: Listening, peer: Peer, pool: str, descriptor: int, **more: Any) -> Message:
    """Come back for a row, with a segment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fdpass.send(ours, wire.pack(Message(Kind.SEGMENT)), descriptor)
        return peer.ask(hello(pool, brings=True, **more), theirs.fileno())


def test_what_a_process_brings_is_looked_at_before_it_is_a_pool(arbiter: Listening, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with contextlib.closing(Listening(other)) as dead:
        peer = Peer(dead)
        welcome = peer.hello("ours").body
        served = dead.pools["ours"].segment
        row, nonce = welcome["row"], welcome["nonce"]
        for descriptor, name, more in (
            (served.fd, "ours", {"row": row, "nonce": nonce + 1}),
            (served.fd, "ours", {"row": row + 1, "nonce": nonce}),
            (served.fd, "ours", {"row": "1", "nonce": nonce}),
            (served.fd, "another", {"row": row, "nonce": nonce}),
            (peer.channel.fileno(), "ours", {"row": row, "nonce": nonce}),
        ):
            coming = Peer(arbiter)
            refused = brings(arbiter, coming, name, descriptor, **more)
            assert (refused.kind, refused.body["error"], refused.body["fact"]) == (Kind.REFUSED, "AttachRefused", "row")
            assert arbiter.pools == {}
            coming.close()
        os.close(served.claimed)  # as when that arbiter has died
        served.claimed = -1
        coming = Peer(arbiter)
        assert brings(arbiter, coming, "ours", served.fd, row=row, nonce=nonce).kind is Kind.WELCOME
        assert list(arbiter.pools) == ["ours"]
        coming.close()
        peer.close()
        for client in list(arbiter._clients):
            arbiter._gone(client)


def test_a_damaged_segment_that_is_brought_keeps_its_name_from_everybody(arbiter: Listening) -> None:
    fd = os.memfd_create(segment.name("", "damaged"))
    try:
        os.write(fd, b"x" * 8192)
        coming, newcomer, apart = Peer(arbiter), Peer(arbiter), Peer(arbiter)
        refused = brings(arbiter, coming, "damaged", fd, row=3, nonce=4)
        assert (refused.kind, refused.body["fact"]) == (Kind.REFUSED, "")
        answer = newcomer.hello("damaged")
        assert (answer.kind, f"in use by the processes {os.getpid()}" in answer.body["text"]) == (Kind.REFUSED, True)
        assert apart.hello("other").kind is Kind.WELCOME
    finally:
        os.close(fd)
    again = Peer(arbiter)
    assert again.hello("damaged").kind is Kind.WELCOME, "it has ended"
    for peer in (coming, newcomer, apart, again):
        peer.close()
