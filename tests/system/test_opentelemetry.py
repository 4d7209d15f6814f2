"""The OpenTelemetry instruments, read back by the real SDK."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the package opentelemetry-sdk is missing")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from sharedpool.integrations import opentelemetry
from tests.support.backend import Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.workers import Worker
from tests.system.lineup import line_up

POOL = "db.client.connection.pool.name"
STATE = "db.client.connection.state"


def export(state: State) -> dict[str, Any]:
    """name -> (unit, monotonic, {attributes: value}) of one export of this worker."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    opentelemetry.instrument(provider)
    data = reader.get_metrics_data()
    provider.shutdown()
    if data is None:
        return {}
    return {
        metric.name: (
            metric.unit,
            metric.data.is_monotonic,
            {tuple(sorted(point.attributes.items())): point.value for point in metric.data.data_points},
        )
        for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
    }  # fmt: skip


def test_the_instruments_are_those_of_the_semantic_conventions(two: list[Worker], tcp: Target) -> None:
    two[0].attach(max_connections=2)
    labels = [two[0].checkout(tcp) for _ in range(2)]
    two[0].fails(TimeoutError, _checkout_at_once, tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    two[0].checkin(labels.pop())
    two[1].checkin(waiting.result())
    found = two[1].call(export)
    name = ((POOL, "default"),)
    assert found == {
        "db.client.connection.count": (
            "{connection}", False, {(*name, (STATE, "idle")): 1, (*name, (STATE, "used")): 1},
        ),
        "db.client.connection.max": ("{connection}", False, {name: 2}),
        "db.client.connection.pending_requests": ("{request}", False, {name: 0}),
        "db.client.connection.timeouts": ("{timeout}", True, {name: 1}),
    }  # fmt: skip


def _checkout_at_once(state: State, target: Target) -> None:
    state.pools["default"].checkout(target.host, target.port, target.transport, checkout_timeout=0)


def test_who_waits_is_a_pending_request(two: list[Worker], tcp: Target) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    assert two[0].call(export)["db.client.connection.pending_requests"][2] == {((POOL, "default"),): 1}
    two[0].checkin(label)
    two[1].checkin(waiting.result())


def test_names_and_units_are_those_that_the_conventions_package_has(worker: Worker, tcp: Target) -> None:
    conventions = pytest.importorskip(
        "opentelemetry.semconv._incubating.metrics.db_metrics",
        reason="the package opentelemetry-semantic-conventions has no metrics of database clients",
    )
    worker.use(tcp)
    known = {value for name, value in vars(conventions).items() if name.startswith("DB_CLIENT_CONNECTION_")}
    assert set(worker.call(export)) <= known


def test_without_an_arbiter_there_is_nothing_to_observe_and_none_is_started(worker: Worker, scope: Scope) -> None:
    assert worker.call(export) == {}
    assert not scope.arbiters()
