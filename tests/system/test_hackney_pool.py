"""hackney_pool's functions at module level, over processes. A docstring names the function that a test is about."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool import (
    ConnectFailed,
    ConnectTimeout,
    LeaseError,
    OptionError,
    PoolNotFound,
    PoolOptionsDiffer,
    PoolStopped,
    PoolTimeout,
)
from sharedpool.genserver import PoolServer
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker, clean_environment
from tests.system import hackney
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")

ROOT = Path(__file__).resolve().parents[2]

#: The function index of hackney_pool 1.16 to 1.21.
FUNCTIONS = [
    "start/0", "start_pool/2", "start_link/2", "child_spec/2", "stop_pool/1", "find_pool/1", "checkout/4", "checkin/2",
    "count/1", "count/2", "get_stats/1", "max_connections/1", "set_max_connections/2", "timeout/1", "set_timeout/2",
    "notify/2",
]  # fmt: skip
CALLBACKS = ["init/1", "handle_call/3", "handle_cast/2", "handle_info/2", "terminate/2", "code_change/3"]


def call(worker: Worker, function: str, *arguments: object, **options: object) -> Any:
    return worker.call(commands.library, function, *arguments, **options)


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS + CALLBACKS)
def test_every_function_of_hackney_pool_is_there_documented_and_tested(function: str) -> None:
    name, _, _ = function.partition("/")
    if function in CALLBACKS:
        assert callable(getattr(PoolServer, name))
    else:
        assert callable(getattr(sharedpool, name))
        assert name in sharedpool.__all__
    assert f"`{function}`" in (ROOT / "docs" / "hackney.md").read_text(encoding="utf-8")
    assert re.search(rf"hackney_pool:{re.escape(function)}(?!\d)", "\n".join(docstrings_of_tests()))


def docstrings_of_tests() -> list[str]:
    found = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append(ast.get_docstring(node) or "")
    return found


# --- pools ------------------------------------------------------------------------------------------------------------


def test_start_starts_an_arbiter_once(two: list[Worker], scope: Scope) -> None:
    """hackney_pool:start/0"""
    call(two[0], "start")
    arbiter = scope.arbiter()
    call(two[1], "start")
    call(two[0], "start")
    assert scope.arbiter() == arbiter


def test_start_pool_twice_gives_the_pool_that_there_is(two: list[Worker]) -> None:
    """hackney_pool:start_pool/2"""
    first = call(two[0], "start_pool", "api", pool_size=3, timeout=9)
    assert (first.options.max_connections, first.options.idle_timeout) == (3, 9.0)
    assert call(two[1], "start_pool", "api") == first
    assert call(two[1], "find_pool", "api") == first
    two[1].fails(PoolOptionsDiffer, commands.library, "start_pool", "api", pool_size=4, update=False)


def test_stop_pool_of_a_pool_that_is_not_there_is_fine_and_find_pool_is_never_stale(two: list[Worker]) -> None:
    """hackney_pool:stop_pool/1, hackney_pool:find_pool/1"""
    call(two[0], "stop_pool", "api")
    assert call(two[0], "find_pool", "api") is None
    call(two[0], "start_pool", "api", max_connections=3)
    assert call(two[1], "find_pool", "api").name == "api"
    call(two[1], "stop_pool", "api")
    assert call(two[0], "find_pool", "api") is None
    two[0].fails(PoolNotFound, commands.library, "count", "api")


def test_a_linked_pool_stops_when_the_process_that_made_it_dies(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney_pool:start_link/2"""
    maker, holder, waiter = three
    call(maker, "start_link", "default", max_connections=1)
    label = holder.checkout(tcp)
    (waiting,) = line_up(holder, [(waiter, tcp)])
    maker.kill()
    waiting.error(PoolStopped)
    wait_until(lambda: call(holder, "find_pool") is None)
    assert holder.exchange(label) == 1
    holder.checkin(label)
    backend.wait_open(0)


def test_a_second_start_link_does_not_take_the_pool_from_the_first(three: list[Worker]) -> None:
    """hackney_pool:start_link/2: there the first pool was orphaned."""
    first, second, third = three
    made = call(first, "start_link", "api", max_connections=3)
    assert call(second, "start_link", "api", max_connections=3) == made
    second.kill()
    call(third, "start")
    assert call(third, "max_connections", "api") == 3
    first.kill()
    wait_until(lambda: call(third, "find_pool", "api") is None)


