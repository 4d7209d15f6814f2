"""`python -m tests.stress --seed S --seconds N`: chaos for so long, and what was lost (nothing)."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("SHAREDPOOL_SPEED", "auto")

from tests.stress.chaos import Chaos, Report
from tests.support.backend import Backend
from tests.support.leaks import check_nothing_left, take_census
from tests.support.processes import adopt_orphans
from tests.support.scope import Scope
from tests.support.workers import ForkServer, Harness


def once(seed: int, seconds: float) -> Report:
    """One run with processes and a scope of its own, which leaves nothing behind."""
    directory = Path(tempfile.mkdtemp(prefix="sp-", dir="/tmp"))
    before = take_census(directory / "s")
    server = ForkServer()
    scope = Scope(directory / "s")
    harness = Harness(directory, scope.env, server)
    try:
        with Backend(directory) as backend:
            report = Chaos(harness, backend, scope, seed).run(seconds)
    finally:
        harness.close()
        scope.stop()
        server.stop()
    try:
        check_nothing_left(before, directory / "s")
    except AssertionError as error:
        report.lost.append(str(error))
    shutil.rmtree(directory)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/stress", description=__doc__)
    parser.add_argument("--seed", type=int, help="of all that chance decides (default: another one each time)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long harm is done (default 60)")
    parser.add_argument("--each", type=float, default=60.0, help="seconds per run; a longer time is several runs")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    adopt_orphans()
    left, good = options.seconds, True
    while left > 0:
        print(f"seed {seed} ...", flush=True)
        report = once(seed, min(left, options.each))
        print(report, flush=True)
        good &= report.good
        left -= options.each
        seed += 1
    print("nothing was lost" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
