"""OpenTelemetry instruments `db.client.connection.*` (extra `opentelemetry`) for the scope's pools.

Names and meaning: the semantic conventions for database client metrics. Values are host-wide, whichever process exports
them: instrument one process of the host, or aggregate with max, never with sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Final

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from .. import inspection
from ..errors import SharedPoolError
from ..stats import PoolStats

_NAME: Final = "db.client.connection.pool.name"
_STATE: Final = "db.client.connection.state"
#: One export asks each instrument in turn: within this, s, all of them see the same numbers.
_FRESH: Final = 0.2

_Value = Callable[[PoolStats], Iterable[Observation]]


class _Numbers:
    """The pools' numbers, asked for once an export."""

    def __init__(self, app: str | None) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._until = 0.0
        self._pools: list[PoolStats] = []

    def pools(self) -> list[PoolStats]:
        with self._lock:
            if monotonic() >= self._until:
                try:
                    self._pools = inspection.pools(self._app)
                except (SharedPoolError, OSError):  # no arbiter that answers: nothing to report, and no error either
                    self._pools = []
                self._until = monotonic() + _FRESH
            return self._pools

    def callback(self, value: _Value) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for stats in self.pools():
                yield from value(stats)

        return observe


def instrument(meter_provider: MeterProvider | None = None, app: str | None = None) -> None:
    """Make the instruments; they are read at every export.

    Args:
        meter_provider: The global one if not given.
        app: The scope's name; not given: SHAREDPOOL_DIR, else SHAREDPOOL_APP, else "default".
    """
    meter = metrics.get_meter("sharedpool", meter_provider=meter_provider)
    numbers = _Numbers(app)
    meter.create_observable_up_down_counter(
        "db.client.connection.count", [numbers.callback(_count)], "{connection}",
        "The number of connections that are currently in the state described by the state attribute.",
    )  # fmt: skip
    meter.create_observable_up_down_counter(
        "db.client.connection.max", [numbers.callback(lambda stats: [_of(stats, stats.max_connections)])],
        "{connection}", "The maximum number of open connections allowed.",
    )  # fmt: skip
    meter.create_observable_up_down_counter(
        "db.client.connection.pending_requests", [numbers.callback(lambda stats: [_of(stats, stats.waiting)])],
        "{request}", "The number of current pending requests for an open connection.",
    )  # fmt: skip
    meter.create_observable_counter(
        "db.client.connection.timeouts", [numbers.callback(lambda stats: [_of(stats, stats.timeouts)])],
        "{timeout}", "The number of connection timeouts that have occurred trying to obtain a connection.",
    )  # fmt: skip


def _count(stats: PoolStats) -> Iterator[Observation]:
    """Idle, and everything else that counts against the cap."""
    for state, number in (("idle", stats.idle), ("used", stats.used - stats.idle)):
        yield Observation(number, {_NAME: stats.name, _STATE: state})


def _of(stats: PoolStats, number: int) -> Observation:
    return Observation(number, {_NAME: stats.name})