def test_a_pool_that_was_there_before_is_not_linked(three: list[Worker]) -> None:
    """hackney_pool:start_link/2"""
    call(three[0], "start")
    call(three[0], "start_pool", "api", max_connections=3)
    call(three[1], "start_link", "api", max_connections=3)
    call(three[1], "start_link", "sign", max_connections=3)
    three[1].kill()
    wait_until(lambda: call(three[2], "find_pool", "sign") is None)
    assert call(three[2], "find_pool", "api") is not None


def test_stop_pool_ends_the_link_too(three: list[Worker]) -> None:
    """hackney_pool:start_link/2"""
    call(three[0], "start_link", "api", max_connections=3)
    call(three[0], "start_link", "sign", max_connections=3)
    call(three[1], "start")
    call(three[1], "stop_pool", "api")
    call(three[1], "start_pool", "api", max_connections=4)
    three[0].kill()
    wait_until(lambda: call(three[1], "find_pool", "sign") is None)
    assert call(three[1], "max_connections", "api") == 4


# --- a process that keeps a pool --------------------------------------------------------------------------------------


def test_a_child_spec_has_hackneys_parts() -> None:
    """hackney_pool:child_spec/2"""
    spec = sharedpool.child_spec("api", max_connections=3)
    assert (spec.id, spec.args, spec.kwargs) == ("api", ("api",), {"max_connections": 3})
    assert (spec.restart, spec.shutdown, spec.type) == ("permanent", 10.0, "worker")
    assert spec.modules == (spec.target.__module__,)
    assert (spec.process().daemon, spec.process().name) == (False, "sharedpool-api")
    with pytest.raises(AttributeError):
        spec.id = "other"  # type: ignore[misc]
    with pytest.raises(OptionError, match="max_connections"):
        sharedpool.child_spec("api", max_connections=0)


def test_a_kept_pool_is_there_again_after_its_arbiter_died(two: list[Worker], scope: Scope) -> None:
    """hackney_pool:child_spec/2"""
    two[0].call(hackney.keep, "api", max_connections=3)
    wait_until(lambda: call(two[1], "find_pool", "api"))
    killed = two[1].call(hackney.kill_arbiter, "api")
    info = two[1].call(hackney.wait_pool_of_another, "api", killed)
    assert info.options.max_connections == 3
    assert scope.arbiter() == info.arbiter_pid


def test_a_terminated_keeper_stops_its_pool_and_no_other(two: list[Worker]) -> None:
    """hackney_pool:child_spec/2"""
    call(two[1], "start")
    call(two[1], "start_pool", "other", max_connections=3)
    two[0].call(hackney.keep, "api", max_connections=3)
    wait_until(lambda: call(two[1], "find_pool", "api"))
    assert two[0].call(hackney.terminate_keeper) == 0
    assert call(two[1], "find_pool", "api") is None
    assert call(two[1], "max_connections", "other") == 3


def test_a_keeper_ends_with_its_parent(two: list[Worker]) -> None:
    """hackney_pool:child_spec/2"""
    call(two[1], "start")
    two[0].call(hackney.keep, "api", max_connections=3)
    wait_until(lambda: call(two[1], "find_pool", "api"))
    two[0].kill()
    wait_until(lambda: call(two[1], "find_pool", "api") is None)


def test_in_local_mode_a_keeper_only_waits_for_its_end(harness: Harness, scope: Scope) -> None:
    """hackney_pool:child_spec/2"""
    worker = harness.start(SHAREDPOOL_MODE="local")
    pid = worker.call(hackney.keep, "api", max_connections=3)
    wait_until(lambda: handles_sigterm(pid))
    assert worker.call(hackney.terminate_keeper) == 0
    assert scope.files() == []


def handles_sigterm(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> signal.SIGTERM - 1 & 1)


def test_a_spawned_keeper_keeps_the_pool_as_well(two: list[Worker]) -> None:
    """hackney_pool:child_spec/2"""
    call(two[1], "start")
    two[0].call(hackney.keep_spawned, "api", max_connections=3)
    wait_until(lambda: call(two[1], "find_pool", "api"))
    assert two[0].call(hackney.terminate_keeper) == 0
    assert call(two[1], "find_pool", "api") is None


# --- checkout and checkin ---------------------------------------------------------------------------------------------


