"""All interleavings of three and four actors over the real table: what takes longer than the rest together."""

from __future__ import annotations

import pytest

from ..core.explorer import Worker
from ..core.tables import A, B
from ..core.test_interleavings import Case, explored, hasty, high, keeping, other, patient, permit, third, watched

SLOW: dict[str, Case] = {
    "three of three keys, idle ones": ([patient, other, third], (), {**watched, "maximum": 2, "idle": (A, B)}),
    "three, the limit is raised": ([patient] * 3, ("raise",), watched),
    "three, the limit is lowered": ([patient] * 3, ("lower", "trim"), {**watched, "maximum": 2}),
    "three leases, the limit is lowered": ([patient] * 3, ("lower",), {**watched, "maximum": 3}),
    "three, the limit is lowered and raised": ([patient] * 3, ("lower", "trim", "raise"), {**watched, "maximum": 2}),
    "three, one is killed": ([patient] * 3, ("kill1", "reap1"), watched),
    "three, one grant is revoked, one killed": ([patient] * 3, ("revoke", "kill1", "reap1"), watched),
    "three, two grants are revoked": ([patient] * 3, ("revoke", "revoke"), watched),
    "three permits, one grant is revoked": ([permit] * 3, ("revoke",), watched),
    "three, stopped": ([patient] * 3, ("stop", "doom"), {**watched, "maximum": 2}),
    "three of two keys, time-outs, failures": ([hasty, Worker(B, fails=True), hasty], ("expire",), {"maximum": 2}),
    "three, one of high priority, one killed": ([patient, high, patient], ("kill1", "reap1"), watched),
    "three, one of high priority, a grant revoked": ([patient, patient, high], ("revoke",), watched),
    "three, a reserve, two of high priority, two keys": (
        [patient, Worker(B, high=True), high],
        (),
        {**watched, "maximum": 2, "reserve": 1},
    ),
    "three, a reserve is made and ends": ([patient, patient, high], ("reserve", "end"), {**watched, "maximum": 2}),
    "three, a reserve, a grant is revoked": (
        [patient, patient, high],
        ("revoke",),
        {**watched, "maximum": 2, "reserve": 1},
    ),
    "three, a limit per key, one is killed": (
        [patient, patient, other],
        ("kill1", "reap1"),
        {**watched, "maximum": 2, "per_key": 1},
    ),
    "four, a limit per key": ([patient, patient, other, third], (), {**watched, "maximum": 2, "per_key": 1}),
    "three, a limit per key, permits": (
        [Worker(B, connects=False), permit, Worker(high=True, connects=False)],
        (),
        {**watched, "maximum": 2, "per_key": 1},
    ),
    "four, two leases that never end": ([keeping, keeping, patient, patient], (), {"maximum": 2}),
}

succeeded = {"watch": True, "deaths": 1}

#: The arbiter is killed between any two of its sections, and an heir goes on.
SUCCEEDED: dict[str, Case] = {
    "two, idle ones, the limit is lowered, killed at any store": (
        [patient, other], ("lower",), {**succeeded, "breaks": True, "maximum": 2, "idle": (A, B)}
    ),
    "three of two keys": ([patient, other, patient], (), succeeded),
    "three, one is killed": ([patient] * 3, ("kill1", "reap1"), succeeded),
    "three, a grant is revoked": ([patient] * 3, ("revoke",), succeeded),
    "three, a reserve, one is killed": (
        [patient, patient, high], ("kill2", "reap2"), {**succeeded, "maximum": 2, "reserve": 1}
    ),
}  # fmt: skip

#: The same, for scripts/model alone: a minute.
LONG: dict[str, Case] = {
    "two, one is killed, both at any store, two heirs": (
        [patient] * 2, ("kill0", "reap0"), {**succeeded, "breaks": True, "deaths": 2}
    ),
    "two, stopped, killed at any store, two heirs": (
        [patient] * 2, ("stop",), {**succeeded, "breaks": True, "deaths": 2}
    ),
    "three, one is killed at any store": ([patient] * 3, ("kill1", "reap1"), {"watch": True, "breaks": True}),
    "three, the limit is lowered": ([patient] * 3, ("lower",), {**succeeded, "maximum": 2}),
    "three, paused and resumed": ([patient] * 3, ("pause", "resume"), succeeded),
    "three, time-outs, a grant is revoked": ([hasty, hasty, patient], ("revoke",), succeeded),
    "three, a grant is revoked, one is killed": ([patient] * 3, ("revoke", "kill1", "reap1"), succeeded),
    "three, one of high priority, one is killed": ([patient, high, patient], ("kill1", "reap1"), succeeded),
}  # fmt: skip


@pytest.mark.parametrize("name", SUCCEEDED)
def test_killed_anywhere_an_heir_knows_from_the_table_how_to_go_on(name: str) -> None:
    assert explored(SUCCEEDED[name]) > 1000


@pytest.mark.parametrize("name", SLOW)
def test_nobody_waits_in_vain_nor_is_overtaken_among_three(name: str) -> None:
    assert explored(SLOW[name]) > 1000
