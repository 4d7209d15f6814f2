"""The Prometheus collector: what a scrape of any worker shows."""

from __future__ import annotations

from typing import Any

import pytest

prometheus_client = pytest.importorskip("prometheus_client", reason="the package prometheus_client is missing")

from sharedpool.integrations import prometheus  # noqa: E402 - it cannot be imported without its library
from tests.support import commands  # noqa: E402
from tests.support.backend import Target  # noqa: E402
from tests.support.scope import Scope  # noqa: E402
from tests.support.state import State  # noqa: E402
from tests.support.workers import Worker  # noqa: E402
from tests.system.cli import run  # noqa: E402


def scrape(state: State) -> str:
    """What this worker's /metrics would answer."""
    if "registry" not in state.things:
        state.things["registry"] = prometheus_client.CollectorRegistry()
        prometheus.register(state.things["registry"])
    return prometheus_client.generate_latest(state.things["registry"]).decode()


def samples(text: str) -> dict[str, float]:
    """All but those that grow from one look to the next."""
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines() if not line.startswith(("#", "sharedpool_longest_"))
    }  # fmt: skip


@pytest.fixture
def busy(two: list[Worker], tcp: Target) -> list[Worker]:
    two[0].attach("api", max_connections=3)
    two[0].checkout(tcp, pool="api")
    for _ in range(2):
        two[1].use(tcp)
    return two


def test_whichever_worker_is_scraped_the_values_are_the_hosts(busy: list[Worker]) -> None:
    first, second = (samples(worker.call(scrape)) for worker in busy)
    assert first == second
    assert first["sharedpool_up"] == 1
    assert first['sharedpool_connections{pool="api",state="in_use"}'] == 1
    assert first['sharedpool_max_connections{pool="api"}'] == 3
    assert first['sharedpool_connections{pool="default",state="idle"}'] == 1
    assert first['sharedpool_opens_total{pool="default"}'] == 1
    assert first['sharedpool_reuses_total{pool="default"}'] == 1
    assert first['sharedpool_checkouts_total{pool="default"}'] == 2


def test_a_scrape_attaches_to_nothing(busy: list[Worker], harness: Any) -> None:
    third = harness.start()
    assert samples(third.call(scrape))['sharedpool_processes{pool="default"}'] == 1


def test_counters_survive_the_worker_that_counted(busy: list[Worker]) -> None:
    busy[1].kill()
    busy[0].wait_stats("default", processes=1)  # the asking one, which has just attached
    assert samples(busy[0].call(scrape))['sharedpool_checkouts_total{pool="default"}'] == 2


def test_without_an_arbiter_it_is_down_and_none_is_started(worker: Worker, scope: Scope) -> None:
    assert samples(worker.call(scrape)) == {"sharedpool_up": 0.0}
    assert not scope.arbiters()


def test_after_the_arbiter_has_gone_and_another_has_come_scrapes_go_on(busy: list[Worker], tcp: Target) -> None:
    assert samples(busy[0].call(scrape))["sharedpool_up"] == 1
    busy[0].call(commands.library, "stop")
    assert samples(busy[0].call(scrape)) == {"sharedpool_up": 0.0}
    busy[1].call(commands.library, "start_pool", "default")
    # The processes still have the stopped pool, so it is the same that was started again.
    assert samples(busy[0].call(scrape))['sharedpool_checkouts_total{pool="default"}'] == 2


def test_the_command_prints_the_same_samples(busy: list[Worker], scope: Scope) -> None:
    pytest.importorskip("typer", reason="the command line needs the package typer (extra cli)")
    assert samples(run(scope, "metrics").out) == samples(busy[0].call(scrape))


def test_what_the_command_prints_is_understood_by_prometheus_own_parser(busy: list[Worker], scope: Scope) -> None:
    pytest.importorskip("typer", reason="the command line needs the package typer (extra cli)")
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(run(scope, "metrics").out)}
    assert families["sharedpool_connections"].type == "gauge"
    assert families["sharedpool_opens"].type == "counter"
    assert {sample.labels["pool"] for sample in families["sharedpool_waiting"].samples} == {"api", "default"}


def test_registering_looks_at_no_pool_and_can_be_undone(scope: Scope) -> None:
    registry = prometheus_client.CollectorRegistry()
    collector = prometheus.register(registry)
    with pytest.raises(ValueError, match="sharedpool_connections"):
        prometheus.register(registry)  # its names are known without a scrape
    registry.unregister(collector)
    prometheus.register(registry)
    assert not scope.arbiters()
