"""What users' own code and tests do with handles, leases and permits; the same pure and compiled."""

from __future__ import annotations

import copy
import inspect
import pickle
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from unittest import mock

import pytest

import sharedpool
from sharedpool import OptionError, testing
from sharedpool.pool import configure, parse_url


@pytest.fixture
def pool() -> Iterator[sharedpool.Pool[socket.socket]]:
    with testing.local_mode():
        yield sharedpool.attach("handles", max_connections=2, app="shop")


def test_tests_can_replace_methods_of_the_class_and_of_one_handle(pool: sharedpool.Pool[socket.socket]) -> None:
    with mock.patch.object(sharedpool.Pool, "checkout", return_value="of the class"):
        assert pool.checkout("host", 1) == "of the class"
    with mock.patch.object(pool, "connection", return_value="of the handle"):
        assert pool.connection("host", 1) == "of the handle"
    assert pool.connection("host", 1) != "of the handle"


def test_a_mock_has_what_a_handle_has() -> None:
    fake = mock.create_autospec(sharedpool.Pool, instance=True)
    assert isinstance(fake, sharedpool.Pool)
    with pytest.raises(AttributeError):
        fake.check_out("host", 1)
    assert list(inspect.signature(sharedpool.Pool.checkout).parameters)[:4] == ["self", "host", "port", "transport"]


def test_a_copied_or_unpickled_handle_is_another_one_on_the_same_pool(pool: sharedpool.Pool[socket.socket]) -> None:
    pool.open()
    for other in (copy.copy(pool), copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert (other.name, other.app, other.transport) == (pool.name, "shop", "tcp")
        assert other.declares
        assert other.attached is None
        assert other.stats().max_connections == 2


def test_a_configuration_makes_a_pool_and_changes_none() -> None:
    with testing.local_mode():
        configure("configured", {"max_connections": 3})
        assert sharedpool.attach("configured").stats().max_connections == 3
        configure("configured", {"max_connections": 4})
        assert sharedpool.attach("configured").stats().max_connections == 3
        with pytest.raises(sharedpool.PoolNotFound):
            sharedpool.attach("configured", app="other").stats()
    with testing.local_mode():
        assert sharedpool.attach("configured", max_connections=5).stats().max_connections == 5


def test_a_lease_cannot_be_copied_or_pickled() -> None:
    with testing.local_mode():
        permits = sharedpool.permit("handles", max_connections=1)
        lease = permits.pool.checkout("handles")
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                attempt(lease)
        assert lease.in_force
        lease.checkin()


def test_none_is_no_lease(pool: sharedpool.Pool[socket.socket]) -> None:
    with pytest.raises(sharedpool.OptionError, match="'lease' has the value None"):
        pool.checkin(None)  # type: ignore[arg-type]


async def _coroutine() -> None: ...


def _generator() -> Iterator[int]:
    yield 1


async def _asynchronous() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("function", [_coroutine, _generator, _asynchronous])
def test_a_permit_decorates_nothing_that_works_after_its_call(function: Callable[[], object]) -> None:
    with pytest.raises(sharedpool.OptionError, match="does its work when it is called"):
        sharedpool.permit("handles", max_connections=1)(function)


@pytest.mark.parametrize("host", ["x" * 64, "ä" * 64, "\ud800"])
def test_a_name_that_cannot_be_encoded_cannot_be_reached(pool: sharedpool.Pool[socket.socket], host: str) -> None:
    with pytest.raises((sharedpool.ConnectFailed, sharedpool.OptionError)):
        pool.checkout(host, 80)
    assert pool.stats().opening == 0


def test_a_path_that_cannot_be_encoded_cannot_be_reached(pool: sharedpool.Pool[socket.socket]) -> None:
    with pytest.raises((sharedpool.ConnectFailed, sharedpool.OptionError)):
        pool.checkout("/\ud800", 0, "unix")
    assert pool.stats().opening == 0


def test_every_wrong_argument_of_a_call_says_so(pool: sharedpool.Pool[socket.socket]) -> None:
    wrong: list[Callable[[], object]] = [
        lambda: pool.checkout("host", 0),
        lambda: pool.checkout("", 1),
        lambda: pool.checkout("host", 1, "carrier pigeon"),
        lambda: pool.checkout("tcp://host:1", 2),
        lambda: pool.on("never", print),
        lambda: pool.on_notify(3),  # type: ignore[arg-type]
        lambda: pool.checkout("host", 1, priority="low"),
    ]
    for call in wrong:
        with pytest.raises(
            sharedpool.OptionError, match=r"option '\w+' has the value .*from the call.* allowed is "
        ) as error:
            call()
        assert error.value.__context__ is None


def test_an_address_of_ipv6_is_named_so_that_it_can_be_given_back(pool: sharedpool.Pool[socket.socket]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        with pool.connection("::1", port):
            pass
        (name,) = pool.key_stats()
        assert name == f"tcp://[::1]:{port}"
        with pool.connection(name):
            pass
        assert pool.stats().reuses == 1


def test_a_password_in_a_url_is_not_shown() -> None:
    with pytest.raises(OptionError) as caught:
        parse_url("tcp://user:secret@host:5", 0, None)
    assert "secret" not in f"{caught.value} {caught.value.value}"
    assert "//***@host:5" in str(caught.value)
