"""What Ctrl-C and its like do at each moment: raise, cancel a running event loop, or wait until something is complete.

The first one counts; all others are ignored, so that nothing disturbs the orderly end.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def raise_now() -> None:
    """What happens unless something else is arranged."""
    raise KeyboardInterrupt


_act: Callable[[], object] = raise_now


def catch() -> None:
    """From now on the signals do what this module says."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def ignore() -> None:
    """From now on they do nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: object) -> None:  # noqa: ARG001 - a signal handler's signature
    ignore()
    _act()


@contextlib.contextmanager
def instead(act: Callable[[], object]) -> Iterator[None]:
    """Within the block an interrupt does something else."""
    global _act
    before, _act = _act, act
    try:
        yield
    finally:
        _act = before


@contextlib.contextmanager
def held() -> Iterator[None]:
    """An interrupt waits for the end of the block: what starts or ends a process must not be left halfway."""
    noted: list[bool] = []
    with instead(lambda: noted.append(True)):
        yield
    if noted:
        raise_now()


def run(main: Coroutine[Any, Any, None]) -> None:
    """asyncio.run, with an interrupt that cancels; an exception thrown into a loop's midst would be printed by it."""

    async def cancellable() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with instead(lambda: loop.call_soon_threadsafe(task.cancel)):
            await main

    try:
        asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
