"""New code meets a live segment of the previous layout: arbiters and workers of two versions, as real processes.

The older version is this one with `layout.LAYOUT` and `layout.SERVED` set back in the process's memory.
"""

from __future__ import annotations

import pytest

from sharedpool import AttachRefused, PoolTimeout, launch, layout, segment
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.test_succession import kill_arbiter, successor

OLD = 2
_AGED = "from sharedpool import layout\nlayout.LAYOUT, layout.SERVED = {}, ({},)\nfrom sharedpool.manager import main\n"


def grow_old(state: State, number: int) -> None:
    """From now on this process is of the version that has only this layout, and so are the arbiters it starts."""
    vars(layout).update(LAYOUT=number, SERVED=(number,))
    segment.identity.cache_clear()
    boot = launch._BOOT.replace("from sharedpool.manager import main\n", _AGED.format(number, number))
    vars(launch).update(_BOOT=boot)


def install_new(state: State) -> None:
    """The package was replaced: this process goes on as it is, but the arbiters that it starts are new."""
    boot = launch._BOOT.replace(_AGED.format(layout.LAYOUT, layout.LAYOUT), "from sharedpool.manager import main\n")
    vars(launch).update(_BOOT=boot)


@pytest.fixture
def old(harness: Harness) -> Worker:
    """A worker of the older version, whose arbiter and pool are of that version, too."""
    worker = harness.start()
    worker.call(grow_old, OLD)
    worker.attach(max_connections=4)
    return worker


def replace_arbiter(scope: Scope, worker: Worker) -> None:
    """The older arbiter is killed and succeeded by a new one, which `worker`'s process starts."""
    worker.call(install_new)
    successor(worker, kill_arbiter(scope))


def test_a_live_pool_of_the_previous_layout_is_served_and_moved_after_its_last_old_process(
    old: Worker, harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    held = [old.checkout(tcp), old.checkout(tcp)]
    old.checkin(held.pop())
    replace_arbiter(scope, old)
    assert old.exchange(held[0]) == 1, "its lease goes on"
    new, late = harness.start_many(2)
    new.attach(max_connections=4, max_per_key=2)
    assert new.use(tcp) == 2, "the idle connection is taken over"
    labels = [new.checkout(tcp) for _ in range(3)]
    assert backend.open == 4, "the limit per key is not in force beside an older process"
    info = old.call(commands.library, "find_pool", "default")
    assert (info.options.max_connections, info.options.max_per_key) == (4, None)
    late.call(grow_old, OLD)
    late.attach(max_connections=4)
    late.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0)  # it is let in: the table is as old as it is
    late.kill()
    for label in labels[:2]:
        new.checkin(label)
    old.checkin(held[0])
    idle = new.wait_stats(idle=3, in_use=1).idle
    old.kill()
    wait_until(lambda: new.stats().idle < idle)  # what is above the limit per key, and only that
    new.checkin(labels[2])
    new.wait_stats(idle=2, in_use=0, closing=0)
    again = [new.checkout(tcp), new.checkout(tcp)]
    new.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.05)
    assert backend.accepted == 4, "no connection was opened anew"
    assert len(again) == 2


def test_moving_closes_no_idle_connection(
    old: Worker, harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    new = harness.start()
    held = [old.checkout(tcp) for _ in range(3)]
    replace_arbiter(scope, old)
    for label in held:
        old.checkin(label)
    new.attach(max_connections=4)
    old.kill()
    late = harness.start()
    late.call(grow_old, OLD)

    new.wait_stats(processes=1)
    late.attach(max_connections=4)
    error = late.fails(AttachRefused, commands.use, tcp)
    assert "has layout 2, pool 'default' has 3: restart the processes that run the older version" in str(error)
    assert new.use(tcp) in (1, 2, 3)
    assert (new.stats().idle, backend.accepted) == (3, 3)


def test_a_new_process_attaches_to_an_arbiter_of_the_previous_version(
    old: Worker, harness: Harness, backend: Backend, tcp: Target
) -> None:
    number = old.use(tcp)
    new = harness.start()
    new.attach(max_connections=4)
    assert new.use(tcp) == number


def test_a_pool_of_an_unknown_layout_is_refused_until_its_processes_have_gone(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    strange, new = harness.start_many(2)
    strange.call(grow_old, 9)
    strange.attach(max_connections=1)
    held = strange.checkout(tcp)
    replace_arbiter(scope, strange)
    new.attach(max_connections=1)
    error = new.fails(AttachRefused, commands.use, tcp)
    assert f"in use by the processes {strange.pid}" in str(error)
    assert "layout 9" in str(error)
    assert "restart" in str(error)
    assert strange.exchange(held) == 1
    assert backend.peak == 1
    strange.kill()
    assert new.use(tcp) == 2
