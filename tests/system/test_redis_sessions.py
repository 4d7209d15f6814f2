"""What commands do to a Redis session, as the server's documentation says: whether the next user may have it."""

from __future__ import annotations

import enum
import logging
import socket
from typing import Any

import pytest
from redis.exceptions import ExecAbortError, ResponseError

from sharedpool.integrations.redis.session import Session

SOCK = socket.socket()
SOCK.close()
MULTI, EXEC, DISCARD, UNWATCH = ("MULTI",), ("EXEC",), ("DISCARD",), ("UNWATCH",)
WATCH, GET = ("WATCH", "k"), ("GET", "k")


class Name(str, enum.Enum):  # noqa: UP042 - what applications of older Pythons have: str() gives its name, not its text
    GET, SELECT, TRACKING = "get", "select", "tracking"


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
        [("SCRIPT LOAD", "return 1")], [(bytearray(b"GET"), "k")], [EXEC], [("json.get", "k")],
        [("FT.SEARCH", "i", "x")], [(Name.GET, "k")],
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
        [("RESET",)], [("READONLY",)], [("HIMPORT PREPARE", "x")], [(Name.SELECT, 1)],
        [("CLIENT", Name.TRACKING, "on")], [("PICKDB", 1)], [("b840fc02d524045429941cc15f59e41cb7be6c52",)],
        [("MYMODULE.LOGIN", "x")], [("JSON",)], [("",)],
        [MULTI, ("EXEC", "now")], [MULTI, ("EXEC now",)], [MULTI, ("DISCARD", "x")], [WATCH, ("UNWATCH", "k")],
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


@pytest.mark.parametrize("begin", [MULTI, WATCH])
def test_an_error_may_mean_that_a_transaction_goes_on(begin: tuple[str, ...]) -> None:
    session = Session(SOCK, b"{}")
    session.sends([begin, EXEC if begin is MULTI else UNWATCH])
    session.answered()
    session.answered(ResponseError("unknown command"))
    assert not session.clean


def test_an_error_without_a_transaction_changes_nothing_and_neither_does_the_end_of_one() -> None:
    session = Session(SOCK, b"{}")
    session.sends([GET])
    session.answered(ResponseError("WRONGTYPE"))
    assert session.clean
    session.sends([MULTI, EXEC])
    session.answered()
    session.answered(ExecAbortError("EXECABORT"))
    session.sends([GET])
    session.answered(ResponseError("WRONGTYPE"))
    assert session.clean, "that was after the transaction"


def test_a_command_that_nobody_knows_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sharedpool"):
        for _ in range(3):
            assert not after(("NEVERHEARDOF", "x"))
    assert [record.getMessage().split(" it may")[0] for record in caplog.records] == [
        "the Redis command 'NEVERHEARDOF' is not known:"
    ]
