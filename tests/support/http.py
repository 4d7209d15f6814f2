"""What workers do with urllib3 and requests over a shared pool."""

from __future__ import annotations

import threading
from typing import Any

import requests
import urllib3

from sharedpool.integrations.requests import SharedPoolAdapter
from sharedpool.integrations.urllib3 import SharedPoolManager
from tests.support.state import State

POOL = "api"
RIGHT = {"/page": b"the page\n", "/redirect": b"the page\n", "/chunked": b"one two three"}


def make(state: State, label: str = "http", **given: Any) -> None:
    """A manager, by its label."""
    state.things[label] = SharedPoolManager(POOL, **given)


def make_session(state: State, label: str = "http", **given: Any) -> None:
    """A session of requests, by its label."""
    session = state.things[label] = requests.Session()
    for prefix in ("http://", "https://"):
        session.mount(prefix, SharedPoolAdapter(POOL, **given))


def get(state: State, url: str, label: str = "http", method: str = "GET", **given: Any) -> tuple[int, bytes]:
    """One request; its answer."""
    answer = state.things[label].request(method, url, **given)
    return (
        (answer.status_code, answer.content) if isinstance(answer, requests.Response) else (answer.status, answer.data)
    )


def number(state: State, url: str, label: str = "http", **given: Any) -> int:
    """The number of the connection, as the server has it."""
    return int(get(state, f"{url}/id", label, **given)[1])


def begin(state: State, url: str, answer: str, label: str = "http") -> int:
    """A request whose answer is not read yet; its status."""
    found = state.things[answer] = state.things[label].request("GET", url, preload_content=False)
    return int(found.status)


def finish(state: State, answer: str) -> bytes:
    """What was left of such an answer."""
    return bytes(state.things.pop(answer).read())


def drop_manager(state: State, label: str = "http") -> None:
    state.things[label].clear()
    del state.things[label]


def numbers(state: State, label: str = "http") -> str:
    """The pool's numbers in words."""
    thing = state.things[label]
    shared = thing.adapters["http://"].shared_pool if isinstance(thing, requests.Session) else thing.shared_pool
    return str(shared.stats().numbers())


def load(state: State, url: str, rounds: int, threads: int = 3, label: str = "http") -> list[str]:
    """Many requests of each kind at once; what was wrong."""
    wrong: list[str] = []
    http = state.things[label]

    def work(place: int) -> None:
        try:
            for turn in range(rounds):
                body = f"{place}-{turn}-".encode() * 50
                for path, right in (
                    ("/page", b"the page\n"),
                    ("/redirect", b"the page\n"),
                    ("/chunked", b"one two three"),
                ):
                    if (found := http.request("GET", url + path).data) != right:
                        wrong.append(f"{path}: {found[:80]!r}")
                for given in ({"body": body}, {"body": iter([body, body]), "chunked": True}):
                    if not (found := http.request("POST", f"{url}/echo", **given).data).startswith(body):
                        wrong.append(f"echo: {found[:80]!r}")
                if turn % 5 == place % 5:
                    http.request("GET", f"{url}/close")
                    with http.request("GET", f"{url}/large", preload_content=False) as answer:
                        answer.read(1000)  # and no more: the rest is nobody's
                    answer = http.request("GET", f"{url}/large-close", preload_content=False)
                    if sum(len(piece) for piece in answer.stream(10_000)) != 1 << 20:
                        wrong.append("large-close")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong
