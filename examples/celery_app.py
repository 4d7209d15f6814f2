"""Celery tasks whose worker processes share one pool of connections to a back end.

    BACKEND=127.0.0.1:8080 CELERY_FILES=/tmp/tasks celery -A examples.celery_app worker --concurrency 4
    CELERY_FILES=/tmp/tasks python -m examples.celery_app /page 100

The second fetches a path a hundred times by tasks, and prints how each one went. Messages go through files here, so
that nothing but Celery is needed. A task that is told to stop (SoftTimeLimitExceeded) leaves its connection's `with`
block by an exception, which closes the connection; of one that is killed (the hard limit) the arbiter closes it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import celery
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

import sharedpool.integrations.celery  # noqa: F401 - optional: children leave the pool as they end
from examples import gunicorn_app

FILES = Path(os.environ.get("CELERY_FILES", "/tmp/tasks"))

app = celery.Celery("examples", broker="filesystem://", backend=f"file://{FILES}/results")
app.conf.update(
    broker_transport_options={
        "data_folder_in": f"{FILES}/queue", "data_folder_out": f"{FILES}/queue", "control_folder": f"{FILES}/control",
        "polling_interval": 0.02,
    },
    worker_prefetch_multiplier=1,
)  # fmt: skip


@app.task  # type: ignore[untyped-decorator]
def fetch(path: str) -> str:
    """Fetch a path from the back end; gives the status."""
    try:
        return gunicorn_app.fetch(path)[0]
    except SoftTimeLimitExceeded:
        return "soft time limit"


def main(path: str, number: str, soft: str = "0", hard: str = "0") -> None:
    """Have a path fetched so many times, with time limits in seconds, and print how it went."""
    limits = {"soft_time_limit": float(soft) or None, "time_limit": float(hard) or None}
    results = [fetch.apply_async((path,), **limits) for _ in range(int(number))]
    for outcome, times in Counter(map(wait, results)).items():
        print(times, outcome, flush=True)


def wait(result: celery.result.AsyncResult) -> str:
    """What a task gave."""
    try:
        return str(result.get(timeout=60, interval=0.02))
    except TimeLimitExceeded:
        return "hard time limit"


if __name__ == "__main__":
    for folder in ("queue", "control", "results"):
        (FILES / folder).mkdir(parents=True, exist_ok=True)
    main(*sys.argv[1:])
