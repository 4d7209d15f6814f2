"""Which connection a checkout gets: its own idle one, another process's, a new one, or one in the place of another."""

from __future__ import annotations

import pytest

from tests.support.backend import Backend, Target
from tests.support.workers import Worker


@pytest.fixture(params=["tcp", "unix"])
def target(request: pytest.FixtureRequest, backend: Backend) -> Target:
    return backend.tcp if request.param == "tcp" else backend.listen_unix()


def test_a_process_uses_its_own_idle_connection_again(worker: Worker, backend: Backend, target: Target) -> None:
    worker.attach(max_connections=5)
    assert [worker.use(target) for _ in range(10)] == [1] * 10
    assert (backend.accepted, backend.peak) == (1, 1)
    stats = worker.stats()
    assert (stats.opens, stats.reuses, stats.takeovers, stats.handoffs) == (1, 9, 0, 0)


def test_the_connection_used_last_is_used_first(worker: Worker, backend: Backend, target: Target) -> None:
    labels = [worker.checkout(target) for _ in range(3)]
    for label in (labels[1], labels[0], labels[2]):
        worker.checkin(label)
    assert [worker.exchange(worker.checkout(target)) for _ in range(3)] == [3, 1, 2]


def test_a_process_takes_over_the_idle_connection_of_another(
    two: list[Worker], backend: Backend, target: Target
) -> None:
    two[0].attach(max_connections=5)
    assert [two[i % 2].use(target) for i in range(20)] == [1] * 20
    assert (backend.accepted, backend.peak) == (1, 1)
    stats = two[0].stats()
    assert (stats.opens, stats.reuses, stats.takeovers, stats.handoffs) == (1, 0, 19, 0)


def test_a_takeover_does_not_wake_the_owner(two: list[Worker], backend: Backend, target: Target) -> None:
    two[0].attach(max_connections=5)
    two[0].use(target)
    two[0].stop()
    assert two[1].use(target) == 1
    two[0].resume()
    assert two[0].use(target) == 1
    assert backend.accepted == 1


def test_hosts_are_case_insensitive(two: list[Worker], backend: Backend, tcp: Target) -> None:
    assert two[0].use(Target("localhost", tcp.port)) == 1
    assert two[1].use(Target("LocalHost", tcp.port)) == 1
    assert backend.accepted == 1


def test_a_url_names_the_same_connection_as_its_parts(
    worker: Worker, backend: Backend, tcp: Target, unix: Target
) -> None:
    from tests.system.test_local import use_url

    assert worker.call(use_url, tcp.url) == worker.use(tcp)
    assert backend.accepted == 1


def test_different_addresses_never_share(worker: Worker, backend: Backend, tcp: Target, unix: Target) -> None:
    """hackney #322, #355, #566, #570: a request went to the wrong server."""
    other = backend.listen("other")
    targets = [tcp, other, unix] * 3
    assert [worker.use(target) for target in targets] == [1, 2, 3] * 3
    assert backend.counts()["accepted_by"] == {"tcp": 1, "other": 1, "unix": 1}


@pytest.mark.parametrize("owner_stopped", [False, True])
def test_at_the_cap_an_idle_connection_of_another_address_gives_up_its_permit(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target, owner_stopped: bool
) -> None:
    two[0].attach(max_connections=1)
    two[0].use(tcp)
    if owner_stopped:
        two[0].stop()
    assert two[1].use(unix) == 2
    if owner_stopped:
        two[0].resume()
    assert two[0].use(tcp) == 3
    assert backend.peak == 1
    assert two[0].stats().evictions == 2


def test_below_the_cap_nothing_is_evicted(worker: Worker, backend: Backend, tcp: Target, unix: Target) -> None:
    worker.attach(max_connections=2)
    worker.use(tcp)
    worker.use(unix)
    assert (worker.stats().idle, worker.stats().evictions, backend.open) == (2, 0, 2)


def test_an_idle_connection_is_closed_by_the_arbiter_after_its_time(
    worker: Worker, backend: Backend, target: Target
) -> None:
    """hackney #775: each expiry stalled the pool for 100 ms; here its owner needn't even run."""
    worker.attach(max_connections=5, idle_timeout=0.3)
    labels = [worker.checkout(target) for _ in range(3)]
    for label in labels:
        worker.checkin(label)
    worker.stop()
    backend.wait_open(0)
    worker.resume()
    worker.wait_stats(idle=0, closing=0, expired=3)
    assert worker.use(target) == 4


def test_a_connection_in_use_does_not_expire(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=2, idle_timeout=0.2)
    kept = worker.checkout(tcp)
    worker.use(tcp)
    worker.wait_stats(idle=0, closing=0, expired=1)
    assert worker.exchange(kept) == 1
    assert backend.ids() == [1]


def test_without_an_idle_timeout_nothing_expires(two: list[Worker], backend: Backend, tcp: Target) -> None:
    two[0].attach("kept", max_connections=2, idle_timeout=None)
    two[1].attach("expiring", max_connections=2, idle_timeout=0.2)
    assert two[0].use(tcp, pool="kept") == 1
    assert two[1].use(tcp, pool="expiring") == 2
    two[1].wait_stats("expiring", expired=1, closing=0)
    assert two[0].use(tcp, pool="kept") == 1
