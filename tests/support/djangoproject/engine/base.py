"""Where Django looks for it."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import base

from sharedpool.django import SharedPoolMixin


class Other(base.DatabaseWrapper):  # type: ignore[misc]
    said = ""
    closes = 0

    def close(self) -> None:
        self.closes += 1
        super().close()

    def get_connection_params(self) -> Any:
        self.said = "asked"
        return super().get_connection_params()


class DatabaseWrapper(SharedPoolMixin, Other):
    pass
