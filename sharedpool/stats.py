"""Numbers of a pool, host-wide, and their arithmetic. Pure data: no I/O, no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

#: The counters every worker keeps in its row, in the order in which they lie there.
COUNTERS: tuple[str, ...] = (
    "reuses",
    "takeovers",
    "handoffs",
    "opens",
    "open_failures",
    "waits",
    "timeouts",
    "fetches",
    "attempts",
    "unwanted",
    "dropped",
    "opened",
    "replaced",
    "prewarmed",
)

#: What only the arbiter counts, in its own row, at the same places.
ARBITER_COUNTERS: tuple[str, ...] = (
    "reaped",
    "adopted",
    "revoked",
    "closed",
    "closed_unconfirmed",
    "rescued",
    "repairs",
    "abandoned",
)

#: Why connections are closed, in the order in which every row counts it. Each close has one reason, counted in the
#: section that decides it.
REASONS: tuple[str, ...] = (
    "evicted",  # for its permit: another key was waited for
    "discarded",  # by its user
    "unclean",  # closed, detached or replaced by its user, or with something unread
    "doomed",  # its remote closed during the lease, or what it belongs to was drained, or its time was over
    "dropped",  # its lease was forgotten and collected
    "late",  # it could not be given back in time, because the mutex stayed busy
    "ended",  # found ended, or readable, when it was to be leased
    "check_failed",  # the driver's active check refused it
    "gone",  # nobody has its descriptor any more
    "unwanted",  # granted to who did not want it any more
    "over_limit",  # the cap was lowered
    "stopped",  # the pool was stopped
    "expired",  # idle for longer than idle_timeout
    "remote_closed",  # closed by its remote while it was idle
    "reaped",  # leased by a process that ended, or its own and not to be moved
    "revoked",  # granted to who did not take it, and of no use to the next
    "reclaimed",  # idle, and closed by the arbiter for a waiter
    "max_lifetime",
    "drained",
    "killed",
    "over_idle",
    "reclaimed_leases",
)

#: Reasons that say how a lease ended that was given back closed.
_DISCARDS = ("discarded", "unclean", "doomed", "dropped", "late")
#: Reasons that are numbers of their own, too.
_FLAT = (
    "over_limit", "stopped", "expired", "remote_closed", "reclaimed", "max_lifetime", "drained", "killed", "over_idle",
    "reclaimed_leases",
)  # fmt: skip

#: The upper bounds of all histograms' buckets, seconds; one more bucket has what is above.
BOUNDS: tuple[float, ...] = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """How often something took how long.

    Attributes:
        counts: How many lay within each bound of BOUNDS and above the one before; the last: above all. Not cumulated.
        sum: Seconds altogether.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    sum: float = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


