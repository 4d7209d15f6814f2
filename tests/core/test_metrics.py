"""The metrics and their text form."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from sharedpool import metrics
from sharedpool.stats import ARBITER_COUNTERS, BOUNDS, COUNTERS, REASONS, Histogram, PoolStats

API = PoolStats(name="api", max_connections=5, in_use=3, idle=1, granted=1, waiting=7, processes=2, reuses=40, opens=4)


def lines(*pools: PoolStats) -> list[str]:
    return metrics.text(metrics.families(pools)).splitlines()


def test_every_number_of_a_pool_is_in_a_metric() -> None:
    values = range(100, 200)
    by_reason = {"discards", "evictions", *REASONS}  # these are labels of `closes`
    others = {"name", "connections", "longest_wait_pid", "longest_lease_pid"}  # the states tell the second one
    kinds = {"int", "float"}
    names = [
        field.name for field in dataclasses.fields(PoolStats)
        if field.name not in by_reason | others and field.type in kinds
    ]  # fmt: skip
    assert len(names) > 25
    stats = PoolStats(name="x", **dict(zip(names, values, strict=False)))
    seen = {value for family in metrics.families([stats]) for _, value in family.samples}
    assert {float(getattr(stats, name)) for name in names} <= seen
    assert float(stats.checkouts) in seen


def test_gauges_have_states_and_counters_end_in_total() -> None:
    text = lines(API)
    assert 'sharedpool_connections{pool="api",state="in_use"} 3' in text
    assert 'sharedpool_connections{pool="api",state="granted"} 1' in text
    assert 'sharedpool_waiting{pool="api"} 7' in text
    assert "# TYPE sharedpool_waiting gauge" in text
    assert 'sharedpool_reuses_total{pool="api"} 40' in text
    assert 'sharedpool_checkouts_total{pool="api"} 44' in text
    assert "# TYPE sharedpool_checkouts_total counter" in text


def test_closes_have_their_reason_as_a_label() -> None:
    text = lines(dataclasses.replace(API, closes={"expired": 3}))
    assert 'sharedpool_closes_total{pool="api",reason="expired"} 3' in text
    assert 'sharedpool_closes_total{pool="api",reason="evicted"} 0' in text


def test_histograms_are_cumulated() -> None:
    counts = (2, 0, 1, *(0 for _ in BOUNDS[3:]), 4)
    text = lines(dataclasses.replace(API, wait_seconds=Histogram(counts, 50.5)))
    assert "# TYPE sharedpool_wait_seconds histogram" in text
    assert [line.split()[-1] for line in text if line.startswith("sharedpool_wait_seconds_bucket")] == [
        "2", "2", *["3"] * (len(BOUNDS) - 2), "7",
    ]  # fmt: skip
    assert 'sharedpool_wait_seconds_bucket{le="+Inf",pool="api"} 7' in text
    assert 'sharedpool_wait_seconds_sum{pool="api"} 50.5' in text
    assert 'sharedpool_wait_seconds_count{pool="api"} 7' in text


def test_the_states_of_a_pool_add_up_to_what_counts_against_the_cap() -> None:
    (states,) = [family for family in metrics.families([API]) if family.name == "sharedpool_connections"]
    assert sum(value for _, value in states.samples) == API.used


def test_each_pool_has_a_sample_under_one_help_and_type() -> None:
    text = lines(API, dataclasses.replace(API, name="default", waiting=1))
    assert [line for line in text if "sharedpool_waiting" in line] == [
        "# HELP sharedpool_waiting Checkouts in the queue now.",
        "# TYPE sharedpool_waiting gauge",
        'sharedpool_waiting{pool="api"} 7',
        'sharedpool_waiting{pool="default"} 1',
    ]


def test_what_could_break_a_line_is_escaped() -> None:
    family = metrics.Family("n", "gauge", "a\nb\\c", (({"pool": 'x"y\\z\n'}, 1.0),))
    assert metrics.text([family]) == '# HELP n a\\nb\\\\c\n# TYPE n gauge\nn{pool="x\\"y\\\\z\\n"} 1\n'


def test_large_counters_keep_every_digit() -> None:
    family = metrics.Family("n", "counter", "", (({}, float(2**53 - 1)),))
    assert metrics.text([family]).splitlines()[-1] == "n_total 9007199254740991"


def test_every_counter_says_what_it_counts() -> None:
    told = {family.name.removeprefix("sharedpool_"): family.help for family in metrics.families([])}
    for name in (*COUNTERS, *ARBITER_COUNTERS):
        assert "of PoolStats." not in told[name], f"{name} is missing in the docstring of PoolStats"


def test_the_page_on_metrics_lists_every_metric_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `(sharedpool_\w+)", page, re.MULTILINE))
    assert listed == {family.sample_name for family in [metrics.up(True), *metrics.families([])]}
