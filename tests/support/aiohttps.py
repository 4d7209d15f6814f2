"""What a worker can be told to do with aiohttp. The first argument is the worker's State."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import aiohttp

from sharedpool.integrations.aiohttp import SharedConnector
from tests.support.state import State
from tests.system import tasks


def make(state: State, label: str = "s", ca: str = "", **options: Any) -> None:
    """A session with a connector of ours, under a label; `ca`: a file with whom to trust."""
    if ca:
        options["ssl"] = ssl.create_default_context(cafile=ca)

    async def begin() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=SharedConnector("web", **options))

    state.things[label] = tasks.run(state, begin())
    state.things[f"connector {label}"] = state.things[label].connector


def get(state: State, url: str, label: str = "s", **timeouts: float) -> tuple[int, str]:
    return tuple(tasks.run(state, _get(state.things[label], url, **timeouts)))


async def _get(session: aiohttp.ClientSession, url: str, **timeouts: float) -> tuple[int, str]:
    async with session.get(url, timeout=aiohttp.ClientTimeout(**timeouts)) as response:
        return response.status, await response.text()


def get_many(state: State, url: str, number: int, cancel: int = 0, label: str = "s") -> list[Any]:
    """So many at once, of which every `cancel`th is cancelled; the answers of the others."""
    session = state.things[label]

    async def everything() -> list[Any]:
        begun = [asyncio.ensure_future(_get(session, url)) for _ in range(number)]
        await asyncio.sleep(0)
        gone = begun[::cancel] if cancel else []
        for turn, task in enumerate(gone):
            if turn % 3 == 0:
                await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        return [task.result() for task in begun if task not in gone]

    return list(tasks.run(state, everything()))


def hold(state: State, url: str, label: str = "s") -> None:
    """Ask, and leave the answer unread."""

    async def begin() -> Any:
        return await state.things[label].get(url)

    state.things["answer"] = tasks.run(state, begin())


def let_go(state: State, read: bool = True) -> None:
    """Read the answer that was left, or close its connection."""

    async def end() -> None:
        answer = state.things.pop("answer")
        await answer.read() if read else answer.close()

    tasks.run(state, end())


def stats(state: State, label: str = "s") -> Any:
    return state.things[f"connector {label}"].shared_stats()


def close(state: State, label: str = "s") -> None:
    tasks.run(state, state.things[label].close())


def lose_loop(state: State, url: str) -> tuple[int, str]:
    """Use a connector in a loop that is then closed without closing it."""

    async def use() -> tuple[int, str]:
        session = state.things["lost"] = aiohttp.ClientSession(connector=SharedConnector("web"))
        return await _get(session, url)

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(use())
    finally:
        loop.close()
