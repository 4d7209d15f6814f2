"""Closing to the end: a permit is free when the remote has closed, too, and not before."""

from __future__ import annotations

import pytest

from sharedpool import PoolTimeout
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.waiting import wait_until
from tests.support.workers import Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


def test_a_permit_is_taken_until_the_remote_has_closed_too(two: list[Worker], backend: Backend, tcp: Target) -> None:
    backend.do("hold_closes")
    two[0].attach(max_connections=1, close_timeout=60)
    two[0].discard(two[0].checkout(tcp))
    two[0].wait_stats(closing=1, in_use=0)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    wait_until(lambda: backend.do("connections")[0]["ended"])
    two[0].fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.2)
    assert not waiting.done
    assert backend.do("release_closes") == 1
    assert two[1].exchange(waiting.result()) == 2
    stats = two[0].wait_stats(closing=0, in_use=1)
    assert (stats.closed, stats.closed_unconfirmed) == (1, 0)
    assert backend.peak == 1


@pytest.mark.parametrize("death", [False, True])
def test_a_remote_that_never_closes_holds_its_permit_for_close_timeout_only(
    two: list[Worker], backend: Backend, tcp: Target, death: bool
) -> None:
    backend.do("hold_closes")
    two[1].attach(max_connections=1, close_timeout=0.3)
    two[1].stats()
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    if death:
        two[0].kill()
    else:
        two[0].discard(label)
    assert two[1].exchange(waiting.result()) == 2
    assert two[1].wait_stats(closing=0, in_use=1).closed_unconfirmed == 1
    assert backend.peak == 2  # the back end's own doing, and counted as such


def test_a_killed_workers_permit_is_taken_until_the_remote_has_closed_too(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    backend.do("hold_closes")
    two[1].attach(max_connections=1, close_timeout=60)
    two[1].stats()
    two[0].checkout(tcp)
    (waiting,) = line_up(two[1], [(two[1], tcp)])
    two[0].kill()
    wait_until(lambda: backend.do("connections")[0]["ended"])
    two[1].wait_stats(closing=1, waiting=1)
    assert backend.do("release_closes") == 1
    assert two[1].exchange(waiting.result()) == 2
    assert backend.peak == 1


def test_an_evicted_connections_permit_is_taken_until_the_remote_has_closed_too(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    other = backend.listen("other")
    backend.do("hold_closes")
    two[0].attach(max_connections=1, close_timeout=60)
    two[0].use(tcp)
    opening = two[1].begin_checkout(other, checkout_timeout=None)
    wait_until(lambda: backend.do("connections")[0]["ended"])
    assert not opening.done
    assert backend.ids() == [1]
    assert backend.do("release_closes") == 1
    assert two[1].exchange(opening.result()) == 2
    assert backend.peak == 1


def test_a_slow_close_holds_nobody_else_up(two: list[Worker], backend: Backend, tcp: Target) -> None:
    """hackney #780, #788: what one connection needed blocked the pool for all."""
    backend.do("hold_closes")
    two[0].attach(max_connections=2, close_timeout=60)
    two[0].discard(two[0].checkout(tcp))
    two[0].wait_stats(closing=1)
    assert [worker.use(tcp) for worker in two * 10] == [2] * 20
    assert two[0].stats().closing == 1
    assert backend.do("release_closes") == 1
    two[0].wait_stats(closing=0)
    assert backend.peak == 2


def test_bytes_under_way_to_us_do_not_keep_a_connection_from_closing(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    """The remote is in the middle of a long answer when the lease is discarded."""
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    two[0].exchange(label)
    backend.say("x" * 200_000)
    two[0].discard(label)
    assert two[1].use(tcp, checkout_timeout=20) == 2
    assert backend.ids() == [2]
