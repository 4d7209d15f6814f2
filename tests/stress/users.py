"""The users of a chaos run: threads of the workers that lease, use, misuse and give back until they are told."""

from __future__ import annotations

import gc
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharedpool
from sharedpool import errors, invariants, view
from sharedpool.layout import FREE, HIGH, SLOT, STATE, generation_of, holder_of
from tests.stress.board import BEGAN, CROSSED, FIRST, LIMIT, OUTCOMES, UNEXPECTED, Board
from tests.support import commands
from tests.support.backend import Target
from tests.support.state import State

POOL = "chaos"
CONNECT_TIMEOUT = 0.5
#: An exchange whose answer does not come is given up after so long, seconds.
PATIENCE = 3.0
#: Giving back tries for 50 ms to get the mutex; a user's own close may be slow too, ns.
_GIVE_BACK = 1_000_000_000
#: A lease that is kept while its user goes on is forgotten after so long, ns.
_KEEP = 100_000_000
#: What the back end says unasked.
JUNK = "!junk"


#: How an attempt ended that raised this.
_ERRORS: dict[type[Exception], str] = {
    errors.PoolTimeout: "timed out", errors.ConnectFailed: "refused", errors.ConnectTimeout: "refused",
    errors.PoolStopped: "stopped", errors.PoolNotFound: "stopped", errors.ArbiterLost: "no arbiter",
    errors.StartFailed: "no arbiter", errors.LeaseError: "lease taken away",
}  # fmt: skip


class Spoiled(Exception):
    """The back end said what nobody had asked."""


class Crossed(AssertionError):
    """An answer that is another's."""


def begin(
    state: State, worker: int, board: tuple[str, int, int], targets: list[Target], seed: int, given: dict[str, Any]
) -> None:
    """Start the users of this worker."""
    pool = sharedpool.attach(POOL, connect_timeout=CONNECT_TIMEOUT, **given)
    state.pools[POOL] = pool
    start(state, board, lambda numbers, number: User(pool, numbers, worker, number, targets, seed))


def start(state: State, board: tuple[str, int, int], make: Callable[[Board, int], Turns]) -> None:
    """A thread for every user of this worker, which `make` makes of the board and its number."""
    numbers = Board(Path(board[0]), *board[1:])
    state.things["board"] = numbers
    state.things["users"] = [
        threading.Thread(target=make(numbers, number).run, name=f"user {number}", daemon=True)
        for number in range(numbers.threads)
    ]
    for thread in state.things["users"]:
        thread.start()


def stop_and_start(state: State, seconds: float, given: dict[str, Any]) -> None:
    """The pool is stopped for a while, and then started for certain, whatever happens to arbiters meanwhile."""
    try:
        sharedpool.stop_pool(POOL)
        time.sleep(seconds)
    finally:
        limit = time.monotonic() + 30
        while True:
            try:
                sharedpool.start_pool(POOL, **given)
                break
            except errors.SharedPoolError:
                if time.monotonic() > limit:
                    raise


def pause_and_resume(state: State, seconds: float) -> None:
    """The pool is paused for a while."""
    sharedpool.pause(POOL)
    time.sleep(seconds)
    sharedpool.resume(POOL)


def leave(state: State) -> None:
    """End as a program does that has come to its end, in the midst of what the users do."""
    Turns.leaving = True
    commands.leave(state)


def join(state: State, seconds: float) -> list[str]:
    """Wait for the end of all users, let go of what they kept; gives the names of those that do not end."""
    limit = time.monotonic() + seconds
    for thread in state.things["users"]:
        thread.join(max(0.0, limit - time.monotonic()))
    alive = [thread.name for thread in state.things["users"] if thread.is_alive()]
    gc.collect()
    return alive


def check(state: State, pool: str = POOL) -> None:
    """Check every invariant of the pool's table."""
    invariants.check(state.pools[pool].attached.table)


def rows(state: State) -> list[tuple[int, int]]:
    """(row, process) of all that are attached."""
    attached = state.pools[POOL].attached
    words, geometry = attached.words, attached.segment.geometry
    return [(row, view.row_pid(words, row)) for row in view.live_rows(words, geometry)]


def slots(state: State) -> str:
    """Every slot that is not free: its number, generation, state and holder, for who looks for a mistake."""
    attached = state.pools[POOL].attached
    words, geometry = attached.words, attached.segment.geometry
    found = []
    for index in range(words[HIGH]):
        word = words[geometry.slot_base + SLOT * index]
        if word & STATE != FREE:
            found.append(
                (index, generation_of(word), word & STATE, holder_of(word), view.row_pid(words, holder_of(word)))
            )
    return str(found)


