"""Clients that know what each of their answers has to be."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from tests.support.waiting import wait_until
from tests.system.servers import Answer

#: What is asked, and what is right.
Question = tuple[str, str]
#: A kill and a restart may take long on a busy machine.
DEADLINE = 60.0


@dataclass(frozen=True)
class Asked:
    """A request and how it ended; status 0: without a whole answer, whose text says why."""

    path: str
    right: str
    status: int
    text: str

    @property
    def is_right(self) -> bool:
        return (self.status, self.text) == (200, self.right)

    @property
    def is_wrong(self) -> bool:
        """Somebody else's answer, or one that nobody should get."""
        return self.status == 200 and self.text != self.right

    @property
    def is_stuck(self) -> bool:
        return self.status == 0 and "timed out" in self.text.lower()


class Clients:
    """Each asks one question after the other until told to stop.

    Args:
        get: Asks the service.
        questions: For each client a source of questions without an end.
    """

    def __init__(self, get: Callable[[str], Answer], questions: Iterable[Iterable[Question]]) -> None:
        self._get = get
        self.asked: list[Asked] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(each,)) for each in questions]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, questions: Iterable[Question]) -> None:
        for question in questions:
            self.asked.append(ask(self._get, question))
            if self._over.is_set():
                return

    def wait_more(self, number: int, of: str = "") -> None:
        """Until so many more had the right answer, of the paths that begin so."""
        before = self.right(of)
        try:
            wait_until(lambda: self.right(of) >= before + number, DEADLINE, f"{number} right answers more")
        except AssertionError as error:
            raise AssertionError(f"{error}; {self}") from None

    def right(self, of: str = "") -> int:
        return sum(asked.is_right and asked.path.startswith(of) for asked in list(self.asked))

    @property
    def wrong(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.is_wrong or asked.is_stuck]

    @property
    def failed(self) -> list[Asked]:
        """Those that had an error for an answer."""
        return [asked for asked in self.asked if asked.status not in (0, 200)]

    @property
    def cut(self) -> list[Asked]:
        """Those that had no answer."""
        return [asked for asked in self.asked if asked.status == 0]

    def __str__(self) -> str:
        kinds = Counter(
            "right" if each.is_right else f"{each.status} {each.text[:70]!r}" for each in list(self.asked)
        )  # fmt: skip
        return ", ".join(f"{kind}: {number}" for kind, number in kinds.most_common(8))


def ask(get: Callable[[str], Answer], question: Question) -> Asked:
    path, right = question
    status, body = get(path)
    return Asked(path, right, status, body.decode(errors="replace"))


class AtOnce:
    """Some questions, all under way at the same time once begun; the block's end waits for their answers."""

    def __init__(self, get: Callable[[str], Answer], questions: list[Question]) -> None:
        self._get, self._questions = get, questions
        self._threads = ThreadPoolExecutor(len(questions))
        self._begun: list[Future[Asked]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def begin(self) -> None:
        self._begun = [self._threads.submit(ask, self._get, each) for each in self._questions]

    @property
    def asked(self) -> list[Asked]:
        return [each.result() for each in self._begun]


def not_right(asked: list[Asked]) -> list[Asked]:
    return [each for each in asked if not each.is_right]
