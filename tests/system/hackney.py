"""What a worker is told to do in the tests of hackney's functions: pools by their names alone, without handles."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import sharedpool
from tests.support import commands, processes
from tests.support.backend import Target
from tests.support.state import State
from tests.support.waiting import wait_until


def checkout(state: State, target: Target, **options: Any) -> str:
    """hackney_pool:checkout/4; gives the label under which the lease is kept."""
    lease = sharedpool.checkout(target.host, target.port, target.transport, **options)
    label = state.new_label()
    state.leases[label] = lease
    return label


def checkin(state: State, label: str) -> None:
    """hackney_pool:checkin/2."""
    sharedpool.checkin(state.leases[label])


def use(state: State, target: Target, text: str = "hello", **options: Any) -> int:
    """Checkout, exchange, checkin; gives the connection's number."""
    label = checkout(state, target, **options)
    number = commands.exchange(state, label, text)
    checkin(state, label)
    return number


def subscribe(state: State, pool: str = "default", label: str = "heard", attach: bool = True) -> None:
    """Keep what notify says from now on."""
    heard: list[Any] = []
    handle = commands.pool_of(state, pool)
    state.things[label] = heard
    state.things[label + " undo"] = handle.on_notify(heard.append)
    if attach:
        handle.open()


def subscribe_raising(state: State, error: str) -> None:
    """A callback that raises."""

    def fail(message: Any) -> None:
        raise {"ValueError": ValueError, "SystemExit": SystemExit}[error](f"cannot bear {message!r}")

    commands.pool_of(state, "default").on_notify(fail)


def unsubscribe(state: State, label: str = "heard") -> None:
    state.things[label + " undo"]()


def heard(state: State, number: int, label: str = "heard") -> list[Any]:
    """Wait until so many messages have come, and give them."""
    wait_until(lambda: len(state.things[label]) >= number)
    return list(state.things[label])


def heard_now(state: State, label: str = "heard") -> list[Any]:
    return list(state.things[label])


def keep(state: State, name: str, **options: Any) -> int:
    """Start the process of a child_spec; gives its pid."""
    process = sharedpool.child_spec(name, **options).process()
    process.start()
    state.things["keeper"] = process
    return int(process.pid)


def keep_spawned(state: State, name: str, **options: Any) -> None:
    """As `keep`, in an interpreter of its own."""
    import multiprocess

    spec = sharedpool.child_spec(name, **options)
    process = multiprocess.get_context("spawn").Process(target=spec.target, args=spec.args, kwargs=spec.kwargs)
    process.start()
    state.things["keeper"] = process


def terminate_keeper(state: State) -> int | None:
    """SIGTERM, and its exit status."""
    state.things["keeper"].terminate()
    state.things["keeper"].join(20)
    return state.things["keeper"].exitcode  # type: ignore[no-any-return]


def kill_arbiter(state: State, name: str = "default") -> int:
    """SIGKILL the arbiter; gives the pid that it had."""
    info = sharedpool.find_pool(name)
    assert info is not None
    os.kill(info.arbiter_pid, signal.SIGKILL)
    wait_until(lambda: not processes.alive(info.arbiter_pid))
    return info.arbiter_pid


def wait_pool_of_another(state: State, name: str, pid: int) -> sharedpool.PoolInfo:
    """Wait until the pool is there with another arbiter than `pid`."""

    def found() -> sharedpool.PoolInfo | None:
        info = sharedpool.find_pool(name)
        return info if info is not None and info.arbiter_pid != pid else None

    return wait_until(found)  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """A message as JSON gives it back."""
    return json.loads(json.dumps(value))
