"""The scenarios of hackney's own suites, ported: pools by their names, raw HTTP over the sockets that they lend."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool import ConnectFailed, ConnectTimeout, LeaseError, PoolStopped, PoolTimeout, drivers
from sharedpool.drivers.sockets import StreamDriver
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.commands import Load
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending, Worker
from tests.system import hackney
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")

SETTLED = {"in_use": 0, "opening": 0, "granted": 0, "closing": 0, "waiting": 0}


def call(worker: Worker, function: str, *arguments: object, **options: object) -> Any:
    return worker.call(commands.library, function, *arguments, **options)


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(nothing_left_behind: None) -> Iterator[Target]:
    """An HTTP server."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("http_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        yield Target("127.0.0.1", int(server.stdout.readline()))


def get(state: State, web: Target, path: str, follow: bool = False, **options: Any) -> tuple[int, bytes]:
    """GET a path over a leased socket; `follow` redirects, each over a lease of its own."""
    with sharedpool.checkout(web.host, web.port, **options) as lease:
        lease.conn.settimeout(20)
        lease.conn.sendall(f"GET {path} HTTP/1.1\r\nHost: {web.host}\r\n\r\n".encode())
        response = http.client.HTTPResponse(lease.conn)
        response.begin()
        body = response.read()
        if response.will_close:
            lease.conn.close()
    if follow and response.status == 307:
        return get(state, web, response.headers["Location"], **options)
    return response.status, body


def get_many(state: State, web: Target, path: str, number: int, **options: Any) -> list[tuple[int, bytes]]:
    return [get(state, web, path, **options) for _ in range(number)]


@pytest.mark.parametrize(
    ("path", "status", "idle"), [("/page", 200, 1), ("/missing", 404, 1), ("/redirect", 307, 1), ("/close", 200, 0)]
)
def test_a_connection_is_released_after_every_kind_of_answer(
    two: list[Worker], web: Target, path: str, status: int, idle: int
) -> None:
    """hackney's suite: release after body, close, 404 and 307."""
    for worker in two * 2:
        assert worker.call(get, web, path, max_connections=1, checkout_timeout=20.0)[0] == status
        worker.wait_stats(**SETTLED)
        assert call(worker, "count") == idle
    assert two[0].stats().opens == (1 if idle else 4)


def test_redirects_on_a_pool_of_two_return_its_counts_to_their_start(harness: Harness, web: Target) -> None:
    """hackney's suite: redirects on a pool of 2."""
    workers = harness.start_many(4)
    call(workers[0], "start_pool", max_connections=2)
    workers[0].attach()
    begun = [
        worker.begin(get_many, web, "/redirect", 10, follow=True, thread=f"t{number}", checkout_timeout=20.0)
        for worker in workers
        for number in range(2)
    ]
    for pending in begun:
        assert pending.result() == [(200, b"the page\n")] * 10
    stats = workers[0].wait_stats(**SETTLED)
    assert (call(workers[0], "get_stats")["free_count"], stats.checkouts) == (stats.idle, 160)
    assert json.loads(workers[0].call(get, web, "/numbers")[1])["peak"] <= 2


def test_five_at_once_on_a_pool_of_two_all_get_their_answer(harness: Harness, web: Target) -> None:
    """hackney's suite: 5 concurrent on a small pool."""
    workers = harness.start_many(5)
    call(workers[0], "start_pool", max_connections=2)
    begun = [worker.begin(get_many, web, "/page", 4, checkout_timeout=20.0) for worker in workers]
    assert [pending.result() for pending in begun] == [[(200, b"the page\n")] * 4] * 5
    assert workers[0].wait_stats(**SETTLED).used <= 2


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_who_waits_too_long_gets_a_timeout_and_the_pool_goes_on(two: list[Worker], tcp: Target) -> None:
    """hackney's suite: queue_timeout."""
    label = two[0].call(hackney.checkout, tcp, max_connections=1)
    error = two[1].fails(PoolTimeout, hackney.checkout, tcp, checkout_timeout=0.1)
    assert error.stats.in_use == 1
    assert call(two[1], "get_stats")["queue_count"] == 0
    two[0].call(hackney.checkin, label)
    assert two[1].call(hackney.use, tcp) == 1


