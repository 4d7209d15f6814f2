"""An arbiter that can be told to end at its k-th boundary call from now on.

Run in the place of a Python (SHAREDPOOL_PYTHON), so that it is started, and its successors are, as every arbiter is:
`arbiter_main.py ORDERS -I -c CODE ARGUMENTS`. SIGUSR1: read K from the file ORDERS, and end at the K-th; 0: at none.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    orders, _, _, code, *arguments = sys.argv[1:]
    os.environ["SHAREDPOOL_SPEED"] = "pure"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from sharedpool.arbiter import Arbiter
    from tests.crash.points import counter, install

    def obey(number: int, frame: object) -> None:
        k = int(Path(orders).read_text())
        if k:
            counter.arm(k, "kill")
        else:
            counter.disarm()
        Path(orders).unlink()  # heard

    install()
    real = Arbiter.run

    def run(arbiter: Arbiter) -> None:
        signal.signal(signal.SIGUSR1, obey)
        real(arbiter)

    Arbiter.run = run  # type: ignore[method-assign]
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<arbiter>", "exec"), {"__name__": "__main__"})  # noqa: S102 - as `python -c` does


if __name__ == "__main__":
    main()
