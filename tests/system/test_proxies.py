"""urllib3 and requests through a real proxy, plain or over TLS, which counts its clients."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from urllib3.exceptions import ProxyError, SSLError

from sharedpool.integrations.urllib3 import SharedProxyManager
from tests.support import http
from tests.support.postgres import Ports
from tests.support.proxies import PLAIN, SECURE, Proxy
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.tls import Authority
from tests.support.waiting import wait_until
from tests.support.workers import ForkServer, Harness, Worker
from tests.system.servers import Web

#: What HAProxy may count under a cap of one: where it closes first, a connection has ended at both of its ends before
#: it has read so. In the same turn of its only thread it reads that, and sees the next one; never a third.
AT_ONCE = 2
LOGIN = urllib3.make_headers(proxy_basic_auth="me:hush")


@pytest.fixture(scope="session")
def fork_server_with_proxies(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded urllib3 and requests, too."""
    server = ForkServer("tests.support.http", "tests.system.test_proxies")
    yield server
    server.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_proxies: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_proxies)
    yield harness
    harness.close()


@pytest.fixture
def authority(directory: Path) -> Authority:
    return Authority(directory)


@pytest.fixture
def tls(authority: Authority, nothing_left_behind: None) -> Iterator[Web]:
    """The server behind the proxy."""
    with Web(Path(authority.client("localhost"))) as running:
        yield running


@pytest.fixture
def proxy(authority: Authority, nothing_left_behind: None) -> Iterator[Proxy]:
    with Proxy(authority.client("localhost")) as running:
        yield running


def make(state: State, proxy: str, ca: str, **given: Any) -> None:
    """A manager and a session through a proxy, over one pool."""
    state.things["http"] = SharedProxyManager(proxy, http.POOL, proxy_headers=LOGIN, ca_certs=ca, **given)
    http.make_session(state, "session")
    session = state.things["session"]
    session.proxies = {"https": proxy.replace("//", "//me:hush@")}
    session.verify, session.trust_env = ca, False


@pytest.mark.parametrize("kind", [PLAIN, SECURE])
def test_a_tunnel_stays_in_its_process_and_its_permit_goes_over(
    two: list[Worker], proxy: Proxy, tls: Web, authority: Authority, kind: str
) -> None:
    for worker in two:
        worker.call(make, proxy.address(kind), authority.file, max_connections=1, steal_after=0.02, checkout_timeout=20)
    numbers = [two[turn // 2 % 2].call(http.number, tls.url) for turn in range(4)]
    assert numbers == [1, 1, 2, 2]
    loads = [worker.begin(http.load, tls.url, 1) for worker in two]
    assert [load.result(60) for load in loads] == [[], []]
    one, other = two
    first = one.call(http.number, tls.url, "session")
    assert one.call(http.number, tls.url, "session") == first
    assert one.call(http.begin, f"{tls.url}/large", "answer") == 200
    os.kill(one.pid, signal.SIGKILL)
    assert other.call(http.number, tls.url, "session") > first
    assert " leased=0 " in other.call(http.numbers)
    found = proxy.numbers(kind)
    assert found["open"] == 1
    assert found["peak"] <= AT_ONCE
    assert tls.numbers()["accepted"] - 1 == found["accepted"], "one for each tunnel, and the question"


def refused(state: State, proxies: dict[str, str], url: str, plain_url: str, ca: str) -> None:
    """Who cannot be reached, or does not prove who he is; each leaves the permit for the next."""
    trusted, untrusted = ssl.create_default_context(cafile=ca), ssl.create_default_context()

    def ask(kind: str, where: str, headers: dict[str, str] = LOGIN, **given: Any) -> bytes:
        manager = SharedProxyManager(
            proxies[kind], http.POOL, proxy_headers=headers, retries=False, max_connections=1, **given
        )
        try:
            return bytes(manager.request("GET", where).data)
        finally:
            wait_until(lambda: manager.shared_pool.stats().in_use == 0)

    for kind in (PLAIN, SECURE):
        with pytest.raises(ProxyError, match="Tunnel connection failed: 40"):
            ask(kind, f"{url}/id", urllib3.make_headers(proxy_basic_auth="me:guessed"), ca_certs=ca)
        with contextlib.closing(Ports()) as ports, pytest.raises(ProxyError, match="Tunnel connection failed: 5"):
            ask(kind, f"https://127.0.0.1:{ports.take()}/", ca_certs=ca)
        with pytest.raises(SSLError, match="certificate"):
            ask(kind, f"{url}/id", proxy_ssl_context=trusted)
        assert ask(kind, f"{url}/page", ca_certs=ca, proxy_ssl_context=trusted) == b"the page\n"
        assert ask(kind, f"{plain_url}/page", ca_certs=ca) == b"the page\n"
    proxies["itself"] = url  # the server forwards what it is asked of others, as if it had got it there
    forwarded = ask("itself", "https://elsewhere.invalid/page", ca_certs=ca, use_forwarding_for_https=True)
    assert forwarded == b"the page\n"
    with pytest.raises(ProxyError, match="certificate"):
        ask(SECURE, f"{url}/id", ca_certs=ca, proxy_ssl_context=untrusted)


def test_whatever_a_proxy_refuses_or_does_not_prove_is_urllib3s_error_and_leaves_no_lease(
    worker: Worker, proxy: Proxy, tls: Web, web: Web, authority: Authority
) -> None:
    proxies = {kind: proxy.address(kind) for kind in (PLAIN, SECURE)}
    worker.call(refused, proxies, tls.url, web.url, authority.file)
    assert max(proxy.numbers(kind)["peak"] for kind in (PLAIN, SECURE)) <= AT_ONCE
