"""Keep a pool there for as long as this program runs, whatever dies in between.

    python -m examples.kept_pool api 20

What a supervisor does with a ChildSpec: start its process, start it again whenever it ends, terminate it at the end.
"""

from __future__ import annotations

import signal
import sys

import sharedpool


def main(name: str, limit: str) -> None:
    """Supervise one process, which keeps one pool."""
    spec = sharedpool.child_spec(name, max_connections=int(limit))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    process = spec.process()
    try:
        while True:
            process.start()
            print(f"pool {name!r} is kept by process {process.pid}", flush=True)
            process.join()
            process = spec.process()  # permanent: whenever it ends
    except KeyboardInterrupt:
        pass
    finally:
        if process.is_alive():
            process.terminate()
            process.join(spec.shutdown)


if __name__ == "__main__":
    main(*sys.argv[1:])
