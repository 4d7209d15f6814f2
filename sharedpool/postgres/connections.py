"""What psycopg 3's connections need to be right on a session that moves: whom they cancel, where they say they are, and
names for what they prepare that no other process gives.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
from typing import Any

import psycopg
from psycopg import errors as e
from psycopg import pq
from psycopg._connection_info import ConnectionInfo
from psycopg._preparing import PrepareManager

from ..native import libpq_number
from .sessions import Cancels, Session

#: Seconds for a CancelRequest.
_PATIENCE = 10.0


class OwnNames(PrepareManager):
    """Statements that one object prepares have names that no other object gives, and it forgets its own only."""

    def __init__(self) -> None:
        super().__init__()
        self._prepared_idx = secrets.randbits(62)  # the number in the names, counted up from here

    def clear(self) -> bool:
        """As psycopg's, but one by one: DEALLOCATE ALL would take other objects' statements away."""
        names = list(self._names.values())
        found = super().clear()
        if found:
            self._to_flush.clear()
            self._to_flush.extend(names)
        return found


class _Info(ConnectionInfo):
    """About the server itself, not about the door through which libpq went."""

    def __init__(self, pgconn: pq.abc.PGconn, session: Session) -> None:
        super().__init__(pgconn)
        self._session = session
        assert session.target.server is not None
        self._server = session.target.server

    @property
    def host(self) -> str:
        """The server's host name, or the directory of its socket."""
        return self._server.host or self._server.hostaddr

    @property
    def hostaddr(self) -> str:
        """The server's IP address; "" for a Unix socket."""
        return self._session.hostaddr

    @property
    def port(self) -> int:
        """The server's port."""
        return self._server.port

    def get_parameters(self) -> dict[str, str]:
        """What the connection was made with, as psycopg gives it."""
        target = self._session.target
        found = {
            name: value
            for name, value in super().get_parameters().items()
            if name not in ("host", "hostaddr", "port", "sslmode", "gssencmode", "require_auth")
        }
        shown = {name: value for name, value in target.given.items() if name != "password"}
        return {**found, **shown, "host": self.host}


class _Shared:
    """What all of them have in common, before psycopg's own class."""

    _shared: Session | None = None
    _cancels: Cancels
    _baseline: tuple[tuple[bytes, ...], list[bytes | None]] = ((), [])
    _configured = False
    #: Whether something is known to have changed the session: it is set back when it is given back.
    _changed = False

    fileno = libpq_number  # compiled, no other thread comes between it and what it is asked for

    @property
    def info(self) -> ConnectionInfo:
        """As psycopg's, about the server itself."""
        if self._shared is None:
            return super().info  # type: ignore[misc, no-any-return]
        return _Info(self.pgconn, self._shared)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        if self._shared is None:
            return super().__repr__()
        status = pq.TransactionStatus(self.pgconn.transaction_status).name  # type: ignore[attr-defined]
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        closed = self.closed  # type: ignore[attr-defined]
        return f"<{name} [{'BAD' if closed else status}] ({self._shared.target.address}) at 0x{id(self):x}>"

    def cancel(self) -> None:
        """Cancel what the session is doing; nothing, once it was given back."""
        if self._should_cancel():  # type: ignore[attr-defined]
            with self._cancels.asking(self) as asks:
                if asks and self._shared is None:
                    super().cancel()  # type: ignore[misc]
                elif asks and self._shared is not None:
                    _cancel(self._shared, _PATIENCE)


class _Sync(_Shared):
    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """The same, within `timeout` seconds."""
        if self._should_cancel():  # type: ignore[attr-defined]
            with self._cancels.asking(self) as asks:
                if asks and self._shared is None:
                    super().cancel_safe(timeout=timeout)  # type: ignore[misc]
                elif asks and self._shared is not None:
                    _cancel(self._shared, timeout)


class _Async(_Shared):
    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """The same, within `timeout` seconds, without blocking the loop."""
        if not self._should_cancel():  # type: ignore[attr-defined]
            return
        if self._shared is not None:
            await asyncio.to_thread(self._cancel_in_thread, self._shared, timeout)
            return
        with self._cancels.asking(self) as asks:
            if asks:
                await super().cancel_safe(timeout=timeout)  # type: ignore[misc]

    def _cancel_in_thread(self, session: Session, timeout: float) -> None:
        """It goes on although its task may have gone, and is under way until it is done."""
        with self._cancels.asking(self) as asks:
            if asks:
                _cancel(session, timeout)


def _cancel(session: Session, seconds: float) -> None:
    try:
        session.cancel(seconds or _PATIENCE)
    except TimeoutError:
        raise e.CancellationTimeout("cancellation timeout expired") from None
    except OSError as error:
        raise e.OperationalError(f"cancellation failed: {error}") from error


@functools.cache
def shared_class(base: Any) -> Any:
    """The user's class, with what is about the server instead of the door; one for each."""
    ours = _Async if issubclass(base, psycopg.AsyncConnection) else _Sync
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ours, base), names)
