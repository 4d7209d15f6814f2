"""Where Django looks for it."""

from __future__ import annotations

from django_tenants.postgresql_backend import base

from sharedpool.django import SharedPoolMixin


class DatabaseWrapper(SharedPoolMixin, base.DatabaseWrapper):
    pass
