"""What `sharedpool.testing` gives to the tests of applications, in local mode; over processes: tests/system."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

import sharedpool
from sharedpool.testing import assert_no_leases, exhausted, local_mode


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def local() -> Iterator[None]:
    with local_mode():
        yield


def test_local_mode_starts_with_nothing_and_leaves_nothing(address: tuple[str, int]) -> None:
    before = dict(os.environ)
    pool = sharedpool.attach("api", max_connections=3)
    for _ in range(2):
        with local_mode():
            assert os.environ["SHAREDPOOL_MODE"] == "local"
            assert sharedpool.find_pool("api") is None
            lease = pool.checkout(*address)
            assert (pool.stats().opens, pool.stats().in_use) == (1, 1)
        with pytest.raises(sharedpool.LeaseError):
            lease.checkin()  # it ended with the block
    assert dict(os.environ) == before


def test_local_mode_forgets_the_pools_of_other_apps_too() -> None:
    with local_mode():
        sharedpool.attach("api", app="shop", max_connections=3).open()
    with local_mode():
        pool = sharedpool.attach("api", app="shop", max_connections=5).open()
        assert pool.stats().max_connections == 5
        assert pool.stats().processes == 1


def test_local_mode_ends_after_an_exception_as_well() -> None:
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), local_mode():
        sharedpool.attach("api", max_connections=3).open()
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_no_leases_are_found_where_all_were_given_back(local: None, address: tuple[str, int]) -> None:
    pool = sharedpool.attach(max_connections=3)
    assert_no_leases(pool)  # never used
    with pool.connection(*address):
        pass
    assert_no_leases(pool)


def test_a_lease_in_force_is_told_with_its_address_process_and_thread(local: None, address: tuple[str, int]) -> None:
    pool = sharedpool.attach(max_connections=3)
    lease = pool.checkout(*address)
    with pytest.raises(AssertionError) as told:
        assert_no_leases(pool)
    text = str(told.value)
    assert "pool 'default' has 1 leases in force" in text
    assert f"tcp://{address[0]}:{address[1]} for " in text
    assert f"process {os.getpid()} (this one), thread 'MainThread'" in text
    lease.checkin()
    assert_no_leases(pool)


def test_leases_may_be_given_some_time_to_come_back(local: None, address: tuple[str, int]) -> None:
    pool = sharedpool.attach(max_connections=3)
    lease = pool.checkout(*address)
    asked = threading.Event()

    def give_back() -> None:
        asked.wait(30)
        lease.checkin()

    thread = threading.Thread(target=give_back)
    thread.start()
    asked.set()
    assert_no_leases(pool, wait=30)
    thread.join()


def test_a_permit_held_is_a_lease(local: None) -> None:
    permit = sharedpool.permit("jobs", max_connections=2)
    with permit, pytest.raises(AssertionError, match="permit:jobs for"):
        assert_no_leases(permit)
    assert_no_leases(permit)


def test_a_forgotten_lease_is_given_back_by_the_collector_and_is_none(local: None, address: tuple[str, int]) -> None:
    pool = sharedpool.attach(max_connections=3)
    lease = pool.checkout(*address)
    del lease
    assert_no_leases(pool)


def test_an_exhausted_pool_gives_nothing_and_then_everything_again(local: None, address: tuple[str, int]) -> None:
    pool = sharedpool.attach(max_connections=3)
    mine = pool.checkout(*address)
    with exhausted(pool):
        assert pool.stats().in_use == 3
        with pytest.raises(sharedpool.PoolTimeout):
            pool.checkout(*address, checkout_timeout=0.01)
        mine.checkin()  # one more than the block has taken: the rest of the cap is free for others
        pool.checkout(*address, checkout_timeout=0.01).checkin()
    assert_no_leases(pool)
    assert pool.stats().max_connections == 3


def test_idle_connections_make_room_for_the_exhaustion(local: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool = sharedpool.attach(max_connections=2, close_timeout=0.05)
        with pool.connection(*server.getsockname()):
            pass
        assert pool.stats().idle == 1
        with exhausted(pool):
            assert (pool.stats().in_use, pool.stats().idle) == (2, 0)


def test_a_permit_can_be_exhausted(local: None) -> None:
    permit = sharedpool.permit("jobs", max_connections=2, checkout_timeout=0.01)
    with exhausted(permit), pytest.raises(sharedpool.PoolTimeout):
        permit.__enter__()
    with permit:
        pass


def test_what_cannot_be_exhausted_in_time_is_an_error_and_leaves_nothing_taken(
    local: None, address: tuple[str, int]
) -> None:
    """Somebody else gives back and takes all the time; here: an endless opening."""
    pool = sharedpool.attach(max_connections=1, close_timeout=60)
    with pool.connection(*address):
        pass  # idle: it is to be closed for the block, but its remote never closes
    with pytest.raises(AssertionError, match=r"could not be exhausted in 0\.2 s"), exhausted(pool, wait=0.2):
        pass
    assert pool.stats().in_use == 0
