"""What the arbiter tells of its pools: processes, leases, and keys by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sharedpool import inspection
from sharedpool.errors import ArbiterLost, NotSupported, PoolNotFound
from sharedpool.inspection import NoArbiter
from tests.support import commands
from tests.support.backend import Target
from tests.support.processes import Watched
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Worker
from tests.system.lineup import line_up


def ask(scope: Scope, method: str, *arguments: object) -> Any:
    return inspection.ask(str(scope.directory / "sharedpool"), method, *arguments)


def test_workers_are_told_with_their_leases_and_counters(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].attach(max_connections=5)
    for _ in range(3):
        two[0].checkout(tcp)
    two[1].use(tcp)
    found = {row["pid"]: row for row in ask(scope, "workers", "default")}
    assert [(found[worker.pid]["leases"], found[worker.pid]["counters"]["opens"]) for worker in two] == [(3, 3), (0, 1)]
    assert all(0 <= row["age"] < 60 for row in found.values())


def test_leases_are_told_the_longest_first_and_where_they_lead(two: list[Worker], scope: Scope, tcp: Target) -> None:
    for worker in two:
        worker.checkout(tcp)
    found = ask(scope, "leases", "default")
    assert [row["pid"] for row in found] == [worker.pid for worker in two]
    assert {row["key"] for row in found} == {f"tcp://{tcp.host}:{tcp.port}"}
    assert found[0]["age"] >= found[1]["age"] >= 0


def test_keys_are_told_by_name_with_their_states_and_waiters(
    two: list[Worker], scope: Scope, tcp: Target, unix: Target
) -> None:
    two[0].attach(max_connections=2)
    label = two[0].checkout(tcp)
    other = two[0].checkout(unix)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    rows = {row.pop("key"): row for row in ask(scope, "keys", "default")}
    found = rows[f"tcp://{tcp.host}:{tcp.port}"]
    assert not any(found.pop("closes").values())
    assert {name: number for name, number in found.items() if number} == {
        "in_use": 1, "waiting": 1, "checkouts": 1, "opens": 1, "opened": 1, "connections": 1, "waits": 1,
    }  # fmt: skip
    assert rows[f"unix:{unix.host}"]["in_use"] == 1
    two[0].checkin(label)
    two[1].checkin(waiting.result())
    two[0].checkin(other)
    rows = {row.pop("key"): row for row in ask(scope, "keys", "default")}
    assert [(row["idle"], row["in_use"], row["waiting"]) for row in rows.values()] == [(1, 0, 0)] * 2


def test_a_permits_key_is_its_name(worker: Worker, scope: Scope) -> None:
    worker.call(commands.hold_permit, "jobs", "held", max_connections=2)
    assert [(row["key"], row["in_use"]) for row in ask(scope, "keys", "jobs")] == [("permit:jobs", 1)]


def test_the_overview_has_the_longest_wait_and_lease(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    (facts,) = ask(scope, "overview")
    assert (facts["stats"]["in_use"], facts["longest_wait"], facts["paused"]) == (1, 0.0, False)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    (facts,) = ask(scope, "overview")
    assert 0 < facts["longest_wait"] <= facts["longest_lease"] < 60
    assert facts["options"]["max_connections"] == 1
    two[0].checkin(label)
    two[1].checkin(waiting.result())


def test_without_an_arbiter_none_is_started_and_it_is_an_error_of_its_own(scope: Scope) -> None:
    with pytest.raises(NoArbiter, match="no arbiter runs in"):
        ask(scope, "names")
    assert not scope.arbiters()
    assert scope.files() == []


def test_a_pool_that_is_not_there_is_not_found(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    for method in ("workers", "leases", "keys"):
        with pytest.raises(PoolNotFound, match="'nobody'; pools here: default"):
            ask(scope, method, "nobody")


def test_an_arbiter_that_does_not_know_a_method_is_of_another_version(
    worker: Worker, scope: Scope, tcp: Target
) -> None:
    worker.use(tcp)
    with pytest.raises(NotSupported, match="another version"):
        ask(scope, "of_the_future")


def test_numbers_of_an_arbiter_of_another_version_are_read_as_far_as_they_are_known() -> None:
    told = {"name": "api", "max_connections": 5, "in_use": 2, "counter_of_the_future": 7}
    stats = inspection.stats_of(told)
    assert (stats.name, stats.in_use, stats.opens) == ("api", 2, 0)


def test_an_arbiter_that_does_not_answer_is_not_one_that_is_not_there(
    worker: Worker, scope: Scope, tcp: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.use(tcp)
    monkeypatch.setattr(inspection, "_GREETING", 0.2)
    arbiter = Watched(scope.arbiter())
    arbiter.stop()
    try:
        with pytest.raises(ArbiterLost, match="does not answer"):
            ask(scope, "names")
    finally:
        arbiter.resume()
        arbiter.close()
    assert ask(scope, "names") == ["default"]


def test_the_pools_of_local_mode_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sharedpool

    monkeypatch.setenv("SHAREDPOOL_MODE", "local")
    monkeypatch.setenv("SHAREDPOOL_DIR", str(tmp_path))
    assert inspection.pools() == []
    with sharedpool.attach("api", max_connections=3).open() as pool:
        lease = pool.checkout("x", 0, "permit")
        (facts,) = inspection.overview()
        assert (facts["stats"].in_use, facts["options"]["max_connections"]) == (1, 3)
        assert facts["longest_lease"] > 0
        lease.checkin()
        assert [stats.in_use for stats in inspection.pools()] == [0]
        sharedpool.stop_pool("api")


def test_what_the_arbiter_says_of_itself(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    about = ask(scope, "about")
    assert about["pid"] == scope.arbiter()
    assert about["files"] >= about["descriptors"] > 3
    assert 0 < about["age"] < 60


def test_a_name_that_came_before_the_connection_is_forgotten_by_nobody(
    two: list[Worker], scope: Scope, tcp: Target
) -> None:
    """Its process may be dead by the time somebody looks."""
    two[0].use(tcp)
    two[0].kill()
    two[1].attach()
    wait_until(lambda: two[1].stat("adopted") == 1)
    assert [row["key"] for row in ask(scope, "keys", "default")] == [f"tcp://{tcp.host}:{tcp.port}"]
    assert os.getpid() not in [row["pid"] for row in ask(scope, "workers", "default")]


def test_an_error_that_somebody_keeps_does_not_spoil_the_calls_of_the_next_arbiter(
    two: list[Worker], scope: Scope, tcp: Target
) -> None:
    two[0].use(tcp)
    with pytest.raises(PoolNotFound) as kept:
        ask(scope, "stats", "nobody")
    two[0].call(commands.library, "stop")
    two[1].use(tcp)
    assert ask(scope, "names") == ["default"]
    assert "nobody" in str(kept.value)