def test_the_pool_default_is_made_by_its_first_checkout(two: list[Worker], tcp: Target) -> None:
    """hackney_pool:checkout/4"""
    label = two[0].call(hackney.checkout, tcp)
    assert two[0].exchange(label) == 1
    assert call(two[1], "get_stats")["max"] == 50
    two[0].call(hackney.checkin, label)
    assert two[1].call(hackney.use, tcp) == 1


def test_a_missing_pool_is_declared_with_the_options_of_its_first_checkout(two: list[Worker], tcp: Target) -> None:
    """hackney_pool:checkout/4"""
    two[0].fails(PoolNotFound, hackney.checkout, tcp, pool="api")
    two[0].call(hackney.checkout, tcp, pool="api", max_connections=1)
    assert call(two[1], "max_connections", "api") == 1
    two[1].fails(PoolTimeout, hackney.checkout, tcp, pool="api", checkout_timeout=0.05)


def test_one_process_is_attached_once_however_it_asks(worker: Worker, tcp: Target) -> None:
    """hackney_pool:checkout/4"""
    for _ in range(3):
        worker.call(hackney.use, tcp)
        worker.call(hackney.use, tcp, max_connections=50)
        worker.use(tcp)
    assert (worker.stat("processes"), worker.stat("opens"), worker.stat("reuses")) == (1, 1, 8)


def test_a_checkout_whose_options_differ_applies_them_with_a_warning(two: list[Worker], tcp: Target) -> None:
    """hackney_pool:checkout/4"""
    two[1].call(commands.collect_log)
    two[0].call(hackney.use, tcp, max_connections=3)
    two[1].call(hackney.use, tcp, max_connections=5)
    assert call(two[0], "max_connections") == 5
    (line,) = two[1].call(commands.log, "WARNING")
    assert "max_connections" in line
    two[1].call(hackney.use, tcp, max_connections=5)
    assert len(two[1].call(commands.log, "WARNING")) == 1


def test_a_forked_child_checks_out_for_itself(worker: Worker, tcp: Target) -> None:
    """hackney_pool:checkout/4"""
    worker.call(hackney.use, tcp)
    child = worker.fork()
    assert child.call(hackney.use, tcp) == 1
    assert worker.stat("processes") == 2


def test_checkouts_fail_as_those_of_a_handle_do(worker: Worker, backend: Backend, tcp: Target) -> None:
    """hackney_pool:checkout/4"""
    hanging = backend.listen("hanging")
    backend.do("hang", name="hanging")
    worker.fails(ConnectTimeout, hackney.checkout, hanging, connect_timeout=0.05)
    backend.do("refuse", name="tcp")
    worker.fails(ConnectFailed, hackney.checkout, tcp)
    worker.fails(OptionError, hackney.checkout, tcp, max_connections=[1])
    worker.fails(OptionError, hackney.checkout, tcp, nonsense=1)
    worker.fails(OptionError, hackney.checkout, tcp, pool="not a name")
    worker.wait_stats(in_use=0, opening=0, granted=0, closing=0, idle=0)


def test_a_stopped_pool_is_missing_and_its_next_checkout_makes_it_anew(two: list[Worker], tcp: Target) -> None:
    """hackney_pool:checkout/4, hackney_pool:stop_pool/1"""
    two[0].call(hackney.use, tcp)
    two[0].call(hackney.use, tcp, pool="api", max_connections=3)
    two[1].call(hackney.use, tcp, pool="api")
    for name in ("default", "api"):
        call(two[1], "stop_pool", name)
    two[0].call(hackney.use, tcp)
    two[1].fails(PoolNotFound, hackney.checkout, tcp, pool="api")
    two[0].call(hackney.use, tcp, pool="api", max_connections=3)
    two[1].call(hackney.use, tcp, pool="api")


def test_a_second_checkin_raises_and_changes_nothing(worker: Worker, tcp: Target) -> None:
    """hackney_pool:checkin/2: there it crashed the pool, or made it spin."""
    label = worker.call(hackney.checkout, tcp)
    worker.call(hackney.checkin, label)
    before = worker.stats()
    worker.fails(LeaseError, hackney.checkin, label)
    assert worker.stats() == before
    worker.fails(OptionError, commands.library, "checkin", "no lease")