def seconds_until_timeout(state: State, target: Target, **options: Any) -> float:
    begun = time.monotonic()
    with pytest.raises(PoolTimeout):
        sharedpool.checkout(target.host, target.port, **options)
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "options",
    [{"checkout_timeout": 0.5}, {"checkout_timeout": 0.5, "connect_timeout": 60.0}, {"connect_timeout": 0.5}],
)
def test_a_checkout_waits_as_long_as_it_was_told_whatever_the_other_time_outs_are(
    two: list[Worker], tcp: Target, options: dict[str, float]
) -> None:
    """hackney's suite: checkout_timeout is exact, and is connect_timeout where it is not given; 8 s is the default."""
    two[0].call(hackney.checkout, tcp, max_connections=1)
    waited = [two[1].call(seconds_until_timeout, tcp, **options) for _ in range(3)]
    assert min(waited) >= 0.5
    assert min(waited) < 8


def test_a_checkout_that_waits_for_nothing_is_told_at_once(two: list[Worker], tcp: Target) -> None:
    """hackney's suite: checkout_timeout."""
    two[0].call(hackney.checkout, tcp, max_connections=1)
    for _ in range(5):
        two[1].call(seconds_until_timeout, tcp, checkout_timeout=0)
    assert two[0].stats().waits == 0


# --- connecting -------------------------------------------------------------------------------------------------------


class CrashingDriver(StreamDriver):
    """A driver with a defect: its open raises what nobody expects."""

    name = "crashing"

    def address(self, host: str, port: int) -> tuple[str, int]:
        return host, port

    def open(self, host: str, port: int, timeout: float, register: Any) -> Any:
        raise ZeroDivisionError("a defect of the driver")


def checkout_by_crashing_driver(state: State) -> None:
    drivers.register(CrashingDriver())
    sharedpool.checkout("h", 1, "crashing", max_connections=1)


@pytest.mark.parametrize("how", ["slow", "hanging", "crashing", "refused"])
def test_a_connect_that_goes_wrong_leaves_the_pool_as_it_was(
    two: list[Worker], backend: Backend, tcp: Target, how: str
) -> None:
    """hackney's suite: connect slow, hanging, crashing, refused."""
    other = backend.listen("other")
    call(two[0], "start_pool", max_connections=1)
    if how in ("slow", "hanging"):
        backend.do("hang", name="other")
    if how == "slow":
        opening = two[0].begin(hackney.checkout, other, connect_timeout=60.0)
        two[1].wait_stats(opening=1)
        backend.do("accept_again", name="other")
        two[0].discard(opening.result())
    elif how == "hanging":
        two[0].fails(ConnectTimeout, hackney.checkout, other, connect_timeout=0.1)
    elif how == "crashing":
        two[0].fails(ZeroDivisionError, checkout_by_crashing_driver)
    else:
        backend.do("refuse", name="other")
        two[0].fails(ConnectFailed, hackney.checkout, other)
    two[1].wait_stats(**SETTLED)
    assert two[1].call(hackney.use, tcp, checkout_timeout=20.0)


# --- deaths and load --------------------------------------------------------------------------------------------------