def histogram_of(words: Sequence[int]) -> Histogram:
    """A histogram as a row keeps it: the buckets, then the sum in ns."""
    return Histogram(tuple(words[: len(BOUNDS) + 1]), words[len(BOUNDS) + 1] / 1e9)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What a pool looks like at one moment, over all processes of its scope.

    States count slots, one per permit: `in_use` (leased), `idle`, `opening`, `granted` (on the way to a waiter) and
    `closing` (until the remote has closed, too). Together they never exceed `max_connections`, except while a lowered
    limit is being reached. Counters only grow, from zero again after reset_stats(), and survive the death of the worker
    that counted.

    They add up: `checkouts` = reuses + takeovers + handoffs + opens, each counted when the lease is delivered; `opened`
    - `closed` = `connections`; and the sum of `closes` is what was opened and is not leased, idle or granted now. (A
    process that is killed within the microsecond between a deed and its count takes that count with it.)

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
        discards: Leases given back closed or forgotten; the closes "discarded", "unclean", "doomed", "dropped", "late".
        fetches: Descriptors fetched from the arbiter.
        attempts: Permits taken to open a connection.
        unwanted: Grants that came when nobody wanted them any more.
        dropped: Leases that were forgotten and collected.
        opened: Connections that were opened, for checkouts or by prewarming.
        replaced: Connections found ended at their checkout and closed to the end by their holder, to be opened anew.
        prewarmed: Connections opened by prewarming.
        evictions: Connections closed early for their permit; the closes "evicted".
        expired: Idle connections closed after idle_timeout.
        remote_closed: Idle connections that the remote closed.
        reaped: Leases, openings and waiters of dead processes.
        adopted: Idle connections of dead processes that were kept.
        revoked: Grants taken back from a waiter that did not take them.
        closed: Connections closed to the end, `replaced` and closed_unconfirmed among them.
        closed_unconfirmed: Connections whose remote had not closed within close_timeout.
        rescued: Waiters served by the arbiter's watch instead of by a release.
        repairs: Repairs of the table after a death inside a critical section.
        over_limit: Idle connections closed because the cap was lowered.
        reclaimed: Idle connections closed by the arbiter for a waiter.
        stopped: Idle connections closed because the pool was stopped.
        abandoned: Leases that lasted longer than lease_timeout.
        reclaimed_leases: Abandoned leases whose connection was taken away.
        max_lifetime: Idle connections closed for their age; leased ones count as doomed, at their checkin.
        drained: Idle connections closed by drain(); leased ones count as doomed, at their checkin.
        killed: The same by kill().
        over_idle: Idle connections closed because there were more than max_idle.
        connections: Connections open now, those among them that are not yet closed to the end.
        closes: How many connections were closed for which reason (see REASONS); each has one.
        wait_seconds: How long checkouts queued, those that gave up among them; who did not queue is not in it.
        connect_seconds: How long opening a connection took, where it succeeded.
        lease_seconds: How long leases lasted that their holders ended.
        longest_wait: Seconds for which the longest waiter has waited by now; 0.0 if nobody waits.
        longest_wait_pid: Its process, or 0.
        longest_lease: Seconds for which the longest lease has lasted by now; 0.0 if there is none.
        longest_lease_pid: Its process, or 0.
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
    fetches: int = 0
    attempts: int = 0
    unwanted: int = 0
    dropped: int = 0
    opened: int = 0
    replaced: int = 0
    prewarmed: int = 0
    discards: int = 0
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
    connections: int = 0
    closes: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    wait_seconds: Histogram = Histogram()
    connect_seconds: Histogram = Histogram()
    lease_seconds: Histogram = Histogram()
    longest_wait: float = 0.0
    longest_wait_pid: int = 0
    longest_lease: float = 0.0
    longest_lease_pid: int = 0

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


def from_closes(closes: Mapping[str, int]) -> dict[str, int]:
    """The numbers of PoolStats that are closes by their reasons."""
    known = PoolStats.__dataclass_fields__
    flat = {name: closes.get(name, 0) for name in _FLAT if name in known}
    discards = sum(closes.get(name, 0) for name in _DISCARDS)
    return {**flat, "discards": discards, "evictions": closes.get("evicted", 0)}


def from_counts(
    name: str,
    maximum: int,
    states: Mapping[str, int],
    counters: Mapping[str, int],
    waiting: int,
    processes: int,
    closes: Mapping[str, int] | None = None,
    **more: Any,
) -> PoolStats:
    """Put together what the table counted; `closed` gets what holders closed themselves."""
    closes = dict(closes or {})
    numbers = {**states, **counters, **from_closes(closes), **more}
    numbers["closed"] = numbers.get("closed", 0) + numbers.get("replaced", 0)
    return PoolStats(name=name, max_connections=maximum, waiting=waiting, processes=processes, closes=closes, **numbers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeyStats:
    """The connections of one address at one moment, over all processes; fields as in PoolStats, and adding up as there.

    The counters of all addresses, and those of what has none, are the pool's.
    """

    in_use: int = 0
    idle: int = 0
    opening: int = 0
    granted: int = 0
    closing: int = 0
    waiting: int = 0
    connections: int = 0
    reuses: int = 0
    takeovers: int = 0
    handoffs: int = 0
    opens: int = 0
    open_failures: int = 0
    waits: int = 0
    timeouts: int = 0
    opened: int = 0
    closed: int = 0
    closed_unconfirmed: int = 0
    revoked: int = 0
    abandoned: int = 0
    closes: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def checkouts(self) -> int:
        """Leases ever given: reuses + takeovers + handoffs + opens."""
        return self.reuses + self.takeovers + self.handoffs + self.opens


#: What stands for the keys that have no line of their own.
OTHER_KEYS = "other"

#: The counters that there are by key.
KEY_COUNTERS: tuple[str, ...] = (
    "reuses", "takeovers", "handoffs", "opens", "open_failures", "waits", "timeouts", "opened", "closed",
    "closed_unconfirmed", "revoked", "abandoned",
)  # fmt: skip


def key_counters(counters: Mapping[str, int]) -> dict[str, int]:
    """Those of KeyStats; `closed` gets what holders closed themselves."""
    numbers = {name: counters.get(name, 0) for name in KEY_COUNTERS}
    numbers["closed"] += counters.get("replaced", 0)
    return numbers
