"""httpx and httpx2 over a shared pool, as their users use them; the server counts the connections."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharedpool import NotSupported, OptionError
from tests.support.http1 import MEGABYTE, HttpServer
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.tls import Authority
from tests.support.workers import ForkServer, Harness, Worker

#: Both are the same code over different modules: what depends on these is tried with both.
LIBRARIES = ["httpx", "httpx2"]


@pytest.fixture(scope="session")
def fork_server_with_httpx(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded both libraries."""
    server = ForkServer("sharedpool.integrations.httpx", "sharedpool.integrations.httpx2")
    yield server
    server.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_httpx: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_httpx)
    yield harness
    harness.close()


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def http(nothing_left_behind: None) -> Iterator[HttpServer]:
    with HttpServer() as running:
        yield running


@pytest.fixture
def authority(directory: Path) -> Authority:
    return Authority(directory)


@pytest.fixture
def https(authority: Authority, nothing_left_behind: None) -> Iterator[HttpServer]:
    with HttpServer(authority.server_context("localhost"), "localhost") as running:
        yield running


def make(state: State, library: str, **options: Any) -> None:
    """A client under the label "client"."""
    state.things["httpx"] = httpx = importlib.import_module(library)
    ours = importlib.import_module(f"sharedpool.integrations.{library}")
    state.things["client"] = httpx.Client(transport=ours.SharedTransport(**options))


def get(state: State, url: str, **options: Any) -> int:
    answer = state.things["client"].get(url, **options)
    answer.raise_for_status()
    return int(answer.text)


def stats(state: State) -> Any:
    return state.things["client"]._transport.pool.stats()


def close(state: State) -> None:
    state.things.pop("client").close()


# --- requests ---------------------------------------------------------------------------------------------------------


def test_workers_share_what_they_leave_idle_and_the_cap(two_of: list[Worker], http: HttpServer) -> None:
    assert [worker.call(get, f"{http.url}/number") for worker in two_of * 3] == [1] * 6
    assert two_of[0].call(stats).takeovers >= 3
    assert two_of[1].call(get, f"{http.url}/large") == 1
    assert two_of[0].call(exchange, f"{http.url}/") == [("chunked", 1), ("length", 300_000), ("length", 7)]
    for worker in two_of:
        worker.call(close)
    assert (http.peak, http.accepted) == (1, 1)


@pytest.fixture
def two_of(two: list[Worker], library: str) -> list[Worker]:
    for worker in two:
        worker.call(make, library, max_connections=1)
    return two


def exchange(state: State, url: str) -> list[tuple[str, int]]:
    """Chunks in both directions."""
    client = state.things["client"]
    return [
        ("chunked", int(client.get(url + "chunked").text)),
        ("length", int(client.post(url + "length", content=(b"x" * 100_000 for _ in range(3))).text)),
        ("length", int(client.post(url + "length", content=b"content").text)),
    ]


def streams(state: State, url: str) -> list[int]:
    """What is leased while a response is streamed, read to its end, closed early, or forgotten."""
    client = state.things["client"]
    found = []
    with client.stream("GET", url + "large") as answer:
        found.append(stats(state).in_use)
        body = b"".join(answer.iter_bytes())
        assert len(body) == MEGABYTE + 1
        found.append(stats(state).in_use)
    assert get(state, url + "number") == 1
    with client.stream("GET", url + "slowly") as answer:
        assert next(answer.iter_raw(100))
    found.append(get(state, url + "number"))
    found.append(get(state, url + "close"))
    found.append(get(state, url + "number"))
    found.append(get(state, url + "extra"))
    found.append(get(state, url + "number"))
    with client.stream("GET", url + "switch", headers={"Connection": "upgrade", "Upgrade": "echo"}) as answer:
        network = answer.extensions["network_stream"]
        network.write(b"hello", timeout=20)
        assert (answer.status_code, network.read(100, timeout=20)) == (101, b"hello")
        assert network.get_extra_info("server_addr")[0] == "127.0.0.1"
        assert not network.get_extra_info("is_readable")
    found.append(get(state, url + "number"))
    return found


def test_a_connection_goes_back_at_the_end_of_its_response_or_is_closed(harness: Harness, http: HttpServer) -> None:
    one = harness.start()
    one.call(make, "httpx", max_connections=1)
    assert one.call(streams, f"{http.url}/") == [1, 0, 2, 2, 3, 3, 4, 5]
    assert http.peak == 1


def fails(state: State, url: str, **limits: float) -> str:
    """The error's name as its users know it, which knows its request."""
    httpx = state.things["httpx"]
    try:
        state.things["client"].get(url, timeout=httpx.Timeout(600, **limits))
    except httpx.HTTPError as error:
        assert error.request.url == url
        return type(error).__name__
    return "nothing"


def hold_and_fail(state: State, url: str) -> str:
    with state.things["client"].stream("GET", url + "slowly"):
        return fails(state, url + "number", pool=0.05)