def test_an_unread_connection_is_closed_at_its_checkin_and_its_permit_serves_the_next(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney_pool:checkin/2"""
    label = two[0].call(hackney.checkout, tcp, max_connections=1)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    backend.say("unread")
    two[0].call(hackney.checkin, label)
    assert two[1].exchange(waiting.result()) == 2
    assert backend.peak == 1


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_count_counts_idle_connections_of_all_processes(two: list[Worker], tcp: Target) -> None:
    """hackney_pool:count/1"""
    labels = [worker.call(hackney.checkout, tcp) for worker in two]
    assert call(two[0], "count") == 0
    for worker, label in zip(two, labels, strict=True):
        worker.call(hackney.checkin, label)
    assert call(two[0], "count") == call(two[1], "count", "default") == 2


def test_count_with_a_key_counts_the_idle_connections_to_that_address(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    """hackney_pool:count/2: there it was always 0 since 1.16."""
    other = backend.listen("other")
    for worker, target, number in ((two[0], tcp, 2), (two[1], tcp, 1), (two[1], other, 1), (two[0], unix, 1)):
        labels = [worker.checkout(target) for _ in range(number)]
        two[0].wait_stats(in_use=number)
        for label in labels:
            worker.checkin(label)
        call(two[1], "count")
    for worker in two:
        assert call(worker, "count", "default", (tcp.host, tcp.port)) == 2  # the third was taken over, not opened
        assert call(worker, "count", "default", (tcp.host, tcp.port, "tcp")) == 2
        assert call(worker, "count", "default", tcp.url) == 2
        assert call(worker, "count", "default", (other.host, other.port)) == 1
        assert call(worker, "count", "default", (unix.host, 0, "unix")) == 1
        assert call(worker, "count", "default", ("nobody.example", 1)) == 0
        assert call(worker, "count") == 4


@pytest.mark.parametrize("key", ["nonsense", ("h",), ("h", 1, "smoke"), ("h", 0), 7, ("h", 1, "tcp", 2)])
def test_a_key_that_is_none_is_said_to_be_none(worker: Worker, key: object) -> None:
    """hackney_pool:count/2"""
    call(worker, "start_pool")
    worker.fails(OptionError, commands.library, "count", "default", key)


def test_get_stats_has_hackneys_five_numbers(worker: Worker, tcp: Target) -> None:
    """hackney_pool:get_stats/1"""
    worker.call(hackney.checkout, tcp, max_connections=3)
    numbers = {"name": "default", "max": 3, "in_use_count": 1, "free_count": 0, "queue_count": 0}
    assert call(worker, "get_stats") == numbers


def test_a_raised_limit_serves_the_waiting_at_once_and_in_order(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney_pool:set_max_connections/2, hackney_pool:max_connections/1: there nobody was woken."""
    holder, one, other = three
    holder.call(hackney.checkout, tcp, max_connections=1)
    queue = line_up(holder, [(one, tcp), (other, tcp), (one, tcp)])
    call(holder, "set_max_connections", "default", 3)
    assert call(other, "max_connections", "default") == 3
    queue[0].result()
    queue[1].result()
    holder.wait_stats(in_use=3, waiting=1)
    assert not queue[2].done
    assert backend.peak == 3


def test_a_lowered_limit_closes_the_idle_ones_longest_unused(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """hackney_pool:set_max_connections/2: there nothing was closed."""
    labels = [two[0].checkout(tcp) for _ in range(4)]
    for label in labels:
        two[0].checkin(label)
    call(two[1], "set_max_connections", "default", 2)
    backend.wait_open(2)
    assert backend.ids() == [3, 4]
    leased = [two[1].checkout(tcp) for _ in range(2)]
    call(two[1], "set_max_connections", "default", 1)
    two[1].checkin(leased[0])
    backend.wait_open(1)


def test_an_idle_timeout_applies_to_what_is_idle_already(worker: Worker, backend: Backend, tcp: Target) -> None:
    """hackney_pool:set_timeout/2, hackney_pool:timeout/1: there it applied to later checkins only."""
    worker.call(hackney.use, tcp)
    assert call(worker, "timeout", "default") == 150.0
    call(worker, "set_timeout", "default", None)
    assert call(worker, "timeout", "default") is None
    call(worker, "set_timeout", "default", 0.05)
    backend.wait_open(0)
    assert worker.stat("expired") == 1


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [("count", ()), ("count", (("h", 1),)), ("get_stats", ()), ("max_connections", ()), ("timeout", ()),
     ("set_max_connections", (3,)), ("set_timeout", (3,)), ("notify", ("hello",))],
)  # fmt: skip
def test_of_a_pool_that_is_not_there_nothing_can_be_asked(
    worker: Worker, function: str, arguments: tuple[object, ...], running: bool
) -> None:
    """hackney_pool:set_max_connections/2: there a missing pool was no error."""
    if running:
        call(worker, "start")
    worker.fails(PoolNotFound, commands.library, function, "nobody", *arguments)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "3", 10**6])
