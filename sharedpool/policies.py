"""What the arbiter closes or reports by rule: max_idle, max_lifetime, lease_timeout, and drains under way.

It decides which and when; how a connection is closed, marked or shut down is the pool's business (`served`), which
calls `turn` and gives the time. Nothing here blocks. A busy mutex shows as an exception of the pool's, and what was
not done then is done at the next turn.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Final

from .layout import (
    BARE,
    CLOSING,
    DOOMED,
    FREE,
    GEN,
    GRANTED,
    IDLE,
    KEY,
    LEASE_TIMEOUT,
    LEASED,
    MASK64,
    MAX_IDLE,
    MAX_LIFETIME,
    OPENED,
    OPENING,
    SERIAL,
    SINCE,
    STATE,
    USED,
    generation_of,
    holder_of,
)
from .table import Table
from .view import row_pid

FAR: Final = 1 << 62
#: While more connections are open than may be idle, the idle ones are counted so often, ns.
COUNT_EVERY: Final = 100_000_000
#: A drain that somebody waits for, or that a grant on its way holds up, is looked at so often, ns.
DRAIN_EVERY: Final = 10_000_000


def lifetime_of(limit: int, index: int, generation: int) -> int:
    """How long one connection may live, ns: up to 10 % less than `limit`, always the same for one connection.

    So connections that were opened together do not all end, and have to be opened anew, at one moment.
    """
    mixed = (index * 0x9E37_79B9_7F4A_7C15 + generation * 0xD1B5_4A32_D192_ED03) & MASK64
    mixed = (mixed ^ mixed >> 31) * 0xBF58_476D_1CE4_E5B9 & MASK64
    return limit - limit * (mixed >> 44) // 10_485_760  # 20 bits of it: less than a tenth


@dataclasses.dataclass(slots=True, eq=False)
class Drain:
    """Connections that are to be closed: idle ones now, leased ones when they come back.

    Attributes:
        reason: Counted for each idle one.
        until: While somebody waits for its end, monotonic ns; 0: nobody does.
        shut: Leased ones are shut down, too.
        left: The generation of each slot's connection that has not ended.
        number: How many there were, not counting those that were being closed already.
        done: Set when all of them have ended.
    """

    reason: str
    until: int
    shut: bool
    left: dict[int, int]
    number: int = 0
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class Policies:
    """The rules of one pool.

    Args:
        table: The table, as the arbiter's row.
        slots: Gives (index, place, word) of every slot that is not FREE.
        close: An idle or leased slot's place, word, the reason, the time: closes its connection; False: it changed.
        doom: A leased or opening slot's place: its checkin will close it.
        registered: Whether a slot's connection, by index and generation, has a descriptor here.
        shut: A slot's index: shut its connection down under its user's hands.
        abandoned: A slot's index, word and the age of its lease, ns: say so.
        reclaims: Whether an abandoned lease's connection is taken away.
    """

    def __init__(
        self,
        table: Table,
        *,
        slots: Callable[[], Iterator[tuple[int, int, int]]],
        close: Callable[[int, int, str, int], bool],
        doom: Callable[[int], None],
        registered: Callable[[int, int], bool],
        shut: Callable[[int], None],
        abandoned: Callable[[int, int, int], None],
        reclaims: Callable[[], bool],
    ) -> None:
        self._table = table
        self._words = table.words
        self._slots = slots
        self._close = close
        self._doom = doom
        self._registered = registered
        self._shut = shut
        self._abandoned = abandoned
        self._reclaims = reclaims
        self._age_at = self._lease_at = self._count_at = 0
        self._reported: dict[int, int] = {}
        self.drains: list[Drain] = []

    def changed(self) -> None:
        """Other options are in force: everything is looked at in the next turn."""
        self._age_at = self._lease_at = self._count_at = 0

    def turn(self, now: int) -> int:
        """Do what is due; gives when to come again, monotonic ns."""
        if now >= self._age_at:
            self._age_at = self._retire(now)
        if now >= self._lease_at:
            self._lease_at = self._look_at_leases(now)
        return min(self._age_at, self._lease_at, self.trim(now), self._drain(now))

    # --- max_idle -----------------------------------------------------------------------------------------------------

    def trim(self, now: int) -> int:
        """Close the idle connections longest unused while there are more than max_idle; gives when to look again."""
        w = self._words
        limit = w[MAX_IDLE]
        if w[USED] <= limit:  # an opening beyond it is registered, which wakes the loop
            return FAR
        if now < self._count_at:
            return self._count_at
        idle = sorted((w[at + SINCE], at, word) for _, at, word in self._slots() if word & STATE == IDLE)
        for _, at, word in idle[: max(0, len(idle) - limit)]:
            self._close(at, word, "over_idle", now)
        self._count_at = now + COUNT_EVERY
        return self._count_at

    # --- max_lifetime -------------------------------------------------------------------------------------------------

    def _retire(self, now: int) -> int:
        """Close idle connections past their time, and mark leased ones; gives when the next one will be due."""
        w = self._words
        limit = w[MAX_LIFETIME]
        if not limit:
            return FAR
        soonest = now + limit - limit // 10
        for index, at, word in self._slots():
            state = word & STATE
            if state not in (IDLE, LEASED, GRANTED) or word & (DOOMED | BARE) or not w[at + OPENED]:
                continue
            generation = generation_of(word)
            until = w[at + OPENED] + lifetime_of(limit, index, generation)
            if until > now:
                soonest = min(soonest, until)
            elif state == IDLE:
                self._close(at, word, "max_lifetime", now)
            elif state == GRANTED:
                soonest = min(soonest, now + COUNT_EVERY)  # on its way to somebody: marked once it has arrived
            elif self._registered(index, generation):
                self._doom(at)
        return soonest

    # --- lease_timeout ------------------------------------------------------------------------------------------------

    def _look_at_leases(self, now: int) -> int:
        """Report every lease that lasts too long, once; gives when the next one will be due."""
        w = self._words
        limit = w[LEASE_TIMEOUT]
        if not limit:
            self._reported.clear()
            return FAR
        soonest = now + limit
        reported = {}
        for index, at, word in self._slots():
            if word & STATE != LEASED:
                continue
            until = w[at + SINCE] + limit
            if until > now:
                soonest = min(soonest, until)
                continue
            reported[index] = word & (SERIAL | GEN)
            if self._reported.get(index) != reported[index]:
                self._reported[index] = reported[index]  # at once: the rest may have to wait for the mutex
                self._abandoned(index, word, now - w[at + SINCE])
            if self._reclaims() and not self._close(at, word, "reclaimed_leases", now):
                soonest = now + DRAIN_EVERY
        self._reported = reported
        return soonest

    # --- drain and kill -----------------------------------------------------------------------------------------------

    def begin(self, keys: Collection[int], reason: str, *, until: int, shut: bool) -> Drain:
        """Close what there is of some keys (none: of all): what is opened from now on is not concerned."""
        drain = Drain(reason, until, shut, {})
        for index, at, word in self._slots():
            if keys and self._words[at + KEY] not in keys:
                continue
            generation = generation_of(word)
            bare = word & BARE or (word & STATE == LEASED and not self._registered(index, generation))
            if not bare:
                drain.left[index] = generation
                drain.number += word & STATE != CLOSING
        self.drains.append(drain)
        return drain

    def _drain(self, now: int) -> int:
        """Go on with every drain; gives when to look again."""
        due = FAR
        for drain in list(self.drains):
            waits = self._go_on(drain, now)
            if not drain.left:
                drain.done.set()
            if drain.left and (waits or now < drain.until):
                due = now + DRAIN_EVERY
            else:
                self.drains.remove(drain)
        return due

    def _go_on(self, drain: Drain, now: int) -> bool:
        """Close and mark what can be; whether something is in a state in which it can be neither."""
        waits = False
        for index, generation in list(drain.left.items()):
            at = self._table.slot_at(index)
            word = self._words[at]
            state = word & STATE
            if generation_of(word) != generation or state == FREE or (state == GRANTED and word & BARE):
                del drain.left[index]
            elif state == IDLE:
                waits |= not self._close(at, word, drain.reason, now)
            elif state in (LEASED, OPENING):
                self._doom(at)
                if drain.shut and state == LEASED:
                    self._shut(index)
                waits |= drain.shut and state == OPENING  # a connect that fails says that there is no connection
            elif state == GRANTED:
                waits = True
        return waits

    def holders(self, drain: Drain) -> list[int]:
        """The processes that lease what is left of a drain, or are opening it."""
        pids = set()
        for index, generation in drain.left.items():
            word = self._words[self._table.slot_at(index)]
            if generation_of(word) == generation and word & STATE in (LEASED, OPENING):
                pids.add(row_pid(self._words, holder_of(word)))
        return sorted(pids)
