"""Django's database connections out of one pool for all processes (extra `django`); docs/django.md.

    DATABASES = {"default": {"ENGINE": "sharedpool.django.postgresql", ..., "OPTIONS": {"pool": {"max_size": 20}}}}

For other engines over PostgreSQL, such as PostGIS, `SharedPoolMixin` goes before the engine's own class.
"""

from __future__ import annotations

from .mixin import SharedPoolMixin

__all__ = ["SharedPoolMixin"]
