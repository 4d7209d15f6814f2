"""Clients that ask without pause, and what became of their requests."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import enum
import time
from collections.abc import Iterable

REQUEST = b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n"
PATIENCE = 30.0


class Outcome(enum.Enum):
    """What became of a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    CUT = "cut"
    TIMED_OUT = "timed out"


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request: when it began and ended (monotonic seconds), and what came of it."""

    began: float
    ended: float
    outcome: Outcome
    status: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclasses.dataclass(slots=True)
class Load:
    """What the clients have seen so far."""

    requests: list[Request] = dataclasses.field(default_factory=list)
    kills: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Good answers per second."""
        return len(self.good) / self.seconds

    @property
    def good(self) -> list[Request]:
        return [request for request in self.requests if request.status == "200"]

    def cut_by_kills(self, at_once: int) -> int:
        """How many requests were cut because their own worker was killed.

        Only a request that was under way at the moment of a kill can be one, and at most as many for each kill as a
        worker serves at once. Everything else that was cut is an error.
        """
        cut = [request for request in self.requests if request.outcome is Outcome.CUT]
        return sum(min(at_once, sum(r.began <= kill <= r.ended for r in cut)) for kill in self.kills)

    def errors(self, at_once: int) -> dict[str, int]:
        """All other requests without a good answer, by what came instead."""
        kinds = collections.Counter(
            request.status or request.outcome.value for request in self.requests if request.status != "200"
        )
        kinds[Outcome.CUT.value] -= self.cut_by_kills(at_once)
        return {kind: count for kind, count in kinds.items() if count}


def percentile(values: Iterable[float], share: float) -> float:
    """The value that a share of all does not exceed (0 if there are none)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def drive(path: str, clients: int, seconds: float, load: Load) -> None:
    """Let clients ask over a Unix socket for some time; each ends with its last request answered."""
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(path, began + seconds, load))
    load.seconds = time.monotonic() - began


async def client(path: str, until: float, load: Load) -> None:
    """One client: a new connection for every request, since gunicorn's sync worker closes each."""
    while (began := time.monotonic()) < until:
        status = ""
        try:
            async with asyncio.timeout(PATIENCE):
                outcome, status = await ask(path)
        except TimeoutError:
            outcome = Outcome.TIMED_OUT
        load.requests.append(Request(began, time.monotonic(), outcome, status))


async def ask(path: str) -> tuple[Outcome, str]:
    """One request; an answer counts only when it is complete."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return Outcome.REFUSED, ""
    try:
        writer.write(REQUEST)
        answer = await reader.read(-1)
    except OSError:
        return Outcome.CUT, ""
    finally:
        writer.close()
    head, found, body = answer.partition(b"\r\n\r\n")
    fields = head.decode("latin-1").lower().split("\r\n")
    if not found or f"content-length: {len(body)}" not in fields:
        return Outcome.CUT, ""
    return Outcome.ANSWERED, fields[0].split(" ")[1]
