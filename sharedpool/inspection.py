"""Looking at the pools of a scope from outside, without attaching: what the command line, metrics and tests show.

It never starts an arbiter and changes nothing. Facts are plain data, as the registry gives them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from time import monotonic
from typing import Any

from . import scope
from .errors import ArbiterLost, NotSupported, PoolNotFound
from .pool import mode
from .stats import Histogram, PoolStats

#: An arbiter that has not answered a greeting by then is stopped or stuck, s.
_GREETING = 5.0


class NoArbiter(PoolNotFound):
    """No arbiter runs in the scope, so there are no pools to look at or to change."""


def directory(app: str | None = None) -> str:
    """The scope's runtime directory, whether it is there or not."""
    return scope.directory_for(os.environ, app, make=False)


def pools(app: str | None = None) -> list[PoolStats]:
    """The numbers of every pool, over all processes; none if no arbiter runs."""
    try:
        return [facts["stats"] for facts in overview(app)]
    except NoArbiter:
        return []


def overview(app: str | None = None) -> list[dict[str, Any]]:
    """Every pool: "stats" (PoolStats), "options", "paused", "longest_wait" and "longest_lease" in seconds.

    Raises:
        NoArbiter, ArbiterLost, StartFailed.
    """
    if mode() == "local":
        from . import local

        return [_local_overview(pool) for _, pool in sorted(local.pools().items())]
    found = ask(directory(app), "overview")
    return [{**facts, "stats": stats_of(facts["stats"])} for facts in found]


def stats_of(numbers: dict[str, Any]) -> PoolStats:
    """PoolStats of what an arbiter told, which may be of an older or a newer version and know other counters."""
    known = {field.name: field.type for field in dataclasses.fields(PoolStats)}
    values = {name: value for name, value in numbers.items() if name in known}
    for name, value in values.items():
        if known[name] == "Histogram":
            values[name] = Histogram(tuple(value["counts"]), value["sum"])
    return PoolStats(**values)


def _local_overview(pool: Any) -> dict[str, Any]:
    stats = pool.stats()
    since = [slot.since for slot in pool.slots if slot.state == "in_use"]
    return {
        "stats": stats,
        "options": pool.options.as_dict(),
        "paused": pool.paused,
        "longest_wait": 0.0,
        "longest_lease": monotonic() - min(since) if since else 0.0,
    }


def ask(where: str, method: str, *arguments: Any) -> Any:
    """Call a method of the registry that gives something other than None.

    Args:
        where: The scope's runtime directory.
        method: Its name.
        *arguments: Its arguments.

    Raises:
        NoArbiter: None runs in the scope.
        ArbiterLost: It is there, and does not answer.
        NotSupported: It is of another version and does not know the method.
        PoolNotFound, StartFailed.
    """
    greet(where)
    from . import manager

    with of_another_version(where, method):
        answer = manager.call(where, method, *arguments, start=False)
    if answer is None:
        raise NoArbiter(f"the arbiter in {where} has just ended")
    return answer


@contextlib.contextmanager
def of_another_version(where: str, method: str) -> Iterator[None]:
    """An arbiter that does not know a method says so in a traceback; here it becomes a sentence.

    Raises:
        NotSupported: It does not know the method.
    """
    from multiprocess.managers import RemoteError

    try:
        yield
    except RemoteError as error:
        if "not in exposed" not in str(error):
            raise
        raise NotSupported(f"the arbiter in {where} is of another version: it has no {method!r}") from error


def greet(where: str) -> None:
    """See whether an arbiter answers.

    Raises:
        NoArbiter, ArbiterLost.
    """
    from . import launch
    from .wire import Kind

    channel = launch.connect(where)
    if channel is None:
        raise NoArbiter(f"no arbiter runs in {where}")
    with channel:
        try:
            launch.ask(channel, launch.asking(Kind.HOLD), _GREETING)
        except ArbiterLost as error:
            raise ArbiterLost(f"the arbiter in {where} does not answer: {error}") from error
