"""Messages between workers and the arbiter, to and from bytes. No sockets.

A message is a fixed head and, for some kinds, a JSON object. Every request has a number, and its reply repeats the
number, the slot and the generation. What comes from another process is data: it is checked here.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
from collections.abc import Mapping
from typing import Any

from .errors import SharedPoolError

#: Longest message in bytes.
LONGEST = 60_000
#: Longest name of a key in characters: an address, and no more.
LONGEST_NAME = 300

_HEAD = struct.Struct("<HHIQQ")  # kind, whether it is plain, request, slot, generation
_PLAIN = 1
#: Bytes before the state in a plain CONNECTION.
HEAD = _HEAD.size


class WireError(SharedPoolError):
    """Bytes that are no message."""


class Kind(enum.IntEnum):
    """What a message says. The descriptor that goes with it, if any, is named in brackets."""

    HELLO = 1  # worker: facts about itself, the pool and its options [its event channel]
    WELCOME = 2  # arbiter: row, options [the segment]
    REFUSED = 3  # arbiter: an error's name and text
    REGISTER = 4  # worker: a connection is about to be opened in this slot [the socket]; by which driver, if it has a
    #               session state: that comes with a HOLDS; no reply
    FETCH = 5  # worker: the connection in this slot, please
    CONNECTION = 6  # arbiter: here, and its session's state [the socket]
    GONE = 7  # arbiter: there is none
    CLOSE = 8  # worker: this slot is CLOSING; no reply
    FORGET = 9  # worker: what was registered here never became a connection; no reply
    WATCH = 10  # worker: somebody queues; no reply
    DETACH = 11  # worker: it is leaving; no reply
    CLOSED = 12  # arbiter, on the event channel: drop what you hold of it; `request`: 1 + the reason's place in REASONS
    CALLER = 13  # anybody: the registry's authkey, please
    KEY = 14  # arbiter: here
    HOLD = 15  # anybody: stay while this channel is open
    OK = 16  # arbiter
    DECLARE = 17  # worker: options of another handle
    NOTIFY = 18  # arbiter, on the event channel: somebody's message to all who are attached
    ABANDONED = 20  # arbiter, on the event channel: this lease of yours has lasted longer than lease_timeout
    LOG = 21  # arbiter, on the event channel: a record for your logging
    OPTIONS = 22  # arbiter, on the event channel: the pool's options have changed
    HOLDS = 26  # worker, to a successor: it holds this connection, of this state [the socket]; no reply
    REGISTERED = 27  # worker, to a successor: it has told all that it holds; no reply
    SEGMENT = (
        28  # worker, on its event channel before the HELLO that brings it: the pool's memory [the segment]; no reply
    )
    KEY_NAME = 23  # worker: what a key (in the place of the generation) stands for; no reply


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message: what it says, the request it belongs to, the connection it is about, and facts."""

    kind: Kind
    request: int = 0
    slot: int = 0
    generation: int = 0
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def pack(message: Message) -> bytes:
    """A message as bytes.

    Raises:
        WireError: It is too long.
    """
    head = _HEAD.pack(message.kind, 0, message.request, message.slot, message.generation)
    data = head + (json.dumps(dict(message.body)).encode() if message.body else b"")
    if len(data) > LONGEST:
        raise WireError(f"a message {message.kind.name} of {len(data)} bytes is longer than {LONGEST}")
    return data


def pack_plainly(kind: Kind, request: int, slot: int, generation: int, state: bytes = b"") -> bytes:
    """A FETCH whose CONNECTION may be plain, or such a CONNECTION: its body is the session's state, and no JSON.

    Somebody waits for it, so it is made without a Message. Versions that know nothing of that ask and answer otherwise.

    Raises:
        WireError: It is too long.
    """
    data = _HEAD.pack(kind, _PLAIN, request, slot, generation) + state
    if len(data) > LONGEST:
        raise WireError(f"a message {kind.name} of {len(data)} bytes is longer than {LONGEST}")
    return data


def unpack_plainly(data: bytes) -> tuple[int, int, int] | None:
    """(request, slot, generation) if that is a FETCH whose answer may be plain; else None: any message."""
    if len(data) != _HEAD.size:
        return None
    kind, plain, request, slot, generation = _HEAD.unpack(data)
    return (request, slot, generation) if kind == Kind.FETCH and plain == _PLAIN else None


def unpack(data: bytes) -> Message:
    """Bytes as a message; a plain CONNECTION, to whoever has not asked for it, has no body.

    Raises:
        WireError: They are none; the message says why.
    """
    if not _HEAD.size <= len(data) <= LONGEST:
        raise WireError(f"a message of {len(data)} bytes; {_HEAD.size} to {LONGEST} are allowed")
    number, plain, request, slot, generation = _HEAD.unpack_from(data)
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"a message of unknown kind {number}") from None
    rest = b"" if plain == _PLAIN and kind is Kind.CONNECTION else data[_HEAD.size :]
    body: Any = {}
    if rest:
        try:
            body = json.loads(rest)
        except (ValueError, RecursionError) as error:
            raise WireError(f"the body of a message {kind.name} is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise WireError(f"the body of a message {kind.name} is a {type(body).__name__}, not an object")
    return Message(kind, request, slot, generation, body)


def with_state(driver: str, state: bytes | None) -> dict[str, Any]:
    """A body that says which driver a connection is of, if it is one that has session states, and the state.

    None: it has none yet, or never will that could be told.
    """
    if not driver:
        return {}
    return {"driver": driver} if state is None else {"driver": driver, "state": state.decode("latin-1")}


def state_of(message: Message) -> bytes | None:
    """The session state in a message; None if there is to be one, which is not known.

    Raises:
        WireError: It is none.
    """
    state = message.body.get("state", None if "driver" in message.body else "")
    if state is None:
        return None
    try:
        return bytes(state, "latin-1")
    except (TypeError, UnicodeEncodeError) as error:
        raise WireError(f"a {message.kind.name} with a session state that is none") from error


def driver_of(message: Message) -> str:
    """The driver's name in a message; empty if there is none."""
    name = message.body.get("driver", "")
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        raise WireError(f"a {message.kind.name} with a driver that is none")
    return name
