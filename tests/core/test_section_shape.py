"""The critical sections have the one shape in which nothing can come between, on the Python that runs this."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from errno import EOWNERDEAD
from typing import Any

import pytest

from sharedpool.table import Table

from .section_shape import refusals, trylocks

METHODS = [
    name
    for name, method in vars(Table).items()
    if inspect.isfunction(method) and trylocks([one for one in dis.get_instructions(method) if one.opname != "CACHE"])
]

ONE = 1
TEXT = "text"


def test_every_transition_is_among_the_methods_that_are_looked_at() -> None:
    transitions = {"take_idle", "take_free", "take_grant", "swap", "put_idle", "hand", "hand_free", "free", "close"}
    transitions |= {"take_idle_counted", "put_idle_counted", "connected", "reopen"}
    transitions |= {
        "claim_cell",
        "claim_line",
        "enqueue",
        "enqueue_high",
        "rejoin",
        "leave",
        "set_row",
        "set_limit",
        "repair",
    }
    assert transitions == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_can_come_between_trylock_and_unlock(name: str) -> None:
    calls = ("rebuild",) if name == "repair" else ()
    assert refusals(getattr(Table, name), calls) == []


# --- what the walk must refuse ----------------------------------------------------------------------------------------


def sound(w: Any, mutex: Any, lease: Any, new: int) -> None:
    rc = -mutex
    if rc == 0:
        try:
            if not w[0] and w[ONE] == new:
                w[0] = 1
                lease.word = new
                w[ONE] = w[ONE] + 1 & ~new
                w[2] = 1 if w[2] else 2
        finally:
            +mutex
    elif rc == EOWNERDEAD:
        try:
            w[0] = w[0] or new
            ~mutex
        finally:
            +mutex


def forgets_the_dead(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[0] = 1
        finally:
            +mutex


def leaves_the_dead_to_another(w: Any, mutex: Any, other: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[0] = 1
        finally:
            +mutex
    elif rc == EOWNERDEAD:
        other()


def calls_a_function(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[0] = min(w[1], w[2])
        finally:
            +mutex


def calls_a_method(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w.release()
        finally:
            +mutex


def loops(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            while w[0]:
                w[0] = w[0] - 1
        finally:
            +mutex


def iterates(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            for place in w:
                w[0] = place
        finally:
            +mutex


def returns_within(w: Any, mutex: Any) -> int:
    rc = -mutex
    if rc == 0:
        if w[0]:
            return 1
        +mutex
    return 0


def forgets_the_try(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        w[0] = 1
        +mutex


def catches_only_some(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[0] = 1
        except ValueError:
            +mutex
        else:
            +mutex


def stores_another_attribute(w: Any, mutex: Any, lease: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            lease.conn = w[0]
        finally:
            +mutex


def stores_to_another_object(w: Any, mutex: Any, other: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            other.word = w[0]
        finally:
            +mutex


def uses_text(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[0] = TEXT
        finally:
            +mutex


def builds_a_tuple(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            done = (w[0], w[1])
        finally:
            +mutex
        assert done


def looks_for_something(w: Any, mutex: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[0] = 3 in w
        finally:
            +mutex


def does_something_before_the_test(w: Any, mutex: Any) -> None:
    rc = -mutex
    w[0] = 1
    if rc == 0:
        try:
            w[1] = 1
        finally:
            +mutex


def unlocks_another(w: Any, mutex: Any, other: Any) -> None:
    rc = -mutex
    if rc == 0:
        try:
            w[1] = 1
        finally:
            +other


def has_no_section(w: Any) -> None:
    w[0] = 1


def test_a_sound_section_is_not_refused() -> None:
    assert refusals(sound) == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (calls_a_function, "CALL"),
        (calls_a_method, "CALL|LOAD_METHOD|LOAD_ATTR"),
        (loops, "backward"),
        (iterates, "white list|backward"),
        (returns_within, "RETURN"),
        (forgets_the_try, "nothing unlocks"),
        (catches_only_some, "white list|RERAISE"),
        (stores_another_attribute, "word of a lease"),
        (stores_to_another_object, "word of a lease"),
        (uses_text, "no int"),
        (builds_a_tuple, "BUILD_TUPLE"),
        (looks_for_something, "CONTAINS_OP"),
        (does_something_before_the_test, "after trylock"),
        (unlocks_another, "locked"),
        (has_no_section, "no section"),
        (forgets_the_dead, "after trylock"),
        (leaves_the_dead_to_another, "CALL"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_section_of_another_shape_is_refused(function: Callable[..., Any], reason: str) -> None:
    found = refusals(function)
    assert any(word in text for word in reason.split("|") for text in found), found
