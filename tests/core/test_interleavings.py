"""All orders of the steps of two and three checkouts, checkins, time-outs, limits and deaths; see explorer.py."""

from __future__ import annotations

from typing import Any

import pytest

from sharedpool.layout import PAUSED

from .explorer import Explorer, Violation, Worker
from .tables import A, B, C

Case = tuple[list[Worker], tuple[str, ...], dict[str, Any]]

patient, hasty = Worker(), Worker(gives_up=True)
failing, permit = Worker(fails=True), Worker(connects=False)
keeping, other, third = Worker(keeps=True), Worker(B), Worker(C)
high, urgent = Worker(high=True), Worker(high=True, connects=False)
watched = {"watch": True}

WITHOUT_A_WATCHER: dict[str, Case] = {
    "two of one key": ([patient, patient], (), {}),
    "two of two keys": ([patient, other], (), {}),
    "three of one key": ([patient] * 3, (), {}),
    "three of two keys": ([patient, other, patient], (), {}),
    "connects fail": ([failing, failing], (), {}),
    "time-outs": ([hasty, hasty, patient], (), {}),
    "bare permits": ([permit] * 3, (), {}),
    "discards": ([Worker(discards=True), patient, patient], (), {}),
    "two leases that never end, one more place": ([keeping, patient, patient], (), {"maximum": 2}),
    "a lease that never ends, connects fail": ([keeping, failing], (), {"maximum": 2}),
    "idle ones of both keys": ([patient, other], (), {"maximum": 2, "idle": (A, B)}),
    "an idle one to be closed for its permit": ([third, other], (), {"maximum": 2, "idle": (B, B)}),
    "an idle one expires": ([patient, patient], ("expire",), {}),
    "the limit is raised": ([patient, patient], ("raise",), {}),
    "two of high priority": ([high, high], (), {}),
    "one of high priority": ([patient, patient, high], (), {}),
    "one of normal priority": ([high, patient, high], (), {}),
    "of high priority for another key": ([patient, patient, Worker(B, high=True)], (), {}),
    "high priority, time-outs": ([hasty, patient, Worker(high=True, gives_up=True)], (), {}),
    "a reserve": ([patient, high], (), {"maximum": 2, "reserve": 1}),
    "a reserve, two of normal priority": ([patient, patient, high], (), {"maximum": 2, "reserve": 1}),
    "a reserve, two of high priority": ([patient, high, high], (), {"maximum": 2, "reserve": 1}),
    "a reserve, idle ones": ([patient, other, high], (), {"maximum": 2, "reserve": 1, "idle": (A, A)}),
    "a reserve, connects fail": ([failing, Worker(fails=True, high=True)], (), {"maximum": 2, "reserve": 1}),
    "a reserve, bare permits": ([permit, permit, urgent], (), {"maximum": 2, "reserve": 1}),
    "a reserve, time-outs": ([hasty, hasty, Worker(gives_up=True, high=True)], (), {"maximum": 2, "reserve": 1}),
    "a reserve, two keys": ([patient, other, Worker(B, high=True)], (), {"maximum": 2, "reserve": 1}),
    "one may wait": ([patient, patient, hasty], (), {"max_waiting": 1}),
    "one may wait, connects fail": ([failing] * 3, (), {"max_waiting": 1}),
    "a key has its limit": ([patient, patient, other], (), {"maximum": 3, "per_key": 1}),
    "both keys have their limit": ([patient, other, other], (), {"maximum": 2, "per_key": 1}),
    "a limit per key at the cap": ([patient, other, third], (), {"maximum": 2, "per_key": 1}),
    "a limit per key, a lease that never ends": ([keeping, patient, other], (), {"maximum": 2, "per_key": 1}),
    "a limit per key, an idle one of another": ([patient, patient], (), {"maximum": 2, "per_key": 1, "idle": (B, B)}),
    "a limit per key, idle ones": ([patient, patient, other], (), {"maximum": 2, "per_key": 1, "idle": (A, B)}),
    "a limit per key, what is idle stays": (
        [patient, other],
        (),
        {"maximum": 2, "per_key": 1, "idle": (A,), "stays": True},
    ),
    "a limit per key, connects fail": ([failing, failing, other], (), {"maximum": 2, "per_key": 1}),
    "a limit per key, bare permits": ([permit, permit, other], (), {"maximum": 2, "per_key": 1}),
    "a limit per key, time-outs": ([hasty, hasty, Worker(B, gives_up=True)], (), {"maximum": 2, "per_key": 1}),
    "a limit per key, discards": ([Worker(discards=True), patient, other], (), {"maximum": 2, "per_key": 1}),
    "a limit per key, high priority": ([patient, high, other], (), {"maximum": 2, "per_key": 1}),
    "a lease is doomed": ([patient, patient], ("doom",), {}),
}