def test_errors_are_the_librarys(harness: Harness, http: HttpServer, library: str) -> None:
    one = harness.start()
    one.call(make, library, max_connections=1)
    assert one.call(fails, f"{http.url}/never", read=0.1) == "ReadTimeout"
    assert one.call(fails, f"{http.url}/slowly", read=0.1) == "ReadTimeout"
    assert one.call(fails, f"{http.url}/drop") == "RemoteProtocolError"
    assert one.call(fails, "http://127.0.0.1:1/") == "ConnectError"
    assert one.call(fails, "ftp://127.0.0.1/") == "UnsupportedProtocol"
    assert one.call(hold_and_fail, f"{http.url}/") == "PoolTimeout"
    assert one.call(fails, http.url.replace("http:", "https:") + "/", connect=0.2) == "ConnectTimeout"
    assert one.call(get, f"{http.url}/number", timeout=None) == http.accepted
    assert http.peak == 1


def test_https_is_verified_stays_and_resumes(
    two: list[Worker], https: HttpServer, library: str, authority: Authority
) -> None:
    one = two[0]
    one.call(make, library, max_connections=2)
    assert one.call(fails, f"{https.url}/number") == "ConnectError"
    for worker in two:
        worker.call(make, library, verify=authority.file)
    found = [worker.call(get, f"{https.url}/number") for worker in two * 2]
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    assert one.call(get, f"{https.url}/large") == found[0]
    assert one.call(get, f"{https.url}/close") == found[0]
    assert one.call(get, f"{https.url}/number") == max(found) + 1
    sni = f"https://127.0.0.1:{https.port}/number"
    assert one.call(get, sni, extensions={"sni_hostname": "localhost"}) > found[0]
    assert one.call(stats).takeovers == 0
    assert https.peak <= 2


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def _tasks(library: str, http: str, https: str, verify: str) -> int:
    httpx = importlib.import_module(library)
    ours = importlib.import_module(f"sharedpool.integrations.{library}")
    transport = ours.AsyncSharedTransport(max_connections=1, verify=verify)
    async with httpx.AsyncClient(transport=transport, timeout=20) as client:
        for url in (http, https):
            many = await asyncio.gather(*(client.get(url + "number") for _ in range(30)))
            assert {int(each.text) for each in many} == {1}
            assert len((await client.get(url + "large")).text) == MEGABYTE + 1
            assert (await client.post(url + "length", content=b"y" * MEGABYTE)).text == str(MEGABYTE)
            async with client.stream("GET", url + "slowly") as answer:
                async for _ in answer.aiter_raw():
                    break
            for path in ("never", "slowly"):
                task = asyncio.create_task(client.get(url + path))
                while transport.pool.stats().in_use == 0:
                    await asyncio.sleep(0.001)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                with pytest.raises(httpx.ReadTimeout):
                    await client.get(url + path, timeout=httpx.Timeout(20, read=0.05))
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(url + "drop")
            # A task that was cancelled before it had sent its request leaves the connection as it was.
            assert 5 <= int((await client.get(url + "number")).text) <= 7
        for delay in range(40):  # wherever it is just then
            task = asyncio.create_task(client.get(https + "chunked"))
            for _ in range(delay):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert (await client.get(https + "number")).status_code == 200
        return int(transport.pool.stats().in_use)


def run_tasks(state: State, *arguments: str) -> int:
    return asyncio.run(_tasks(*arguments))


def test_tasks_share_the_same_pool_and_lose_nothing_by_being_cancelled(
    harness: Harness, http: HttpServer, https: HttpServer, library: str, authority: Authority
) -> None:
    one = harness.start()
    assert one.call(run_tasks, library, f"{http.url}/", f"{https.url}/", authority.file) == 0
    assert (http.peak, https.peak) == (1, 1)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_with_a_sentence(library: str) -> None:
    ours = importlib.import_module(f"sharedpool.integrations.{library}")
    for kind in (ours.SharedTransport, ours.AsyncSharedTransport):
        for given, why in [
            ({"http2": True}, "HTTP/2"),
            ({"http1": False}, "HTTP/2"),
            ({"proxy": "http://p"}, "proxies"),
        ]:
            with pytest.raises(NotSupported, match=why):
                kind("api", **given)
        with pytest.raises(OptionError, match="unknown option 'retries'"):
            kind("api", retries=1)
    httpx = importlib.import_module(library)
    with pytest.raises(NotSupported, match="over a Unix socket"):
        httpx.Client(transport=ours.SharedTransport("api", uds="/tmp/none")).get("https://here/")
    asked = ours.AsyncSharedTransport("api").handle_async_request(httpx.Request("GET", "http://here/"))
    with pytest.raises(NotSupported, match="needs asyncio"):
        asked.send(None)


def test_threads_of_a_client_wait_for_each_other(harness: Harness, http: HttpServer, directory: Path) -> None:
    one = harness.start()
    with HttpServer(path=str(directory / "http.sock")) as unix:
        one.call(make, "httpx", uds=unix.path)
        assert [one.call(get, "http://anything/number") for _ in range(3)] == [1, 1, 1]
        one.call(close)
    one.call(make, "httpx", max_connections=2)
    assert one.call(in_threads, f"{http.url}/number") <= {1, 2}
    assert http.peak <= 2


def in_threads(state: State, url: str) -> set[int]:
    found: set[int] = set()
    threads = [threading.Thread(target=lambda: [found.add(get(state, url)) for _ in range(20)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
