"""Whatever the arbiter does, connections opened and closed add up, and each close has its reason."""

from __future__ import annotations

import os

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sharedpool import served, view
from sharedpool.layout import GATE, GATE_FLAGS, IDLE, LEASED, MAX, STATE, USED, holder_of
from sharedpool.lines import Lines
from sharedpool.stats import KEY_COUNTERS, PoolStats
from sharedpool.testing import SteppedArbiter, SteppedWorker

EXAMPLES = int(os.environ.get("SHAREDPOOL_TEST_EXAMPLES", "20"))

some = st.integers(min_value=0, max_value=7)


class Numbers(RuleBasedStateMachine):
    """Workers that open, leave idle and die; remotes that end; time, limits, resets, an heir, and a stop."""

    keys = 3

    def __init__(self) -> None:
        super().__init__()
        self.arbiter = SteppedArbiter()
        self.given = {"max_connections": 4, "idle_timeout": 10.0, "close_timeout": 1.0}
        self.pool = self.arbiter.pool(**self.given)
        self.workers: list[SteppedWorker] = []
        self.opened = 0
        self.pids = 100

    def teardown(self) -> None:
        self.arbiter.close()

    def stats(self) -> PoolStats:
        return view.stats(self.pool.words, self.pool.segment.geometry, "default", 0)

    def worker(self, number: int) -> SteppedWorker:
        if number >= len(self.workers):
            self.pids += 1
            self.workers.append(self.arbiter.worker(self.pool, self.pids))
        return self.workers[number % len(self.workers)]

    def in_state(self, state: int, worker: SteppedWorker) -> list[int]:
        row = worker.table.row
        return [at for _, at, word in self.pool.slots() if word & STATE == state and holder_of(word) == row]

    @rule(number=some, key=some)
    def open(self, number: int, key: int) -> None:
        w = self.pool.words
        if not w[GATE] & GATE_FLAGS and w[USED] < w[MAX]:
            self.worker(number).open(key % self.keys + 1)
            self.opened += 1

    @rule(number=some)
    def leave_idle(self, number: int) -> None:
        worker = self.worker(number)
        if not self.pool.words[GATE] & GATE_FLAGS:
            for at in self.in_state(LEASED, worker)[:1]:
                worker.leave_idle(at)

    @rule(number=some)
    def remote_ends(self, number: int) -> None:
        worker = self.worker(number)
        for at in (self.in_state(IDLE, worker) + self.in_state(LEASED, worker))[:1]:
            worker.peer(at).close()
            self.arbiter.step(0)

    @rule(number=some)
    def die(self, number: int) -> None:
        if self.workers:
            self.workers.pop(number % len(self.workers)).die()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.arbiter.pass_time(seconds)

    @rule(maximum=st.integers(1, 6))
    def limit(self, maximum: int) -> None:
        self.given["max_connections"] = maximum
        self.arbiter.pool(**self.given)

    @rule()
    def reset(self) -> None:
        self.pool.reset_stats()
        self.opened = self.stats().connections

    @rule()
    def inherit_the_lines(self) -> None:
        """As an heir knows them: from the table alone."""
        self.pool.lines = Lines(self.pool.table)

    @rule()
    def stop_and_start(self) -> None:
        self.pool.stop()
        self.pool = self.arbiter.pool(**self.given)

    @invariant()
    def connections_add_up(self) -> None:
        stats = self.stats()
        assert stats.opened - stats.closed == stats.connections
        assert sum(stats.closes.values()) == stats.closed + stats.closing
        assert stats.opened == self.opened

    @invariant()
    def keys_add_up(self) -> None:
        stats, keys = self.stats(), view.keys(self.pool.words, self.pool.segment.geometry)
        for name in KEY_COUNTERS:
            assert sum(getattr(key, name) for key in keys.values()) == getattr(stats, name), name
        for reason, number in stats.closes.items():
            assert sum(key.closes.get(reason, 0) for key in keys.values()) == number, reason
        assert sum(key.connections for key in keys.values()) == stats.connections
        if 0 not in keys:  # every key has its lines
            for key in keys.values():
                assert key.opened - key.closed == key.connections
                assert sum(key.closes.values()) == key.closed + key.closing

    @invariant()
    def every_key_has_its_lines(self) -> None:
        assert 0 not in view.keys(self.pool.words, self.pool.segment.geometry)


class BeyondTheRoom(Numbers):
    """More keys and processes than there are lines for."""

    keys = 7

    def every_key_has_its_lines(self) -> None:
        """It has not."""

    def reset(self) -> None:
        """Not here: a key for which the arbiter has no line starts from zero in the pool's sums only."""


@pytest.mark.parametrize("machine", [Numbers, BeyondTheRoom])
def test_connections_opened_and_closed_add_up_whatever_happens(
    machine: type[Numbers], monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine is BeyondTheRoom:
        monkeypatch.setattr(served, "LINES", 8)
    hypothesis.stateful.run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
