"""gunicorn with --preload: workers recycled, reloaded and replaced by a new master, all under load."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scope import Scope
from tests.support.waiting import DEADLINE, wait_until
from tests.system.servers import CAP, Gunicorn, Load, Web

pytestmark = pytest.mark.usefixtures("unhurried")

#: The issue asks for 60.
SECONDS = float(os.environ.get("SHAREDPOOL_TEST_SECONDS", "5"))
WORKERS, RECYCLE = 4, 50


@pytest.fixture
def gunicorn(directory: Path, scope: Scope, web: Web) -> Iterator[Gunicorn]:
    with Gunicorn(directory, scope, web, "--preload", "--max-requests", str(RECYCLE), workers=WORKERS) as running:
        yield running


@pytest.fixture
def load(gunicorn: Gunicorn) -> Iterator[Load]:
    with Load(gunicorn.get) as running:
        yield running


def test_recycled_workers_lose_no_request_and_leave_their_connections_to_the_others(
    gunicorn: Gunicorn, load: Load, web: Web
) -> None:
    seen: set[int] = set()
    end = time.monotonic() + SECONDS

    def recycled_often() -> bool:
        seen.update(gunicorn.workers())  # how many workers there have been can only be seen while they live
        return time.monotonic() > end and load.statuses[200] >= 2 * WORKERS * RECYCLE

    wait_until(recycled_often, deadline=SECONDS + DEADLINE)
    load.stop()
    recycled = load.statuses[200] // RECYCLE
    opened = web.opened()
    print(f"{load.statuses[200]} requests, {recycled} workers recycled ({len(seen)} seen), {opened} connections")
    assert not load.wrong, (load.statuses, load.wrong[:3], gunicorn.log[-3000:])
    assert recycled >= 2 * WORKERS
    assert opened < recycled / 2 + 2 * CAP


@pytest.mark.parametrize("renew", [Gunicorn.new_workers, Gunicorn.new_master])
def test_new_workers_and_a_new_master_take_over_under_load(
    gunicorn: Gunicorn, load: Load, web: Web, renew: object
) -> None:
    assert callable(renew)
    renew(gunicorn)
    load.wait_more(2 * RECYCLE)
    load.stop()
    assert not load.wrong, (load.statuses, load.wrong[:3], gunicorn.log[-3000:])
    web.opened()
    stats = gunicorn.stats()
    assert (stats["in_use"], stats["waiting"], stats["max_connections"]) == (0, 0, CAP)
