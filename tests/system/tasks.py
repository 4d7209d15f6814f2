"""What a worker can be told to do with asyncio: its coroutines run on a loop in a thread of the worker's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from sharedpool import Lease, aio
from tests.support.backend import Target
from tests.support.commands import parse_answer
from tests.support.state import State


def loop_of(state: State, name: str = "loop") -> asyncio.AbstractEventLoop:
    """A loop of that name, in a thread of its own."""
    if name not in state.things:
        loop = state.things[name] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name=f"test-{name}", daemon=True).start()
    found: asyncio.AbstractEventLoop = state.things[name]
    return found


def run(state: State, work: Coroutine[Any, Any, Any], loop: str = "loop") -> Any:
    return asyncio.run_coroutine_threadsafe(work, loop_of(state, loop)).result(60)


def pool_of(state: State, pool: str = "default", **options: Any) -> aio.Pool[Any]:
    key = f"async {pool}"
    if key not in state.things:
        state.things[key] = aio.attach(pool, **options)
    found: aio.Pool[Any] = state.things[key]
    return found


def attach(state: State, pool: str = "default", **options: Any) -> None:
    pool_of(state, pool, **options)


def checkout(
    state: State, target: Target, *, label: str | None = None, loop: str = "loop", pool: str = "default", **options: Any
) -> str:
    """Take a lease and keep it under a label, where `commands.checkin` finds it."""
    handle = pool_of(state, pool)
    lease = run(state, handle.checkout(target.host, target.port, target.transport, **options), loop)
    label = label or state.new_label()
    state.leases[label] = lease
    return label


def begin(state: State, target: Target, label: str, *, pool: str = "default", **options: Any) -> None:
    """Begin a checkout as a task; `commands` find its lease, once it has one, by `finish`."""
    handle = pool_of(state, pool)
    work = handle.checkout(target.host, target.port, target.transport, **options)
    state.things[f"task {label}"] = asyncio.run_coroutine_threadsafe(work, loop_of(state))


def finish(state: State, label: str) -> None:
    """Wait for a checkout that was begun."""
    begun: Future[Lease[Any]] = state.things.pop(f"task {label}")
    state.leases[label] = begun.result(60)


def cancel(state: State, label: str) -> bool:
    """Cancel a checkout that was begun."""
    begun: Future[Lease[Any]] = state.things.pop(f"task {label}")
    return begun.cancel()


def checkin(state: State, label: str) -> None:
    """On the loop's own thread."""

    async def give_back() -> None:
        state.leases[label].checkin()

    run(state, give_back())


def exchange(state: State, label: str, text: str = "hello") -> int:
    return int(run(state, talk(state.leases[label].conn, text)))


async def talk(conn: Any, text: str) -> int:
    """One line there, its answer back. Returns the connection's number at the back end."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(conn, text.encode() + b"\n")
    data = b""
    while not data.endswith(b"\n"):
        more = await loop.sock_recv(conn, 65536)
        if not more:
            raise ConnectionError(f"the stream ended after {data!r}")
        data += more
    return parse_answer(data[:-1], text)


async def use(pool: aio.Pool[Any], target: Target, text: str, **options: Any) -> int:
    """Checkout, exchange, checkin."""
    async with pool.connection(target.host, target.port, target.transport, **options) as conn:
        return await talk(conn, text)


def use_many(state: State, target: Target, tasks: int, rounds: int = 1, **options: Any) -> list[int]:
    """So many tasks at once, each so often; the connections' numbers, and the most threads that there were."""
    pool = pool_of(state)
    most = [0]

    async def one(number: int) -> list[int]:
        found = []
        for turn in range(rounds):
            found.append(await use(pool, target, f"{number}.{turn}", **options))
            most[0] = max(most[0], threading.active_count())
        return found

    async def all_of_them() -> set[int]:
        answers = await asyncio.gather(*[one(number) for number in range(tasks)])
        return {number for numbers in answers for number in numbers}

    return [*sorted(run(state, all_of_them())), most[0]]
