"""Metrics of pools: which there are, and the Prometheus text format. Pure; prometheus_client is not needed for it.

Every value is host-wide, over all processes of a scope. A monitoring system that collects it from several workers
must aggregate with max, not sum.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

from .stats import ARBITER_COUNTERS, BOUNDS, COUNTERS, REASONS, Histogram, PoolStats

PREFIX: Final = "sharedpool"
#: The states of a slot, as PoolStats names them.
STATES: Final = ("in_use", "idle", "opening", "granted", "closing")

_GAUGES: Final = {
    "max_connections": "The cap on connections over all processes of the scope.",
    "waiting": "Checkouts in the queue now.",
    "processes": "Processes attached to the pool.",
    "longest_wait": "Seconds for which the longest waiter has waited by now.",
    "longest_lease": "Seconds for which the longest lease has lasted by now.",
}
_HISTOGRAMS: Final = {
    "wait_seconds": "How long checkouts queued, those that gave up among them.",
    "connect_seconds": "How long opening a connection took.",
    "lease_seconds": "How long leases lasted.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, "gauge", "counter" or "histogram", what it means, and its values with their labels.

    A histogram's samples have the label `le` (cumulated, as Prometheus wants them), or `part` "sum" or "count".
    """

    name: str
    kind: str
    help: str
    samples: tuple[tuple[dict[str, str], float], ...]

    @property
    def sample_name(self) -> str:
        """As the samples are written: counters end in `_total`."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def families(pools: Iterable[PoolStats]) -> list[Family]:
    """Every metric, with a value for each pool."""
    pools = list(pools)
    told = _described()
    counters = {name: told.get(name, f"{name} of PoolStats.") for name in (*COUNTERS, *ARBITER_COUNTERS)}
    return [
        _states(pools),
        *(_family(name, "gauge", text, pools) for name, text in _GAUGES.items()),
        _family("checkouts", "counter", "Leases ever given.", pools),
        *(_family(name, "counter", text, pools) for name, text in counters.items()),
        _closes(pools),
        *(_histogram(name, text, pools) for name, text in _HISTOGRAMS.items()),
    ]


def up(answers: bool) -> Family:
    """Whether the scope's arbiter answers. Without one there are no pools, and no other metric has a value."""
    return Family(f"{PREFIX}_up", "gauge", "Whether the scope's arbiter answers.", (({}, float(answers)),))


def _states(pools: list[PoolStats]) -> Family:
    samples = tuple(
        ({"pool": stats.name, "state": state}, float(getattr(stats, state))) for stats in pools for state in STATES
    )
    return Family(f"{PREFIX}_connections", "gauge", "Permits taken, by state; together never above the cap.", samples)


def _closes(pools: list[PoolStats]) -> Family:
    samples = tuple(
        ({"pool": stats.name, "reason": reason}, float(stats.closes.get(reason, 0)))
        for stats in pools
        for reason in REASONS
    )
    return Family(f"{PREFIX}_closes", "counter", "Connections closed, by reason; each has one.", samples)


def _histogram(name: str, text: str, pools: list[PoolStats]) -> Family:
    samples: list[tuple[dict[str, str], float]] = []
    for stats in pools:
        histogram: Histogram = getattr(stats, name)
        bounds = [*map(str, BOUNDS), "+Inf"]
        for bound, up_to in zip(bounds, accumulate(histogram.counts), strict=True):
            samples.append(({"pool": stats.name, "le": bound}, float(up_to)))
        samples.append(({"pool": stats.name, "part": "sum"}, histogram.sum))
        samples.append(({"pool": stats.name, "part": "count"}, float(histogram.count)))
    return Family(f"{PREFIX}_{name}", "histogram", text, tuple(samples))


def _family(name: str, kind: str, text: str, pools: list[PoolStats]) -> Family:
    samples = tuple(({"pool": stats.name}, float(getattr(stats, name))) for stats in pools)
    return Family(f"{PREFIX}_{name}", kind, text, samples)


def _described() -> dict[str, str]:
    """What PoolStats says of its counters; nothing where docstrings are stripped (-OO)."""
    found = re.findall(r"^ {4,8}(\w+): (.+(?:\n {12}.+)*)", PoolStats.__doc__ or "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def text(found: Iterable[Family]) -> str:
    """The metrics in the Prometheus text format, version 0.0.4."""
    lines = []
    for family in found:
        lines.append(f"# HELP {family.sample_name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.sample_name} {family.kind}")
        for given, value in family.samples:
            labels = dict(given)
            name = family.sample_name
            if family.kind == "histogram":
                name += "_" + labels.pop("part", "bucket")
            inside = ",".join(f'{label}="{_quoted(each)}"' for label, each in sorted(labels.items()))
            lines.append(f"{name}{f'{{{inside}}}' if inside else ''} {value:.17g}")
    return "\n".join(lines) + "\n"


def _escaped(words: str) -> str:
    return words.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(value: str) -> str:
    return _escaped(value).replace('"', '\\"')
