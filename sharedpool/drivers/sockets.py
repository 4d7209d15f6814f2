"""What the drivers for plain stream sockets share: the socket that users get, and how a connection ends.

A pooled socket is always non-blocking underneath: a thread still inside recv() when its socket is given back would
otherwise read the next user's bytes. "No timeout" is a very long one.
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import importlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

from ..errors import ConnectFailed, ConnectTimeout
from ..options import LONGEST

#: TCP_INFO's first byte once both sides have closed (or the connection was reset).
_TCP_CLOSE: Final = 7
#: What a peer still sends after our end is read away, in so many reads of so many bytes per look.
_READS: Final = 16
_DRAIN: Final = 1 << 16
#: Whoever else has the connection may have made it blocking; not every platform has this.
_AT_ONCE: Final = int(getattr(socket, "MSG_DONTWAIT", 0))
#: The answer of a peer that has been said goodbye to is awaited up to so many bytes.
_LONG_ANSWER: Final = 1 << 20
#: Then it is reset; its process, which counts the connection, has so many looks, about 0.1 s, to notice.
_NOTICES: Final = 5
#: A peer that has not closed after so many looks, 7.5 ms, is busy.
_PATIENT: Final = 5
#: Between two attempts to connect to a Unix socket whose queue is full, s.
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.01
#: Seconds for a server to close a connection that did not become a session.
_SEEN_OFF: Final = 1.0
#: What a user did to a socket: set a timeout, made a file of it, closed or detached it.
TIMED: Final = 1
FILED: Final = 2
GONE: Final = 4


if TYPE_CHECKING:
    _Socket = socket.socket
else:
    _Socket = object


class Pooled(_Socket):
    """What a pooled socket does beyond its class."""

    if not TYPE_CHECKING:
        __slots__ = ()

    _owner: int
    _touched: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = os.getpid()
        self._touched = 0

    def settimeout(self, value: float | None) -> None:
        """As socket.settimeout; None is the longest timeout there is."""
        if value is None:
            super().settimeout(LONGEST)  # as at rest: there is nothing to set back that was not before
        else:
            self._touched |= TIMED
            super().settimeout(value)

    def setblocking(self, flag: bool) -> None:
        """As socket.setblocking; True is the longest timeout there is."""
        self.settimeout(None if flag else 0.0)

    def gettimeout(self) -> float | None:
        """As socket.gettimeout: None where no timeout was asked for."""
        value = super().gettimeout()
        return None if value == LONGEST else value

    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        """As socket.makefile; the file must be closed before the connection is given back."""
        self._touched |= FILED
        return super().makefile(*args, **kwargs)

    def close(self) -> None:
        """End the connection. In a forked child only the child's copy is closed."""
        self._touched |= GONE
        if not self._closed and self._owner == os.getpid():  # type: ignore[attr-defined]
            try:
                self.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        super().close()

    def detach(self) -> int:
        """As socket.detach; the connection ends when it is given back."""
        self._touched |= GONE
        return super().detach()

    def rest(self) -> None:
        """Back to the state in which every lease begins."""
        super().settimeout(LONGEST)
        self._touched = 0

    def limit(self, seconds: float) -> None:
        """As socket.settimeout, which the user has not done."""
        super().settimeout(seconds)


class PooledSocket(Pooled, socket.socket):
    """A connected socket that a pool lends.

    `close()` ends the connection for everybody, as the user means it, although the pool has descriptors of its own.
    `settimeout(None)` and `setblocking(True)` wait "for ever", which is 23 days.
    """

    __slots__ = ("_owner", "_touched")


@functools.cache
def _pooled(base: type[socket.socket]) -> type[PooledSocket]:
    """The same on another class of sockets, as gevent puts in the place of Python's."""
    return cast("type[PooledSocket]", type("PooledSocket", (Pooled, base), {"__slots__": ("_owner", "_touched")}))


def pooled() -> type[PooledSocket]:
    """Pooled sockets of the class that `socket.socket` is by now."""
    return PooledSocket if socket.socket is _BASE else _pooled(socket.socket)


def fresh(*args: Any, **kwargs: Any) -> PooledSocket:
    """One of them."""
    return pooled()(*args, **kwargs)


_BASE: Final = socket.socket
with contextlib.suppress(ImportError):  # 0.5 us less for each; only where the hot path is compiled
    if issubclass(_BASE, _socket.socket):
        PooledSocket.sendall = importlib.import_module("sharedpool._calls").sendall  # type: ignore[method-assign]


class StreamDriver:
    """The part of a driver that is the same for every plain stream socket."""

    moves = True
    connects = True

    def fileno(self, conn: PooledSocket) -> int:
        """Python's own number: authoritative, -1 after close and detach."""
        return conn.fileno()

    def clean(self, conn: PooledSocket) -> bool:
        """No file object is open on it (its buffer may hold unread bytes); timeouts back at the baseline."""
        touched = conn._touched
        if not touched:
            return True
        if touched & GONE or conn._io_refs:  # type: ignore[attr-defined]
            return False
        if touched & TIMED:
            conn.rest()
        conn._touched = 0
        return True

    def adopt(self, descriptor: int, state: bytes) -> PooledSocket:
        """The same connection under another process's descriptor; there is no state to carry."""
        conn = fresh(fileno=descriptor)
        conn.rest()
        return conn

    def export(self, conn: PooledSocket) -> bytes | None:
        """Nothing."""
        return b""

    def close(self, conn: PooledSocket) -> None:
        """End the connection and close the object, whatever a file object on it still holds."""
        conn._io_refs = 0  # type: ignore[attr-defined]
        try:
            conn.close()
        except OSError:
            pass


