"""What the demonstration prints at its end. It computes from what was counted and decides nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .backend import Seen
from .load import Load, percentile

#: The ways to a lease; together they are all leases.
LEASES = ("opens", "reuses", "takeovers", "handoffs")
COLUMNS = ("requests", *LEASES, "waits")
NAME, KILLED, ALL = "worker", "killed", "all"


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
    times = [request.seconds * 1000 for request in load.good]
    rows = [
        ("requests", f"{len(load.good):,}", f"{load.rate:,.0f} per second{most(setting)}"),
        ("errors", f"{sum(errors.values()):,}", ", ".join(f"{n} x {kind}" for kind, n in errors.items())),
        (
            "cut by a kill",
            str(load.cut_by_kills(setting.threads)),
            f"{len(load.kills)} workers were killed; only what they were serving can be lost",
        ),
        ("peak connections", str(run.seen.peak), f"counted by {setting.backend}; the cap is {setting.cap}"),
        ("with a pool per worker", *beside(setting, compared)),
        ("connections opened", str(run.seen.connections), f"in all, counted by {setting.backend}"),
        ("p50", f"{percentile(times, 0.50):.1f} ms", f"{setting.clients} clients; waiting for a worker is included"),
        ("p99", f"{percentile(times, 0.99):.1f} ms", ""),
    ]
    return table(("", "", ""), [row for row in rows if load.kills or row[0] != "cut by a kill"], left=(0, 2))


def most(setting: Setting) -> str:
    """The cap's price and purpose: what so many connections can carry."""
    if not setting.milliseconds:
        return ""
    rate = setting.cap * 1000 / setting.milliseconds
    return f"; {setting.cap} connections with answers of {setting.milliseconds} ms allow {rate:,.0f}"


def beside(setting: Setting, compared: Run | None) -> tuple[str, str]:
    """The same without one pool for all: measured if it was run, else computed."""
    allowed = f"{setting.workers} x {setting.cap} = {setting.workers * setting.cap} are allowed"
    if compared is None:
        return str(setting.workers * setting.per_worker), f"computed: {setting.per_worker} in each worker; {allowed}"
    return str(compared.seen.peak), f"counted, too, at {compared.load.rate:,.0f} requests per second; {allowed}"


def workers_table(setting: Setting, run: Run) -> str:
    """What each worker did, with one row for the killed ones together."""
    rows = [(f"{row[NAME]}", *(f"{row.get(name, 0):,}" for name in COLUMNS)) for row in each_row(setting, run)]
    return table((NAME, *COLUMNS), rows, left=(0,))


def each_row(setting: Setting, run: Run) -> list[Mapping[str, Any]]:
    """Each worker's numbers, those of the killed ones, and all. Nobody but the pool knows what the killed ones did:
    it is the pool's total, and the back end's count of requests, less what the others did.
    """
    rows: list[Mapping[str, Any]] = []
    for worker in sorted(run.workers, key=lambda worker: int(worker["number"])):
        new = " (new)" if worker["number"] > setting.workers else ""
        rows.append({**worker, NAME: f"{worker['number']}{new}"})
    sums = {name: sum(row.get(name, 0) for row in rows) for name in COLUMNS}
    totals = sums if run.totals is None else {**run.totals, "requests": run.seen.requests}
    if run.load.kills:
        rows.append({NAME: KILLED, **{name: totals[name] - sums[name] for name in COLUMNS}})
    return [*rows, {**totals, NAME: ALL}]


def not_adding_up(setting: Setting, run: Run) -> list[str]:
    """Rows in which leases and requests differ. A killed worker may hold leases it had sent no request on."""
    unsent = dict.fromkeys((KILLED, ALL), setting.threads * len(run.load.kills))
    wrong = []
    for row in each_row(setting, run):
        leases = sum(row.get(name, 0) for name in LEASES)
        if not 0 <= leases - row["requests"] <= unsent.get(row[NAME], 0):
            wrong.append(f"worker {row[NAME]}: {leases:,} leases for {row['requests']:,} requests")
    return wrong


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