def test_who_is_killed_while_he_leases_leaves_his_permit_to_the_next(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney's suite: kill while leased."""
    two[0].call(hackney.checkout, tcp, max_connections=1)
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    two[0].kill()
    assert two[1].exchange(waiting.result()) == 2
    assert backend.peak == 1


def use_many(state: State, target: Target, number: int) -> Load:
    """So many requests by hackney's functions."""
    load = Load()
    for index in range(number):
        try:
            hackney.use(state, target, f"{os.getpid()} {index}", checkout_timeout=60.0)
            load.done += 1
        except Exception as error:
            load.errors.append(repr(error))
    return load


def all_at_once(workers: list[Worker], target: Target, threads: int, number: int) -> Load:
    begun = [
        worker.begin(use_many, target, number, thread=f"client {thread}")
        for thread in range(threads)
        for worker in workers
    ]
    return sum((pending.result() for pending in begun), Load())


def test_a_storm_of_two_hundred_clients_on_a_pool_of_five(harness: Harness, backend: Backend, tcp: Target) -> None:
    """hackney's suite: storm."""
    workers = harness.start_many(4)
    call(workers[0], "start_pool", max_connections=5)
    assert all_at_once(workers, tcp, threads=50, number=1) == Load(done=200)
    workers[0].wait_stats(**SETTLED)
    assert backend.peak <= 5


def test_fifty_clients_with_twenty_requests_each_on_a_pool_of_four(
    harness: Harness, backend: Backend, tcp: Target
) -> None:
    """hackney's suite: stress, 50 x 20 on a pool of 4 with zero errors."""
    workers = harness.start_many(5)
    call(workers[0], "start_pool", max_connections=4)
    assert all_at_once(workers, tcp, threads=10, number=20) == Load(done=1000)
    stats = workers[0].wait_stats(**SETTLED)
    assert stats.checkouts == 1000
    assert backend.peak <= 4


LANES, ROUNDS = 12, 15


def live(state: State, target: Target, rounds: int, fate: str) -> None:
    """So many rounds; in the last one this process is killed, or ends without a checkin, unless its fate is "end"."""
    for number in range(rounds):
        lease = sharedpool.checkout(target.host, target.port, checkout_timeout=60.0)
        commands.exchange_over(lease.conn, f"{os.getpid()} {number}")
        if number == rounds - 1 and fate != "end":
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        sharedpool.checkin(lease)


def lives_of_a_lane(seeded: random.Random) -> list[tuple[int, str]]:
    """The rounds of one lane as the lives of processes, each with its length and its end."""
    lives, length = [], 0
    for _ in range(ROUNDS):
        length += 1
        fate = seeded.choices(["checkin", "killed", "never checked in"], [8, 1, 1])[0]
        if fate != "checkin":
            lives.append((length, fate))
            length = 0
    return [*lives, (length, "end")]


def test_chaos_settles_at_zero_and_then_serves(
    harness: Harness, backend: Backend, tcp: Target, seeded: random.Random
) -> None:
    """hackney's suite: chaos, 12 x 400 rounds (here 12 x 15), 10 % killed and 10 % never checked in, seeded."""
    observer = harness.start()
    call(observer, "start_pool", max_connections=5)
    observer.attach()
    observer.stats()
    lanes = [lives_of_a_lane(seeded) for _ in range(LANES)]
    running: list[tuple[Worker, Pending]] = []
    while any(lanes) or running:
        for lane in lanes[: LANES - len(running)]:
            if lane:
                worker = harness.start()
                running.append((worker, worker.begin(live, tcp, *lane.pop(0))))
        lanes = [lane for lane in lanes[1:] + lanes[:1] if lane]
        running = wait_for_one(running)
    for worker in harness.workers[1:]:
        worker.kill()
    stats = observer.wait_stats(processes=1, **SETTLED)
    assert backend.open == stats.idle
    assert backend.peak <= 5, backend.story()
    labels = [observer.call(hackney.checkout, tcp, checkout_timeout=20.0) for _ in range(5)]
    assert len({observer.exchange(label) for label in labels}) == 5


def wait_for_one(running: list[tuple[Worker, Pending]]) -> list[tuple[Worker, Pending]]:
    """Wait until a life has come to its end; gives those that have not."""
    left = running

    def one_is_over() -> bool:
        nonlocal left
        left = [each for each in left if not over(*each)]
        return len(left) < len(running)

    wait_until(one_is_over)
    return left


def over(worker: Worker, pending: Pending) -> bool:
    """Whether a life was lived to its end, without an error, or its process has ended."""
    try:
        return pending.done and pending.result() is None
    except AssertionError:  # it does not answer, because it is dead
        worker.wait_dead()
        return True


# --- ends -------------------------------------------------------------------------------------------------------------


def test_stopping_a_pool_releases_what_is_leased_at_its_checkin(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """hackney's suite: stop releases leased slots."""
    labels = [two[0].call(hackney.checkout, tcp, max_connections=2) for _ in range(2)]
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    call(two[1], "stop_pool")
    waiting.error(PoolStopped)
    for label in labels:
        assert two[0].exchange(label)
        two[0].call(hackney.checkin, label)
        two[0].fails(LeaseError, hackney.checkin, label)
    backend.wait_open(0)
    assert two[1].call(hackney.use, tcp) == 3
    assert call(two[0], "get_stats")["in_use_count"] == 0


@pytest.mark.parametrize("how", ["told", "rst"])
def test_an_idle_connection_that_the_server_closes_is_not_lent_again(
    two: list[Worker], backend: Backend, tcp: Target, how: str
) -> None:
    """hackney's suite: server closes an idle connection."""
    two[0].call(hackney.use, tcp, max_connections=1)
    backend.close(how=how)
    assert two[1].call(hackney.use, tcp) == 2
    backend.close(how=how)
    wait_until(lambda: call(two[0], "count") == 0)
    assert backend.peak == 1
