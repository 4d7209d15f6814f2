"""A checkout in force: what the user holds until it is checked in or discarded."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

from .table import Claim

T = TypeVar("T")


class Owner(Protocol):
    """Whoever gave the lease."""

    def checkin(self, lease: Lease[Any]) -> None: ...
    def discard(self, lease: Lease[Any]) -> None: ...
    def drop(self, lease: Lease[Any]) -> None: ...
    def stays_inert(self) -> bool: ...


class Lease(Claim, Generic[T]):
    """A connection (or a permit) that is yours until you give it back.

    A context manager: leaving the block checks in, an exception discards. A lease that is forgotten is discarded when
    it is collected, and counted as `dropped`. In a forked child an inherited lease is inert: it belongs to the parent.

    Attributes:
        conn: The connection; None for a permit. Valid until checkin or discard.
        word: The slot's word while in force, else 0; stored inside critical sections only.
        place: The slot's place in the table.
    """

    __slots__ = ("_entry", "_owner", "conn", "place")

    #: The connection; None for a permit.
    conn: T

    def __init__(self, owner: Owner, entry: Any, place: int) -> None:
        self.word = 0
        self._owner = owner
        self._entry = entry
        self.place = place

    def checkin(self) -> None:
        """Give it back; it goes to the longest waiter, or stays open and idle.

        Raises:
            LeaseError: It is not in force here (checked in before, taken away, or another process's); nothing changes.
        """
        self._owner.checkin(self)

    def discard(self) -> None:
        """Give it back closed.

        Raises:
            LeaseError: It is not in force here; nothing changes.
        """
        self._owner.discard(self)

    @property
    def in_force(self) -> bool:
        """Whether it can still be checked in here."""
        return self.word != 0 and not self._owner.stays_inert()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.word and not self._owner.stays_inert():
            if kind is None:
                self._owner.checkin(self)
            else:
                self._owner.discard(self)

    def __del__(self) -> None:
        # Finalizers may run anywhere, in a critical section too: this only appends to a deque.
        if self.word:
            self._owner.drop(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a lease can be neither copied nor pickled: it belongs to who took it, until it is given back")

    def __repr__(self) -> str:
        return f"<Lease {'in force' if self.word else 'given back'}: {getattr(self, 'conn', None)!r}>"
