"""Messages to bytes and back; whatever else comes is refused with a reason."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharedpool.wire import LONGEST, Kind, Message, WireError, pack, unpack

json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20, deadline=None, database=None, print_blob=True)
@given(
    kind=st.sampled_from(Kind),
    request=st.integers(0, 2**32 - 1),
    slot=st.integers(0, 2**64 - 1),
    generation=st.integers(0, 2**64 - 1),
    body=st.dictionaries(st.text(max_size=5), json, max_size=3),
)
def test_a_message_comes_back_as_it_was(
    kind: Kind, request: int, slot: int, generation: int, body: dict[str, object]
) -> None:
    message = Message(kind, request, slot, generation, body)
    assert unpack(pack(message)) == message


@settings(max_examples=50, deadline=None, database=None, print_blob=True)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message = unpack(data)
    except WireError:
        return
    assert unpack(pack(message)).kind is message.kind


HEAD = pack(Message(Kind.OK))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (HEAD[:-1], "bytes"),
        (HEAD + b" " * LONGEST, "bytes"),
        (struct.pack("<H", 999) + HEAD[2:], "unknown kind 999"),
        (struct.pack("<H", 0) + HEAD[2:], "unknown kind 0"),
        (HEAD + b"{", "OK is no JSON"),
        (HEAD + b"[1]", "a list, not an object"),
        (HEAD + b"null", "NoneType"),
        (HEAD + b"\xff\xfe\xfd", "no JSON"),
        (HEAD + b'{"a":' * 9000, "no JSON"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        unpack(data)


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(WireError, match=r"HELLO .* longer than"):
        pack(Message(Kind.HELLO, body={"a": "x" * LONGEST}))


def test_a_message_of_the_greatest_length_is_a_message() -> None:
    body = {"a": "x" * (LONGEST - len(HEAD) - len('{"a": ""}'))}
    data = pack(Message(Kind.HELLO, body=body))
    assert len(data) == LONGEST
    assert unpack(data).body == body


def test_no_two_kinds_have_one_number() -> None:
    assert len({kind.value for kind in Kind}) == len(Kind.__members__)
