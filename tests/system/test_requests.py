"""requests over a shared pool, against a real HTTP server that counts its connections."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme

from sharedpool.integrations.requests import SharedPoolAdapter
from tests.suites.urllib3 import KNOWN, ROOT
from tests.support import http
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import ForkServer, Harness, Worker
from tests.system.servers import Web


@pytest.fixture(scope="session")
def fork_server_with_requests(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded requests, too."""
    server = ForkServer("tests.support.http", "tests.system.test_requests")
    yield server
    server.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_requests: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_requests)
    yield harness
    harness.close()


def number(answer: requests.Response) -> int:
    """The number of the connection, as the server has it."""
    return int(answer.content)


def use(state: State, url: str) -> None:
    """What a session does: redirects, posts, streams, pickling."""
    state.things["http"].close()  # only urllib3's pools end
    session = pickle.loads(pickle.dumps(state.things["http"]))
    first = number(session.get(f"{url}/id"))
    assert session.get(f"{url}/redirect").history[0].status_code == 307
    assert session.post(f"{url}/redirect", data=b"twice").content == b"twice"
    assert session.post(f"{url}/echo", data=iter([b"in ", b"chunks"])).content == b"in chunks"
    with session.get(f"{url}/large", stream=True) as answer:
        assert session.adapters["http://"].shared_pool.stats().in_use == 1
        assert sum(map(len, answer.iter_content(5000))) == 1 << 20
    assert number(copy.deepcopy(session).get(f"{url}/id")) == first
    with session.get(f"{url}/large", stream=True) as answer:
        assert next(answer.iter_content(10)) == b"0123456789"
    assert number(session.get(f"{url}/id")) == first + 1
    session.get(f"{url}/page", headers={"Connection": "close"})
    assert session.get(f"{url}/page", proxies={"http": url}).content == b"the page\n"
    with pytest.raises(requests.exceptions.InvalidSchema, match="SOCKS"):
        session.get(url, proxies={"http": "socks5://127.0.0.1:1"})


def test_a_session_is_as_ever_and_shares_its_connections(two: list[Worker], web: Web) -> None:
    for worker in two:
        worker.call(http.make_session, max_connections=1, checkout_timeout=20)
    assert [worker.call(http.number, web.url) for worker in two] == [1, 1]
    for worker in two:
        worker.call(use, web.url)
    assert web.opened(1) == 5  # each gives one answer up, and asks for the end of one connection


def errors(state: State, url: str, full: int) -> None:
    """Each failure raises what requests raises, and leaves no lease."""
    session = state.things["http"]
    pool = session.adapters["http://"].shared_pool

    def fails(kind: type[Exception], where: str, **given: Any) -> None:
        with pytest.raises(requests.RequestException) as caught:
            session.get(where, **given)
        assert type(caught.value) is kind
        wait_until(lambda: pool.stats().used == pool.stats().idle)

    fails(requests.ConnectionError, "http://127.0.0.1:1/")
    fails(requests.ConnectionError, "http://nowhere.invalid/")
    fails(requests.ConnectTimeout, f"http://127.0.0.1:{full}/", timeout=0.02)
    fails(requests.ReadTimeout, f"{url}/never", timeout=(5, 0.1))
    fails(requests.exceptions.ProxyError, "http://elsewhere.invalid/", proxies={"http": "http://127.0.0.1:1"})
    with session.get(f"{url}/large", stream=True), pytest.raises(requests.ConnectionError, match="in time"):
        session.get(f"{url}/page")


def test_errors_are_requests_own_and_leave_nothing_leased(worker: Worker, web: Web, backend: Backend) -> None:
    full = backend.listen("full")
    backend.do("hang", name="full")
    worker.call(http.make_session, max_connections=1, checkout_timeout=1, close_timeout=0.5)
    worker.call(errors, web.url, full.port)


def verify(state: State, url: str, ca: str, cert: str, proxy: str) -> None:
    """verify= and cert=, straight and through a tunnel."""
    session = state.things["http"]
    for proxies in ({}, {"https": proxy}):
        with pytest.raises(requests.exceptions.SSLError):
            session.get(f"{url}/id", cert=cert, proxies=proxies)
        with pytest.raises(requests.ConnectionError):  # the server wants a certificate, and says so later
            session.get(f"{url}/id", verify=ca, proxies=proxies)
        first = number(session.get(f"{url}/id", verify=ca, cert=cert, proxies=proxies))
        assert number(session.get(f"{url}/id", verify=ca, cert=cert, proxies=proxies)) == first
        with pytest.warns(match="Unverified"):
            assert number(session.get(f"{url}/id", verify=False, cert=cert, proxies=proxies)) > first
    assert session.adapters["https://"].shared_pool.stats().in_use == 0


def test_servers_and_clients_certificates_are_those_that_requests_is_told(
    worker: Worker, web: Web, directory: Path
) -> None:
    authority = trustme.CA()
    ca, server, client = (directory / name for name in ("ca.pem", "server.pem", "client.pem"))
    authority.cert_pem.write_to_path(str(ca))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(server))
    authority.issue_cert("me@localhost").private_key_and_cert_chain_pem.write_to_path(str(client))
    worker.call(http.make_session, max_connections=9)
    with Web(server, ca) as tls:
        worker.call(verify, tls.url, str(ca), str(client), web.url)


def test_an_adapter_says_at_once_which_option_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_connections"):
        SharedPoolAdapter("api", max_connections=0)
    with pytest.raises(ValueError, match="maxsize"):
        SharedPoolAdapter("api", maxsize=3)


def test_the_page_lists_why_tests_of_urllib3_fail_here() -> None:
    page = (ROOT / "docs" / "urllib3.md").read_text(encoding="utf-8")
    assert KNOWN["deviations"]
    for name, reason in (KNOWN["deviations"] | KNOWN["either"]).items():
        assert f"| `{name}` | {reason}" in page
