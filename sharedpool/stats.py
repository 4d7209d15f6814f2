"""Numbers of a pool, host-wide, and their arithmetic. Pure data: no I/O, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

#: The counters every worker keeps in its row, in the order in which they lie there.
COUNTERS: tuple[str, ...] = (
    "reuses",
    "takeovers",
    "handoffs",
    "opens",
    "open_failures",
    "waits",
    "timeouts",
    "discards",
    "fetches",
    "attempts",
    "unwanted",
    "dropped",
    "evictions",
)

#: What only the arbiter counts, in its own row, at the same places.
ARBITER_COUNTERS: tuple[str, ...] = (
    "expired",
    "remote_closed",
    "reaped",
    "adopted",
    "revoked",
    "closed",
    "closed_unconfirmed",
    "rescued",
    "repairs",
    "over_limit",
    "reclaimed",
    "stopped",
    "abandoned",
    "reclaimed_leases",
    "max_lifetime",
    "drained",
    "killed",
    "over_idle",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What a pool looks like at one moment, over all processes of its scope.

    States count slots, one per permit: `in_use` (leased), `idle`, `opening`, `granted` (on the way to a waiter) and
    `closing` (until the remote has closed, too). Together they never exceed `max_connections`, except while a lowered
    limit is being reached. Counters only grow, from zero again after reset_stats(), and survive the death of the worker
    that counted.

    Attributes:
        name: The pool's name.
        max_connections: The cap.
        in_use: Leases in force.
        idle: Open connections that nobody uses.
        opening: Permits taken for a connection that is being opened.
        granted: Permits on their way to a waiter.
        closing: Connections not yet closed to the end.
        waiting: Checkouts in the queue.
        processes: Processes attached.
        reuses: Leases of a connection that the same process had idle.
        takeovers: Leases of a connection that another process had idle.
        handoffs: Leases of a connection or permit given by whoever released it.
        opens: Leases of a connection newly opened, or of a permit.
        open_failures: Connects that failed.
        waits: Checkouts that had to queue.
        timeouts: Checkouts that gave up.
        discards: Leases given back closed.
        fetches: Descriptors fetched from the arbiter.
        attempts: Permits taken to open a connection.
        unwanted: Grants that came when nobody wanted them any more.
        dropped: Leases that were forgotten and collected.
        evictions: Idle connections closed early for their permit.
        expired: Idle connections closed after idle_timeout.
        remote_closed: Idle connections that the remote closed.
        reaped: Leases, openings and waiters of dead processes.
        adopted: Idle connections of dead processes that were kept.
        revoked: Grants taken back from a waiter that did not take them.
        closed: Connections closed to the end, closed_unconfirmed among them.
        closed_unconfirmed: Connections whose remote had not closed within close_timeout.
        rescued: Waiters served by the arbiter's watch instead of by a release.
        repairs: Repairs of the table after a death inside a critical section.
        over_limit: Idle connections closed because the cap was lowered.
        reclaimed: Idle connections closed by the arbiter for a waiter.
        stopped: Idle connections closed because the pool was stopped.
        abandoned: Leases that lasted longer than lease_timeout.
        reclaimed_leases: Abandoned leases whose connection was taken away.
        max_lifetime: Idle connections closed for their age; leased ones count as discards, at their checkin.
        drained: Idle connections closed by drain(); leased ones count as discards, at their checkin.
        killed: The same by kill().
        over_idle: Idle connections closed because there were more than max_idle.
    """

    name: str
    max_connections: int
    in_use: int = 0
    idle: int = 0
    opening: int = 0
    granted: int = 0
    closing: int = 0
    waiting: int = 0
    processes: int = 0
    reuses: int = 0
    takeovers: int = 0
    handoffs: int = 0
    opens: int = 0
    open_failures: int = 0
    waits: int = 0
    timeouts: int = 0
    discards: int = 0
    fetches: int = 0
    attempts: int = 0
    unwanted: int = 0
    dropped: int = 0
    evictions: int = 0
    expired: int = 0
    remote_closed: int = 0
    reaped: int = 0
    adopted: int = 0
    revoked: int = 0
    closed: int = 0
    closed_unconfirmed: int = 0
    rescued: int = 0
    repairs: int = 0
    over_limit: int = 0
    reclaimed: int = 0
    stopped: int = 0
    abandoned: int = 0
    reclaimed_leases: int = 0
    max_lifetime: int = 0
    drained: int = 0
    killed: int = 0
    over_idle: int = 0

    @property
    def used(self) -> int:
        """Slots that count against the cap."""
        return self.in_use + self.idle + self.opening + self.granted + self.closing

    @property
    def checkouts(self) -> int:
        """Leases ever given: reuses + takeovers + handoffs + opens."""
        return self.reuses + self.takeovers + self.handoffs + self.opens

    def numbers(self) -> str:
        """The numbers as they stand in error messages: `(max=20 leased=20 idle=0 ...)`."""
        return (
            f"(max={self.max_connections} leased={self.in_use} idle={self.idle} opening={self.opening + self.granted}"
            f" closing={self.closing} waiting={self.waiting})"
        )

    def as_hackney(self) -> dict[str, int | str]:
        """The five keys of hackney_pool:get_stats/1."""
        return {
            "name": self.name,
            "max": self.max_connections,
            "in_use_count": self.in_use + self.opening + self.granted,
            "free_count": self.idle,
            "queue_count": self.waiting,
        }


def from_counts(
    name: str, maximum: int, states: Mapping[str, int], counters: Mapping[str, int], waiting: int, processes: int
) -> PoolStats:
    """Put together what the table counted."""
    return PoolStats(name=name, max_connections=maximum, waiting=waiting, processes=processes, **{**states, **counters})
