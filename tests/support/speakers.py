"""What a worker can be told to do with each of the HTTP clients. The first argument is the worker's State."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
from collections.abc import Coroutine
from typing import Any

import aiohttp
import requests

from sharedpool import exchange
from sharedpool.integrations.aiohttp import SharedConnector
from sharedpool.integrations.requests import SharedPoolAdapter
from sharedpool.integrations.urllib3 import SharedPoolManager
from tests.support.state import State
from tests.system import tasks

POOL = "spoken"
CLIENTS = ["urllib3", "requests", "stream", "httpx", "httpx-async", "httpx2", "aiohttp"]


def make(state: State, client: str, **options: Any) -> None:
    """A session of that client."""
    state.things["client"] = client
    if client == "urllib3":
        state.things["session"] = SharedPoolManager(POOL, **options)
    elif client in ("requests", "stream"):
        session = state.things["session"] = requests.Session()
        session.trust_env = False
        session.mount("http://", SharedPoolAdapter(POOL, **options))
    elif client == "httpx-async":
        state.things["session"] = tasks.run(state, _make_async(options))
    elif client == "aiohttp":
        state.things["session"] = tasks.run(state, _make_aiohttp(options))
    else:
        ours = importlib.import_module(f"sharedpool.integrations.{client}")
        state.things["session"] = importlib.import_module(client).Client(
            transport=ours.SharedTransport(POOL, **options)
        )


async def _make_async(options: dict[str, Any]) -> Any:
    ours = importlib.import_module("sharedpool.integrations.httpx")
    return importlib.import_module("httpx").AsyncClient(transport=ours.AsyncSharedTransport(POOL, **options))


async def _make_aiohttp(options: dict[str, Any]) -> Any:
    return aiohttp.ClientSession(connector=SharedConnector(POOL, **options))


def ask(state: State, url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """One request, read to its end: its status and its body. `X_Y="a"` is the field `X-Y: a`."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    session, client = state.things["session"], state.things["client"]
    if client == "urllib3":
        answer = session.request(method, url, body=body, headers=fields, retries=False, timeout=20)
        return answer.status, answer.data
    if client == "httpx-async":
        return tuple(tasks.run(state, _as_one_user(state, _ask_async(session, method, url, fields))))
    if client == "aiohttp":
        return tuple(tasks.run(state, _as_one_user(state, _ask_aiohttp(session, method, url, body, fields))))
    if client == "stream":
        answer = session.request(method, url, headers=fields, timeout=20, stream=True)
        return answer.status_code, b"".join(answer.iter_content(3))
    given = {} if body is None else {"data": body}
    answer = session.request(method, url, headers=fields, timeout=20, **given)
    return answer.status_code, answer.content


def ask_elsewhere(state: State, url: str, **headers: str) -> tuple[int, bytes]:
    """As `ask`, in a thread or a task that ends with it."""
    user = state.things.pop("user", None)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            return threads.submit(ask, state, url, **headers).result()
    finally:
        _end_user(state)
        if user is not None:
            state.things["user"] = user


async def _as_one_user(state: State, request: Coroutine[Any, Any, Any]) -> Any:
    """Requests of a worker come from one task, as one user's do."""
    loop = asyncio.get_running_loop()
    if "user" not in state.things:
        requests_of: asyncio.Queue[Any] = asyncio.Queue()
        state.things["user"] = requests_of, loop.create_task(_user(requests_of))
    answer = loop.create_future()
    state.things["user"][0].put_nowait((request, answer))
    return await answer


async def _user(requests_of: asyncio.Queue[Any]) -> None:
    while (asked := await requests_of.get()) is not None:
        request, answer = asked
        try:
            answer.set_result(await request)
        except Exception as error:
            answer.set_exception(error)


def _end_user(state: State) -> None:
    if "user" in state.things:
        requests_of, user = state.things.pop("user")

        async def end() -> None:
            requests_of.put_nowait(None)
            await user

        tasks.run(state, end())


async def _ask_async(session: Any, method: str, url: str, fields: dict[str, str]) -> tuple[int, bytes]:
    answer = await session.request(method, url, headers=fields, timeout=20)
    return answer.status_code, answer.content


async def _ask_aiohttp(
    session: Any, method: str, url: str, body: bytes | None, fields: dict[str, str]
) -> tuple[int, bytes]:
    async with session.request(method, url, data=body, headers=fields, timeout=aiohttp.ClientTimeout(20)) as answer:
        return answer.status, await answer.read()


def attempt(state: State, url: str, method: str = "GET") -> str:
    """One request that may fail: its answer, or its error, in words."""
    try:
        return repr(ask(state, url, method))
    except Exception as error:
        return f"{type(error).__name__}"


def numbers(state: State) -> Any:
    """The pool's numbers."""
    session = state.things["session"]
    if hasattr(session, "shared_pool"):
        return session.shared_pool.stats()
    if isinstance(session, requests.Session):
        return session.get_adapter("http://").shared_pool.stats()
    if isinstance(session, aiohttp.ClientSession):
        return session.connector.shared_stats()
    return session._transport.pool.stats()


def turn(state: State) -> bool:
    """The loop runs for a moment: it closes what it was told to close."""

    async def moment() -> bool:
        return True

    return bool(tasks.run(state, moment()))


def close(state: State) -> None:
    _end_user(state)
    session = state.things.pop("session")
    if state.things["client"] == "urllib3":
        session.clear()
    elif state.things["client"] == "httpx-async":
        tasks.run(state, session.aclose())
    elif state.things["client"] == "aiohttp":
        tasks.run(state, session.close())
    else:
        session.close()


def keep_logins_for(state: State, seconds: float) -> None:
    """How long a login that has begun waits for its next request."""
    for end in exchange.KEPT:
        exchange.KEPT[end] = seconds
