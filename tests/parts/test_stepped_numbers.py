"""Whatever the arbiter does, connections opened and closed add up, and each close has its reason."""

from __future__ import annotations

import os

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sharedpool import invariants, view
from sharedpool.layout import GATE, GATE_FLAGS, IDLE, LEASED, MAX, STATE, USED, holder_of
from sharedpool.stats import PoolStats
from sharedpool.testing import SteppedArbiter, SteppedWorker

EXAMPLES = int(os.environ.get("SHAREDPOOL_TEST_EXAMPLES", "20"))

some = st.integers(min_value=0, max_value=7)


class Numbers(RuleBasedStateMachine):
    """Workers that open, leave idle and die; remotes that end; time, limits, and a stop."""

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
        return view.stats(self.pool.words, self.pool.segment.geometry, "default")

    def worker(self, number: int) -> SteppedWorker:
        if number >= len(self.workers):
            self.pids += 1
            self.workers.append(self.arbiter.worker(self.pool, self.pids))
        return self.workers[number % len(self.workers)]

    def in_state(self, state: int, worker: SteppedWorker) -> list[int]:
        row = worker.table.row
        return [at for _, at, word in self.pool.slots() if word & STATE == state and holder_of(word) == row]

    @rule(number=some, key=st.integers(1, 3))
    def open(self, number: int, key: int) -> None:
        w = self.pool.words
        if not w[GATE] & GATE_FLAGS and w[USED] < w[MAX]:
            self.worker(number).open(key)
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
    def stop_and_start(self) -> None:
        self.pool.stop()
        self.pool = self.arbiter.pool(**self.given)

    @invariant()
    def connections_add_up(self) -> None:
        stats = self.stats()
        assert not list(invariants.connections_add_up(self.pool.table))
        assert stats.opened - stats.closed == stats.connections
        assert sum(stats.closes.values()) == stats.closed + stats.closing
        assert stats.opened == self.opened


def test_connections_opened_and_closed_add_up_whatever_happens() -> None:
    hypothesis.stateful.run_state_machine_as_test(
        Numbers,
        settings=hypothesis.settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
