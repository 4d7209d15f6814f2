"""Chaos with PostgreSQL sessions: workers are killed all the time; the server says who was connected.

    python -m tests.stress.postgres --seconds 300

Every lease leaves a token in its session and asks for it again and again; at its beginning no other process's may be
there. The cap is what pg_stat_activity shows, looked at without a pause.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.stress.looking import looking
from tests.support import sessions
from tests.support.postgres import CLIENTS, Postgres, too_many
from tests.support.stage import stage
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

KILL_EVERY = 0.5


@dataclasses.dataclass
class Outcome:
    """What there was to see."""

    leases: int = 0
    killed: int = 0
    samples: int = 0
    most: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)
    left: int = 0


def chaos(harness: Harness, seconds: float, seed: int, workers: int = 8, cap: int = 4) -> Outcome:
    """Run it; both libraries, on a server that has room for the cap and one judge."""
    chance, outcome = random.Random(seed), Outcome()
    server = Postgres(max_connections=str(cap + 1 + 3), superuser_reserved_connections="3")
    evidence = harness.directory / "evidence"
    try:
        server.begin()
        server.ask("CREATE USER plain")
        server.wait_until_alone()
        info = server.conninfo.replace("user=app", "user=plain")
        with server.judge() as ask, looking(lambda: _look(ask, outcome)):
            at_work = {n: _start(harness, n, info, cap, seconds, evidence) for n in range(workers)}
            end = time.monotonic() + seconds
            while time.monotonic() + KILL_EVERY < end:
                time.sleep(KILL_EVERY)
                n = chance.randrange(workers)
                at_work[n].kill()
                outcome.killed += 1
                at_work[n] = _start(harness, n, info, cap, end - time.monotonic(), evidence)
            wait_until(lambda: all(worker.idle for worker in at_work.values()), deadline=60)
            stats = at_work[0].worker.wait_stats(in_use=0, waiting=0, opening=0, granted=0, closing=0)
            outcome.left = stats.connections - len(server.backends())
        lines = evidence.read_text().splitlines()
        outcome.leases = lines.count(".")
        outcome.wrong = [line for line in lines if line != "."]
        outcome.refused = too_many(server.log())
        return outcome
    finally:
        server.end()


class _AtWork:
    def __init__(self, worker: Worker, seconds: float, evidence: Path) -> None:
        self.worker = worker
        self._working = worker.begin(sessions.work, seconds, evidence=str(evidence))

    @property
    def idle(self) -> bool:
        return self._working.done

    def kill(self) -> None:
        self.worker.kill()
        self.worker.close()
        self.worker.harness.workers.remove(self.worker)


def _start(harness: Harness, n: int, info: str, cap: int, seconds: float, evidence: Path) -> _AtWork:
    worker = harness.start()
    worker.attach(max_connections=cap)
    worker.call(sessions.make, "psycopg2" if n % 4 == 3 else "psycopg3", info)
    return _AtWork(worker, seconds, evidence)


def _look(ask: Callable[..., Any], outcome: Outcome) -> None:
    outcome.samples += 1
    outcome.most = max(outcome.most, len(ask(CLIENTS)))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args()
    print(f"seed: {given.seed}")
    with stage() as on:
        outcome = chaos(on.harness, given.seconds, given.seed)
    print(
        f"{outcome.leases} leases, {outcome.killed} workers killed; at most {outcome.most} sessions (cap 4) in"
        f" {outcome.samples} samples; {len(outcome.wrong)} wrong, {len(outcome.refused)} refused by the server"
    )
    for line in (outcome.wrong + outcome.refused)[:20]:
        print(line)
    raise SystemExit(bool(outcome.wrong or outcome.refused or outcome.most > 4 or outcome.left))


if __name__ == "__main__":
    main()
