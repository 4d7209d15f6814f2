"""urllib3 over a shared pool, against a real HTTP server that counts its connections."""

from __future__ import annotations

import gc
import http.client as http_client
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trustme
import urllib3
from urllib3.exceptions import (
    ClosedPoolError,
    ConnectTimeoutError,
    EmptyPoolError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from sharedpool import OptionError, attach
from sharedpool.integrations.urllib3 import (
    SharedHTTPConnectionPool,
    SharedHTTPSConnectionPool,
    SharedPoolManager,
    SharedProxyManager,
)
from tests.support import http
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import ForkServer, Harness, Worker
from tests.system.servers import Web

#: States of a TCP connection as the kernel numbers them.
ESTABLISHED, CLOSE_WAIT = 1, 8


@pytest.fixture(scope="session")
def fork_server_with_http(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded urllib3 and requests, too."""
    server = ForkServer("tests.support.http", "tests.system.test_urllib3")
    yield server
    server.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_http: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_http)
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, directory: Path, nothing_left_behind: None) -> Iterator[Web]:
    """The same server with TLS; `ca.pem` beside the scope is whom to trust."""
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
    with Web(directory / "server.pem") as running:
        yield running


def ca(directory: Path) -> str:
    return str(directory / "ca.pem")


# --- http:// ----------------------------------------------------------------------------------------------------------


def plain(state: State, host: str, port: int) -> bytes:
    """A request without any library, over the same pool."""
    with attach(http.POOL).connection(host, port) as sock:
        sock.sendall(b"GET /id HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while not answer.rpartition(b"\r\n\r\n")[2]:
            answer += sock.recv(4096)
        return answer[-1:]


def settings(state: State, host: str, port: int) -> None:
    """Sockets with other settings are others."""
    alive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for given in ({"source_address": ("127.0.0.2", 0)}, {"socket_options": [alive]}):
        for _ in range(2):
            with SharedHTTPConnectionPool(host, port, pool=http.POOL, **given) as pool:
                conn = pool._get_conn()
                conn.connect()
                assert (conn.sock.getsockname()[0] == "127.0.0.2") == ("source_address" in given)
                assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == ("socket_options" in given)
                pool._put_conn(conn)


def test_one_connection_serves_processes_in_turn_and_whoever_uses_sockets(two: list[Worker], web: Web) -> None:
    for worker in two:
        worker.call(http.make, max_connections=1)
    assert {worker.call(http.number, web.url) for worker in (*two, *two)} == {1}
    host, _, port = web.address.rpartition(":")
    assert two[0].call(plain, host, int(port)) == b"1"
    assert web.opened(1) == 1
    two[1].call(settings, host, int(port))
    assert web.opened(1) == 1 + 2 + 1  # and the question before


def test_under_load_of_every_kind_the_cap_holds_and_every_answer_is_its_own(three: list[Worker], web: Web) -> None:
    for worker in three:
        worker.call(http.make, max_connections=2, checkout_timeout=60)
    loads = [worker.begin(http.load, web.url, 10) for worker in three]
    assert [load.result(100) for load in loads] == [[], [], []]
    web.opened(2)
    assert " leased=0 " in three[0].call(http.numbers)


def stream(state: State, url: str) -> None:
    """How long an answer keeps its connection: until it has been read, or is given up."""
    manager = SharedPoolManager(http.POOL, max_connections=1, checkout_timeout=20)
    first = int(manager.request("GET", f"{url}/id").data)

    def leased() -> int:
        return manager.shared_pool.stats().in_use

    def number() -> int:
        return int(manager.request("GET", f"{url}/id").data)

    def ask(path: str) -> Any:
        return manager.request("GET", url + path, preload_content=False)

    answer = ask("/large")
    assert leased() == 1
    with pytest.raises(EmptyPoolError):
        manager.connection_from_url(url).urlopen("GET", "/page", pool_timeout=0)
    assert sum(map(len, answer.stream(4096))) == 1 << 20
    assert (leased(), number()) == (0, first)
    answer = ask("/large")
    answer.drain_conn()
    assert (leased(), number()) == (0, first)
    answer = ask("/chunked")
    assert (answer.read(3), leased()) == (b"one", 1)
    answer.release_conn()  # in the midst
    assert (leased(), number()) == (0, first + 1)
    answer = ask("/large")
    answer.close()
    assert (leased(), number()) == (0, first + 2)
    answer = ask("/large-close")
    assert (leased(), len(answer.read(1000))) == (1, 1000)
    sock = answer.connection._lease.conn  # http.client has given it up, and said no goodbye: who does may get no more
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in (ESTABLISHED, CLOSE_WAIT)
    assert len(answer.read()) == (1 << 20) - 1000
    assert (leased(), number()) == (0, first + 3)
    answer = ask("/large")
    del answer
    gc.collect()
    assert number() == first + 4
    with pytest.raises(ProtocolError) as caught:
        manager.request("GET", f"{url}/broken", retries=False)
    assert isinstance(caught.value.args[1], http_client.IncompleteRead)
    assert (leased(), number()) == (0, first + 5)
    manager.request("GET", f"{url}/hangup")
    assert number() == first + 6  # that it has ended was seen before it was lent
    assert manager.request("GET", f"{url}/once/x").data == b"the page\n"
    assert (leased(), number()) == (0, first + 7)


def test_an_answer_keeps_its_connection_until_it_has_been_read_or_given_up(worker: Worker, web: Web) -> None:
    worker.call(stream, web.url)
    assert web.opened(1) == 8


def reconnect(state: State, host: str, port: int) -> None:
    """What http.client reconnects by itself is another lease, after the end of the first one."""
    with SharedHTTPConnectionPool(host, port, pool=http.POOL, max_connections=1, checkout_timeout=30) as pool:
        conn = pool._get_conn()
        for _ in range(3):
            conn.request("GET", "/chunked")
            assert conn.getresponse().status == 200
            assert pool.shared_pool.stats().in_use == 1
            conn.close()
        conn.request("GET", "/large-close", preload_content=False)
        conn.getresponse()  # whose connection is no longer the object's
        conn.request("GET", "/id")  # and no answer is read
        pool._put_conn(conn)
        assert pool.request("GET", "/page").data == b"the page\n"
    with pytest.raises(ClosedPoolError):
        pool.request("GET", "/page")


def test_within_a_lease_nothing_is_connected_a_second_time(worker: Worker, web: Web) -> None:
    host, _, port = web.address.rpartition(":")
    worker.call(reconnect, host, int(port))
    assert web.opened(1) == 6


def errors(state: State, url: str, full: int, silent: int) -> None:
    """Each failure raises what urllib3 raises, and leaves no lease."""
    manager = SharedPoolManager(
        http.POOL, max_connections=2, checkout_timeout=0.05, block=True, maxsize=1, retries=False
    )

    def fails(kind: type[Exception], where: str, **given: Any) -> Any:
        with pytest.raises(kind) as caught:
            manager.request("GET", where, **given)
        wait_until(lambda: manager.shared_pool.stats().used == manager.shared_pool.stats().idle)
        return caught.value

    assert type(fails(NewConnectionError, "http://127.0.0.1:1/")) is NewConnectionError
    fails(NameResolutionError, "http://nowhere.invalid/")
    assert type(fails(ConnectTimeoutError, f"http://127.0.0.1:{full}/", timeout=0.02)) is ConnectTimeoutError
    fails(ReadTimeoutError, f"http://127.0.0.1:{silent}/", timeout=urllib3.Timeout(connect=5, read=0.05))
    error = fails(MaxRetryError, "http://127.0.0.1:1/", retries=urllib3.Retry(2))
    assert isinstance(error.reason, NewConnectionError)
    pool = attach(http.POOL)
    with pool.checkout("mine", 0, "permit"), pool.checkout("mine", 0, "permit"):
        for _ in range(3):  # nothing of urllib3's queue is lost thereby
            with pytest.raises(EmptyPoolError, match="became free in time"):
                manager.request("GET", url)
        with pytest.raises(EmptyPoolError, match="became free in time"):
            manager.connection_from_url(url).urlopen("GET", "/page", pool_timeout=0.01)
    with manager.request("GET", url, preload_content=False), pytest.raises(EmptyPoolError, match="maxsize"):
        manager.connection_from_url(url).urlopen("GET", "/page", pool_timeout=0.01)


def test_errors_are_urllib3s_and_leave_nothing_leased(worker: Worker, web: Web, backend: Backend) -> None:
    full = backend.listen("full")
    backend.do("hang", name="full")
    backend.do("pause", name="tcp")
    worker.call(errors, f"{web.url}/large", full.port, backend.tcp.port)


def wait_twice(state: State, url: str) -> None:
    """First for the pool's only object, then for a lease: what the first wait took, the second one has no more."""
    patience = 3.0
    manager = SharedPoolManager(http.POOL, max_connections=1, maxsize=1, block=True, retries=False)
    pool = manager.connection_from_url(url)
    with manager.shared_pool.checkout("mine", 0, "permit"):
        conn = pool._get_conn()
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(pool._get_conn, patience)
            wait_until(lambda: pool.pool.not_empty._waiters)  # type: ignore[union-attr]
            seen = monotonic()
            wait_until(lambda: monotonic() > seen + patience / 2)
            waited = monotonic() - seen
            pool._put_conn(conn)
            same = waiting.result()
        assert same is conn
        assert same._patience <= patience - waited
        with pytest.raises(EmptyPoolError, match="became free in time"):
            same.connect()
    assert pool.urlopen("GET", "/page", pool_timeout=patience).data == b"the page\n"


def test_the_two_waits_of_a_blocking_pool_have_one_time_limit(worker: Worker, web: Web) -> None:
    worker.call(wait_twice, web.url)


def misuse(state: State) -> None:
    """What is refused, and how it is said."""

    class Other(SharedHTTPConnectionPool):
        ConnectionCls = urllib3.connection.HTTPConnection  # type: ignore[assignment]

    with pytest.raises(OptionError, match="max_connections"):
        SharedPoolManager(max_connections=0)
    with pytest.raises(OptionError, match=r"beside max_idle, app"):
        SharedHTTPConnectionPool("localhost", pool=attach("api"), max_idle=1, app="x")
    with pytest.raises(TypeError, match="SharedHTTPConnection"):
        Other("localhost", max_connections=1).request("GET", "/")


def test_what_cannot_be_is_refused(worker: Worker) -> None:
    worker.call(misuse)


def test_a_forked_child_uses_nothing_of_its_parents(worker: Worker, web: Web) -> None:
    worker.call(http.make, max_connections=3)
    worker.call(http.begin, f"{web.url}/large", "answer")
    mine = worker.call(http.number, web.url)
    child = worker.fork()
    assert child.call(http.number, web.url) == mine  # taken over from the parent, in turn
    child.call(http.begin, f"{web.url}/large", "other")
    assert len(child.call(http.finish, "other")) == 1 << 20
    child.call(http.drop_manager)
    assert len(worker.call(http.finish, "answer")) == 1 << 20
    assert web.opened(3) == 2


# --- https:// ---------------------------------------------------------------------------------------------------------


def test_tls_connections_stay_in_their_process_and_permits_go_over(
    two: list[Worker], tls: Web, directory: Path
) -> None:
    for worker in two:
        worker.call(http.make, max_connections=1, steal_after=0.02, checkout_timeout=20, ca_certs=ca(directory))
    numbers = [two[turn // 2 % 2].call(http.number, tls.url) for turn in range(6)]
    assert numbers == [1, 1, 2, 2, 3, 3]
    loads = [worker.begin(http.load, tls.url, 3) for worker in two]
    assert [load.result(60) for load in loads] == [[], []]
    tls.opened(1)


def secure(state: State, url: str, ca_file: str, proxy: str) -> None:
    """Connections with other settings are others; nothing unproven is lent to who wants proof."""
    host, port = url.removeprefix("https://").split(":")

    def number(**given: Any) -> int:
        manager = SharedPoolManager(http.POOL, max_connections=9, retries=False, **given)
        return int(manager.request("GET", f"{url}/id").data)

    with pytest.warns(urllib3.exceptions.InsecureRequestWarning):
        unproven = number(cert_reqs="CERT_NONE")
    with pytest.raises(SSLError, match="certificate"):
        number()
    proven = number(ca_certs=ca_file)
    assert proven > unproven
    assert number(ca_certs=ca_file) == proven  # by another manager of this process
    context = ssl.create_default_context(cafile=ca_file)
    by_context = number(ssl_context=context)
    assert by_context == number(ssl_context=context) > proven
    assert number(ssl_context=ssl.create_default_context(cafile=ca_file)) > by_context
    with pytest.raises(SSLError, match="ingerprint"):
        number(ca_certs=ca_file, assert_fingerprint="00" * 32)
    with SharedHTTPSConnectionPool(host, int(port), pool=http.POOL, ca_certs=ca_file) as pool:
        assert int(pool.request("GET", "/id").data) == proven
        with pool.request("GET", "/large", preload_content=False) as answer:
            answer.read(10)
        assert int(pool.request("GET", "/id").data) > proven  # closed in the midst of an answer: not lent again
        conn = pool._get_conn()
        conn.connect()
        conn.sock.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert conn.sock.recv(1000).startswith(b"HTTP/1.1 200")
        assert conn.sock.recv(1)
        assert conn.sock.pending()
        assert not conn._known[1].clean(conn._lease.conn)  # part of a record is left
        conn.close()

    def tunnel(password: str) -> int:
        headers = urllib3.make_headers(proxy_basic_auth=f"me:{password}")
        manager = SharedProxyManager(proxy, http.POOL, proxy_headers=headers, ca_certs=ca_file)
        return int(manager.request("GET", f"{url}/id").data)

    assert tunnel("hush") == tunnel("hush") < tunnel("hush, too")
    forward = SharedProxyManager(proxy, http.POOL)
    assert forward.request("GET", "http://elsewhere.invalid/page").data == b"the page\n"
    stats = forward.shared_pool.stats()
    assert (stats.in_use, stats.open_failures) == (0, 2)
    names = sorted(forward.shared_pool.key_stats())
    assert (
        [name.split("+")[0] for name in names[:5]] == ["https"] * 5 == [name.split("://")[0][:5] for name in names[:5]]
    )
    assert f"{proxy.replace('http', 'tcp')}" in names
    assert not [name for name in names if "hush" in name]


def test_settings_of_tls_and_of_proxies_are_part_of_the_key_and_secrets_are_not(
    worker: Worker, tls: Web, web: Web, directory: Path
) -> None:
    worker.call(secure, tls.url, ca(directory), web.url)
    assert web.numbers()["peak"] <= 4  # two tunnels, one to ask what it forwards, and the question


def handshake(state: State, port: int, ca_file: str) -> None:
    """A server that accepts and says nothing."""
    manager = SharedPoolManager(http.POOL, max_connections=1, retries=False, ca_certs=ca_file)
    with pytest.raises(ReadTimeoutError):
        manager.request("GET", f"https://127.0.0.1:{port}/", timeout=0.1)
    assert manager.shared_pool.stats().in_use == 0


def test_a_handshake_that_does_not_end_is_given_up_and_its_connection_closed(
    worker: Worker, backend: Backend, tls: Web, directory: Path
) -> None:
    backend.do("pause", name="tcp")
    worker.call(handshake, backend.tcp.port, ca(directory))
    backend.do("resume", name="tcp")
    wait_until(lambda: (backend.accepted, backend.open) == (1, 0))
