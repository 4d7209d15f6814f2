"""Connections that a loop has made itself, and that cannot leave it: TLS of redis.asyncio, under the pool's permits.

What is leased is a stand-in, as for other libraries whose connections stay; the streams are its guest.
"""

from __future__ import annotations

import asyncio
import contextlib

from ...drivers.dbapi import DbapiDriver
from ...drivers.dbapi import Session as StandIn
from .session import Ledger


class Guest(Ledger):
    """The streams of one connection, once it is open.

    Attributes:
        reader: The loop's.
        writer: The same.
    """

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        super().__init__()
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    @property
    def usable(self) -> bool:
        """Whether it is open, and nothing came that nobody asked for."""
        reader, writer = self.reader, self.writer
        if reader is None or writer is None or writer.transport.is_closing():
            return False
        unread = bool(reader._buffer) or reader.at_eof()  # type: ignore[attr-defined]
        return not unread and reader.exception() is None and not writer.transport.get_write_buffer_size()

    def end(self) -> None:
        """Close it, at once; in its loop."""
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None


class GuestDriver(DbapiDriver):
    """For the connections of one loop: opening makes the stand-in only, because connecting is for the task itself."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__("rediss.asyncio", Guest, clean=lambda guest: bool(guest.clean and guest.usable))
        self._loop = loop

    def end(self, conn: StandIn) -> None:
        """In its loop, whichever thread has found out that it is time."""
        try:
            self._loop.call_soon_threadsafe(self._end_in_loop, conn, conn.connection)
        except RuntimeError:  # the loop was closed: nobody can say goodbye, and its objects are left to be collected
            conn.sign_off()

    def _end_in_loop(self, conn: StandIn, guest: Guest) -> None:
        with contextlib.suppress(Exception):
            guest.end()
        self._loop.call_soon(conn.sign_off)  # after the transport has closed its socket
