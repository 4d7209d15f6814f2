"""The same for the arbiter: workers give it something to do, and it ends at its k-th boundary call from then on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sharedpool
from tests.crash.victims import CAP, Outcome, look, survivors
from tests.support import commands, processes
from tests.support.backend import Backend
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

#: A waiter has its lease so long after the arbiter's death, seconds: a successor has to be started.
WITHIN = 5.0
CLOSE_TIMEOUT = 0.5


def interpreter(directory: Path) -> dict[str, str]:
    """The environment for workers that start such arbiters."""
    path = directory / "arbiter-python"
    main = Path(__file__).with_name("arbiter_main.py")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{main}" "{directory / "orders"}" "$@"\n')
    path.chmod(0o700)
    return {"SHAREDPOOL_PYTHON": str(path)}


class ArbiterScene:
    """A back end, a scope whose arbiters can be told to end, and two workers.

    Args:
        harness: Starts processes.
        backend: Counts connections.
        scope: Where the pool is.
        allowed: How many times as long as on an idle machine a survivor may wait.
    """

    def __init__(self, harness: Harness, backend: Backend, scope: Scope, allowed: float = 1.0) -> None:
        self.allowed = allowed
        self.harness, self.backend, self.scope = harness, backend, scope
        self.env = interpreter(harness.directory)
        self.target = backend.tcp
        self.one, self.two = survivors(harness, CLOSE_TIMEOUT, **self.env)

    def die(self, script: str, k: int) -> Outcome:
        """Let the arbiter end at its k-th boundary call while it does what the script asks of it."""
        self.one.wait_stats(in_use=0, opening=0, closing=0)
        self.insist("drain", "default")
        self.one.wait_stats(connections=0)
        self.backend.do("reset_peak")
        arbiter = self.scope.arbiter()
        outcome = Outcome(f"arbiter: {script}", "kill", k, ended=False)
        began = time.monotonic()
        try:
            SCRIPTS[script](self, lambda: self._tell(arbiter, k))
            outcome.ended = processes.alive(arbiter)
            if outcome.ended:
                self._tell(arbiter, 0)
                outcome.ended = processes.alive(arbiter)
            label = self.two.checkout(self.target, checkout_timeout=20.0)
            outcome.seconds = time.monotonic() - began
            self.two.exchange(label)
            self.two.checkin(label)
            self._look(outcome)
        except AssertionError as error:
            outcome.lost.append(str(error))
        return outcome

    def _tell(self, arbiter: int, k: int) -> None:
        """Tell it, and wait until it has heard, or is dead."""
        orders = self.harness.directory / "orders"
        orders.write_text(str(k))
        os.kill(arbiter, signal.SIGUSR1)
        wait_until(lambda: not orders.exists() or not processes.alive(arbiter), what="the arbiter has heard")
        orders.unlink(missing_ok=True)

    def _look(self, outcome: Outcome) -> None:
        wait_until(self._answers, what="there is an arbiter")
        look(outcome, self.two, self.backend, self.allowed * WITHIN, processes=2)

    def _answers(self) -> bool:
        return self.two.call(commands.library, "ping", thread="ping") is not None and len(self.scope.arbiters()) == 1

    def insist(self, what: str, *arguments: object) -> None:
        """An operation, again until an arbiter has carried it out: between a death and the successor there is none."""

        def done() -> bool:
            with contextlib.suppress(sharedpool.SharedPoolError):
                self.one.call(commands.library, what, *arguments)
                return True
            return False

        wait_until(done, what=what)

    def another(self) -> Worker:
        worker = self.harness.start(**self.env)
        worker.attach(max_connections=CAP, close_timeout=CLOSE_TIMEOUT)
        return worker

    def end(self, worker: Worker) -> None:
        worker.kill()
        worker.close()
        self.harness.workers.remove(worker)


def register(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    arm()
    scene.one.use(scene.target, checkout_timeout=20.0)


def close(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    label = scene.one.checkout(scene.target)
    waiting = scene.two.begin_checkout(scene.target, thread="waiter", checkout_timeout=20.0)
    scene.one.wait_stats(waiting=1)
    arm()
    scene.one.discard(label)
    scene.two.checkin(waiting.result())


def reap(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    victim = scene.another()
    victim.checkout(scene.target)
    waiting = scene.two.begin_checkout(scene.target, thread="waiter", checkout_timeout=20.0)
    scene.one.wait_stats(waiting=1)
    arm()
    scene.end(victim)
    scene.two.checkin(waiting.result())


def adopt(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    victim = scene.another()
    victim.use(scene.target)
    arm()
    scene.end(victim)
    scene.two.use(scene.target, checkout_timeout=20.0)


def attach(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    arm()
    newcomer = scene.another()
    newcomer.stats()
    newcomer.begin(commands.leave)
    newcomer.wait_dead()
    newcomer.close()
    scene.harness.workers.remove(newcomer)


def expire(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    scene.one.use(scene.target)
    arm()
    scene.insist("set_timeout", "default", 0.001)
    scene.backend.wait_open(0)
    scene.insist("set_timeout", "default", 60.0)


def limits(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    arm()
    scene.insist("set_max_connections", "default", CAP)


def fetch(scene: ArbiterScene, arm: Callable[[], None]) -> None:
    scene.one.use(scene.target)
    arm()
    scene.two.use(scene.target, checkout_timeout=20.0)


#: What the arbiter is given to do.
SCRIPTS: dict[str, Callable[[ArbiterScene, Callable[[], None]], None]] = {
    "register": register,
    "close": close,
    "reap": reap,
    "adopt": adopt,
    "attach": attach,
    "expire": expire,
    "limits": limits,
    "fetch": fetch,
}
