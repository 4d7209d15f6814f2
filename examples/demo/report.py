"""What the demonstration prints at its end. It computes from what was counted and decides nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .backend import Seen
from .load import Load, percentile

COUNTERS = ("opens", "reuses", "takeovers", "handoffs", "waits")


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What was run."""

    workers: int
    threads: int
    cap: int
    clients: int
    backend: str
    milliseconds: int

    @property
    def per_worker(self) -> int:
        """Connections that a worker with a pool of its own would open: no more than it serves at once."""
        return min(self.cap, self.threads)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What was counted: by the clients, the back end, the pool, and each worker that ended in peace."""

    load: Load
    seen: Seen
    workers: Sequence[Mapping[str, Any]]
    totals: Mapping[str, Any] | None  # of the pool, all workers; None when every worker had its own


def summary(setting: Setting, run: Run, compared: Run | None) -> str:
    """The figures."""
    load = run.load
    errors = load.errors(setting.threads)
    answers = f"an answer of the back end takes {setting.milliseconds} ms"
    times = [request.seconds * 1000 for request in load.good]
    rows = [
        ("requests", f"{len(load.good):,}", f"{len(load.good) / load.seconds:,.0f} per second; {answers}"),
        ("errors", f"{sum(errors.values()):,}", ", ".join(f"{n} x {kind}" for kind, n in errors.items())),
        (
            "cut by a kill",
            str(load.cut_by_kills(setting.threads)),
            f"{len(load.kills)} workers got SIGKILL; only what they were serving themselves can be lost",
        ),
        ("peak connections", str(run.seen.peak), f"as {setting.backend} counted; the cap is {setting.cap}"),
        ("with a pool per worker", *beside(setting, compared)),
        ("connections opened in all", str(run.seen.connections), f"as {setting.backend} counted"),
        ("p50", f"{percentile(times, 0.50):.1f} ms", f"{setting.clients} clients, waiting for a worker included"),
        ("p99", f"{percentile(times, 0.99):.1f} ms", ""),
    ]
    return table(("", "", ""), rows, left=(0, 2))


def beside(setting: Setting, compared: Run | None) -> tuple[str, str]:
    """The same without one pool for all: measured if it was run, else computed."""
    allowed = f"{setting.workers} x {setting.cap} = {setting.workers * setting.cap} would be allowed"
    if compared is None:
        return str(setting.workers * setting.per_worker), f"computed: {setting.per_worker} in each worker; {allowed}"
    return str(compared.seen.peak), f"measured too, under the same load; {allowed}"


def workers_table(run: Run) -> str:
    """What each worker did. What the killed ones did is the pool's total less all others."""
    names = ("requests", *COUNTERS)
    rows = [(str(worker["pid"]), *(f"{worker[name]:,}" for name in names)) for worker in run.workers]
    sums = {name: sum(worker[name] for worker in run.workers) for name in names}
    if run.totals is not None:
        totals = {**run.totals, "requests": run.seen.requests}
        if run.load.kills:
            killed = f"{len(run.load.kills)} killed"
            rows.append((killed, *(f"{totals[name] - sums[name]:,}" for name in names)))
        sums = totals
    rows.append(("all", *(f"{sums[name]:,}" for name in names)))
    return table(("worker", *names), rows, left=(0,))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int]) -> str:
    """Aligned columns, two spaces apart, numbers to the right."""
    lines = [list(head), *map(list, rows)] if any(head) else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
