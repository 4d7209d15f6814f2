"""What a victim does while it is ended: one script for each thing that a worker does with a pool.

Each has what the victim does before, which is not counted, and what it does then, which is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sharedpool
from tests.crash.points import SoftTimeLimitExceeded, counter, install
from tests.support import commands
from tests.support.backend import Target
from tests.support.state import State

Step = Callable[[State, Target, Target], None]
PATIENCE = 10.0


@dataclass(frozen=True)
class Script:
    """What a victim does.

    Attributes:
        before: Not counted.
        then: Counted.
        cap: Of the pool.
        held: A survivor holds the only permit, and gives it back once the victim waits.
        waits: A survivor waits from the beginning.
        idle: Where survivors have left an idle connection: "", "same" or "other".
        remote_ends: The victim's idle connection is closed by the remote in between.
        arbiter_dies: It is killed in between.
    """

    before: Step
    then: Step
    held: bool = False
    waits: bool = False
    idle: str = ""
    remote_ends: bool = False
    arbiter_dies: bool = False


def attach(state: State, target: Target, other: Target) -> None:
    pool(state).stats()


def nothing(state: State, target: Target, other: Target) -> None:
    pass


def pool(state: State) -> Any:
    return commands.pool_of(state, "default")


def checkout(state: State, target: Target, other: Target) -> None:
    attach(state, target, other)
    state.things["lease"] = pool(state).checkout(target.host, target.port, checkout_timeout=PATIENCE)


def checkin(state: State, target: Target, other: Target) -> None:
    state.things.pop("lease").checkin()


def discard(state: State, target: Target, other: Target) -> None:
    state.things.pop("lease").discard()


def leave_idle(state: State, target: Target, other: Target) -> None:
    checkout(state, target, other)
    checkin(state, target, other)


def use(state: State, target: Target, other: Target) -> None:
    with pool(state).connection(target.host, target.port, checkout_timeout=PATIENCE) as conn:
        commands.exchange_over(conn, "hello")


def leave(state: State, target: Target, other: Target) -> None:
    pool(state).close()


def take_permit(state: State, target: Target, other: Target) -> None:
    pool(state).checkout("a permit", 0, "permit", checkout_timeout=PATIENCE).checkin()


SCRIPTS = {
    "register": Script(nothing, use),
    "checkout, opening": Script(attach, use),
    "checkout, own idle": Script(leave_idle, use),
    "takeover": Script(attach, use, idle="same"),
    "evict": Script(attach, use, idle="other"),
    "wait": Script(attach, use, held=True),
    "checkin to a waiter": Script(checkout, checkin, waits=True),
    "discard with a waiter": Script(checkout, discard, waits=True),
    "renew": Script(leave_idle, use, remote_ends=True),
    "permit": Script(attach, take_permit),
    "leave": Script(checkout, leave),
    "tell a successor": Script(leave_idle, use, arbiter_dies=True),
}


def prepare(state: State, script: str, target: Target, other: Target) -> None:
    """Make this process a victim."""
    install()
    state.pools["default"] = sharedpool.attach("default")
    SCRIPTS[script].before(state, target, other)


def run(state: State, script: str, k: int, way: str, target: Target, other: Target) -> tuple[bool, int, str]:
    """End at the k-th boundary call; gives whether it came to its end first, and how many there were."""
    counter.arm(k, way)
    try:
        SCRIPTS[script].then(state, target, other)
        ended = True
    except (SystemExit, SoftTimeLimitExceeded):
        ended = False
    finally:
        count = counter.disarm()
    state.things.clear()
    gc.collect()
    return ended, count, counter.last
