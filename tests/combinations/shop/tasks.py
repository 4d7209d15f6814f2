"""Celery's half: `celery -A tests.combinations.shop.tasks worker`."""

from __future__ import annotations

import os

import celery

import sharedpool.integrations.celery  # noqa: F401
from tests.combinations.shop import notes

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.combinations.shop.settings")
app = celery.Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")


@app.task(name="write")  # type: ignore[untyped-decorator]
def write(name: str, text: str, hold: bool = False) -> str:
    return notes.write(name, text, hold)