def connect(conn: PooledSocket, address: Any, where: str, seconds: float) -> None:
    """Connect within `seconds`, then rest.

    Raises:
        ConnectTimeout, ConnectFailed: With the operating system's error as the cause. The socket is closed.
    """
    try:
        if seconds <= 0:
            raise TimeoutError
        conn.limit(min(seconds, LONGEST))
        conn.connect(address)
    except TimeoutError as error:
        conn.close()
        raise ConnectTimeout(f"{where} did not answer within {max(seconds, 0):.3g} s (connect_timeout)") from error
    except OSError as error:
        conn.close()
        raise ConnectFailed(f"{where} cannot be reached: {error}") from error
    conn.rest()


def connect_unix(sock: socket.socket, path: str, seconds: float) -> None:
    """Connect to a Unix socket within `seconds`; afterwards it does not block.

    A queue that is full refuses who does not block, so that one asks again and again. Who blocks instead connects in
    the end, although others have long shut the socket down or closed its descriptor: the kernel looks at neither.

    Raises:
        TimeoutError: The queue stayed full.
        OSError: There is nobody, or the socket was closed meanwhile.
    """
    sock.setblocking(False)
    until = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError from None
            time.sleep(min(left, pause))
            pause = min(_LONGEST_PAUSE, 2 * pause)


def is_unix(sock: socket.socket) -> bool:
    """Whether it is a Unix socket; not every platform has them."""
    return sock.family == getattr(socket, "AF_UNIX", None)


def break_off(sock: socket.socket) -> None:
    """End a connection under its user's hands; a peer in the midst of an answer is reset."""
    sock.shutdown(socket.SHUT_WR if is_unix(sock) else socket.SHUT_RDWR)


def shut(descriptor: int) -> None:
    """Say goodbye on a connection, whoever else has a descriptor of it."""
    sock = socket.socket(fileno=os.dup(descriptor))
    try:
        sock.shutdown(socket.SHUT_WR)
    finally:
        sock.close()


class Ending:
    """Closes one connection to the end: until the other side has closed, too.

    Our sending side is shut down, and what still comes is read away: a peer that sends to a socket that nobody reads
    is reset, and then we could no longer see when it closes. Only one that goes on and on is reset all the same.
    With TCP the kernel says when the peer has our end and we have its; a Unix socket has no such state, and the end of
    what comes is the peer's.

    Args:
        sock: The connection.
        abort: Calls off what the peer is doing; used where it has not closed after some milliseconds.
    """

    __slots__ = ("_abort", "_cut", "_left", "_sock", "_tcp", "asked")

    def __init__(self, sock: socket.socket, abort: Callable[[], None] | None = None) -> None:
        self._sock = sock
        self._abort = abort
        self._tcp = not is_unix(sock)
        self._left = _LONG_ANSWER
        self._cut = 0
        self.asked = 0

    def begin(self) -> None:
        """Say goodbye; never blocks."""
        try:
            self._sock.setblocking(False)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def ended(self) -> bool:
        """Whether the peer has closed as well; never blocks."""
        self.asked += 1
        if self.asked == _PATIENT and self._abort is not None:
            self._abort()
        if self._cut:
            return self.asked >= self._cut + _NOTICES
        try:
            end = self._read_away()
            if self._left <= 0 and not end:  # just cut off
                return False
            if self._tcp:
                return self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
            return end
        except OSError:
            return True

    def _read_away(self) -> bool:
        """Whether nothing more can come."""
        for _ in range(_READS):
            try:
                read = len(self._sock.recv(_DRAIN, _AT_ONCE))
            except (BlockingIOError, InterruptedError):
                break
            if not read:
                return True
            self._left -= read
        if self._left <= 0:
            self._cut = self.asked
            self.force()
        return False

    def force(self) -> None:
        """The peer did not close in time, or has very much to say: cut it off."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if self._tcp and sys.platform == "linux":
            from ..native import disconnect  # not to be had elsewhere

            disconnect(self._sock.fileno())

    def pause(self) -> float:
        """Seconds until the next look: 0.5 ms, then 1, 2, 4 ... up to 50 ms."""
        return float(min(0.05, 0.0005 * 2 ** min(self.asked, 10)))


def end(sock: socket.socket, seconds: float, *, cut: bool = True) -> bool:
    """Close a connection to the end, waiting for it; False if the peer had not closed within `seconds`.

    Then it is cut off, unless others watch for its end: a peer that says something more would be reset, and they could
    no longer see when it closes.
    """
    ending = Ending(sock)
    ending.begin()
    limit = time.monotonic() + seconds
    while not ending.ended():
        left = limit - time.monotonic()
        if left <= 0:
            if cut:
                ending.force()
            return False
        time.sleep(min(left, ending.pause()))
    return True


@contextlib.contextmanager
def ended_if_it_fails(sock: socket.socket, kind: type[BaseException] = BaseException) -> Iterator[socket.socket]:
    """For the block: the pool's own copy of a connection that is about to become a session.

    If it does not, the server is seen off before the permit goes on: it counts until it has closed.

    Args:
        sock: The copy; it is closed in any case.
        kind: Of the errors after which nobody else sees it off.
    """
    try:
        yield sock
    except kind:
        with contextlib.suppress(OSError):
            end(sock, _SEEN_OFF)
        raise
    finally:
        sock.close()
