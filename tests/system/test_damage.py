"""Random words in a pool's shared memory: a clear error or a mended table; no crash, and nobody who waits for ever."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

import pytest

import sharedpool
from sharedpool import SharedPoolError
from sharedpool.layout import CELL, MASK64, SLOT
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Worker

ROUNDS = int(os.environ.get("SHAREDPOOL_TEST_ROUNDS", "6"))
#: What a checkout may take beyond its own deadline: a repair is due after two looks of the arbiter's, 1 s apart.
GRACE = 30.0


def damage(state: State, seed: int, times: int) -> list[tuple[int, int]]:
    """Write random words where the table is in use: its header, the first rows, slots and cells."""
    rng = random.Random(seed)
    attached = state.pools["default"]._attached
    w, geometry = attached.words, attached.segment.geometry
    places = [
        *range(64), *range(64, 64 + 112 * 4),
        *range(geometry.slot_base, geometry.slot_base + SLOT * 6),
        *range(geometry.cell_base, geometry.cell_base + CELL * 6),
    ]  # fmt: skip
    done = []
    for _ in range(times):
        at = rng.choice(places)
        values = [
            rng.getrandbits(64),
            rng.getrandbits(6),
            MASK64,
            0,
            w[at] ^ 1 << rng.randrange(64),
            w[rng.choice(places)],
        ]
        value = rng.choice(values)
        w[at] = value
        done.append((at, value))
    return done


def try_everything(state: State, target: Target, threads: int, number: int) -> dict[str, Any]:
    """Leases by several threads, each within a second: how many came off, what was raised, the longest try."""
    handle = commands.pool_of(state, "default")
    raised: list[str] = []
    took: list[float] = []
    good: list[int] = []

    def some() -> None:
        for _ in range(number):
            began = time.monotonic()
            try:
                with handle.connection(target.host, target.port, checkout_timeout=0.3) as conn:
                    good.append(commands.exchange_over(conn, f"{threading.get_ident()}-{len(took)}"))
            except SharedPoolError as error:
                raised.append(type(error).__name__)
            except Exception as error:
                raised.append(f"unclear: {error!r}")
            took.append(time.monotonic() - began)

    running = [threading.Thread(target=some) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    alive = sum(thread.is_alive() for thread in running)
    return {"good": len(good), "raised": raised, "longest": max(took, default=0.0), "hanging": alive}


def attach_anew(state: State) -> None:
    """The row ends, and whatever it seems to lease; the pool is the same."""
    state.pools["default"].close()
    state.pools["default"].open()


def works(worker: Worker, target: Target) -> bool:
    try:
        worker.use(target, checkout_timeout=1)
    except sharedpool.SharedPoolError:
        return False
    return True


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_random_words_end_no_process_and_hold_nobody_for_ever(
    two: list[Worker], scope: Scope, backend: Backend, tcp: Target, unix: Target, seed: int
) -> None:
    for worker in two:
        worker.attach(max_connections=2)
        worker.use(tcp)
        worker.use(unix)
    arbiter = scope.arbiter()
    begun = [worker.begin(try_everything, target, 3, 4) for worker, target in zip(two, (tcp, unix), strict=True)]
    written = [two[0].begin(damage, seed * 100 + times, 1 + seed % 4, thread="damage") for times in range(3)]
    words = [pending.result() for pending in written]
    for pending in begun:
        result = pending.result(GRACE * 4)
        text = f"seed {seed}, wrote {words}: {result}"
        assert not result["hanging"], text
        assert result["longest"] < GRACE, text
        assert not [name for name in result["raised"] if name.startswith("unclear")], text
    for worker in two:
        worker.call(attach_anew)
    for worker in two:
        wait_until(lambda worker=worker: works(worker, tcp), what=f"seed {seed}: the pool works again")  # type: ignore[misc]
    assert scope.arbiter() == arbiter
    assert processes.alive(arbiter)
