"""What every chaos run does: it kills, stops and recycles workers and arbiters, and looks whether anything is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.stress import users
from tests.stress.board import CROSSED, UNEXPECTED, Board
from tests.support import processes
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

#: Between two faults, seconds, at most.
PAUSE = 0.06
#: A call may be so late before it is called stuck, ns: its process may have to attach, which may take 30 s.
LATE = 35_000_000_000
CLOSE_TIMEOUT = 3.0
#: It serves again once so many requests were served, within so many seconds on a machine that may be busy: an heir
#: waits for all that live, and then for what the dead one had open as long as `close_timeout`.
SERVED, RECOVERY = 50, 40


@dataclass
class Report:
    """What was done, and what was lost."""

    seed: int
    kind: dict[str, Any]
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    peak: int = 0
    over: list[str] = field(default_factory=list)
    crossed: int = 0
    unexpected: int = 0
    stuck: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    rate: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.over or self.crossed or self.unexpected or self.stuck or self.lost)

    def __str__(self) -> str:
        def counts(of: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(of.items()))

        ended = f"back end: {self.accepted} connections accepted, peak {self.peak}"
        lost = f"crossed answers {self.crossed}, unexpected errors {self.unexpected}, stuck {len(self.stuck)}"
        lines = [
            f"seed {self.seed}, options {self.kind or 'default'}",
            f"faults: {counts(self.faults)}",
            f"users: {counts(self.outcomes)}",
            f"{ended}, above the cap in force {len(self.over)} times",
            f"{lost}, lost {len(self.lost)}; at the end {self.rate:.0f} requests/s",
        ]
        return "\n".join([*lines, *self.over, *self.stuck, *self.lost])


class Harm:
    """One run; what else is done, and who judges, is its subclass's.

    Args:
        harness: Starts the workers.
        scope: Where the arbiters are.
        seed: Of all that chance decides.
        kinds: Options of pools; chance chooses some.
        workers: How many of them have users.
        threads: How many users each of them has.
    """

    #: Every fault with its weight.
    harmful: ClassVar[Mapping[str, int]] = {
        "worker killed": 10,
        "worker stopped": 8,
        "worker recycled": 4,
        "arbiter killed": 1,
        "arbiter stopped": 1,
    }
    #: The pools' names.
    pools: ClassVar[tuple[str, ...]]

    def __init__(
        self, harness: Harness, scope: Scope, seed: int, kinds: tuple[dict[str, Any], ...], workers: int, threads: int
    ) -> None:
        self.harness, self.scope = harness, scope
        self.chance = random.Random(seed)
        self.report = Report(seed, self.chance.choice(kinds))
        self.board = Board(harness.directory / "board", workers, threads)
        self.operator, *self.workers = harness.start_many(1 + workers)
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.stopped: dict[int, float] = {}
        self.leaving: list[tuple[Worker, float]] = []
        #: The last faults and operations, with their times.
        self.told: deque[str] = deque(maxlen=60)

    def _begin(self, index: int) -> None:
        """Start the users of a worker."""
        raise NotImplementedError

    def _where(self) -> tuple[str, int, int]:
        """What a worker needs to find the board."""
        return str(self.harness.directory / "board"), self.board.workers, self.board.threads

    def run(self, seconds: float) -> Report:
        """Do harm for so long, then see what is left."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                name, fault = self._choose()
                if fault():
                    self.report.faults[name] += 1
                    self._tell(name)
                self._turn()
                time.sleep(self.chance.uniform(0, PAUSE))
            self._calm()
        finally:  # whoever is stopped could not be ended
            for _, undo in self.later:
                with contextlib.suppress(OSError):
                    undo()
        self._look_at_what_is_left()
        return self.report

    def _choose(self) -> tuple[str, Callable[[], bool]]:
        names = list(self.harmful)
        (name,) = self.chance.choices(names, [self.harmful[each] for each in names])
        return name, getattr(self, "_" + name.replace(" ", "_"))

    def _turn(self) -> None:
        """Undo what is over by now, and look for what must never be."""
        now = time.monotonic()
        due = [each for each in self.later if each[0] <= now]
        self.later = [each for each in self.later if each[0] > now]
        for _, undo in due:
            undo()
        self._look_after_leaving()
        self._look_for_stuck()
        self._look()

    def _look(self) -> None:
        """Whether there were ever more connections than may be."""
        raise NotImplementedError

    def _in(self, low: float, high: float, undo: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + self.chance.uniform(low, high), undo))

    # --- workers ------------------------------------------------------------------------------------------------------

    def _replace(self, index: int) -> None:
        self.board.clear(index)
        self.stopped.pop(index, None)
        self.workers[index] = self.harness.start()
        self._begin(index)

    def _collect(self, worker: Worker, status: int) -> None:
        """A worker that has ended must have ended like this."""
        wait_until(lambda: worker.dead and worker.pid in processes.children())  # and not the one's that it came from
        _, found = os.waitpid(worker.pid, 0)
        if os.waitstatus_to_exitcode(found) != status:
            self.report.lost.append(f"worker {worker.pid} ended with {found}, not {status}:\n{worker.stderr()[-3000:]}")
        self._read_errors(worker)
        worker.close()
        self.harness.workers.remove(worker)

    def _read_errors(self, worker: Worker) -> None:
        text = worker.stderr()
        found = [at for at in map(text.find, ("Traceback", "Fatal")) if at >= 0]
        if found:  # what it wrote afterwards may be long
            self.report.stuck.append(f"worker {worker.pid} wrote:\n{text[min(found) :][:3000]}")

    def _worker_killed(self, index: int | None = None) -> bool:
        index = self.chance.randrange(self.board.workers) if index is None else index
        worker = self.workers[index]
        with contextlib.suppress(ProcessLookupError):
            worker.signal(signal.SIGKILL)
        self._collect(worker, -signal.SIGKILL)
        self._replace(index)
        return True

    def _worker_stopped(self) -> bool:
        index = self.chance.randrange(self.board.workers)
        if index in self.stopped or len(self.stopped) > 3:
            return False
        worker = self.workers[index]
        worker.signal(signal.SIGSTOP)
        self.stopped[index] = float("inf")

        def resume() -> None:
            if self.workers[index] is worker:
                worker.resume()
                self.stopped[index] = time.monotonic()

        self._in(0.01, 0.7, resume)
        return True

    def _worker_recycled(self) -> bool:
        index = self.chance.randrange(self.board.workers)
        if index in self.stopped:
            return False
        worker = self.workers[index]
        worker.begin(users.leave)
        self.leaving.append((worker, time.monotonic() + 30))
        self._replace(index)
        return True

    def _look_after_leaving(self) -> None:
        for worker, limit in list(self.leaving):
            if worker.dead:
                self._collect(worker, 0)
                self.leaving.remove((worker, limit))
            elif time.monotonic() > limit:
                self.report.stuck.append(f"worker {worker.pid} does not end:\n{worker.stacks()}")
                worker.kill()
                self.leaving.remove((worker, limit))

    # --- the arbiter --------------------------------------------------------------------------------------------------

    def _signal_arbiter(self, number: int) -> list[int]:
        found = self.scope.arbiters()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return list(found)

    def _arbiter_killed(self) -> bool:
        found = self._signal_arbiter(signal.SIGKILL)
        wait_until(lambda: not any(map(processes.alive, found)))
        return bool(found)

    def _arbiter_stopped(self) -> bool:
        found = self._signal_arbiter(signal.SIGSTOP)

        def resume() -> None:
            for pid in found:
                if processes.state(pid) == "T":
                    os.kill(pid, signal.SIGCONT)

        self._in(0.01, self.chance.choice((0.1, 0.5, 4.0)), resume)
        return bool(found)

    def _tell(self, what: str) -> None:
        self.told.append(f"{time.monotonic():.6f} {what}")

    def _look_for_stuck(self) -> None:
        now = time.monotonic_ns()
        for index, worker in enumerate(self.workers):
            since = self.stopped.get(index, 0.0)
            if since == float("inf"):
                continue
            late = max(self.board.overdue(index, now), default=0)
            if late > LATE and now - since * 1e9 > LATE:
                stats = ", ".join(self.operator.stats(name).numbers() for name in self.pools)
                self.report.stuck.append(f"a call is {late / 1e9:.1f} s late {stats}:\n{worker.stacks()}")
                self._worker_killed(index)  # to print the stacks of a process that runs may have ended it

    # --- the end ------------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """Whether all that was begun has come to its end."""
        return not (self.later or self.leaving)

    def _calm(self) -> None:
        """No more harm: everybody goes on."""
        while not self._is_over():
            self._turn()
            time.sleep(0.01)
        time.sleep(CLOSE_TIMEOUT + 0.5)  # what had been open under a killed arbiter counts so long

    def _look_at_what_is_left(self) -> None:
        report = self.report
        before, start = sum(self.board.outcomes().values()), time.monotonic()
        served = 0
        while served < SERVED and time.monotonic() < start + RECOVERY:
            time.sleep(1.0)
            served = sum(self.board.outcomes().values()) - before
        report.rate = served / (time.monotonic() - start)
        if served < SERVED:
            report.lost.append(f"the pool served {served} requests only in {RECOVERY} s")
        self._look()
        self.board.stop()
        for worker in self.workers:
            alive = worker.call(users.join, 40.0)
            if alive:
                report.stuck.append(f"{', '.join(alive)} of {worker.pid}:\n{worker.stacks()}")
        self._settled()
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
            self._collect(worker, -signal.SIGKILL)
        self._settled(processes=1)
        report.outcomes = self.board.outcomes()
        report.crossed = self.board.total(CROSSED)
        report.unexpected = self.board.total(UNEXPECTED)
        self.board.close()

    def _settled(self, **more: int) -> None:
        """All counters return to zero, and the back end has no connection but the idle ones."""
        raise NotImplementedError
