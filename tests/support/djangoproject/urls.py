"""One page, which asks twice and does something else between."""

from __future__ import annotations

from typing import Any

from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.urls import path

from tests.support.djangoproject.shop.models import Item

#: Called by the page between its two queries.
between: list[Any] = []


def page(request: HttpRequest, name: str) -> HttpResponse:
    Item.objects.create(name=name)
    for call in between:
        call()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        pid = cursor.fetchone()[0]
    return HttpResponse(f"{Item.objects.filter(name=name).count()} {pid}")


urlpatterns = [path("<str:name>", page)]
