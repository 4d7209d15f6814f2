"""Actors, interleaved repeats, medians, and the table.

Everything that is timed runs in an *actor*: a fresh interpreter of its own that obeys commands, so that no
contestant runs beside another one's threads, caches or garbage. Actors take turns, never at the same time unless
the row is about neighbours. This module never decides what a row means.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
_SPAWN = multiprocessing.get_context("spawn")


class Missing(Exception):
    """A peer cannot run here; the text says which program or package is missing."""


class ActorFailed(Exception):
    """A command raised in its actor; the text is the traceback from there."""


def _forking() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharedpool", "sharedpool.attachment", "benchmarks.throughput"])
    return context


class Actor:
    """One object in a process of its own; its methods are called over a pipe, one command at a time.

    The process ends with `close()`, or by itself when the benchmark's process goes away.

    Args:
        factory: Makes the object, in the process.
        *args: Its arguments.
        forked: The process is forked from one that has imported the library, as a pre-fork server's workers are; it
            then shares the code's memory, and so the processor's caches, with its siblings. Otherwise a new
            interpreter.
    """

    def __init__(self, factory: Callable[..., object], *args: object, forked: bool = False) -> None:
        context = _forking() if forked else _SPAWN
        self._pipe, theirs = context.Pipe()
        # The server that forks keeps the environment of its own beginning, with the scope of an earlier comparison.
        environment = dict(os.environ)
        self._process = context.Process(target=_obey, args=(theirs, environment, factory, args), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.result()  # the factory's outcome
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def send(self, method: str, *args: object) -> None:
        """Starts a command without waiting for it; exactly one `result()` must follow."""
        self._pipe.send((method, args))

    def result(self) -> Any:
        """The outcome of the command sent last.

        Raises:
            ActorFailed: the command raised, or the process has died.
            Missing: the command found that a program or package is missing.
        """
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError) as exc:
            self._process.join(5)
            raise ActorFailed(f"actor {self.pid} ended with {self._process.exitcode}") from exc
        if kind == "missing":
            raise Missing(value)
        if kind == "failed":
            raise ActorFailed(value)
        return value

    def call(self, method: str, *args: object) -> Any:
        self.send(method, *args)
        return self.result()

    def close(self) -> None:
        """Lets the process end in the ordinary way, and kills it if it does not within 5 s."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _obey(
    pipe: Connection, environment: dict[str, str], factory: Callable[..., object], args: tuple[object, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target: object = None
    while True:
        try:
            if target is None:
                target, value = factory(*args), None
            else:
                method, arguments = pipe.recv()
                value = getattr(target, method)(*arguments)
            reply = ("ok", value)
        except (EOFError, ConnectionResetError):
            break
        except Missing as exc:
            reply = ("missing", str(exc))
        except Exception:  # noqa: BLE001 - whatever it was is raised again where the command came from
            reply = ("failed", traceback.format_exc())
        try:
            pipe.send(reply)
        except BrokenPipeError:
            break
        if target is None:
            break
    close = getattr(target, "close", None)
    if close is not None:
        close()


def need(module: str, package: str | None = None) -> Any:
    """Imports `module`, or says which package is missing."""
    try:
        return __import__(module, fromlist=["*"])
    except ModuleNotFoundError as exc:
        raise Missing(f"package {package or module} is missing ({exc})") from exc


def library() -> Any:
    """The package that is measured; what it lacks is reported as a missing package, and the peers still run."""
    package = need("sharedpool")
    if not hasattr(package, "attach"):
        raise Missing("package sharedpool is missing (no attach)")
    return package


def time_pairs(pairs: int, pair: Callable[[Iterable[None]], None]) -> float:
    """Seconds per pair; `pair` runs one pair for each item, so that its loop has its own local names."""
    gc.collect()
    items = [None] * pairs
    start = time.perf_counter()
    pair(items)
    return (time.perf_counter() - start) / pairs


def interleave(rounds: int, contestants: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Lets each contestant run once per round; the order moves on by one with every round."""
    names = list(contestants)
    results: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(contestants[name]())
    return results


def quantile(values: Iterable[float], q: float) -> float:
    """The nearest-rank quantile: always a value that was measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def paired_ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Ours over theirs, round by round, so that a slow minute of the machine touches both."""
    return [a / b for a, b in zip(ours, peer, strict=True)]


@dataclass(frozen=True, slots=True)
class Limit:
    """What a figure must and should reach; `better` is "<=" or ">="."""

    better: str
    must: float
    aim: float

    def mark(self, value: float) -> str:
        sign = 1 if self.better == "<=" else -1
        if sign * value <= sign * self.aim:
            return "AIM"
        return "PASS" if sign * value <= sign * self.must else "MISS"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure per repeat, judged by its median.

    `samples` are what the limit is about, in `unit` ("x" for a ratio); `ours` and `peer` are the two sides as text.
    """

    group: str
    what: str
    samples: Sequence[float] = ()
    unit: str = ""
    limit: Limit | None = None
    ours: str = ""
    peer: str = ""
    note: str = ""

    @property
    def value(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def mark(self) -> str:
        value = self.value
        if value is None:
            return "----"
        return self.limit.mark(value) if self.limit else ""


def missing_row(group: str, what: str, why: str) -> Row:
    return Row(group, what, note=why)


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} µs"


def milli(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def number(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 0.1 or unit == "x" else 3
    text = f"{value:,.{digits}f}"
    return f"{text} {unit}".rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    value, limit = row.value, row.limit
    spread = ""
    if value is not None and len(row.samples) > 1:
        spread = f"{number(quantile(row.samples, 0.25), '')}-{number(quantile(row.samples, 0.75), '')}"
    return (
        row.group,
        row.what,
        row.ours,
        row.peer,
        "" if value is None else number(value, row.unit),
        spread,
        f"{limit.better} {limit.must:g}" if limit else "",
        f"{limit.aim:g}" if limit else "",
        row.mark,
        row.note,
    )


HEAD = ("group", "what", "ours", "peer", "value", "quartiles", "must", "aim", "mark", "note")


def table(rows: Sequence[Row]) -> str:
    lines = [HEAD, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD) - 1)]
    text = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        text.append("  ".join([*padded, line[-1]]).rstrip())
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


@dataclass(slots=True)
class Report:
    """Everything of a run that another run could be compared with."""

    quick: bool
    rows: list[Row] = field(default_factory=list)
    python: str = platform.python_version()
    kernel: str = platform.release()
    cpus: int = os.cpu_count() or 0
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)
    load_after: tuple[float, float, float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def heading(self) -> str:
        return (
            f"Python {self.python}, Linux {self.kernel}, {self.cpus} CPUs, load {self.load_before[0]:.2f} at the start"
            f"{', quick' if self.quick else ''}"
        )

    def to_json(self) -> str:
        content = asdict(self)
        for row, plain in zip(self.rows, content["rows"], strict=True):
            plain.update(samples=list(row.samples), value=row.value, mark=row.mark)
        return json.dumps(content, indent=1, ensure_ascii=False)


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout is the table alone."""
    print(text, file=sys.stderr, flush=True)