def test_a_limit_that_is_none_is_refused(worker: Worker, value: object) -> None:
    """hackney_pool:set_max_connections/2"""
    call(worker, "start_pool", max_connections=3)
    error = worker.fails(OptionError, commands.library, "set_max_connections", "default", value)
    assert error.option == "max_connections"
    assert call(worker, "max_connections") == 3


def test_a_limit_beyond_the_room_of_the_pool_is_refused_by_the_pool(worker: Worker) -> None:
    """hackney_pool:set_max_connections/2"""
    call(worker, "start_pool", max_connections=3)
    error = worker.fails(OptionError, commands.library, "set_max_connections", "default", 30_000)
    assert "stop it and start it anew" in str(error)
    assert call(worker, "max_connections") == 3


# --- notify -----------------------------------------------------------------------------------------------------------


def test_a_message_reaches_every_process_of_the_pool(three: list[Worker]) -> None:
    """hackney_pool:notify/2"""
    message = {"reload": ["a", 1, None, {"deep": True}]}
    for worker in three:
        worker.call(hackney.subscribe)
    assert call(three[0], "notify", "default", message) == 3
    for worker in three:
        assert worker.call(hackney.heard, 1) == [message]


def test_only_processes_that_are_attached_are_reached_and_each_once(three: list[Worker], tcp: Target) -> None:
    """hackney_pool:notify/2"""
    three[0].call(hackney.subscribe)
    three[0].call(hackney.subscribe, label="second")
    three[1].call(hackney.subscribe, attach=False)
    three[2].use(tcp)  # it hears, and nobody there wants to know
    assert call(three[0], "notify", "default", 1) == 2
    assert three[0].call(hackney.heard, 1) == three[0].call(hackney.heard, 1, "second") == [1]
    three[1].use(tcp)
    assert call(three[0], "notify", "default", 2) == 3
    assert three[1].call(hackney.heard, 1) == [2]
    assert call(three[0], "start_pool", "api", max_connections=1).name == "api"
    assert call(three[0], "notify", "api", 3) == 0


def test_who_has_unsubscribed_hears_nothing_more(worker: Worker) -> None:
    """hackney_pool:notify/2"""
    worker.call(hackney.subscribe)
    worker.call(hackney.subscribe, label="second")
    worker.call(hackney.unsubscribe)
    worker.call(hackney.unsubscribe)  # harmless, and it takes nobody else's away
    assert call(worker, "notify", "default", "x") == 1
    assert worker.call(hackney.heard, 1, "second") == ["x"]
    assert worker.call(hackney.heard_now) == []


@pytest.mark.parametrize("error", ["ValueError", "SystemExit"])
def test_a_callback_that_raises_is_logged_and_loses_nothing(
    two: list[Worker], backend: Backend, tcp: Target, error: str
) -> None:
    """hackney_pool:notify/2"""
    two[0].call(commands.collect_log)
    two[0].call(hackney.subscribe_raising, error)
    two[0].call(hackney.subscribe)
    two[0].use(tcp)
    for number in (1, 2):
        assert call(two[1], "notify", "default", number) == 1
    assert two[0].call(hackney.heard, 2) == [1, 2]
    assert all("on_notify callback failed" in line for line in two[0].call(commands.log, "ERROR"))
    assert len(two[0].call(commands.log, "ERROR")) == 2
    assert two[0].use(tcp) == 1


def test_a_forked_child_hears_with_its_parents_callbacks_once_it_is_attached(worker: Worker, tcp: Target) -> None:
    """hackney_pool:notify/2"""
    worker.call(hackney.subscribe)
    child = worker.fork()
    assert call(worker, "notify", "default", 1) == 1
    assert worker.call(hackney.heard, 1) == [1]
    child.use(tcp)
    assert call(worker, "notify", "default", 2) == 2
    assert child.call(hackney.heard, 1) == [2]
    assert worker.call(hackney.heard, 2) == [1, 2]


