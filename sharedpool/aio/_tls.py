"""asyncio's streams on a leased TLS connection: its records come and go by a plain transport."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..drivers.tlssocket import TlsSocket


class Records(asyncio.Protocol):
    """Stands between the transport of the records and the protocol of what they say.

    Args:
        conn: Knows the session.
        inner: Hears what they say.
    """

    def __init__(self, conn: TlsSocket, inner: asyncio.StreamReaderProtocol) -> None:
        self.conn = conn
        self._inner = inner
        self.transport = Transport(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport.raw = transport  # type: ignore[assignment]
        self._inner.connection_made(self.transport)

    def data_received(self, data: bytes) -> None:
        try:
            said = self.conn.opened(data)
        except ssl.SSLError as error:
            self._inner.connection_lost(error)
            self.transport.abort()
            return
        answer = self.conn.sealed()  # of TLS's own
        if answer:
            self.transport.raw.write(answer)
        for part in said:
            if part:
                self._inner.data_received(part)
            else:
                self._inner.eof_received()

    def eof_received(self) -> bool:
        self._inner.eof_received()
        return True  # the lease closes it

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


class Transport(asyncio.Transport):
    """What a StreamWriter writes to; everything but that is the raw transport's.

    Args:
        records: Whose it is.
    """

    raw: asyncio.Transport

    def __init__(self, records: Records) -> None:
        super().__init__()
        self._conn = records.conn

    def write(self, data: Any) -> None:
        self.raw.write(self._conn.sealed(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Also "ssl_object", "peercert" and "cipher", as of asyncio's own."""
        if name == "ssl_object":
            return self._conn.ssl_object
        if name in ("peercert", "cipher"):
            return self._conn.getpeercert() if name == "peercert" else self._conn.cipher()
        return self.raw.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self.raw.is_closing()

    def close(self) -> None:
        self.raw.close()

    def abort(self) -> None:
        self.raw.abort()

    def can_write_eof(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return self.raw.is_reading()

    def pause_reading(self) -> None:
        self.raw.pause_reading()

    def resume_reading(self) -> None:
        self.raw.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self.raw.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.raw.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.raw.set_write_buffer_limits(high, low)
