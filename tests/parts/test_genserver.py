"""The gen_server callbacks of the arbiter's pool object, in this process, step by step."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sharedpool import AttachRefused, OptionError, segment
from sharedpool.layout import IDLE, LAYOUT, MAX_PER_KEY, NOTED_PER_KEY, SERVED, STATE
from sharedpool.testing import SteppedArbiter, check


@pytest.fixture
def arbiter() -> Iterator[SteppedArbiter]:
    made = SteppedArbiter()
    yield made
    for pool in made.pools.values():
        check(pool.table)
    made.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="sharedpool")
    return caplog


def told(log: pytest.LogCaptureFixture, name: str = "sharedpool.pool.default") -> list[str]:
    return [record.getMessage() for record in log.records if record.name == name]


def test_init_begins_every_life_of_a_pool(arbiter: SteppedArbiter, log: pytest.LogCaptureFixture) -> None:
    """hackney_pool:init/1"""
    pool = arbiter.declare("default", {"max_connections": 3}, 42)[0]
    assert "started by process 42 (max 3)" in told(log)[0]
    arbiter.worker(pool).open()
    arbiter.stop_pool(pool)
    again = arbiter.declare("default", {"max_connections": 5}, 43)[0]
    assert (again, again.stopped, again.declared_by, again.options.max_connections) == (pool, False, 43, 5)
    assert "started by process 43 (max 5)" in told(log)[-1]


def test_what_a_process_is_configured_with_makes_a_pool_and_changes_none(arbiter: SteppedArbiter) -> None:
    pool = arbiter.declare("db", {}, 1, implicit=True, defaults={"max_connections": 3, "idle_timeout": 7.0})[0]
    assert (pool.options.max_connections, pool.options.idle_timeout) == (3, 7.0)
    assert arbiter.declare("db", {}, 2, implicit=True, defaults={"max_connections": 9}) == (pool, [])
    assert pool.options.max_connections == 3
    other = arbiter.declare("more", {"max_connections": 5}, 2, defaults={"max_connections": 9, "idle_timeout": 7.0})[0]
    assert (other.options.max_connections, other.options.idle_timeout) == (5, 7.0)
    with pytest.raises(OptionError, match="the configuration of process 2"):
        arbiter.declare("wrong", {}, 2, defaults={"max_connections": 0})


def test_handle_call_answers_each_question(arbiter: SteppedArbiter) -> None:
    """hackney_pool:handle_call/3"""
    pool = arbiter.declare("default", {"max_connections": 3, "idle_timeout": 7.0}, 1)[0]
    worker = arbiter.worker(pool)
    address = ("tcp", "example.org", 80)
    worker.leave_idle(worker.open(key=segment.key_of(pool.segment.secret, address)))
    worker.leave_idle(worker.open(key=1))
    assert pool.handle_call("count") == 2
    assert pool.handle_call("count", address) == 1
    assert pool.handle_call("count", ("tcp", "example.org", 81)) == 0
    assert (pool.handle_call("max_connections"), pool.handle_call("timeout")) == (3, 7.0)
    assert pool.handle_call("stats").idle == 2
    assert pool.handle_call("info")["name"] == "default"


@pytest.mark.parametrize(("how", "kind"), [("handle_call", "call"), ("handle_cast", "cast")])
def test_what_a_pool_does_not_know_is_an_error_reply_and_logged(
    arbiter: SteppedArbiter, log: pytest.LogCaptureFixture, how: str, kind: str
) -> None:
    """hackney_pool:handle_call/3, hackney_pool:handle_cast/2: there the pool crashed."""
    pool = arbiter.declare("default", {}, 1)[0]
    worker = arbiter.worker(pool)
    worker.leave_idle(worker.open())
    before = pool.handle_call("stats")
    with pytest.raises(OptionError, match=f"no {kind} 'nonsense'; there are: "):
        getattr(pool, how)("nonsense", 1, 2)
    assert f"unknown {kind}" in told(log)[-1]
    arbiter.step()
    assert pool.handle_call("stats") == before


def test_handle_cast_changes_a_pool_at_once(arbiter: SteppedArbiter, log: pytest.LogCaptureFixture) -> None:
    """hackney_pool:handle_cast/2"""
    pool = arbiter.declare("default", {}, 1)[0]
    pool.handle_cast("set_max_connections", 7, 99)
    pool.handle_cast("set_timeout", None, 99)
    assert (pool.options.max_connections, pool.options.idle_timeout, pool.declared_by) == (7, None, 99)
    assert "max_connections: 50 -> 7 (by process 99)" in told(log)[-2]
    with pytest.raises(OptionError, match="process 99"):
        pool.handle_cast("set_max_connections", 0, 99)
    assert pool.options.max_connections == 7
    assert pool.handle_cast("notify", json.dumps("nobody is attached")) == 0


def test_handle_info_is_told_of_deaths_and_of_remotes_that_close(arbiter: SteppedArbiter) -> None:
    """hackney_pool:handle_info/2"""
    pool = arbiter.declare("default", {}, 1)[0]
    worker = arbiter.worker(pool)
    idle, leased = worker.open(), worker.open()
    worker.leave_idle(idle)
    pool.handle_info(("remote_ended", worker.table.slot_index(idle)))
    assert (pool.handle_call("stats").idle, pool.handle_call("stats").remote_closed) == (0, 1)
    pool.handle_info(("DOWN", worker.table.row))
    numbers = pool.handle_call("stats")
    assert (numbers.in_use, numbers.reaped, numbers.processes) == (0, 1, 0)
    assert leased != idle


@pytest.mark.parametrize("message", [(), ("EXIT", 1), ("DOWN",), ("remote_ended", 1, 2)])
def test_an_unknown_message_is_logged_and_changes_nothing(
    arbiter: SteppedArbiter, log: pytest.LogCaptureFixture, message: tuple[object, ...]
) -> None:
    """hackney_pool:handle_info/2: a forged message could release another's socket."""
    pool = arbiter.declare("default", {}, 1)[0]
    arbiter.worker(pool).open()
    before = dataclasses.replace(pool.handle_call("stats"), longest_lease=0.0)
    pool.handle_info(message)
    assert dataclasses.replace(pool.handle_call("stats"), longest_lease=0.0) == before
    assert "unknown message" in told(log)[-1]


