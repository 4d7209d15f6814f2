"""What one process holds of a pool: its connections, the routes they belong to, and patience with a busy mutex."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

from .drivers import STATELESS, Driver, named
from .drivers.sockets import disown
from .layout import STAYS, tag_of
from .lines import COUNTS
from .native import Gate, heed, reader_of


def _none() -> object | None:
    return None


#: The event loop that this thread runs, or None; asyncio's own function, once there is something asynchronous.
running_loop: Callable[[], object | None] = _none


#: Of connections that do not tell.
_NOBODY: Final[list[None]] = []


class Entry:
    """A connection that this process holds: the user's object, parked or not, and the pool's own descriptor.

    Attributes:
        at: The slot's place.
        generation: The connection's generation in that slot.
        version: The version of the session state that the object knows.
        route: Where it leads.
        conn: The user's object.
        real: The pool's own descriptor of the connection.
        gate: Polls `real`, unparks and parks `conn`.
        fileno: `fileno[conn]` is the number of the descriptor in `conn`.
        number: The number that it had; another one there means that the user closed or replaced it.
        inside: Has items while calls of pooled sockets are reading or writing on `conn`.
        word: The slot's word when this process left it idle.
        stacked: Whether it is on its route's stack.
        state: What another process needs to adopt it, besides the descriptor; None: it cannot.
        thread: Who leased it last.
    """

    __slots__ = (
        "at", "conn", "fileno", "gate", "generation", "inside", "number", "real", "route", "stacked", "state", "thread",
        "version", "word",
    )  # fmt: skip

    def __init__(
        self, at: int, generation: int, version: int, route: Route, conn: Any, real: int, dead: int,
        state: bytes | None = b"",
    ) -> None:  # fmt: skip
        self.at = at
        self.generation = generation
        self.version = version
        self.route = route
        self.conn = conn
        self.real = real
        self.fileno: Any = reader_of(conn)
        self.number: int = self.fileno[conn]
        self.inside: list[None] = getattr(conn, "inside", _NOBODY)
        self.gate = Gate(real, self.number, dead if route.parks else -1)
        self.state = state
        self.word = 0
        self.stacked = False
        self.thread = 0

    def let_go(self) -> None:
        """Close this process's object and descriptor; the connection itself is ended by whoever decided that.

        An object that a thread is inside of stays parked: its number could be a stranger's before that thread waits.
        """
        if not (self.inside and self.fileno[self.conn] == self.number and -self.gate >= 0):
            self.route.driver.close(self.conn)
        real, self.real = self.real, -1
        if real >= 0:
            with contextlib.suppress(OSError):
                os.close(real)

    def disown(self, dead: int, *, lent: bool) -> None:
        """In a forked child: nothing here leads to the parent's connection any more."""
        disown(self.route.driver, self.conn, self.number, dead, lent=lent)
        real, self.real = self.real, -1
        if real >= 0:
            with contextlib.suppress(OSError):
                os.close(real)


class Route:
    """A key as this process knows it: where to, by which driver, and which connections were left idle here (LIFO).

    `checks` is the driver's active check, where the pool wants it asked; `resets` what it does with a connection that
    others have used, `always` with every one; `direct`: neither is for one's own idle connection. `high` says that its
    checkouts have high priority. What this process does with the key is counted behind the place `counts`: `reuses`,
    `takeovers` and `handoffs` are places there. `place` and what of it `matters` are as in `drivers.places`.
    """

    __slots__ = (
        "always", "checks", "clean", "counts", "direct", "driver", "handoffs", "high", "host", "key", "matters",
        "parks", "place", "port", "resets", "reuses", "settles", "stack", "stateful", "stays", "sticky", "strict",
        "tag", "takeovers", "urgent", "where",
    )  # fmt: skip

    def __init__(
        self, driver: Driver[Any], host: str, port: int, key: int, *, moves: bool, sticky: bool, counts: int,
        checks: Callable[[Any], bool] | None = None, strict: bool = False, place: str = "",
        matters: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.place = place
        self.matters = matters
        self.counts = counts
        self.reuses = counts + COUNTS["reuses"]
        self.takeovers = counts + COUNTS["takeovers"]
        self.handoffs = counts + COUNTS["handoffs"]
        self.driver = driver
        self.host = host
        self.port = port
        self.key = key
        self.tag = tag_of(key)
        self.stack: list[Entry] = []
        self.clean = driver.clean
        self.settles: Callable[[Any], bool] | None = getattr(driver, "settled", None)
        self.stays = 0 if moves else STAYS
        self.sticky = sticky
        self.strict = strict
        self.checks = checks
        wants: bool = getattr(driver, "resets", True)
        self.resets: Callable[[Any], bool] | None = getattr(driver, "reset", None) if wants else None
        self.always: bool = self.resets is not None and getattr(driver, "always", False)
        self.direct = checks is None and not self.always
        self.parks: bool = getattr(driver, "parks", True)
        self.stateful = "" if driver.name in STATELESS else driver.name
        self.high = False
        self.urgent: Route | None = None
        self.where = named(driver.name, host, port)

    def with_high_priority(self) -> Route:
        """The same route for checkouts with high priority; both have one stack."""
        if self.urgent is None:
            urgent = Route(
                self.driver, self.host, self.port, self.key,
                moves=not self.stays, sticky=self.sticky, counts=self.counts, checks=self.checks, strict=self.strict,
                place=self.place, matters=self.matters,
            )  # fmt: skip
            urgent.stack, urgent.high = self.stack, True
            self.urgent = urgent
        return self.urgent

    def stay(self) -> None:
        """A connection turned out not to be one that moves, and so will the next: from now on none does."""
        for route in (self, self.urgent):
            if route is not None:
                route.stays = STAYS
                route.sticky = not self.strict

    def push(self, entry: Entry) -> None:
        """Remember an idle connection; on the stack once, however often it comes and goes."""
        if not entry.stacked:
            entry.stacked = True
            self.stack.append(entry)

    def pop(self) -> Entry | None:
        """The connection left idle last, or None. It may have been taken by another process since."""
        try:
            entry = self.stack.pop()
        except IndexError:
            return None
        entry.stacked = False
        return entry


#: A section takes 1 us, so the first tries follow at once. Then the holder is probably waiting for this very processor
#: (a wake-up preempted it): a yield lets it run in 5 us, where the shortest sleep takes 110. Both are bounded, because
#: a real-time thread would never let a normal holder run that way: after them, sleeps.
_SPINS: Final = 3
_YIELDS: Final = 20


class Patience:
    """Waits for a busy mutex: a few tries at once, a few after a yield, then after sleeps of 50 us and more."""

    __slots__ = ("limit", "tries")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tries = 0

    def wait(self) -> bool:
        """Wait a moment; False when the deadline has passed."""
        self.tries += 1
        if self.tries <= _SPINS:
            return True
        if monotonic_ns() >= self.limit:
            return False
        if self.tries <= _YIELDS:
            os.sched_yield()
        else:
            time.sleep(min(0.001, 50e-6 * (self.tries - _YIELDS)))
        heed()
        return True
