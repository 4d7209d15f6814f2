"""The test's side: sets the scene of a script, lets the victim end at its k-th boundary call, looks what is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field

from tests.crash import scripts
from tests.crash.scripts import SCRIPTS
from tests.stress import users
from tests.support import commands, processes
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending, Worker

CAP = 1
#: What had been open under an arbiter that died, too, counts so long, seconds.
CLOSE_TIMEOUT = 0.3
#: A waiter has its lease so long after the death, seconds.
WITHIN = 1.0
#: Or after an exception in a process that lives: its own thread looks once a second for what was lost; and what became
#: another program is missed after a second.
WITHIN_ALIVE = 2.5


@dataclass
class Outcome:
    """One death."""

    script: str
    way: str
    k: int
    ended: bool  # the script came to its end before its k-th boundary call
    count: int = 0  # how many boundary calls it had, if it came to its end
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.script}, k = {self.k}, {self.way}: {self.seconds:.3f} s, lost: {'; '.join(self.lost) or 'nothing'}"
        )


class Scene:
    """A back end, a scope, and two workers that survive.

    Args:
        harness: Starts processes.
        backend: Counts connections.
        scope: Where the pool is.
        allowed: How many times as long as on an idle machine a survivor may wait.
    """

    def __init__(self, harness: Harness, backend: Backend, scope: Scope, allowed: float = 1.0) -> None:
        self.allowed = allowed
        self.harness, self.backend, self.scope = harness, backend, scope
        self.target, self.other = backend.tcp, backend.listen("other")
        self.one, self.two = survivors(harness, CLOSE_TIMEOUT)

    def die(self, script: str, k: int, way: str = "kill") -> Outcome:
        """Let a victim of a script end at its k-th boundary call."""
        scene = SCRIPTS[script]
        self._clear()
        victim = self.harness.start()
        held = waiting = None
        if scene.idle:
            self.one.use(self.target if scene.idle == "same" else self.other)
        victim.call(scripts.prepare, script, self.target, self.other)
        if scene.held:
            held = self.one.checkout(self.target)
        if scene.waits:
            waiting = self._wait()
        if scene.remote_ends:
            self.backend.close()
        if scene.arbiter_dies:
            os.kill(pid := self.scope.arbiter(), signal.SIGKILL)
            wait_until(lambda: not processes.alive(pid))
        running = victim.begin(scripts.run, script, k, way, self.target, self.other)
        if held is not None:
            wait_until(lambda: victim.dead or _done(running) or self.two.stats().waiting)
            self.one.checkin(held)
        outcome = Outcome(script, way, k, ended=False)
        self._end(outcome, victim, running)
        began = time.monotonic()
        try:
            label = (waiting or self._wait()).result()
            outcome.seconds = time.monotonic() - began
            self.two.exchange(label)
            self.two.checkin(label)
            self._look(outcome, victim)
        except AssertionError as error:
            outcome.lost.append(str(error))
        self._collect(victim)
        return outcome

    def _wait(self) -> Pending:
        return self.two.begin_checkout(self.target, thread="waiter", checkout_timeout=20.0)

    def _clear(self) -> None:
        """No connections, so that every script begins alike."""
        self.one.call(commands.library, "drain", "default", wait=5.0)
        self.one.wait_stats(connections=0)
        self.backend.do("reset_peak")

    def _end(self, outcome: Outcome, victim: Worker, running: Pending) -> None:
        """Wait for the victim's end, or its script's."""
        wait_until(lambda: _done(running) or _is_another_program(victim.pid), what="the victim ends")
        try:
            outcome.ended, outcome.count, _ = running.result()
        except AssertionError:  # it ended without an answer
            wait_until(lambda: victim.dead or _is_another_program(victim.pid))

    def _look(self, outcome: Outcome, victim: Worker) -> None:
        """Everything at rest, sound, and no more at the back end than there may be."""
        processes_left = 2 if victim.dead or _is_another_program(victim.pid) else 3
        if outcome.script == "leave" and outcome.ended:
            processes_left = 2
        counted = {"processes": processes_left} if outcome.way in ("kill", "exec") else {}
        within = self.allowed * (WITHIN if victim.dead else WITHIN_ALIVE)
        look(outcome, self.two, self.backend, within, **counted)

    def _collect(self, victim: Worker) -> None:
        victim.kill()
        victim.close()
        self.harness.workers.remove(victim)


def survivors(harness: Harness, close_timeout: float, **env: str) -> list[Worker]:
    """Two workers that are attached; close_timeout in seconds."""
    workers = harness.start_many(2, **env)
    for worker in workers:
        worker.attach(max_connections=CAP, close_timeout=close_timeout)
        worker.stats()
    return workers


def look(outcome: Outcome, worker: Worker, backend: Backend, within: float, **counted: int) -> None:
    """Everything at rest, sound, no more at the back end than there may be, and all that in time, seconds."""
    stats = worker.wait_stats(in_use=0, opening=0, granted=0, waiting=0, closing=0, **counted)
    worker.call(check)
    if (peak := backend.counts()["peak"]) > CAP:
        outcome.lost.append(f"{peak} connections at the back end:\n{backend.story()}")
    wait_until(lambda: backend.open == stats.idle, what=f"the back end has {stats.idle}")
    if outcome.seconds > within:
        outcome.lost.append(f"{outcome.seconds:.3f} s")


def check(state: object) -> None:
    from tests.support.state import State

    assert isinstance(state, State)
    state.pools.setdefault(users.POOL, state.pools["default"])
    users.check(state)


def _done(running: Pending) -> bool:
    with contextlib.suppress(AssertionError):  # it has ended
        return running.done
    return True


def _is_another_program(pid: int) -> bool:
    return processes.command_line(pid).startswith("sleep")
