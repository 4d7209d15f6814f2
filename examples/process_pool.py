"""The standard library's pool of processes: its workers share one pool of connections, however they are started.

    BACKEND=127.0.0.1:8080 python -m examples.process_pool forkserver /page 100

Fetches a path a hundred times in four processes, each of which is replaced after ten, and prints how it went.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter

from examples.gunicorn_app import fetch, pool


def status(path: str) -> str:
    """Fetch a path from the back end; gives the status."""
    return fetch(path)[0]


def main(method: str, path: str, number: str) -> None:
    """Fetch a path so many times by processes that are started in this way: fork, spawn or forkserver."""
    with multiprocessing.get_context(method).Pool(4, maxtasksperchild=10) as workers:
        statuses = Counter(workers.imap_unordered(status, [path] * int(number)))
        workers.close()
        workers.join()
    for outcome, times in statuses.items():
        print(times, outcome)
    stats = pool.stats()
    print(f"{stats.opens} connections opened, {stats.takeovers} times one was taken over from another process")


if __name__ == "__main__":
    main(*sys.argv[1:])
