"""Row 8: what the arbiter costs while nothing happens."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import servers
from benchmarks.harness import Actor, Limit, Missing, Row, library, missing_row, need, say

WORKERS = 8
POOL = "rest"
MEGABYTE = 1_000_000


class Worker:
    """Attached, with one warm connection that it doesn't use."""

    def __init__(self, port: int) -> None:
        self.pool = library().attach(POOL, max_connections=WORKERS)
        leases = [self.pool.checkout(servers.HOST, port)]
        for lease in leases:
            self.pool.checkin(lease)

    def arbiter(self) -> int:
        pid: int = library().find_pool(POOL).arbiter_pid
        return pid

    def processes(self) -> int:
        count: int = self.pool.stats().processes
        return count


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of the process, from the scheduler's own count in ns: ticks of 10 ms are too coarse."""
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return sum(int(text.split()[0]) for text in texts) / 1e9
    except (OSError, IndexError):
        times = need("psutil").Process(pid).cpu_times()
        return float(times.user + times.system)


def rows(quick: bool) -> list[Row]:
    seconds = 5.0 if quick else 20.0
    cpu, memory = f"arbiter at rest, CPU over {seconds:g} s", "arbiter at rest, memory (PSS)"
    try:
        psutil = need("psutil")
        with ExitStack() as stack:
            stack.enter_context(servers.scope())
            (port,) = stack.enter_context(servers.echo())
            workers = [stack.enter_context(Actor(Worker, port)) for _ in range(WORKERS)]
            process = psutil.Process(workers[0].call("arbiter"))
            assert workers[0].call("processes") == WORKERS
            assert not process.children(), "the arbiter has children that would have to be counted, too"
            start, before = time.monotonic(), cpu_seconds(process.pid)
            time.sleep(seconds)  # the thing that is measured
            share = 100 * (cpu_seconds(process.pid) - before) / (time.monotonic() - start)
            full, threads = process.memory_full_info(), process.num_threads()
    except Missing as exc:
        return [missing_row("rest", text, str(exc)) for text in (cpu, memory)]
    say(f"  pss {full.pss / MEGABYTE:.1f} MB, uss {full.uss / MEGABYTE:.1f}, rss {full.rss / MEGABYTE:.1f}")
    return [
        Row("rest", cpu, [share], "%", Limit("<=", 0.5, 0.1), f"{threads} threads"),
        Row("rest", memory, [full.pss / MEGABYTE], "MB", Limit("<=", 32.0, 20.0), f"USS {full.uss / MEGABYTE:.1f} MB"),
    ]
