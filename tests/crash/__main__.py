"""`scripts/crash-demo`: a worker, then an arbiter, ends at its k-th boundary call, for every k there is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ["SHAREDPOOL_SPEED"] = "pure"

from tests.crash import arbiters, scripts
from tests.crash.arbiters import ArbiterScene
from tests.crash.points import WAYS
from tests.crash.victims import Outcome, Scene
from tests.support.stage import stage

MOST = 500


def through(what: str, die: Callable[[int], Outcome]) -> bool:
    """Die at 1, 2, 3 ... until it comes to its end by itself; print each line that has a loss, and one for all."""
    slowest, good, k = 0.0, True, 0
    for k in range(1, MOST):
        outcome = die(k)
        slowest = max(slowest, outcome.seconds)
        if outcome.lost:
            good = False
            print(outcome, flush=True)
        if outcome.ended:
            break
    lost = "nothing lost" if good else "LOST"
    print(f"{what}: k = 1 ... {k - 1}: {lost}, a waiter served within {slowest:.3f} s", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/crash-demo", description=__doc__)
    parser.add_argument("--way", action="append", choices=list(WAYS), help="how workers end (default: kill)")
    parser.add_argument("--only", choices=("workers", "arbiters"))
    parser.add_argument("scripts", nargs="*", help=f"of {', '.join([*scripts.SCRIPTS, *arbiters.SCRIPTS])}")
    options = parser.parse_args()
    good = True
    if options.only != "arbiters":
        with stage() as made:
            scene = Scene(made.harness, made.backend, made.scope)
            for way in options.way or ["kill"]:
                for script in [each for each in scripts.SCRIPTS if each in (options.scripts or scripts.SCRIPTS)]:
                    good &= through(f"worker, {script}, {way}", lambda k: scene.die(script, k, way))  # noqa: B023
    if options.only != "workers":
        with stage() as made:
            arbiter = ArbiterScene(made.harness, made.backend, made.scope)
            for script in [each for each in arbiters.SCRIPTS if each in (options.scripts or arbiters.SCRIPTS)]:
                good &= through(f"arbiter, {script}", lambda k: arbiter.die(script, k))  # noqa: B023
    print("nothing was lost" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
