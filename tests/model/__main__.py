"""`python -m tests.model`: goes through every state of every case, and says how many there are."""

from __future__ import annotations

import sys
import time

from ..core.explorer import Explorer, Violation
from ..core.test_interleavings import KILLED_ANYWHERE, WITH_A_WATCHER, WITHOUT_A_WATCHER, Case
from .test_interleavings_of_three import LONG, SLOW, SUCCEEDED

GROUPS: dict[str, dict[str, Case]] = {
    "nobody watches": WITHOUT_A_WATCHER,
    "the arbiter watches": WITH_A_WATCHER,
    "the arbiter watches, three and four": SLOW,
    "killed between any two steps and at any store": KILLED_ANYWHERE,
    "killed, more of them": SUCCEEDED | LONG,
}


def main() -> int:
    total = wrong = 0
    for group, cases in GROUPS.items():
        began, states = time.monotonic(), 0
        for name, (workers, script, more) in cases.items():
            try:
                found = Explorer(workers, script, **more).explore()
            except Violation as violation:
                wrong += 1
                print(f"{group}: {name}: VIOLATION\n{violation}", file=sys.stderr)
                continue
            states += found
            print(f"{found:10,}  {group}: {name}", flush=True)
        total += states
        print(f"{states:10,}  states of {len(cases)} cases in {time.monotonic() - began:.0f} s: {group}\n", flush=True)
    print(f"{total:10,}  states in all; {wrong or 'no'} violation{'s' if wrong > 1 else ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
