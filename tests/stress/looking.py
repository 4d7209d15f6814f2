"""Looking at a server again and again, while everything goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

_PAUSE = 0.001


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """For the block: `look` is called in a thread of its own, with a millisecond between two looks.

    Raises:
        Exception: Of a look, at the block's end: nobody has looked since.
    """
    over = threading.Event()

    def again_and_again() -> None:
        look()
        while not over.wait(_PAUSE):
            look()

    with ThreadPoolExecutor(1) as thread:
        looks = thread.submit(again_and_again)
        try:
            yield
        finally:
            over.set()
        looks.result()