@pytest.mark.parametrize(
    "message", [{"kind": 12, "slot": 0, "generation": 1}, ["checkin", 0], {"message": {"kind": 8}}]
)
def test_no_message_touches_the_accounting(two: list[Worker], backend: Backend, tcp: Target, message: object) -> None:
    """hackney_pool:notify/2: there a message could release somebody else's socket."""
    two[0].call(hackney.subscribe)
    leased, idle = two[0].checkout(tcp), two[0].checkout(tcp)
    two[0].checkin(idle)
    before = two[0].stats()
    assert call(two[1], "notify", "default", message) == 1
    assert two[0].call(hackney.heard, 1) == [hackney.plain(message)]
    assert dataclasses.replace(two[0].stats(), longest_lease=before.longest_lease) == before
    assert two[0].exchange(leased) == 1
    assert backend.ids() == [1, 2]


@pytest.mark.parametrize("message", [{1, 2}, b"bytes", float("nan"), "x" * 60_000, object])
def test_what_json_cannot_say_or_is_too_long_is_refused(worker: Worker, message: object) -> None:
    """hackney_pool:notify/2"""
    worker.call(hackney.subscribe)
    worker.fails(OptionError, commands.library, "notify", "default", message)
    assert call(worker, "notify", "default", "x" * 59_000) == 1


def test_a_process_that_does_not_read_its_events_is_passed_over_and_is_whole_afterwards(
    three: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney_pool:notify/2"""
    for worker in three[:2]:
        worker.call(hackney.subscribe)
        worker.use(tcp)
    three[0].stop()
    taken, reached = 0, 2
    while reached == 2:  # one after the other, so that only who is stopped can have a full channel
        reached, taken = call(three[2], "notify", "default", "x" * 50_000), taken + 1
        assert len(three[1].call(hackney.heard, taken)) == taken
        assert taken < 1000, "the channels never fill up"
    assert reached == 1
    assert three[1].use(tcp) == 1
    three[0].resume()
    three[0].call(hackney.heard, taken - 1)
    assert three[0].use(tcp) == 1
    three[0].wait_stats(idle=1, in_use=0, processes=2)


def test_callbacks_must_be_callable() -> None:
    """hackney_pool:notify/2"""
    with pytest.raises(OptionError, match="callback"):
        sharedpool.attach().on_notify("no function")  # type: ignore[arg-type]


# --- local mode -------------------------------------------------------------------------------------------------------


def test_in_local_mode_every_function_does_the_same_for_one_process(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    """hackney_pool:checkout/4, hackney_pool:count/2, hackney_pool:notify/2"""
    worker = harness.start(SHAREDPOOL_MODE="local")
    worker.fails(PoolNotFound, hackney.checkout, tcp, pool="api")
    worker.fails(PoolNotFound, commands.library, "count", "api")
    worker.call(hackney.use, tcp)
    assert call(worker, "count") == call(worker, "count", "default", tcp.url) == 1
    assert call(worker, "count", "default", ("h", 1)) == 0
    assert (call(worker, "max_connections"), call(worker, "timeout")) == (50, 150.0)
    call(worker, "set_max_connections", "default", 1)
    call(worker, "set_timeout", "default", None)
    assert (call(worker, "max_connections"), call(worker, "timeout")) == (1, None)
    worker.call(hackney.checkout, tcp)
    worker.fails(PoolTimeout, hackney.checkout, tcp, checkout_timeout=0.02)
    assert call(worker, "start_link", "other", max_connections=2).options.max_connections == 2
    assert call(worker, "notify", "other", 1) == 0
    worker.call(hackney.subscribe_raising, "ValueError")
    worker.call(hackney.subscribe)
    assert call(worker, "notify", "default", {"a": (1, 2)}) == 1
    assert worker.call(hackney.heard, 1) == [{"a": [1, 2]}]
    assert scope.files() == []
    assert backend.peak == 1


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_example_keeps_a_pool_until_it_is_told_to_end(two: list[Worker], scope: Scope) -> None:
    """hackney_pool:child_spec/2"""
    call(two[1], "start")
    command = [sys.executable, "-m", "examples.kept_pool", "api", "3"]
    environment = clean_environment(scope.env)
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = int(process.stdout.readline().split()[-1])
        wait_until(lambda: call(two[1], "find_pool", "api"))
        call(two[1], "stop_pool", "api")
        os.kill(first, signal.SIGKILL)
        assert int(process.stdout.readline().split()[-1]) != first
        wait_until(lambda: call(two[1], "find_pool", "api"))
        assert call(two[1], "max_connections", "api") == 3
        process.terminate()
        assert process.wait(30) == 0
    assert call(two[1], "find_pool", "api") is None
