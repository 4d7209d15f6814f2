"""Metrics of pools: which there are, and the Prometheus text format. Pure; prometheus_client is not needed for it.

Every value is host-wide, over all processes of a scope. A monitoring system that collects it from several workers
must aggregate with max, not sum.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Final

from .stats import ARBITER_COUNTERS, COUNTERS, PoolStats

PREFIX: Final = "sharedpool"
#: The states of a slot, as PoolStats names them.
STATES: Final = ("in_use", "idle", "opening", "granted", "closing")

_GAUGES: Final = {
    "max_connections": "The cap on connections over all processes of the scope.",
    "waiting": "Checkouts in the queue now.",
    "processes": "Processes attached to the pool.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, "gauge" or "counter", what it means, and its values with their labels."""

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
    ]


def up(answers: bool) -> Family:
    """Whether the scope's arbiter answers. Without one there are no pools, and no other metric has a value."""
    return Family(f"{PREFIX}_up", "gauge", "Whether the scope's arbiter answers.", (({}, float(answers)),))


def _states(pools: list[PoolStats]) -> Family:
    samples = tuple(
        ({"pool": stats.name, "state": state}, float(getattr(stats, state))) for stats in pools for state in STATES
    )
    return Family(f"{PREFIX}_connections", "gauge", "Permits taken, by state; together never above the cap.", samples)


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
        for labels, value in family.samples:
            inside = ",".join(f'{name}="{_quoted(each)}"' for name, each in labels.items())
            lines.append(f"{family.sample_name}{f'{{{inside}}}' if inside else ''} {value:.17g}")
    return "\n".join(lines) + "\n"


def _escaped(words: str) -> str:
    return words.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(value: str) -> str:
    return _escaped(value).replace('"', '\\"')
