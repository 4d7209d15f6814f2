"""Two settings that lead to different servers, users or ways of trust never have equal keys; docs/keys.md has them."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from sharedpool import drivers, segment
from sharedpool.drivers import places
from sharedpool.drivers.tcp import NODELAY, TcpDriver
from sharedpool.drivers.tls import TlsDriver
from sharedpool.drivers.unix import UnixDriver
from sharedpool.integrations.httpx import AsyncSharedTransport, SharedTransport
from sharedpool.integrations.redis import SharedConnectionPool
from sharedpool.postgres.conninfo import resolve
from tests.conftest import seeded  # noqa: F401 - a fixture

SECRET = bytes(range(16))
SETTINGS = hypothesis.settings(
    max_examples=200, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip

#: Texts made of what separates the parts of an address, or of none at all.
TEXTS = st.text(alphabet=st.sampled_from(list("ab0,@:/?#&=%()[]\0\"'\\ \udc80é")), max_size=6)


def tries(rng: random.Random, check: Callable[..., None], **given: Any) -> None:
    """Run a property with a seed that is printed."""
    hypothesis.seed(rng.randrange(2**32))(SETTINGS(hypothesis.given(**given)(check)))()


def key(driver: Any, host: str, port: int) -> int:
    return segment.key_of(SECRET, drivers.key(driver, *driver.address(host, port)))


def test_no_part_of_an_address_can_pass_for_another(seeded: random.Random) -> None:  # noqa: F811
    address = st.tuples(TEXTS, TEXTS, st.integers(0, 65535), TEXTS)

    def check(one: Any, other: Any) -> None:
        keys = segment.key_of(SECRET, one), segment.key_of(SECRET, other)
        assert (keys[0] == keys[1]) == (one == other)

    tries(seeded, check, one=address, other=address)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a\0b", "c", 1, ""), ("a", "b\0c", 1, "")),
        (("a", "b\x001", 1, ""), ("a", "b", 1, "1\x001")),
        (("tcp", "h", 1, "x"), ("tcp", "h", 1, "")),
    ],
)
def test_a_separator_within_a_part_separates_nothing(one: Any, other: Any) -> None:
    assert segment.key_of(SECRET, one) != segment.key_of(SECRET, other)


def test_tcp_connections_with_other_socket_options_or_another_source_are_others(
    seeded: random.Random,  # noqa: F811
) -> None:
    option = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3) | st.binary(max_size=3))
    setting = st.tuples(
        st.lists(option, max_size=2).map(tuple), st.none() | st.tuples(st.sampled_from("ab"), st.integers(0, 1))
    )

    def check(one: Any, other: Any) -> None:
        equal = key(TcpDriver("", *one), "h", 1) == key(TcpDriver("", *other), "h", 1)
        named = key(TcpDriver("tcp", *one), "h", 1) == key(TcpDriver("tcp", *other), "h", 1)
        assert equal == named == (one == other)

    tries(seeded, check, one=setting, other=setting)


def test_settings_are_part_of_the_key_whatever_name_is_given() -> None:
    device = (*NODELAY, (socket.SOL_SOCKET, 25, b"eth1"))  # SO_BINDTODEVICE
    made = [TcpDriver(), TcpDriver("tcp", device), TcpDriver("tcp", source=("127.0.0.9", 0)), TcpDriver("other")]
    assert len({key(driver, "10.0.0.5", 80) for driver in made}) == 4
    assert key(TcpDriver("tcp", NODELAY), "10.0.0.5", 80) == key(drivers.find("tcp"), "10.0.0.5", 80)
    assert TcpDriver(options=device).name != "tcp", "people can tell them apart, too"


class Tunnel(TcpDriver):
    """One's own, which leads somewhere else and says nothing about it."""


class Named(Tunnel):
    identity = "by way of b"


def test_a_class_of_ones_own_is_not_the_one_that_it_is_made_of() -> None:
    class Local(Tunnel):
        pass

    keys = {key(driver, "10.0.0.5", 80) for driver in (TcpDriver(), Tunnel(), Named(), Local())}
    assert len(keys) == 4
    assert key(Tunnel(), "10.0.0.5", 80) == key(Tunnel(), "10.0.0.5", 80)


def test_names_are_equal_in_any_case_but_interfaces_are_not() -> None:
    assert key(TcpDriver(), "DB.Example", 80) == key(TcpDriver(), "db.example", 80)
    assert TcpDriver().address("FE80::1%Eth0", 80) == ("fe80::1%Eth0", 80)
    assert len({key(TcpDriver(), f"fe80::1%{zone}", 80) for zone in ("eth0", "Eth0", "eth1")}) == 3


@pytest.mark.parametrize(
    ("driver", "host", "matters"),
    [
        (TcpDriver(), "127.0.0.1", [places.NETWORK]),
        (TcpDriver(), "fe80::1%eth0", [places.NETWORK]),
        (TcpDriver(), "db", [places.NETWORK, places.NAMES]),
        (TcpDriver(), "127.1", [places.NETWORK, places.NAMES]),
        (UnixDriver(), "/run/x.sock", [places.FILES]),
        (TlsDriver(), "db", []),
        (drivers.find("permit"), "db", []),
    ],
)
def test_of_its_place_an_address_has_what_decides_where_it_leads(driver: Any, host: str, matters: list[str]) -> None:
    assert list(drivers.matters(driver, host)) == matters