def test_terminate_runs_once_when_a_pool_stops(arbiter: SteppedArbiter, log: pytest.LogCaptureFixture) -> None:
    """hackney_pool:terminate/2: there it never ran."""
    pool = arbiter.declare("default", {"max_connections": 3}, 1)[0]
    arbiter.worker(pool).open()
    arbiter.stop_pool(pool)
    arbiter.terminate("the arbiter ends")
    (line,) = [line for line in told(log) if "ended" in line]
    assert "(stopped)" in line
    assert "in_use=1" in line


def test_terminate_runs_when_the_arbiter_ends(arbiter: SteppedArbiter, log: pytest.LogCaptureFixture) -> None:
    """hackney_pool:terminate/2"""
    for name in ("a", "b"):
        arbiter.declare(name, {}, 1)
    arbiter.terminate("the arbiter ends")
    for name in ("a", "b"):
        assert "ended (the arbiter ends)" in told(log, f"sharedpool.pool.{name}")[-1]


def test_code_change_refuses_a_layout_that_it_does_not_know(arbiter: SteppedArbiter) -> None:
    """hackney_pool:code_change/3"""
    pool = arbiter.declare("default", {}, 1)[0]
    assert pool.code_change(LAYOUT) == LAYOUT
    with pytest.raises(AttachRefused, match=rf"layout {LAYOUT + 1}.*restart all processes"):
        pool.code_change(LAYOUT + 1)


def test_code_change_moves_a_table_after_the_last_process_of_the_older_version(arbiter: SteppedArbiter) -> None:
    """hackney_pool:code_change/3"""
    pool = arbiter.declare("default", {}, 1)[0]
    old, new = arbiter.worker(pool, 2), arbiter.worker(pool, 3)
    pool.segment.move_to(SERVED[0])
    pool.layouts[new.table.row] = LAYOUT
    arbiter.declare("default", {"max_per_key": 1}, 1)
    at = new.open()
    new.leave_idle(at)
    arbiter.pass_time(1)
    assert pool.code_change(SERVED[0], None, None) == SERVED[0]
    assert (pool.options.max_per_key, pool.words[MAX_PER_KEY], pool.old_rows()) == (1, 0, [old.table.row])
    old.die()
    arbiter.pass_time(1)
    assert (pool.segment.layout, pool.words[MAX_PER_KEY], pool.words[NOTED_PER_KEY]) == (LAYOUT, 1, 0)
    assert pool.words[at] & STATE == IDLE


def test_a_linked_pool_keeps_the_arbiter_until_its_process_dies_or_it_is_stopped(arbiter: SteppedArbiter) -> None:
    """hackney_pool:start_link/2"""
    pool = arbiter.declare("default", {}, 1)[0]
    arbiter.link(pool, os.getpid())
    arbiter.pass_time(4000)  # more than the linger time
    assert not arbiter.over
    arbiter.stop_pool(pool)
    arbiter.pass_time(4000)
    assert arbiter.over


def test_a_pool_linked_to_a_process_that_has_died_stops_at_once(arbiter: SteppedArbiter) -> None:
    """hackney_pool:start_link/2"""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    pool = arbiter.declare("default", {}, 1)[0]
    arbiter.link(pool, dead.pid)
    assert pool.stopped
    arbiter.pass_time(4000)
    assert arbiter.over


def test_a_linked_pool_whose_mutex_is_busy_when_its_process_dies_stops_a_turn_later(arbiter: SteppedArbiter) -> None:
    """hackney_pool:start_link/2"""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pool = arbiter.declare("default", {}, 1)[0]
    arbiter.link(pool, process.pid)
    assert -pool.segment.mutex == 0  # somebody is inside and does not let go
    try:
        process.communicate(b"\n", 30)
        arbiter.step(5)
        assert not pool.stopped
    finally:
        +pool.segment.mutex
    arbiter.step(5)
    assert pool.stopped
