"""TLS: verified, kept by its process, resumed, clean between leases, and said goodbye to; a real server counts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharedpool import ConnectFailed, ConnectTimeout, OptionError, aio
from sharedpool.drivers.tls import TlsDriver
from tests.support import commands
from tests.support.backend import Target
from tests.support.state import State
from tests.support.tls import NAME, Authority, TlsServer
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up

LOCAL = ("localhost", "127.0.0.1", NAME)


@pytest.fixture
def authority(directory: Path) -> Authority:
    return Authority(directory)


@pytest.fixture
def server(authority: Authority, nothing_left_behind: None) -> Iterator[TlsServer]:
    with TlsServer(authority.server_context(*LOCAL)) as running:
        yield running


@pytest.fixture
def pair(harness: Harness, authority: Authority) -> list[Worker]:
    """Two workers whose system trusts the authority."""
    return harness.start_many(2, SSL_CERT_FILE=authority.file)


@pytest.fixture
def one(harness: Harness, authority: Authority) -> Worker:
    return harness.start(SSL_CERT_FILE=authority.file)


@pytest.fixture(params=["shared", "local"])
def solo(request: pytest.FixtureRequest, harness: Harness, authority: Authority) -> Worker:
    """One worker, in either mode."""
    return harness.start(SHAREDPOOL_MODE=str(request.param), SSL_CERT_FILE=authority.file)


@dataclasses.dataclass(frozen=True)
class Session:
    """What is known of a leased connection."""

    number: int
    version: str | None
    resumed: bool | None
    alpn: str | None
    name: Any


def make_driver(state: State, which: str, *, newest: ssl.TLSVersion | None = None, **options: Any) -> str:
    """A driver under a label; `newest`: by a context that knows nothing newer."""
    if newest is not None:
        context = ssl.create_default_context(cafile=options.pop("cafile"))
        context.maximum_version = newest
        options["context"] = context
    driver = state.things[f"driver {which}"] = TlsDriver(**options)
    return driver.name


def look(state: State, target: Target, which: str = "", *, discard: bool = False, **options: Any) -> Session:
    """Lease, by the driver of that label or the default one, use, and give back."""
    pool = commands.pool_of(state, "default")
    lease = pool.checkout(target.host, target.port, state.things.get(f"driver {which}", "ssl"), **options)
    conn: Any = lease.conn
    number = commands.exchange_over(conn, "hello")
    found = Session(
        number, conn.version(), conn.session_reused, conn.selected_alpn_protocol(), conn.getpeercert()["subjectAltName"]
    )
    if discard:
        lease.discard()
    else:
        lease.checkin()
    return found


def large(state: State, target: Target, size: int) -> bool:
    """So many bytes there and back."""
    with commands.pool_of(state, "default").connection(*target) as conn:
        text = os.urandom(size // 2).hex().encode()
        conn.settimeout(20)
        conn.sendall(text + b"\n")
        with conn.makefile("rb") as file:
            return bool(file.readline().split(b" ")[1] == text + b"\n")


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_each_process_verifies_reuses_its_own_and_never_gets_anothers(pair: list[Worker], server: TlsServer) -> None:
    target = server.target("localhost")
    for worker in pair:
        worker.attach(max_connections=2)
    assert [pair[i % 2].use(target) for i in range(6)] == [1, 2, 1, 2, 1, 2]
    assert pair[0].call(use_url, f"ssl://localhost:{server.port}") == 1
    assert pair[0].call(large, target, 3_000_000)
    stats = pair[0].stats()
    assert (stats.takeovers, stats.fetches, stats.opens, server.peak) == (0, 0, 2, 2)


def use_url(state: State, url: str) -> int:
    with commands.pool_of(state, "default").connection(url) as conn:
        return commands.exchange_over(conn, "by url")


def test_at_the_cap_it_is_closed_for_its_permit_and_so_is_a_dead_ones(pair: list[Worker], server: TlsServer) -> None:
    one, other = pair
    for worker in pair:
        worker.attach(max_connections=1, steal_after=0.3, close_timeout=20)
    label = one.checkout(server.target())
    (foreign,) = line_up(one, [(other, server.target())])
    one.checkin(label)
    assert other.exchange(foreign.result()) == 2
    assert server.peak == 1
    os.kill(other.pid, signal.SIGKILL)
    assert one.use(server.target(), checkout_timeout=20) == 3
    assert (server.peak, server.open) == (1, 1)


# --- who is trusted ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_verified_is_refused_and_leaves_nothing_open(
    harness: Harness, authority: Authority, directory: Path
) -> None:
    stranger = Authority(directory, "stranger")
    one = harness.start(SSL_CERT_FILE=authority.file)
    one.attach(max_connections=1)
    refused = [
        (authority.server_context("other.test"), "Hostname mismatch"),
        (authority.server_context(*LOCAL, expired=True), "certificate has expired"),
        (stranger.server_context(*LOCAL), "unable to get local issuer certificate"),
    ]
    for context, why in refused:
        with TlsServer(context) as server:
            error = one.fails(ConnectFailed, commands.use, server.target("localhost"))
            assert str(error).startswith(f"ssl://localhost:{server.port}: its certificate was refused: {why}")
            assert isinstance(error.__cause__, ssl.SSLCertVerificationError) or error.__cause__ is None
            assert (server.open, server.accepted, server.shaken) == (0, 1, 0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = Target("127.0.0.1", silent.getsockname()[1], "ssl")
        error = one.fails(ConnectTimeout, commands.use, mute, connect_timeout=0.3)
        assert "did not finish the TLS handshake within 0." in str(error)
        closer = threading.Thread(target=read_and_close, args=(silent, 2))
        closer.start()
        assert "the server closed the connection" in str(one.fails(ConnectFailed, commands.use, mute))
        closer.join()
    one.wait_stats(connections=0)
    assert one.stats().open_failures == 5


def read_and_close(listener: socket.socket, number: int) -> None:
    """So many connections, one after the other."""
    for _ in range(number):
        conn, _ = listener.accept()
        conn.recv(65536)
        conn.close()


def test_a_client_certificate_a_name_and_protocols_are_the_drivers_and_part_of_the_key(
    harness: Harness, authority: Authority
) -> None:
    context = authority.server_context(NAME, asks=True)
    context.set_alpn_protocols(["http/1.1"])
    one = harness.start()
    one.attach(max_connections=4)
    options: dict[str, Any] = {"cafile": authority.file, "server_hostname": NAME, "alpn": ["h2", "http/1.1"]}
    name = one.call(make_driver, "known", certfile=authority.client("client@test"), label="mine", **options)
    assert name.startswith("ssl.mine.")
    assert one.call(make_driver, "other", certfile=authority.client("else@test"), label="mine", **options) != name
    assert one.call(make_driver, "stranger", **options) not in (name, "ssl")
    with TlsServer(context) as server:
        found = one.call(look, server.target(), "known")
        assert (found.number, found.alpn, found.name) == (1, "http/1.1", (("DNS", NAME),))
        assert one.call(look, server.target(), "other").number == 2
        assert one.call(look, server.target(), "known").number == 1
        assert [peer["subjectAltName"] for peer in server.peers] == [
            (("email", "client@test"),), (("email", "else@test"),)
        ]  # fmt: skip
        one.fails(OSError, look, server.target(), "stranger")  # with TLS 1.3 it is told after the handshake
        server.wait_open(2)
        assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in server.ends[-1]


def test_options_that_are_wrong_are_refused_at_once(directory: Path, authority: Authority) -> None:
    nothing = directory / "nothing.pem"
    nothing.write_text("no certificate")
    for given, why in [
        ({"cafile": str(directory / "missing")}, "option 'cafile' has the value '.*missing'"),
        ({"cafile": nothing}, "a file with certificates in PEM format"),
        ({"certfile": str(nothing)}, "a certificate and its key in PEM format"),
        ({"keyfile": str(nothing)}, "one beside a certfile"),
        ({"alpn": "h2"}, "a sequence of protocol names"),
        ({"alpn": [""]}, "names of protocols"),
        ({"server_hostname": "."}, "a host name"),
        ({"label": "not this"}, "up to 40 letters"),
        ({"context": object()}, "an ssl.SSLContext"),
        ({"context": ssl.create_default_context(), "cafile": authority.file}, "nothing, where there is a context"),
    ]:
        with pytest.raises(OptionError, match=why):
            TlsDriver(**given)  # type: ignore[arg-type]
    driver = TlsDriver(cafile=authority.file, label="copied")
    assert pickle.loads(pickle.dumps(driver)).name == driver.name
    with pytest.raises(TypeError, match="make it in each process"):
        pickle.dumps(TlsDriver(context=ssl.create_default_context()))


# --- resumption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "newest"), [("shared", ssl.TLSVersion.TLSv1_3), ("local", ssl.TLSVersion.TLSv1_2)])
def test_a_second_connection_resumes_the_first_ones_session(
    harness: Harness, server: TlsServer, authority: Authority, mode: str, newest: ssl.TLSVersion
) -> None:
    solo = harness.start(SHAREDPOOL_MODE=mode)
    solo.attach(max_connections=2)
    solo.call(make_driver, "a", newest=newest, cafile=authority.file)
    found = [solo.call(look, server.target(), "a", discard=bool(i)) for i in range(3)]
    assert [each.number for each in found] == [1, 1, 2]
    again = solo.call(look, server.target(), "a")
    assert (found[0].resumed, found[2].resumed, again.resumed) == (False, True, True)
    assert found[0].version == again.version == newest.name.replace("_", ".")
    assert server.resumed == [False, True, True]


# --- between leases ---------------------------------------------------------------------------------------------------


def test_tickets_of_an_idle_connection_are_read_and_what_nobody_asked_for_is_never_lent(
    solo: Worker, server: TlsServer
) -> None:
    target = server.target()
    solo.attach(max_connections=1)
    solo.call(prewarm, target)
    wait_until(lambda: server.shaken == 1, what="a connection was made in advance, and its tickets sent")
    solo.wait_stats(idle=1)
    assert solo.use(target) == 1
    assert solo.stats().prewarmed == 1
    server.say(b"9 hello\n")
    assert solo.use(target) == 2
    label = solo.checkout(target)
    solo.call(commands.send, label, b"!bytes 100\n")
    assert solo.call(receive, label, 10) == b"x" * 10
    solo.checkin(label)
    assert solo.use(target) == 3, "with 91 bytes decrypted and unread it is closed"
    label = solo.checkout(target)
    solo.call(commands.send, label, b"!bytes 50000\n")
    assert solo.call(receive, label, 10) == b"x" * 10
    solo.checkin(label)
    assert solo.use(target) == 4, "in the midst of records"
    stats = solo.stats()
    assert (stats.closes["ended"], stats.closes["unclean"], server.peak) == (1, 2, 1)


def prewarm(state: State, target: Target) -> None:
    commands.pool_of(state, "default").prewarm(target.host, target.port, target.transport, 1)


def receive(state: State, label: str, length: int) -> bytes:
    conn = state.leases[label].conn
    conn.settimeout(20)
    return bytes(conn.recv(length))


def misuse(state: State, target: Target) -> tuple[str, list[str]]:
    """What happens to who uses a connection after giving it back, and to the next user."""
    pool = commands.pool_of(state, "default")
    lease = pool.checkout(*target)
    conn: Any = lease.conn
    commands.exchange_over(conn, "mine")
    conn.settimeout(None)
    told: list[str] = []

    def wait() -> None:
        try:
            told.append(repr(conn.recv(100)))
        except OSError as error:
            told.append(str(error.strerror))

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: waits(thread), what="the thread waits in poll")
    lease.checkin()
    with contextlib.suppress(OSError):
        told.append(repr(conn.recv(100)))
    for call in (functools.partial(conn.shutdown, socket.SHUT_RDWR), conn.goodbye):
        with contextlib.suppress(OSError):
            call()
    with pool.connection(*target) as again:
        assert again is conn
        number = commands.exchange_over(again, "yours")
    thread.join(20)
    with pool.connection(*target) as again:
        assert commands.exchange_over(again, "mine") == number
    with contextlib.suppress(OSError):
        conn.sendall(b"stale\n")
        told.append("sent")
    with pool.connection(*target) as again:
        other = commands.exchange_over(again, "theirs")
    return f"{number} {other}", told


def waits(thread: threading.Thread) -> bool:
    """Whether the kernel has it asleep."""
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_an_object_given_back_is_harmless_also_to_the_next_user_in_its_own_process(
    one: Worker, server: TlsServer
) -> None:
    one.attach(max_connections=1)
    numbers, told = one.call(misuse, server.target())
    assert numbers == "1 2", "records that were lost cost the connection, and nobody an answer"
    assert told == ["this connection was given back while it was read from"]
    assert server.peak == 1


class Watching(TlsDriver):
    """Sees what the pool knows when goodbye is said."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state
        self.seen: list[int] = []

    def goodbye(self, conn: Any) -> None:
        self.seen.append(self._state.pools["default"].stats().in_use)
        super().goodbye(conn)


