"""`scripts/stress --seed S --seconds N`: chaos for so long, and what was lost (nothing)."""

from __future__ import annotations

import argparse
import os
import random

os.environ.setdefault("SHAREDPOOL_SPEED", "auto")

from tests.stress.chaos import Chaos
from tests.stress.harm import Report
from tests.support.stage import Stage, stage


def once(seed: int, seconds: float, clients: bool = False) -> Report | None:
    """One run with processes and a scope of its own; None if it could not be brought to its end."""
    report = None
    run = _clients if clients else _sockets
    try:
        with stage(*(("tests.stress.clients",) if clients else ())) as made:
            report = run(made, seed, seconds)
    except AssertionError as error:
        if report is None:
            print(error)
        else:
            report.lost.append(str(error))
    return report


def _sockets(made: Stage, seed: int, seconds: float) -> Report:
    return Chaos(made.harness, made.backend, made.scope, seed).run(seconds)


def _clients(made: Stage, seed: int, seconds: float) -> Report:
    from tests.stress.clients import ClientsChaos, Servers  # redis-py and urllib3 are not everywhere

    with Servers(made.harness.directory) as servers:
        return ClientsChaos(made.harness, made.scope, servers, seed).run(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/stress", description=__doc__)
    parser.add_argument("--seed", type=int, help="of all that chance decides (default: another one each time)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long harm is done (default 60)")
    parser.add_argument("--each", type=float, default=60.0, help="seconds per run; a longer time is several runs")
    parser.add_argument("--clients", action="store_true", help="with redis-py and urllib3 instead of sockets")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    left, good = options.seconds, True
    while left > 0:
        print(f"seed {seed} ...", flush=True)
        report = once(seed, min(left, options.each), options.clients)
        print(report, flush=True)
        good &= report is not None and report.good
        left -= options.each
        seed += 1
    print("nothing was lost" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