def test_a_driver_that_says_nothing_has_all_of_its_place() -> None:
    class Plain:
        name, moves, connects = "plain", True, True

    assert set(drivers.matters(Plain(), "x")) == {places.NETWORK, places.NAMES, places.FILES}  # type: ignore[arg-type]


def test_what_the_resolver_is_told_by_the_environment_counts_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[int]:
        return [key(TcpDriver(), host, 80) for host in ("10.0.0.5", "db")]

    before = keys()
    monkeypatch.setenv("LOCALDOMAIN", "b.example")
    assert [one == other for one, other in zip(before, keys(), strict=True)] == [True, False]


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [SharedTransport, AsyncSharedTransport])
def test_a_relative_path_for_httpx_is_one_from_where_its_transport_was_made(
    transport: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = transport(uds="x.sock")
    monkeypatch.chdir("/")
    import httpx

    assert made._where(httpx.Request("GET", "http://a/"))[:2] == (str(tmp_path / "x.sock"), 0)


def test_a_relative_path_for_redis_is_one_from_where_its_pool_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redis.connection import UnixDomainSocketConnection

    hosts = []
    for directory in (tmp_path, Path("/")):
        monkeypatch.chdir(directory)
        made = SharedConnectionPool("cache", connection_class=UnixDomainSocketConnection, path="x.sock")
        hosts.append(made._transport)
    monkeypatch.chdir("/tmp")
    assert [host._arguments["path"] for host in hosts] == [str(tmp_path / "x.sock"), "/x.sock"]
    assert hosts[0].host != hosts[1].host


# --- Redis ------------------------------------------------------------------------------------------------------------


def test_a_host_of_redis_cannot_pass_for_a_user_and_a_host() -> None:
    pools = [SharedConnectionPool("cache", host="a@b"), SharedConnectionPool("cache", host="b", username="a")]
    assert len({key(pool._transport, pool._transport.host, 0) for pool in pools}) == 2


def test_a_connection_class_of_ones_own_for_redis_is_not_the_plain_one() -> None:
    from redis.connection import Connection

    class Mine(Connection):
        pass

    made = [SharedConnectionPool("cache", connection_class=kind)._transport for kind in (Connection, Mine)]
    assert len({key(transport, transport.host, 0) for transport in made}) == 2


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)


def test_no_setting_of_a_session_can_pass_for_another(
    seeded: random.Random,  # noqa: F811
    no_environment: None,
) -> None:
    names = ("host", "hostaddr", "port", "user", "dbname", "options", "application_name", "require_auth", "sslmode")
    params = st.dictionaries(st.sampled_from(names), TEXTS.filter(bool), max_size=4)

    def effective(given: dict[str, str]) -> dict[str, str]:
        return {"port": "5432", **given, "dbname": given.get("dbname") or given["user"]}

    def check(one: dict[str, str], other: dict[str, str]) -> None:
        one, other = {"user": "u", **one}, {"user": "u", **other}
        equal = resolve(one, 170000).identity == resolve(other, 170000).identity
        assert equal == (effective(one) == effective(other))

    tries(seeded, check, one=params, other=params)


def test_who_logs_in_cannot_be_written_as_where(no_environment: None) -> None:
    one, other = {"user": "a@b", "host": "c", "dbname": "d"}, {"user": "a", "host": "b@c", "dbname": "d"}
    assert resolve(one, 170000).address == resolve(other, 170000).address
    assert resolve(one, 170000).identity != resolve(other, 170000).identity


def test_how_a_server_must_prove_itself_is_part_of_the_key_and_no_secret_is(
    no_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"user": "u", "host": "h", "dbname": "d"}
    usual = resolve(plain, 170000)
    secrets = {"password": "hunter2", "passfile": "/x", "sslpassword": "hunter2", "scram_client_key": "hunter2"}
    assert resolve({**plain, **secrets}, 170000).identity == usual.identity
    strict = resolve({**plain, "require_auth": "scram-sha-256"}, 170000)
    assert strict.identity != usual.identity
    assert strict.address == usual.address, "a pool's name is made of that"
    monkeypatch.setenv("PGREQUIREAUTH", "scram-sha-256")
    assert resolve(plain, 170000).identity == strict.identity


@pytest.mark.parametrize(
    ("params", "matters"),
    [
        ({"host": "10.0.0.5"}, {places.NETWORK}),
        ({"host": "db"}, {places.NETWORK, places.NAMES}),
        ({"host": "db", "hostaddr": "10.0.0.5"}, {places.NETWORK}),
        ({"host": "/run/postgresql"}, {places.FILES}),
        ({"host": "@abstract"}, {places.NETWORK}),
    ],
)
def test_of_its_place_a_session_has_what_decides_where_it_leads(
    no_environment: None, params: dict[str, str], matters: set[str]
) -> None:
    assert set(resolve({"user": "u", **params}, 170000).matters) == matters
