"""The numbers' arithmetic, and that every deliberate error can be raised, caught by its kind, and pickled."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

import sharedpool
from sharedpool import errors
from sharedpool.errors import SharedPoolError
from sharedpool.stats import ARBITER_COUNTERS, COUNTERS, PoolStats, from_counts
from sharedpool.wire import WireError

ERRORS = [
    one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, SharedPoolError)
] + [WireError]  # fmt: skip


def some_stats() -> PoolStats:
    return PoolStats(
        name="x", max_connections=20, in_use=4, idle=3, opening=2, granted=1, closing=5, waiting=37, processes=2,
        reuses=10, takeovers=20, handoffs=30, opens=40,
    )  # fmt: skip


def test_what_counts_against_the_cap_is_every_slot_that_is_not_free() -> None:
    assert some_stats().used == 15


def test_checkouts_are_the_leases_ever_given_by_whatever_way() -> None:
    assert some_stats().checkouts == 100


def test_the_numbers_in_messages_count_what_is_on_its_way_as_opening() -> None:
    assert some_stats().numbers() == "(max=20 leased=4 idle=3 opening=3 closing=5 waiting=37)"


def test_hackneys_five_keys() -> None:
    assert some_stats().as_hackney() == {
        "name": "x", "max": 20, "in_use_count": 7, "free_count": 3, "queue_count": 37
    }  # fmt: skip


def test_what_the_table_counted_is_put_together() -> None:
    states = {"in_use": 1, "idle": 2, "opening": 3, "granted": 4, "closing": 5}
    stats = from_counts("x", 9, states, {"reuses": 6, "revoked": 7}, 8, 2)
    assert stats == PoolStats(
        name="x", max_connections=9, in_use=1, idle=2, opening=3, granted=4, closing=5, waiting=8, processes=2,
        reuses=6, revoked=7,
    )  # fmt: skip


def test_every_counter_has_its_place_and_its_number() -> None:
    names = [*COUNTERS, *ARBITER_COUNTERS]
    assert len(set(names)) == len(names)
    assert set(names) <= set(PoolStats.__dataclass_fields__)


def test_every_error_pickles_with_its_message_and_its_fields() -> None:
    for error in ERRORS:
        raised: Any = error("what happened", stats=some_stats(), pool="x")
        again: Any = pickle.loads(pickle.dumps(raised))
        assert (again.stats, again.pool) == (some_stats(), "x")
        assert (str(again), again.args) == ("what happened", ("what happened",))
        assert type(again) is error


def test_every_error_can_be_made_without_a_message() -> None:
    for error in ERRORS:
        assert isinstance(pickle.loads(pickle.dumps(error())), error)


def test_every_error_is_among_the_public_names() -> None:
    for error in [one for one in ERRORS if one is not WireError]:
        assert getattr(sharedpool, error.__name__) is error
        assert error.__name__ in sharedpool.__all__


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (errors.OptionError, (ValueError,)),
        (errors.PoolTimeout, (TimeoutError,)),
        (errors.ConnectTimeout, (ConnectionError, TimeoutError)),
        (errors.ConnectFailed, (ConnectionError,)),
        (errors.PoolNotFound, (LookupError,)),
        (errors.ArbiterLost, (ConnectionError,)),
    ],
)
def test_errors_are_of_the_kinds_that_callers_catch_already(error: type[Exception], kinds: tuple[type, ...]) -> None:
    assert all(issubclass(error, kind) for kind in kinds)
    if OSError in error.__mro__:
        assert error("text").errno is None  # type: ignore[attr-defined]
