"""gunicorn's side of the demonstration: a worker that ends in peace leaves its own numbers behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

loglevel = "warning"
graceful_timeout = 10
# No file but those of the demonstration: since 25.1 gunicorn would make a socket in the home directory.
control_socket_disable = True


def post_worker_init(worker: Any) -> None:  # noqa: ARG001 - gunicorn's signature
    """Say that this worker has loaded the application and is about to serve."""
    report("ready").touch()


def worker_exit(server: Any, worker: Any) -> None:  # noqa: ARG001 - gunicorn's signature
    """Write the worker's numbers. A killed one gets no chance to: only the pool knows what it did."""
    from examples.gunicorn_app import pool

    numbers = {"pid": os.getpid(), "number": worker.age, "requests": worker.nr, **pool.worker_stats()}
    report("json").write_text(json.dumps(numbers))


def report(kind: str) -> Path:
    """A file of this worker where the demonstration looks."""
    return Path(os.environ["DEMO_REPORTS"], f"{os.getpid()}.{kind}")