def say_goodbye(state: State, target: Target) -> list[int]:
    driver = state.things["driver watching"] = Watching(state)
    look(state, target, "watching", discard=True)
    return driver.seen


def test_goodbye_is_said_by_who_ends_a_connection(solo: Worker, server: TlsServer) -> None:
    target = server.target()
    solo.attach(max_connections=4)
    assert solo.call(say_goodbye, target)[0] == 1, "before anybody else hears of it, and closes"
    server.wait_open(0)
    label = solo.checkout(target)
    solo.call(close_object, label)
    solo.checkin(label)
    server.wait_open(0)
    kept, idle = solo.checkout(target), solo.checkout(target)
    solo.checkin(idle)
    assert kept
    solo.call(close_pool)
    server.wait_open(0)
    assert server.ends == ["said"] * 4


def close_object(state: State, label: str) -> None:
    state.leases[label].conn.close()


def close_pool(state: State) -> None:
    state.pools["default"].close()


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def _tasks(target: Target, port: int) -> list[Any]:
    loop = asyncio.get_running_loop()
    found: list[Any] = []
    async with aio.attach("default") as pool:

        async def ask(text: str) -> int:
            async with pool.connection(*target) as conn:
                await loop.sock_sendall(conn, text.encode() + b"\n")
                data = b""
                while not data.endswith(b"\n"):
                    data += await loop.sock_recv(conn, 65536)
                return commands.parse_answer(data[:-1], text)

        found.append(sorted(set(await asyncio.gather(*(ask(f"text {i}") for i in range(40))))))
        assert await ask("z" * 3_000_000) in found[0]
        for _ in range(2):
            async with pool.stream(f"ssl://127.0.0.1:{port}") as (reader, writer):
                writer.write(b"!bytes 2000000\n")
                writer.writelines([b"two", b"\n"])
                await writer.drain()
                assert await reader.readexactly(2_000_001)
                line = await reader.readline()
                found.append(int(line.split()[0]))
                assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        async with pool.stream(*target) as (reader, writer):
            writer.write(b"!bytes 10\n")
            await reader.readexactly(5)
        with contextlib.suppress(TimeoutError):
            async with pool.connection(*target) as conn, asyncio.timeout(0.05):
                await loop.sock_recv(conn, 1)
        found.append(await ask("after"))
    return found


def run_tasks(state: State, target: Target, port: int) -> list[Any]:
    return asyncio.run(_tasks(target, port))


def test_tasks_use_the_same_connections_as_sockets_and_as_streams(solo: Worker, server: TlsServer) -> None:
    solo.attach(max_connections=1)
    assert solo.use(server.target()) == 1
    assert solo.call(run_tasks, server.target(), server.port) == [[1], 1, 1, 3]
    assert solo.use(server.target()) == 3, "unread at the end of a block, and cancelled: closed"
    assert (server.peak, solo.stats().closes["unclean"] + solo.stats().closes["discarded"]) == (1, 2)
