"""The controller of a chaos run: it does the harm, and looks whether anything is lost."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import signal
import struct
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sharedpool.layout import GATE, INCARNATION, MAX, USED
from tests.stress import users
from tests.stress.board import CROSSED, UNEXPECTED, Board
from tests.stress.users import JUNK, POOL
from tests.support import commands, processes
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending, Worker

CAP = 5
#: What an operator sets it to meanwhile.
CAPS = (3, 4, 5, 5, 7)
WORKERS = 16
THREADS = 4
#: Between two faults, seconds, at most.
PAUSE = 0.06
#: What a back end that closes slowly needs; less than close_timeout, for it is in vain to wait longer.
SLOW = 0.8
CLOSE_TIMEOUT = 3.0
#: A call may be so late before it is called stuck, ns: its process may have to attach, which may take 30 s.
LATE = 35_000_000_000
#: So many requests per second it serves again, on a machine that may be busy, within so many seconds: an heir waits for
#: all that live, and then for what the dead one had open as long as `close_timeout`.
RATE, RECOVERY = 50, 20
#: An operation may take so long while arbiters are killed, seconds.
OPERATION = 60.0
#: Pools of different kinds; chance chooses one for a run.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"order": "fifo", "idle_timeout": 0.2, "min_idle": 1},
    {"order": "sticky", "max_lifetime": 0.5},
    {"move": False},
    {"reserve": 2, "max_idle": 3},
    {"lease_timeout": 0.05, "reclaim": True, "steal_after": 0.01},
)


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


class Chaos:
    """One run.

    Args:
        harness: Starts the workers.
        backend: Counts.
        scope: Where the arbiters are.
        seed: Of all that chance decides.
    """

    def __init__(self, harness: Harness, backend: Backend, scope: Scope, seed: int) -> None:
        self.harness, self.backend, self.scope = harness, backend, scope
        self.chance = random.Random(seed)
        kind = self.chance.choice(KINDS)
        self.report = Report(seed, kind)
        self.given = {"max_connections": CAP, "close_timeout": CLOSE_TIMEOUT, **kind}
        self.targets = [backend.tcp, backend.listen("second"), backend.listen_unix("third")]
        self.listeners = ("tcp", "second", "third")
        self.board = Board(harness.directory / "board", WORKERS, THREADS)
        self.operator, *self.workers = harness.start_many(1 + WORKERS)
        self.operator.attach(POOL, **self.given)
        self.operator.stats(POOL)
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.stopped: dict[int, float] = {}
        self.leaving: list[tuple[Worker, float]] = []
        self.operation: tuple[Pending, float, str] | None = None
        self.ceiling = CAP
        #: Until then an operation that failed may still be carried out, by an arbiter that was stopped meanwhile.
        self.unsure = 0.0
        self.troubled: set[str] = set()
        #: The last faults and operations, with their times.
        self.told: deque[str] = deque(maxlen=60)
        for index in range(WORKERS):
            self._begin(index)

    def _begin(self, index: int) -> None:
        board = (str(self.harness.directory / "board"), WORKERS, THREADS)
        seed = self.chance.randrange(10**9)
        self.workers[index].begin(users.begin, index, board, self.targets, seed, self.given)

    def run(self, seconds: float) -> Report:
        """Do harm for so long, then see what is left."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name, fault = self._choose()
            if fault():
                self.report.faults[name] += 1
                self._tell(name)
            self._turn()
            time.sleep(self.chance.uniform(0, PAUSE))
        self._calm()
        self._look_at_what_is_left()
        return self.report

    def _choose(self) -> tuple[str, Callable[[], bool]]:
        names = list(FAULTS)
        (name,) = self.chance.choices(names, [FAULTS[each] for each in names])
        return name, getattr(self, "_" + name.replace(" ", "_"))

    def _turn(self) -> None:
        """Undo what is over by now, and look for what must never be."""
        now = time.monotonic()
        due = [each for each in self.later if each[0] <= now]
        self.later = [each for each in self.later if each[0] > now]
        for _, undo in due:
            undo()
        self._look_after_operation()
        self._look_after_leaving()
        self._look_for_stuck()
        self._look_at_peak()

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
        wait_until(lambda: worker.dead)
        _, found = os.waitpid(worker.pid, 0)
        if os.waitstatus_to_exitcode(found) != status:
            self.report.lost.append(f"worker {worker.pid} ended with {found}, not {status}:\n{worker.stderr()[-3000:]}")
        self._read_errors(worker)
        worker.close()
        self.harness.workers.remove(worker)

    def _read_errors(self, worker: Worker) -> None:
        text = worker.stderr()
        if "Traceback" in text or "Fatal" in text:
            self.report.stuck.append(f"worker {worker.pid} wrote:\n{text[-3000:]}")

    def _worker_killed(self, index: int | None = None) -> bool:
        index = self.chance.randrange(WORKERS) if index is None else index
        worker = self.workers[index]
        with contextlib.suppress(ProcessLookupError):
            worker.signal(signal.SIGKILL)
        self._collect(worker, -signal.SIGKILL)
        self._replace(index)
        return True

    def _worker_stopped(self) -> bool:
        index = self.chance.randrange(WORKERS)
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
        index = self.chance.randrange(WORKERS)
        if index in self.stopped:
            return False
        worker = self.workers[index]
        worker.begin(commands.leave)
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
        for pid in found:
            wait_until(lambda pid=pid: not processes.alive(pid))
        return bool(found)

    def _arbiter_stopped(self) -> bool:
        found = self._signal_arbiter(signal.SIGSTOP)

        def resume() -> None:
            for pid in found:
                if processes.state(pid) == "T":
                    os.kill(pid, signal.SIGCONT)

        self._in(0.01, self.chance.choice((0.1, 0.5, 4.0)), resume)
        return bool(found)

    # --- remotes ------------------------------------------------------------------------------------------------------

    def _some(self) -> list[int]:
        ids = self.backend.ids()
        return self.chance.sample(ids, self.chance.randint(1, len(ids))) if ids else []

    def _connection_reset(self) -> bool:
        return bool(self.backend.do("close", ids=self._some(), how="rst"))

    def _connection_closed(self) -> bool:
        return bool(self.backend.do("close", ids=self._some()))

    def _connection_half_closed(self) -> bool:
        return bool(self.backend.do("half_close", ids=self._some()))

    def _unsolicited_bytes(self) -> bool:
        return bool(self.backend.do("send", ids=self._some(), data=f"{JUNK}\n"))

    def _late_answers(self) -> bool:
        return bool(self.backend.do("answer"))

    def _trouble(self, command: str, low: float, high: float) -> bool:
        name = self.chance.choice(self.listeners)
        if name in self.troubled:
            return False
        self.troubled.add(name)
        self.backend.do(command, name=name)

        def undo() -> None:
            self.backend.do("accept_again", name=name)
            self.troubled.discard(name)

        self._in(low, high, undo)
        return True

    def _connects_refused(self) -> bool:
        return self._trouble("refuse", 0.05, 0.4)

    def _connects_stalled(self) -> bool:
        return self._trouble("hang", 0.05, 0.9)

    def _slow_closes(self) -> bool:
        if "*" in self.troubled:
            return False
        self.troubled.add("*")
        self.backend.do("hold_closes", seconds=SLOW)  # whatever keeps this process busy: close_timeout is longer

        def undo() -> None:
            self.backend.do("release_closes")
            self.troubled.discard("*")

        self._in(0.01, SLOW, undo)
        return True

    # --- operators ----------------------------------------------------------------------------------------------------

    def _operate(self, what: str, function: Callable[..., Any], *arguments: Any) -> bool:
        """One operation at a time, by a process of its own, while everything goes on."""
        if self.operation is not None:
            return False
        pending = self.operator.begin(function, *arguments, thread="operator")
        self.operation = pending, time.monotonic() + OPERATION, what
        return True

    def _look_after_operation(self) -> None:
        if self.operation is None:
            return
        pending, limit, what = self.operation
        if pending.done:
            self.operation = None
            try:
                pending.result()
                self._tell(f"{what} is done")
            except Exception as error:
                self._tell(f"{what} failed: {error!r}")
                self.report.faults[f"{what} failed: {type(error).__name__}"] += 1
                self.unsure = time.monotonic() + 10.0
        elif time.monotonic() > limit:
            self.report.stuck.append(f"{what} does not return:\n{self.operator.stacks()}")
            self.operation = None

    def _limit_changed(self) -> bool:
        value = self.chance.choice(CAPS)
        if self.operation is not None:
            return False
        self._cap_may_be(value)
        self._tell(f"a limit of {value}")
        return self._operate("limit change", commands.library, "set_max_connections", POOL, value)

    def _pool_paused(self) -> bool:
        return self._operate("pause", users.pause_and_resume, self.chance.uniform(0.01, 0.3))

    def _pool_stopped(self) -> bool:
        if self.operation is not None:
            return False
        self._cap_may_be(CAP)  # it comes back as it was declared
        return self._operate("stop", users.stop_and_start, self.chance.uniform(0.0, 0.2), self.given)

    def _pool_drained(self) -> bool:
        # Not kill: it resets a peer in the midst of an answer on purpose, whose process may notice late.
        return self._operate("drain", commands.library, "drain", POOL)

    # --- what must never be -------------------------------------------------------------------------------------------

    def _cap_may_be(self, value: int) -> None:
        """An operation may make so many the cap: from now on there may be as many, or as many as before."""
        self.ceiling = max(self.ceiling, value)

    def _look_at_peak(self) -> None:
        """Never more than the highest cap that may be in force; it is less again once nothing is above it."""
        in_force = None
        if self.operation is None and time.monotonic() > self.unsure:
            stats = self.operator.stats(POOL)
            if stats.used <= stats.max_connections:  # from here on there are never more: nobody raises it
                in_force = stats.max_connections
        counts = self.backend.counts()
        self.report.accepted = counts["accepted"]
        self.report.peak = max(self.report.peak, counts["peak"])
        if counts["peak"] > self.ceiling:
            self.report.over.append(f"{counts['peak']} connections, cap {self.ceiling}{self._story()}")
            try:
                wait_until(lambda: self.backend.open <= self.ceiling, deadline=20)
            except AssertionError:
                self.report.over.append(f"and it stays so: {self.backend.open} connections{self._segments()}")
                self.ceiling = self.backend.open
            self.backend.do("reset_peak")
        elif in_force is not None and in_force < self.ceiling:
            self.backend.do("reset_peak")
            self._tell(f"the cap in force was {self.ceiling}, is {in_force}")
            self.ceiling = in_force

    def _story(self) -> str:
        """What happened last, for whoever wants to know how it came to that; once."""
        if self.report.over:
            return ""
        stats = self.operator.stats(POOL)
        events = "\n".join(str(event) for event in self.backend.do("log")[-120:])
        told = "\n".join(self.told)
        return f":\n{events}\n{told}\n{stats}\n{self.operator.call(users.slots)}{self._segments()}"

    def _segments(self) -> str:
        """Which segments there are, what they say, and who has them: there should be one."""
        found: dict[int, tuple[str, list[int]]] = {}
        for worker in [self.operator, *self.workers, *(each for each, _ in self.leaving)]:
            for descriptor in glob.glob(f"/proc/{worker.pid}/fd/*"):
                with contextlib.suppress(OSError):
                    if not os.readlink(descriptor).startswith("/memfd:sharedpool"):
                        continue
                    inode = os.stat(descriptor).st_ino
                    if inode not in found:
                        with open(descriptor, "rb") as file:
                            file.seek(4096)
                            words = struct.unpack("64Q", file.read(512))
                        said = (
                            f"MAX {words[MAX]} USED {words[USED]} GATE {words[GATE]:x} INCARNATION {words[INCARNATION]}"
                        )
                        found[inode] = said, []
                    found[inode][1].append(worker.pid)
        return "".join(f"\nsegment {inode}: {said}, of {pids}" for inode, (said, pids) in found.items())

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
                stats = self.operator.stats(POOL).numbers()
                self.report.stuck.append(f"a call is {late / 1e9:.1f} s late {stats}:\n{worker.stacks()}")
                self._worker_killed(index)  # to print the stacks of a process that runs may have ended it

    # --- the end ------------------------------------------------------------------------------------------------------

    def _calm(self) -> None:
        """No more harm: everybody goes on, remotes answer, the pool is as it was declared."""
        while self.later or self.operation or self.leaving:
            self._turn()
            time.sleep(0.01)
        self._cap_may_be(CAP)
        self.operator.call(commands.library, "start_pool", POOL, thread="operator", **self.given)
        self.operator.call(commands.library, "set_max_connections", POOL, CAP, thread="operator")
        self.operator.call(commands.library, "resume", POOL, thread="operator")
        time.sleep(CLOSE_TIMEOUT + 0.5)  # what had been open under a killed arbiter counts so long

    def _look_at_what_is_left(self) -> None:
        report = self.report
        for _ in range(RECOVERY):
            before, start = sum(self.board.outcomes().values()), time.monotonic()
            time.sleep(1.0)
            report.rate = (sum(self.board.outcomes().values()) - before) / (time.monotonic() - start)
            if report.rate >= RATE:
                break
        else:
            report.lost.append(f"the pool serves {report.rate:.0f} requests/s only")
        self._look_at_peak()
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
        """All counters return to zero, the table is sound, and the cap's number of leases can be had at once."""
        report, operator = self.report, self.operator
        try:
            stats = operator.wait_stats(
                POOL, in_use=0, opening=0, granted=0, waiting=0, closing=0, max_connections=CAP, **more
            )
            wait_until(lambda: self.backend.open == operator.stats(POOL).idle, deadline=5)
            operator.call(users.check)
            operator.call(commands.library, "start_pool", POOL, thread="operator", lease_timeout=None)
            labels = [
                operator.checkout(self.targets[i % 3], pool=POOL, checkout_timeout=10, priority="high")
                for i in range(CAP)
            ]
            if len({operator.exchange(label) for label in labels}) != CAP:
                report.lost.append(f"not {CAP} connections: {stats}")
            for label in labels:
                operator.discard(label)
        except Exception as error:
            rows = [(row, pid, processes.state(pid)) for row, pid in operator.call(users.rows)]
            known = [worker.pid for worker in self.workers]
            report.lost.append(f"it does not come to rest: rows {rows}, workers {known}: {error!r}"[:4000])


#: Every fault with its weight.
FAULTS = {
    "worker killed": 10,
    "worker stopped": 8,
    "worker recycled": 4,
    "arbiter killed": 1,
    "arbiter stopped": 1,
    "connection reset": 4,
    "connection closed": 4,
    "connection half closed": 3,
    "unsolicited bytes": 4,
    "late answers": 6,
    "connects refused": 2,
    "connects stalled": 2,
    "slow closes": 2,
    "limit changed": 3,
    "pool paused": 2,
    "pool stopped": 1,
    "pool drained": 2,
}
