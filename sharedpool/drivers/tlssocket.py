"""The socket that users get over TLS.

What is encrypted goes through memory (`ssl.MemoryBIO`), never from OpenSSL to a descriptor by itself. So parking and
waiting are those of every pooled socket, tasks and threads use the same objects, and what is done to an object that
was given back cannot reach the records of its next user.
"""

from __future__ import annotations

import _socket
import errno
import io
import math
import os
import select
import socket
import ssl
import threading
import time
from typing import Any, Final, NoReturn, cast

from ..options import LONGEST
from .sockets import GONE, Pooled, PooledSocket

#: So much is read from the kernel at once, and so much encrypted, bytes.
_READ: Final = 1 << 16
_WRITE: Final = 1 << 18
#: A record's header: type, version, length of what follows.
_HEADER: Final = 5
#: TLS 1.3 brings tickets with the first answer, or never: the end of so many leases is looked at.
_LOOKS: Final = 3
_END: Final = (ssl.SSLZeroReturnError, ssl.SSLEOFError)


class _Tls(Pooled):
    """What a pooled TLS socket does beyond its class: `recv`, `send` and their like speak TLS."""

    __slots__ = ()

    _tls: ssl.SSLObject | None
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _guard: threading.Lock
    _writing: threading.Lock
    _turn: int
    _head: bytes
    _missing: int
    _unsent: bytes
    _promised: int
    looks: int
    address: tuple[str, int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tls = None

    # --- the beginning and the end ------------------------------------------------------------------------------------

    def start(self, context: ssl.SSLContext, server_hostname: str, session: ssl.SSLSession | None) -> None:
        """Prepare for the handshake; the socket is connected."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._guard = threading.Lock()  # one thread in OpenSSL's object, and in the order of what is read; never waits
        self._writing = threading.Lock()  # ... and in the order of what is sent
        self._turn = 0
        self._head, self._missing = b"", 0
        self._unsent, self._promised = b"", 0
        self.looks = _LOOKS
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=False, server_hostname=server_hostname, session=session
        )

    def shake_hands(self, seconds: float) -> None:
        """The handshake.

        Raises:
            TimeoutError, OSError, ssl.SSLError.
        """
        limit = time.monotonic() + seconds
        while True:
            try:
                self.ssl_object.do_handshake()
                return
            except ssl.SSLWantReadError:
                pass
            finally:  # a refusal is told to the other side, too
                self._pass_on(max(0.001, limit - time.monotonic()))
            while not self._fill():
                self._await_records(limit)

    def _pass_on(self, seconds: float) -> None:
        if self._outgoing.pending:
            self.limit(seconds)
            self._send_all(self._outgoing.read())

    @property
    def parked(self) -> bool:
        """Whether this object is idle: a socket that leads nowhere lies over its number."""
        if not hasattr(socket, "SO_DOMAIN"):  # only where nothing is ever parked
            return False
        return self.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) != self.family

    def goodbye(self) -> None:
        """Say close_notify, if that can be done at once; nothing may be sent after it."""
        if self._tls is None or not self._writing.acquire(blocking=False):
            return
        try:
            if not self._unsent and not self.parked and self._guard.acquire(blocking=False):
                try:
                    self._touched |= GONE
                    try:
                        self._tls.unwrap()
                    except (ssl.SSLError, ValueError):
                        pass  # it wants the other side's, or has failed before
                    self._send_now(self._outgoing.read())
                finally:
                    self._guard.release()
        except OSError:
            pass
        finally:
            self._writing.release()

    def _send_now(self, data: bytes) -> None:
        if data:
            before = self.gettimeout()
            self.limit(0.0)
            try:
                super().send(data, getattr(socket, "MSG_NOSIGNAL", 0))
            finally:
                self.limit(LONGEST if before is None else before)

    def shutdown(self, how: int) -> None:
        """As socket.shutdown, after close_notify; the connection ends when it is given back."""
        if not self.parked:
            if how != socket.SHUT_RD:
                self.goodbye()
            self._touched |= GONE
        super(Pooled, self).shutdown(how)  # who does it to an idle object does not cost its next user the connection

    # --- reading ------------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """As socket.recv; empty at the end, also where the other side did not say close_notify (as ssl.SSLSocket)."""
        if flags:
            self._refuse("recv with flags")
        return cast("bytes", self._take(bufsize, None))

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """As socket.recv_into."""
        if flags:
            self._refuse("recv_into with flags")
        with memoryview(buffer) as view:
            length = view.nbytes
        return cast("int", self._take(min(nbytes or length, length), buffer))

    def read(self, length: int = 1024, buffer: Any = None) -> bytes | int:
        """As ssl.SSLSocket.read."""
        return self._take(length, buffer)

    def _take(self, length: int, buffer: Any) -> bytes | int:
        if not length:
            return b"" if buffer is None else 0
        turn, limit, asked = self._turn, 0.0, False
        while True:
            with self._guard:
                if self._turn != turn:
                    raise OSError(errno.ENOTCONN, "this connection was given back while it was read from")
                got = self._decrypt(length, buffer, asked)
                if got is not None:
                    self._touched |= 0 if got else GONE
                    return got
            if self._outgoing.pending:  # an answer of TLS's own
                self._answer()
            seconds = self.gettimeout()
            if seconds == 0 and asked:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if seconds != 0:  # an answer is seldom there at once: to ask first would be one call more for each
                limit = limit or (math.inf if seconds is None else time.monotonic() + seconds)
                self._await_records(limit)
            asked = True

    def _decrypt(self, length: int, buffer: Any, asks: bool) -> bytes | int | None:
        """What the kernel's records say, or those that were read before; None: they say nothing yet.

        Args:
            length: So much at most.
            buffer: Where to; None: they are given back.
            asks: Whether the kernel is asked, if there is nothing here.
        """
        tls, incoming = self.ssl_object, self._incoming
        while incoming.pending or incoming.eof or tls.pending() or (asks and self._fill()):
            try:
                return tls.read(length) if buffer is None else tls.read(length, buffer)
            except ssl.SSLWantReadError:
                pass
            except _END:
                return b"" if buffer is None else 0
            except ssl.SSLError:
                self._touched |= GONE
                raise
        return None

    def _fill(self) -> bool:
        """Take what the kernel has, without waiting; whether there was something, or the end.

        Raises:
            OSError: The connection was reset, or this object is idle, or closed.
        """
        try:
            data = os.read(self.number(), _READ)
        except BlockingIOError:
            return False
        except OSError:
            self._touched |= GONE
            raise
        if not data and self.parked:
            raise OSError(errno.ENOTCONN, "this connection was given back")
        if data:
            self._note_frames(data)
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        return True

    def _note_frames(self, data: bytes) -> None:
        """How much of the last record is still to come: OpenSSL does not tell, once it has begun to read it."""
        if self._head:
            data = self._head + data
        at = self._missing
        while at + _HEADER <= len(data):
            at += _HEADER + int.from_bytes(data[at + 3 : at + _HEADER], "big")
        self._head = data[at:]
        self._missing = max(0, at - len(data))

    def _await_records(self, limit: float) -> None:
        """Until there is something to read."""
        left = None
        if limit != math.inf:
            left = math.ceil(1000 * (limit - time.monotonic()))
            if left <= 0:
                raise TimeoutError("timed out")
        number = self.number()
        if number < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        poller = select.poll()  # gevent's, where it is patched
        poller.register(number, select.POLLIN)
        poller.poll(left)

    # --- writing ------------------------------------------------------------------------------------------------------

    def sendall(self, data: Any, flags: int = 0) -> None:
        """As socket.sendall."""
        if flags:
            self._refuse("sendall with flags")
        with self._writing:
            try:
                if self._unsent:
                    self._push()
                if type(data) is bytes and len(data) <= _WRITE:
                    self._send_all(self._seal(data))
                else:
                    with memoryview(data).cast("B") as view:
                        for at in range(0, len(view), _WRITE):
                            self._send_all(self._seal(view[at : at + _WRITE]))
            except BaseException:  # how much of it was sent nobody knows
                self._spoil()
                raise

    def send(self, data: Any, flags: int = 0) -> int:
        """As socket.send. After a BlockingIOError the same data must be sent again, as OpenSSL demands, too."""
        if flags:
            self._refuse("send with flags")
        with memoryview(data).cast("B") as view, self._writing:
            if not self._promised:
                self._push()
                part = view[:_WRITE]
                self._unsent, self._promised = self._seal(part), len(part)
            self._push()
            sent, self._promised = self._promised, 0
            return sent

    def write(self, data: Any) -> int:
        """As ssl.SSLSocket.write."""
        return self.send(data)

    def _send_all(self, data: bytes) -> None:
        """Send records, as socket.sendall; gevent's would send by `self.send`, which is ours."""
        while data:
            data = data[super().send(data) :]

    def _seal(self, data: bytes | memoryview) -> bytes:
        """The records of some data."""
        with self._guard:
            if len(data):
                self.ssl_object.write(data)
            return self._outgoing.read()

    def _push(self) -> None:
        """Send what was encrypted before."""
        try:
            while self._unsent:
                self._unsent = self._unsent[super().send(self._unsent) :]
        except BlockingIOError:
            raise
        except BaseException:
            self._spoil()
            raise

    def _spoil(self) -> None:
        """Records were lost, so nothing more can be said; if it was idle, nobody may lease it."""
        self._touched |= GONE
        self._promised = 0
        if self.number() >= 0 and self.parked:
            super().close()

    def _answer(self) -> None:
        """Send what OpenSSL says by itself; a writer who is at it sends that along."""
        if self._writing.acquire(blocking=False):
            try:
                self._unsent += self._seal(b"")
                self._push()
            except BlockingIOError:
                pass
            finally:
                self._writing.release()

    # --- for streams, which read and send by themselves ---------------------------------------------------------------

    def opened(self, data: bytes) -> list[bytes]:
        """What received records say; an empty one at the end says that it is the end.

        Raises:
            ssl.SSLError: They are wrong.
        """
        found: list[bytes] = []
        with self._guard:
            self._note_frames(data)
            self._incoming.write(data)
            try:
                while found[-1:] != [b""]:
                    found.append(self.ssl_object.read(_READ))
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                self._touched |= GONE
                raise
        return found

    def sealed(self, data: Any = b"") -> bytes:
        """The records that say it, and what OpenSSL has to say itself."""
        with self._writing:
            return self._seal(memoryview(data).cast("B"))

    # --- between leases -----------------------------------------------------------------------------------------------

    def at_rest(self) -> bool:
        """Whether nothing is unread or unsent; whoever still waits in `recv` finds out that it is over."""
        if not self._writing.acquire(blocking=False):
            return False
        try:
            with self._guard:
                if self._unsent or not self._is_silent():
                    return False
                self._turn += 1
                return True
        finally:
            self._writing.release()

    def hear(self) -> bool:
        """Read what came while it was idle; whether that was TLS's own, such as tickets, and no user's."""
        with self._guard:
            while self._fill():
                if self._incoming.eof:
                    return False
            return self._is_silent()

    def _is_silent(self) -> bool:
        """Whether nothing that a user should have read is here, not even a part of it."""
        tls = self.ssl_object
        if self._incoming.pending or tls.pending():
            try:
                tls.read(1)
                return False
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
        return not (self._head or self._missing or self._outgoing.pending)

    # --- as ssl.SSLSocket ---------------------------------------------------------------------------------------------

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """What knows the session."""
        if self._tls is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self._tls

    @property
    def context(self) -> ssl.SSLContext:
        """The context of its driver."""
        return self.ssl_object.context

    @property
    def server_hostname(self) -> str | None:
        """The name that was asked for, and checked."""
        return self.ssl_object.server_hostname

    @property
    def session_reused(self) -> bool | None:
        """Whether an earlier session was resumed."""
        return self.ssl_object.session_reused

    def pending(self) -> int:
        """How many bytes are decrypted and not read."""
        return self.ssl_object.pending()

    def getpeercert(self, binary_form: bool = False) -> Any:
        """The server's certificate, as ssl.SSLSocket.getpeercert."""
        return self.ssl_object.getpeercert(binary_form)

    def version(self) -> str | None:
        """Such as "TLSv1.3"."""
        return self.ssl_object.version()

    def cipher(self) -> tuple[str, str, int] | None:
        """Its name, the protocol, the number of secret bits."""
        return self.ssl_object.cipher()

    def selected_alpn_protocol(self) -> str | None:
        """What was agreed upon, of the driver's `alpn`."""
        return self.ssl_object.selected_alpn_protocol()

    def get_channel_binding(self, cb_type: str = "tls-unique") -> bytes | None:
        """As ssl.SSLSocket.get_channel_binding."""
        return self.ssl_object.get_channel_binding(cb_type)

    def _sendfile_use_sendfile(self, *args: Any) -> Any:
        from socket import _GiveupOnSendfile  # type: ignore[attr-defined]

        raise _GiveupOnSendfile  # the kernel does not encrypt

    def _refuse(self, what: str = "this") -> NoReturn:
        raise io.UnsupportedOperation(f"{what} is not possible on a TLS connection")

    def recvfrom(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as by ssl.SSLSocket; and so are the others that would bypass TLS."""
        self._refuse("recvfrom")

    recvfrom_into = recvmsg = recvmsg_into = sendto = sendmsg = dup = recvfrom


class TlsSocket(_Tls, PooledSocket):
    """A TLS connection that a pool lends: a socket whose bytes are encrypted on their way.

    Like a PooledSocket, and with what ssl.SSLSocket tells of a session (`getpeercert`, `version`, `cipher`,
    `selected_alpn_protocol`, `session_reused`, …), whose subclass it is not. Non-blocking, it raises BlockingIOError,
    so `loop.sock_recv` and `loop.sock_sendall` work.
    """


if issubclass(PooledSocket, _socket.socket):  # with a time-out for all of it, and one call less
    TlsSocket._send_all = PooledSocket.sendall  # type: ignore[assignment, method-assign]

_others: dict[Any, type[TlsSocket]] = {}


def tls_on(base: type[PooledSocket]) -> type[TlsSocket]:
    """The same on another class of sockets, as gevent's."""
    if base is not PooledSocket and base not in _others:
        _others[base] = cast("type[TlsSocket]", type("TlsSocket", (_Tls, base), {}))
    return _others.get(base, TlsSocket)