class Turns:
    """One thread: at every turn something that chance decides.

    Args:
        board: Where it notes down how its turns end.
        worker: Its worker's number.
        number: Its own.
        seed: Of all that chance decides.

    Attributes:
        leaving: Whether this process is ending, and its leases with it.
    """

    leaving = False

    def __init__(self, board: Board, worker: int, number: int, seed: int) -> None:
        self.board = board
        self.words, self.row = board.words, board.row(worker, number)
        self.chance = random.Random(f"{seed} {worker} {number}")
        self.name = f"{os.getpid()}-{number}"
        self.serial = 0

    def run(self) -> None:
        while not self.board.stopped:
            try:
                outcome = self.turn()
            except Crossed:
                self._says(CROSSED)
                continue
            except Exception as error:
                outcome = self.outcome_of(error)
                if not outcome:
                    self._says(UNEXPECTED)
                    continue
            finally:
                self.words[self.row + BEGAN] = 0
            at = self.row + FIRST + OUTCOMES.index(outcome)
            self.words[at] += 1

    def _says(self, place: int) -> None:
        """First what it was, because this process may be killed at any moment."""
        traceback.print_exc()
        sys.stderr.flush()
        self.words[self.row + place] += 1

    def turn(self) -> str:
        """Do something; gives how it ended."""
        raise NotImplementedError

    def outcome_of(self, error: Exception) -> str:
        """What such an error is called; "": it must not be."""
        if isinstance(error, errors.PoolStopped | errors.PoolNotFound):
            time.sleep(0.01)
        return next((outcome for kind, outcome in _ERRORS.items() if isinstance(error, kind)), "")

    def timed(self, nanoseconds: float) -> None:
        """A call begins that must return within so long."""
        now = time.monotonic_ns()
        self.words[self.row + LIMIT] = now + int(nanoseconds)
        self.words[self.row + BEGAN] = now


class User(Turns):
    """One that leases sockets."""

    def __init__(self, pool: Any, board: Board, worker: int, number: int, targets: list[Target], seed: int) -> None:
        super().__init__(board, worker, number, seed)
        self.pool, self.targets = pool, targets
        self.may_fork = number == 0
        self.kept: list[tuple[int, Any]] = []

    def run(self) -> None:
        super().run()
        self.kept.clear()

    def turn(self) -> str:
        chance = self.chance.random()
        if self.may_fork and chance < 0.002:
            return self.fork()
        while self.kept and time.monotonic_ns() > self.kept[0][0]:
            del self.kept[0]
        lease = self.checkout()
        try:
            outcome = self.use(lease, self.chance.random())
        except Spoiled:
            outcome = "spoiled"
        except OSError:
            outcome = "ended by the remote"
        except BaseException:
            lease.discard()
            raise
        self.give_back(lease, outcome)
        return outcome

    def checkout(self) -> Any:
        target = self.chance.choice(self.targets)
        seconds = self.chance.choice((0, 0.005, 0.05, 1.0, 4.0, 4.0, 4.0))
        # checkout_timeout=0 does everything but stand in line: it may connect, fetch, or close to the end.
        self.timed((seconds or 4.0 + CONNECT_TIMEOUT) * 1e9)
        lease = self.pool.checkout(
            target.host, target.port, transport=target.transport, checkout_timeout=seconds,
            priority=self.chance.choice(("normal", "normal", "high")),
        )  # fmt: skip
        self.words[self.row + BEGAN] = 0
        return lease

    def give_back(self, lease: Any, outcome: str) -> None:
        self.timed(_GIVE_BACK)
        if outcome in ("done", "closed", "left unread", "failed inside"):
            lease.checkin()
        elif outcome == "leaked":
            del lease
        elif outcome == "kept":
            self.kept.append((time.monotonic_ns() + _KEEP, lease))
        else:
            lease.discard()

    def use(self, lease: Any, chance: float) -> str:
        """Something with the lease's connection; gives how it is to end."""
        conn: socket.socket = lease.conn
        self.exchange(conn)
        if chance < 0.75:
            return "done"
        if chance < 0.80:
            return "discarded"
        if chance < 0.83:
            conn.close()
            return "closed"
        if chance < 0.86:
            return "leaked"
        if chance < 0.89:
            self.ask(conn, "!late ")
            return "given up"
        if chance < 0.92:
            self.ask(conn)
            conn.recv(1)  # the rest stays unread
            return "left unread"
        if chance < 0.922:
            return "kept"
        time.sleep(self.chance.uniform(0.0, 0.02))  # an idle user
        return "done"

    def ask(self, conn: socket.socket, how: str = "") -> str:
        self.serial += 1
        text = f"{how}{self.name}-{self.serial}"
        conn.settimeout(PATIENCE)
        conn.sendall(text.encode() + b"\n")
        return text

    def exchange(self, conn: socket.socket) -> None:
        text = self.ask(conn)
        line = commands.read_line(conn).decode()
        if JUNK in line:
            raise Spoiled
        _, _, answered = line.partition(" ")
        if answered != text:
            raise Crossed(f"{text!r} was answered by {line!r}")

    def fork(self) -> str:
        """A child that inherits all this, uses the pool for itself or not, and goes."""
        way = self.chance.choice(("leave", "use", "exec"))
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return "forked"
        try:
            if way == "use":
                target = self.targets[0]
                with self.pool.connection(target.host, target.port, checkout_timeout=2.0) as conn:
                    self.exchange(conn)
            elif way == "exec":
                os.execv("/bin/true", ["true"])
        except Exception as error:
            if isinstance(error, Crossed):
                self.words[self.row + CROSSED] += 1
                traceback.print_exc()
        finally:
            os._exit(0)
