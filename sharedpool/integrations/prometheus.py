"""A collector for prometheus_client (extra `prometheus`): the scope's pools, host-wide, from any process.

Whichever worker is scraped, the values are those of the whole host: aggregate over workers with max, never with sum.
Nothing is attached and no arbiter is started by a scrape.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry

from .. import inspection, metrics
from ..errors import SharedPoolError


class SharedPoolCollector(Collector):
    """Collects the metrics of docs/metrics.md.

    Args:
        app: The scope's name; not given: SHAREDPOOL_DIR, else SHAREDPOOL_APP, else "default".

    A scope without an arbiter has no pools, and `sharedpool_up` is 0. Safe before and after a fork.
    """

    def __init__(self, app: str | None = None) -> None:
        self._app = app

    def describe(self) -> Iterator[Metric]:
        """The names only, so that registering it looks at no pool."""
        for family in metrics.families([]):
            yield _metric(family)
        yield _metric(metrics.up(False))

    def collect(self) -> Iterator[Metric]:
        """The values now. What is wrong with the arbiter is 0 in `sharedpool_up`, never an exception."""
        try:
            facts = inspection.overview(self._app)
        except (SharedPoolError, OSError):
            yield _metric(metrics.up(False))
            return
        yield _metric(metrics.up(True))
        for family in metrics.families(each["stats"] for each in facts):
            yield _metric(family)


def register(registry: CollectorRegistry = REGISTRY, app: str | None = None) -> SharedPoolCollector:
    """Make a collector and register it; gives it, for `registry.unregister`."""
    collector = SharedPoolCollector(app)
    registry.register(collector)
    return collector


def _histogram(family: metrics.Family) -> Metric:
    made = HistogramMetricFamily(family.name, family.help, labels=["pool"])
    buckets: dict[str, list[tuple[str, float]]] = {}
    for given, value in family.samples:
        if "le" in given:
            buckets.setdefault(given["pool"], []).append((given["le"], value))
        elif given["part"] == "sum":
            made.add_metric([given["pool"]], buckets[given["pool"]], value)
    return made


def _metric(family: metrics.Family) -> Metric:
    if family.kind == "histogram":
        return _histogram(family)
    labels = list(family.samples[0][0]) if family.samples else ["pool"]
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    made = kind(family.name, family.help, labels=labels)
    for given, value in family.samples:
        made.add_metric(list(given.values()), value)
    return made