WITH_A_WATCHER: dict[str, Case] = {
    "the limit is raised twice": ([patient, patient], ("raise", "raise"), watched),
    "the limit is lowered": ([patient, patient], ("lower", "trim"), {**watched, "maximum": 2}),
    "the limit is lowered over an idle one and two leases": (
        [patient, patient], ("lower",), {**watched, "maximum": 3, "idle": (A,)}
    ),
    "the limit is lowered, raised and lowered": ([patient] * 2, ("lower", "raise", "lower"), {**watched, "maximum": 2}),
    "the limit is lowered while one is discarded": (
        [patient, Worker(discards=True)], ("lower",), {**watched, "maximum": 2}
    ),
    "paused and resumed": ([patient, patient], ("pause", "resume"), watched),
    "resumed": ([patient, hasty], ("resume",), {**watched, "maximum": 2, "flags": PAUSED}),
    "stopped": ([patient, patient], ("stop",), watched),
    "a worker is killed": ([patient, patient], ("kill0", "reap0"), watched),
    "a grant is revoked": ([patient] * 2, ("revoke",), watched),
    "a grant is revoked, high priority": ([patient, high], ("revoke",), watched),
    "a reserve, a grant is revoked": ([patient, high], ("revoke",), {**watched, "maximum": 2, "reserve": 1}),
    "a reserve, a worker is killed": ([patient, high], ("kill0", "reap0"), {**watched, "maximum": 2, "reserve": 1}),
    "a reserve, the limit is raised": ([patient, patient], ("raise",), {**watched, "maximum": 2, "reserve": 1}),
    "a reserve is made": ([patient, high], ("reserve",), {**watched, "maximum": 2}),
    "a reserve ends": ([patient, patient, high], ("end",), {**watched, "maximum": 2, "reserve": 1}),
    "a limit per key and a reserve": (
        [patient, high, other], (), {**watched, "maximum": 2, "per_key": 1, "reserve": 1}
    ),
    "a limit per key is made": ([patient, patient, other], ("one",), {**watched, "maximum": 2}),
    "a limit per key is raised": ([patient, patient, other], ("two",), {**watched, "maximum": 3, "per_key": 1}),
    "a limit per key ends": ([patient, patient, other], ("any",), {**watched, "maximum": 2, "per_key": 1}),
    "a limit per key, a worker is killed": (
        [patient, patient], ("kill0", "reap0"), {**watched, "maximum": 2, "per_key": 1}
    ),
    "a limit per key, a grant is revoked": (
        [patient, patient, other], ("revoke",), {**watched, "maximum": 2, "per_key": 1}
    ),
    "behind a waiter of another key": (
        [Worker(B, keeps=True), keeping, third], (), {**watched, "idle": (A, A), "maximum": 3}
    ),
}  # fmt: skip


broken_off = {"watch": True, "breaks": True}
succeeded = {"watch": True, "breaks": True, "deaths": 1}

