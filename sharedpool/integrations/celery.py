"""Celery: with `import sharedpool.integrations.celery` its children leave their pools as they end. Optional.

A prefork child ends without Python's exit handlers. Without this the arbiter sees it die, a moment later, and does the
same: its permits go on, its idle connections stay for the others.
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_process_shutdown

from .. import control


def _leave(**_: Any) -> None:
    control.leave()


worker_process_shutdown.connect(_leave, weak=False)
