"""Where Django looks for an engine's class."""

from __future__ import annotations

from django.db.backends.postgresql import base

from ..mixin import SharedPoolMixin


class DatabaseWrapper(SharedPoolMixin, base.DatabaseWrapper):
    """Django's PostgreSQL engine; OPTIONS["pool"] is a pool of all processes."""