#: The arbiter, or a worker, is killed between any two of its steps, or at any store of a section.
KILLED_ANYWHERE: dict[str, Case] = {
    "two of one key, a worker": ([patient] * 2, ("kill0", "reap0"), broken_off),
    "two of one key": ([patient] * 2, (), succeeded),
    "two of two keys, an idle one to be closed for its permit": (
        [third, other], (), {**succeeded, "maximum": 2, "idle": (B, B)}
    ),
    "discards": ([Worker(discards=True), patient], (), succeeded),
    "connects fail, time-outs": ([failing, hasty], (), succeeded),
    "the limit is raised": ([patient] * 2, ("raise",), succeeded),
    "the limit is lowered": ([patient] * 2, ("lower",), {**succeeded, "maximum": 2}),
    "paused and resumed": ([patient] * 2, ("pause", "resume"), succeeded),
    "stopped": ([patient] * 2, ("stop",), succeeded),
    "a grant is revoked": ([patient] * 2, ("revoke",), succeeded),
    "permits, a grant is revoked": ([permit] * 2, ("revoke",), succeeded),
    "an idle one expires": ([patient] * 2, ("expire",), succeeded),
    "a lease is doomed": ([patient] * 2, ("doom",), succeeded),
    "a worker, too, and reaped": ([patient] * 2, ("kill0", "reap0"), succeeded),
    "a reserve is made": ([patient, high], ("reserve",), {**succeeded, "maximum": 2}),
}  # fmt: skip


def explored(case: Case) -> int:
    workers, script, more = case
    return Explorer(workers, script, **more).explore()


@pytest.mark.parametrize("name", WITHOUT_A_WATCHER)
def test_nobody_waits_in_vain_nor_is_overtaken_although_nobody_watches(name: str) -> None:
    assert explored(WITHOUT_A_WATCHER[name]) > 50


@pytest.mark.parametrize("name", WITH_A_WATCHER)
def test_nobody_waits_in_vain_nor_is_overtaken_while_the_arbiter_watches(name: str) -> None:
    assert explored(WITH_A_WATCHER[name]) > 50


@pytest.mark.parametrize(
    ("transition", "case"),
    [
        ("put_idle", ([patient, patient], (), {})),
        ("free", ([failing, failing], (), {})),
        ("free", ([patient, other], ("expire",), {})),
        ("set_limit", ([patient, patient], ("pause", "resume"), {})),
        ("put_idle_counted", ([patient, patient], (), {"maximum": 2, "reserve": 1})),
    ],
    ids=["a checkin", "a failed connect", "a closed connection", "a resumed pool", "a checkin with a reserve"],
)
def test_without_the_version_rule_somebody_waits_in_vain(transition: str, case: Case) -> None:
    workers, script, more = case
    with pytest.raises(Violation, match="waits beside"):
        Explorer(workers, script, unsaid=frozenset([transition]), **more).explore()


@pytest.mark.parametrize("name", KILLED_ANYWHERE)
def test_whoever_is_killed_wherever_broken_off_an_heir_knows_from_the_table_how_to_go_on(name: str) -> None:
    assert explored(KILLED_ANYWHERE[name]) > 200


def test_an_heir_that_does_not_close_what_is_above_the_limit_lets_somebody_wait_in_vain() -> None:
    forgetful = {"watch": True, "deaths": 1, "maximum": 2, "forgets": frozenset(["trims"])}
    with pytest.raises(Violation, match="waits beside an idle connection"):
        Explorer([patient, patient], ("lower",), idle=(A, A), **forgetful).explore()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("transitions", "workers", "wrong"),
    [
        (("hand", "enqueue_high"), [Worker(B, connects=False), Worker(C, connects=False), permit, urgent], "2 slots"),
        (("enqueue",), [keeping, other, patient, third], "may have it"),
    ],
    ids=["two permits for one key", "a checkin past one who came"],
)
def test_without_the_version_of_keys_a_limit_per_key_does_not_hold(
    transitions: tuple[str, ...], workers: list[Worker], wrong: str
) -> None:
    with pytest.raises(Violation, match=wrong):
        Explorer(workers, unkeyed=frozenset(transitions), maximum=2, per_key=1).explore()


def test_without_a_watcher_a_raised_limit_helps_nobody_who_waits_already() -> None:
    with pytest.raises(Violation, match="waits beside a free permit"):
        Explorer([keeping, patient], ("raise",)).explore()
