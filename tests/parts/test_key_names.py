"""The arbiter learns what keys stand for, and does not keep more of it than it needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sharedpool import served
from sharedpool.testing import SteppedArbiter
from sharedpool.wire import LONGEST_NAME, WireError


@pytest.fixture
def arbiter() -> Iterator[SteppedArbiter]:
    made = SteppedArbiter()
    yield made
    made.close()


def test_a_name_replaces_the_one_before(arbiter: SteppedArbiter) -> None:
    pool = arbiter.pool()
    pool.name_key(7, "tcp://a:1")
    pool.name_key(7, "tcp://b:1")
    assert pool.key_names == {7: "tcp://b:1"}


@pytest.mark.parametrize("name", [None, 3, ["a"], "x" * (LONGEST_NAME + 1)])
def test_what_is_no_name_breaks_the_senders_channel(arbiter: SteppedArbiter, name: object) -> None:
    pool = arbiter.pool()
    with pytest.raises(WireError, match=str(LONGEST_NAME)):
        pool.name_key(7, name)
    assert pool.key_names == {}


def test_when_too_many_are_known_only_those_in_the_table_are_kept(
    arbiter: SteppedArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MOST_KEY_NAMES", 3)
    pool = arbiter.pool()
    arbiter.worker(pool).open(key=2)
    for key in (1, 2, 3):
        pool.name_key(key, f"tcp://{key}:1")
    pool.name_key(4, "tcp://4:1")
    assert sorted(pool.key_names) == [2, 4]


def test_when_all_that_are_known_are_in_the_table_a_new_one_is_not_kept(
    arbiter: SteppedArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "MOST_KEY_NAMES", 2)
    pool = arbiter.pool()
    worker = arbiter.worker(pool)
    for key in (1, 2):
        worker.open(key=key)
        pool.name_key(key, f"tcp://{key}:1")
    pool.name_key(3, "tcp://3:1")
    pool.name_key(2, "tcp://two:1")
    assert pool.key_names == {1: "tcp://1:1", 2: "tcp://two:1"}
