"""One table."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Item(models.Model):
    name = models.CharField(max_length=100)
    made = models.DateTimeField(auto_now_add=True)
    follows = models.ForeignKey("self", null=True, on_delete=models.CASCADE)
    objects: ClassVar[models.Manager[Item]]  # type: ignore[type-arg]

    class Meta:
        app_label = "shop"
