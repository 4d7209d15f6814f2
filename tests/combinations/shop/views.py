"""The pages."""

from __future__ import annotations

import dataclasses
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

import sharedpool
from tests.combinations.shop import notes, tasks

HOLD = "hold"


class ErrorsInWords:
    """An error is 503 and says which."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse:
        return HttpResponse(f"{type(error).__name__}: {error}", status=503)


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse("the page\n")


def write(request: HttpRequest, name: str, text: str) -> HttpResponse:
    return HttpResponse(notes.write(name, text, HOLD in request.GET))


def task(request: HttpRequest, name: str, text: str) -> HttpResponse:
    return HttpResponse(tasks.write.delay(name, text, HOLD in request.GET).get(timeout=60))


def stats(request: HttpRequest, pool: str) -> JsonResponse:
    return JsonResponse({"pool": dataclasses.asdict(sharedpool.pool_stats(pool))})


urlpatterns = [
    path("page", page),
    path("write/<str:name>/<str:text>", write),
    path("task/<str:name>/<str:text>", task),
    path("stats/<str:pool>", stats),
]
