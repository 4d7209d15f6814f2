"""aiohttp under a cap of all processes, on a real server that counts its connections."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from sharedpool import OptionError
from sharedpool.integrations.aiohttp import SharedConnector
from tests.support import aiohttps, commands
from tests.support.nginx import BODY, Nginx
from tests.support.scope import Scope
from tests.support.tls import Authority
from tests.support.waiting import wait_until
from tests.support.workers import ForkServer, Harness, Worker
from tests.system.servers import Web

PAGE = (200, "the page\n")


@pytest.fixture(scope="session")
def fork_server_with_aiohttp(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded aiohttp, too."""
    forks = ForkServer("tests.support.aiohttps")
    yield forks
    forks.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_aiohttp: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_aiohttp)
    yield harness
    harness.close()


def test_the_cap_is_over_all_processes_and_cancelling_loses_nothing(three: list[Worker], web: Web) -> None:
    page = f"http://{web.address}/page"
    for worker in three:
        worker.call(aiohttps.make, max_connections=2)
    busy = [worker.begin(aiohttps.get_many, page, 60, 3) for worker in three]
    for pending in busy:
        assert pending.result() == [PAGE] * 40
    web.opened(2)
    numbers = three[0].call(aiohttps.stats)
    assert (numbers.in_use, numbers.granted, numbers.waiting, numbers.opening, numbers.dropped) == (0, 0, 0, 0, 0)
    before = web.opened(2)
    assert three[0].call(aiohttps.get_many, page, 5) == [PAGE] * 5
    assert three[0].call(aiohttps.get_many, page, 5) == [PAGE] * 5
    assert web.opened(2) <= before + 3, "kept alive, and used again (a question each is counted, too)"


def test_an_idle_connection_is_given_up_for_another_process_that_waits(two: list[Worker], web: Web) -> None:
    one, other = two
    page = f"http://{web.address}/page"
    for worker in two:
        worker.call(aiohttps.make, max_connections=1, steal_after=0.05)
    for _ in range(2):
        assert one.call(aiohttps.get, page) == PAGE
        assert one.call(aiohttps.get, page) == PAGE
        assert other.call(aiohttps.get, page) == PAGE
    assert web.numbers()["peak"] <= 2, "and the question itself"
    assert one.call(aiohttps.get, page.replace("127.0.0.1", "localhost")) == PAGE, "another key, and the same cap"
    os.kill(one.pid, signal.SIGKILL)
    assert other.call(aiohttps.get, page) == PAGE
    other.call(aiohttps.close)
    wait_until(lambda: other.call(aiohttps.stats).used == 0, what="with the connector its connections have ended")
    wait_until(lambda: web.numbers()["open"] == 1)


def test_over_tls_the_cap_holds_connections_are_used_again_and_permits_go_over(
    three: list[Worker], directory: Path
) -> None:
    authority = Authority(directory)
    answer = (200, BODY)
    with Nginx(authority.client("localhost")) as nginx:
        for worker in three:
            worker.call(aiohttps.make, ca=authority.file, max_connections=2, steal_after=0.02)
        busy = [worker.begin(aiohttps.get_many, f"{nginx.url}/many", 40, 4) for worker in three]
        assert [pending.result() for pending in busy] == [[answer] * 30] * 3
        assert max(request.open for request in nginx.requests("/many", 90)) == 2
        numbers = three[0].call(aiohttps.stats)
        assert (numbers.in_use, numbers.granted, numbers.waiting, numbers.opening, numbers.dropped) == (0, 0, 0, 0, 0)
        one, other, _ = three
        one.call(commands.library, "set_max_connections", "web", 1)
        wait_until(lambda: one.call(aiohttps.stats).used <= 1, what="what is above the limit has ended")
        for worker in (one, one, other, other, other, one):
            assert worker.call(aiohttps.get, f"{nginx.url}/page") == answer
        told = nginx.requests("/page", 6)
        first, second, third = dict.fromkeys(request.connection for request in told)
        assert [request.connection for request in told] == [first] * 2 + [second] * 3 + [third]
        assert {request.open for request in told} == {1}
        other.call(aiohttps.make, "distrusts")
        other.fails(aiohttp.ClientConnectorCertificateError, aiohttps.get, nginx.url, "distrusts")
        assert other.call(aiohttps.get, nginx.url) == answer, "the permit of what was not trusted is free"


def test_answers_that_end_a_connection_or_are_left_unread_free_the_permit(worker: Worker, web: Web) -> None:
    base = f"http://{web.address}"
    worker.call(aiohttps.make, max_connections=1)
    assert worker.call(aiohttps.get, f"{base}/close") == (200, "the last\n")
    assert worker.call(aiohttps.get, f"{base}/redirect") == PAGE
    worker.call(aiohttps.hold, f"{base}/page")
    worker.call(aiohttps.let_go, read=False)
    assert worker.call(aiohttps.get, f"{base}/page") == PAGE
    worker.fails(TimeoutError, aiohttps.get, f"{base}/never", total=0.1)
    assert worker.call(aiohttps.get, f"{base}/page") == PAGE
    assert web.numbers()["peak"] <= 2
    assert worker.call(aiohttps.lose_loop, f"{base}/page") == PAGE
    assert worker.call(aiohttps.get, f"{base}/page") == PAGE, "what a closed loop had is given up, too"
    assert web.numbers()["peak"] <= 2


def test_errors_are_those_of_aiohttp(two: list[Worker], web: Web) -> None:
    one, other = two
    base = f"http://{web.address}"
    one.call(aiohttps.make, max_connections=1, keepalive_timeout=None)
    one.call(aiohttps.stats)
    other.call(aiohttps.make, checkout_timeout=0.1)
    one.begin(aiohttps.get, f"{base}/never", total=30, thread="asks")
    wait_until(lambda: other.call(aiohttps.stats).in_use == 1)
    error = other.fails(aiohttp.ConnectionTimeoutError, aiohttps.get, f"{base}/page")
    assert "Connection timeout to host" in str(error)
    other.call(aiohttps.make, "patient")
    other.fails(aiohttp.ServerTimeoutError, aiohttps.get, f"{base}/page", "patient", connect=0.05)
    one.kill()
    assert other.call(aiohttps.get, f"{base}/page", "patient") == PAGE
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        other.fails(aiohttp.ClientConnectorError, aiohttps.get, refused, "patient")
        assert other.call(aiohttps.stats).dropped == 0
    with Web() as short:
        assert other.call(aiohttps.get, f"http://{short.address}/page", "patient") == PAGE
        assert other.call(aiohttps.stats).used == 1
    wait_until(lambda: other.call(aiohttps.stats).used == 0, what="a server that has gone leaves no permit taken")
    other.call(aiohttps.close, "patient")
    other.fails(RuntimeError, aiohttps.get, f"{base}/page", "patient")
    wait_until(lambda: other.call(aiohttps.stats).used == 0)
    with pytest.raises(OptionError, match="happy_eyeballs_delay"):
        SharedConnector("web", happy_eyeballs_delay=0.25)
