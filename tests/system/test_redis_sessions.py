"""What commands do to a Redis session, as the server's documentation says: whether the next user may have it."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from sharedpool.integrations.redis.session import Session

SOCK = socket.socket()
SOCK.close()
MULTI, EXEC, DISCARD, UNWATCH = ("MULTI",), ("EXEC",), ("DISCARD",), ("UNWATCH",)
WATCH, GET = ("WATCH", "k"), ("GET", "k")


def after(*commands: tuple[Any, ...], answered: int | None = None) -> bool:
    """Whether a session is clean after these commands and so many answers: all, if not said."""
    session = Session(SOCK, b"{}")
    session.sends(commands)
    session.awaited -= len(commands) if answered is None else answered
    return session.clean


@pytest.mark.parametrize(
    "commands",
    [
        [GET], [MULTI, GET, EXEC], [MULTI, GET, DISCARD], [WATCH, UNWATCH], [WATCH, MULTI, GET, EXEC],
        [WATCH, MULTI, UNWATCH, DISCARD], [("CLIENT", "ID")], [("CLIENT ID",)], [(b"client", b"list")],
        [("SCRIPT LOAD", "return 1")], [(bytearray(b"GET"), "k")], [EXEC], [("WATCH-LIKE",)],
    ],
)  # fmt: skip
def test_what_leaves_a_session_as_it_was(commands: list[tuple[Any, ...]]) -> None:
    assert after(*commands)


@pytest.mark.parametrize(
    "commands",
    [
        [("SELECT", 1)], [("select", 1)], [(b"Select", 1)], [MULTI], [WATCH], [MULTI, GET], [WATCH, DISCARD],
        [WATCH, GET], [WATCH, MULTI, UNWATCH], [("AUTH", "x")], [("HELLO", 3)], [("SUBSCRIBE", "c")],
        [("UNSUBSCRIBE",)], [("MONITOR",)], [("CLIENT", "REPLY", "OFF")], [("CLIENT TRACKING", "ON")],
        [("CLIENT", "NO-EVICT", "on")], [("CLIENT",)], [("CLIENT SETNAME", "x")], [("SCRIPT", "DEBUG", "YES")],
        [("RESET",)], [("READONLY",)], [("HIMPORT PREPARE", "x")],
    ],
)  # fmt: skip
def test_what_the_next_user_must_not_meet(commands: list[tuple[Any, ...]]) -> None:
    assert not after(*commands)


def test_an_answer_that_is_still_on_its_way_or_too_many_are_not_clean() -> None:
    assert not after(GET, GET, answered=1)
    assert not after(GET, answered=2)


def test_bytes_that_nobody_knows_are_not_clean() -> None:
    session = Session(SOCK, b"{}")
    session.sends(None)
    assert not session.clean


def test_a_refusal_may_have_kept_a_transaction_open() -> None:
    session = Session(SOCK, b"{}")
    session.sends([MULTI, EXEC])
    session.awaited -= 2
    assert session.clean
    session.refused()
    assert not session.clean
