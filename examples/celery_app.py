"""Celery tasks whose worker processes share one pool of connections to a back end.

    BACKEND=127.0.0.1:8080 celery -A examples.celery_app worker --concurrency 4 --loglevel info
    python -m examples.celery_app /page 100

The second has a path fetched a hundred times; the worker's log tells how each task went. Messages go through files
below CELERY_FILES here, so that nothing but Celery is needed. A task that is told to stop (SoftTimeLimitExceeded)
leaves its connection's `with` block by an exception, which closes the connection; of one that is killed (the hard
limit) the arbiter closes it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import celery
from celery.exceptions import SoftTimeLimitExceeded

import sharedpool.integrations.celery  # noqa: F401 - optional: children leave the pool as they end
from examples import gunicorn_app

FILES = Path(os.environ.get("CELERY_FILES", "/tmp/sharedpool-celery"))
WRITTEN, QUEUE, CONTROL = (FILES / name for name in ("written", "queue", "control"))
for folder in (WRITTEN, QUEUE, CONTROL):
    folder.mkdir(parents=True, exist_ok=True)

app = celery.Celery("examples", broker="filesystem://")
app.conf.update(
    broker_transport_options={
        "data_folder_out": str(WRITTEN), "data_folder_in": str(QUEUE), "control_folder": str(CONTROL),
        "polling_interval": 0.02,
    },
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
)  # fmt: skip


@app.task(name="fetch")  # type: ignore[untyped-decorator]
def fetch(path: str) -> str:
    """Fetch a path from the back end; gives the status."""
    try:
        return gunicorn_app.fetch(path)[0]
    except SoftTimeLimitExceeded:
        return "told to stop"


def main(path: str, number: str, soft: str = "0", hard: str = "0") -> None:
    """Have a path fetched so many times, with time limits in seconds."""
    for _ in range(int(number)):
        fetch.apply_async((path,), soft_time_limit=float(soft) or None, time_limit=float(hard) or None)
    for message in sorted(WRITTEN.iterdir()):
        message.rename(QUEUE / message.name)  # the worker may read it now that all of it is there


if __name__ == "__main__":
    main(*sys.argv[1:])
