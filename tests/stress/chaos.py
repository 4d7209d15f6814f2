"""The controller of a chaos run: it does the harm, and looks whether anything is lost."""

from __future__ import annotations

import contextlib
import glob
import os
import struct
import time
from collections.abc import Callable
from typing import Any, ClassVar

from sharedpool.layout import GATE, INCARNATION, MAX, USED
from tests.stress import users
from tests.stress.harm import CLOSE_TIMEOUT, Harm
from tests.stress.users import JUNK, POOL
from tests.support import commands, processes
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending

CAP = 5
#: What an operator sets it to meanwhile.
CAPS = (3, 4, 5, 5, 7)
WORKERS = 16
THREADS = 4
#: What a back end that closes slowly needs; less than close_timeout, for it is in vain to wait longer.
SLOW = 0.8
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


class Chaos(Harm):
    """One run.

    Args:
        harness: Starts the workers.
        backend: Counts.
        scope: Where the arbiters are.
        seed: Of all that chance decides.
    """

    harmful: ClassVar = {
        **Harm.harmful,
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
    pools = (POOL,)

    def __init__(self, harness: Harness, backend: Backend, scope: Scope, seed: int) -> None:
        super().__init__(harness, scope, seed, KINDS, WORKERS, THREADS)
        self.backend = backend
        self.given = {"max_connections": CAP, "close_timeout": CLOSE_TIMEOUT, **self.report.kind}
        self.targets = [backend.tcp, backend.listen("second"), backend.listen_unix("third")]
        self.listeners = ("tcp", "second", "third")
        self.operator.attach(POOL, **self.given)
        self.operator.stats(POOL)
        self.operation: tuple[Pending, float, str] | None = None
        self.ceiling = CAP
        #: Until then an operation that failed may still be carried out, by an arbiter that was stopped meanwhile.
        self.unsure = 0.0
        self.troubled: set[str] = set()
        for index in range(WORKERS):
            self._begin(index)

    def _begin(self, index: int) -> None:
        seed = self.chance.randrange(10**9)
        self.workers[index].begin(users.begin, index, self._where(), self.targets, seed, self.given)

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

    def _look(self) -> None:
        self._look_after_operation()
        self._look_at_peak()

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

    # --- the end ------------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return super()._is_over() and self.operation is None

    def _calm(self) -> None:
        """And remotes answer, and the pool is as it was declared."""
        while not self._is_over():
            self._turn()
            time.sleep(0.01)
        self._cap_may_be(CAP)
        self.operator.call(commands.library, "start_pool", POOL, thread="operator", **self.given)
        self.operator.call(commands.library, "set_max_connections", POOL, CAP, thread="operator")
        self.operator.call(commands.library, "resume", POOL, thread="operator")
        super()._calm()

    def _settled(self, **more: int) -> None:
        """All counters return to zero, the table is sound, and the cap's number of leases can be had at once."""
        report, operator = self.report, self.operator
        try:
            stats = operator.wait_stats(
                POOL, in_use=0, opening=0, granted=0, waiting=0, closing=0, max_connections=CAP, **more
            )
            wait_until(lambda: self.backend.open == operator.stats(POOL).idle)
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
