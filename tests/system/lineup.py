"""Waiters put into a queue one by one, so that their order is known."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.backend import Target
from tests.support.workers import Pending, Worker


def line_up(
    observer: Worker, entries: Iterable[tuple[Worker, Target]], already: int = 0, **options: object
) -> list[Pending]:
    """Let each worker begin a checkout, the next one only when `observer` sees the one before it in the queue."""
    queue = []
    for worker, target in entries:
        queue.append(
            worker.begin_checkout(target, thread=f"waiter {len(queue)}", **{"checkout_timeout": None, **options})
        )
        observer.wait_stats(waiting=already + len(queue))
    return queue
