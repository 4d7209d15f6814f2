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
import select
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
#: Another owner of the connection may have made it blocking; not every platform has this flag.
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
#: What a user did to a socket: set a timeout, made a file of it, closed or detached it or changed it for good, set an
#: option that can be set back, asked for its number.
TIMED: Final = 1
FILED: Final = 2
GONE: Final = 4
CHANGED: Final = 8
NUMBERED: Final = 16

_LINUX: Final = sys.platform == "linux"
_SOCKET, _TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP
#: Options that the checkin sets back: their value says everything about them. With its length, where it is no int.
_SET_BACK: Final[dict[tuple[int, int], int]] = {
    (level, getattr(socket, name)): size
    for level, name, size in (
        (_TCP, "TCP_NODELAY", 0), (_TCP, "TCP_CORK", 0), (_TCP, "TCP_USER_TIMEOUT", 0), (_TCP, "TCP_KEEPIDLE", 0),
        (_TCP, "TCP_KEEPINTVL", 0), (_TCP, "TCP_KEEPCNT", 0), (_SOCKET, "SO_KEEPALIVE", 0),
        (_SOCKET, "SO_OOBINLINE", 0), (_SOCKET, "SO_LINGER", 8), (_SOCKET, "SO_RCVTIMEO", 16),
        (_SOCKET, "SO_SNDTIMEO", 16), (_SOCKET, "SO_PRIORITY", 0),
    )
    if hasattr(socket, name)
}  # fmt: skip
#: Options that the kernel itself changes all the time.
_PASSING: Final = {(_TCP, getattr(socket, "TCP_QUICKACK", -1))}
#: What is compared where a user knows the number. Left out is what the kernel itself changes, such as SO_RCVBUF.
_LOOKED_AT: Final[tuple[tuple[int, int, int], ...]] = (
    (_SOCKET, 18, 0),  # SO_RCVLOWAT: hides unread bytes from poll
    (_SOCKET, 13, 4),  # SO_LINGER: whether; a socket remembers how long
    (_SOCKET, 10, 0),  # SO_OOBINLINE
    (_SOCKET, 36, 0),  # SO_MARK
    (_SOCKET, 62, 0),  # SO_BINDTOIFINDEX
    (_SOCKET, 72, 0),  # SO_BUF_LOCK: whether SO_RCVBUF or SO_SNDBUF was set
)
_LOOKED_AT_OF_TCP: Final[tuple[tuple[int, int, int], ...]] = (
    (_TCP, 1, 0),  # TCP_NODELAY
    (_TCP, 3, 0),  # TCP_CORK
    (_TCP, 18, 0),  # TCP_USER_TIMEOUT
    (_TCP, 31, 16),  # TCP_ULP
)


if TYPE_CHECKING:
    from . import Driver

    _Socket = socket.socket
else:
    _Socket = object


def _running_loop() -> Any:
    """The event loop that this thread runs, or None; asyncio is not loaded for it."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()


class Pooled(_Socket):
    """What a pooled socket does beyond its class.

    What users do to it during a lease is noted. The checkin sets it back, or closes the connection (`clean`).

    Attributes:
        inside: One item for each call that is reading or writing just now. Nobody else may have the connection then.
    """

    if not TYPE_CHECKING:
        __slots__ = ()

    _owner: int
    _touched: int
    _changed: dict[tuple[int, int], Any]
    _facts: tuple[Any, ...] | None
    _loop: Any
    inside: list[None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner = os.getpid()
        self._touched = 0
        self._changed = {}
        self._facts = None
        self._loop = None
        self.inside = []

    # --- settings -----------------------------------------------------------------------------------------------------

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

    def setsockopt(self, *args: Any) -> None:
        """As socket.setsockopt. The checkin sets some options back; with any other the connection is closed then."""
        self.note_option(*args)
        super().setsockopt(*args)

    def note_option(self, level: int, option: int, *value: Any) -> None:
        """An option is about to be set, here or by a duplicate."""
        at = level, option
        if at in _PASSING:
            return
        size = _SET_BACK.get(at)
        if size is None:
            self._touched |= GONE
            return
        before = super().getsockopt(level, option, size) if size else super().getsockopt(level, option)
        if value != (before,):
            self._changed.setdefault(at, before)
            self._touched |= CHANGED

    def number(self) -> int:
        """As socket.fileno, for this library itself: it notes nothing."""
        return super().fileno()

    def fileno(self) -> int:
        """As socket.fileno. Who knows the number can change what this object does not see: the checkin looks then."""
        self.note_number()
        return self.number()

    def note_number(self) -> None:
        """A user learns the number, of this object or of a duplicate."""
        self._touched |= NUMBERED
        self._loop = _running_loop()
        if self._facts is None and self.number() >= 0:
            self._facts = self._look()

    def _look(self) -> tuple[Any, ...]:
        """What may have been changed by number."""
        if not _LINUX:
            return ()
        import fcntl

        number = self.number()
        ask = super().getsockopt
        facts: list[Any] = [fcntl.fcntl(number, fcntl.F_GETFL), fcntl.fcntl(number, fcntl.F_GETOWN)]
        for level, option, size in _LOOKED_AT if is_unix(self) else _LOOKED_AT + _LOOKED_AT_OF_TCP:
            try:
                facts.append(ask(level, option, size) if size else ask(level, option))
            except OSError as error:  # an old kernel
                facts.append(error.errno)
        return tuple(facts)

    # --- reading and writing: see below -------------------------------------------------------------------------------

    def makefile(self, *args: Any, **kwargs: Any) -> Any:
        """As socket.makefile; the file must be closed before the connection is given back."""
        self._touched |= FILED
        return super().makefile(*args, **kwargs)

    # --- after which nobody else may have it --------------------------------------------------------------------------

    def close(self) -> None:
        """End the connection. In a forked child only the child's copy is closed."""
        self._touched |= GONE
        if not self._closed and self._owner == os.getpid():  # type: ignore[attr-defined]
            try:
                self.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        super().close()

    def note_end(self) -> None:
        """Nobody else may have this connection."""
        self._touched |= GONE

    def detach(self) -> int:
        """As socket.detach; the connection ends when it is given back."""
        self._touched |= GONE
        return super().detach()

    def dup(self) -> Any:
        """As socket.dup; the connection ends when it is given back."""
        self._touched |= GONE
        return super().dup()

    def shutdown(self, how: int) -> None:
        """As socket.shutdown; the connection ends when it is given back."""
        self._touched |= GONE
        super().shutdown(how)

    def connect(self, address: Any) -> None:
        """As socket.connect; of a leased socket the connection ends when it is given back. So it is with the others."""
        self._touched |= GONE
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        self._touched |= GONE
        return super().connect_ex(address)

    def bind(self, address: Any) -> None:
        self._touched |= GONE
        super().bind(address)

    def listen(self, *args: int) -> None:
        self._touched |= GONE
        super().listen(*args)

    # --- between leases -----------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """This is the state in which every lease begins."""
        super().settimeout(LONGEST)
        self._touched = 0
        self._changed = {}
        self._facts = self._loop = None

    def limit(self, seconds: float) -> None:
        """As socket.settimeout, which the user has not done."""
        super().settimeout(seconds)

    def clean(self, *, timeouts: bool = True) -> bool:
        """Set back what a user has set; whether that is all that was done, so that somebody else may have it.

        A file object that is open may hold unread bytes.

        Args:
            timeouts: Whether the timeout is set back, too; False: the caller keeps account of it.
        """
        touched = self._touched if timeouts else self._touched & ~TIMED
        if touched & GONE or self._io_refs:  # type: ignore[attr-defined]
            return False
        try:
            if touched & CHANGED:
                self._set_back()
            if touched & NUMBERED and (self._is_watched() or self._look() != self._facts):
                return False
        except OSError:
            return False
        if touched & TIMED:
            super().settimeout(LONGEST)
        self._touched = touched & NUMBERED  # a number is known for good
        return True

    def _set_back(self) -> None:
        changed, self._changed = self._changed, {}
        for (level, option), value in changed.items():
            super().setsockopt(level, option, value)

    def _is_watched(self) -> bool:
        """Whether an event loop may still wait for it: what it does then, it would do with the next user's bytes."""
        loop, self._loop = self._loop, None
        running = _running_loop()
        if running is None or (loop is not None and loop is not running):
            return loop is not None  # another thread's must not be asked
        number = self.number()
        try:
            reads, writes = running.remove_reader(number), running.remove_writer(number)
        except NotImplementedError:  # Windows
            return False
        except RuntimeError:  # a transport has it
            return True
        return bool(reads or writes)


def _counted(name: str) -> Callable[..., Any]:
    """A method of sockets that tells in `inside` while it is at work."""

    def method(self: Pooled, *args: Any, **kwargs: Any) -> Any:
        self.inside.append(None)
        try:
            return getattr(super(Pooled, self), name)(*args, **kwargs)
        finally:
            self.inside.pop()

    method.__name__ = name
    method.__doc__ = f"As socket.{name}; a connection that a thread is inside of at the checkin is closed."
    return method


for _name in (
    "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into", "send", "sendall", "sendto", "sendmsg",
    "sendfile",
):  # fmt: skip
    setattr(Pooled, _name, _counted(_name))

_SLOTS: Final = ("_changed", "_facts", "_loop", "_owner", "_touched", "inside")


class PooledSocket(Pooled, socket.socket):
    """A connected socket that a pool lends.

    `close()` ends the connection for everybody, as the user means it, although the pool has descriptors of its own.
    `settimeout(None)` and `setblocking(True)` wait "for ever", which is 23 days.
    """

    __slots__ = _SLOTS


@functools.cache
def _pooled(base: type[socket.socket]) -> type[PooledSocket]:
    """The same on another class of sockets, as gevent puts in the place of Python's."""
    return cast("type[PooledSocket]", type("PooledSocket", (Pooled, base), {"__slots__": _SLOTS}))


def pooled() -> type[PooledSocket]:
    """Pooled sockets of the class that `socket.socket` is by now."""
    return PooledSocket if socket.socket is _BASE else _pooled(socket.socket)


def fresh(*args: Any, **kwargs: Any) -> PooledSocket:
    """One of them."""
    return pooled()(*args, **kwargs)


_BASE: Final = socket.socket
if issubclass(_BASE, _socket.socket):
    PooledSocket.number = _socket.socket.fileno  # type: ignore[method-assign] # nothing but C
    with contextlib.suppress(ImportError):  # 0.5 us less for each; only where the hot path is compiled
        _calls = importlib.import_module("sharedpool._calls")
        for _name in ("recv", "recv_into", "send", "sendall"):
            setattr(PooledSocket, _name, getattr(_calls, _name))


class Copy(socket.socket):
    """A duplicate of a leased connection's descriptor, for a library.

    Attributes:
        of: The connection on which is noted what users do to this one; None: nothing is.
    """

    __slots__ = ("of",)

    def __init__(self, number: int) -> None:
        super().__init__(fileno=number)
        self.of: Pooled | None = None

    def setsockopt(self, *args: Any) -> None:
        """As socket.setsockopt."""
        if self.of is not None and super().fileno() >= 0:
            self.of.note_option(*args)
        super().setsockopt(*args)

    def fileno(self) -> int:
        """As socket.fileno."""
        number = super().fileno()
        if self.of is not None and number >= 0:
            self.of.note_number()
        return number

    def dup(self) -> Any:
        """As socket.dup; the connection ends when it is given back."""
        if self.of is not None:
            self.of.note_end()
        return socket.socket(self.family, self.type, self.proto, fileno=os.dup(super().fileno()))


class StreamDriver:
    """The part of a driver that is the same for every plain stream socket."""

    moves = True
    connects = True

    def fileno(self, conn: PooledSocket) -> int:
        """Python's own number: authoritative, -1 after close and detach."""
        return conn.number()

    def clean(self, conn: PooledSocket) -> bool:
        """What its user has done to it is set back, and can be."""
        return not conn._touched or conn.clean()

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


def disown(driver: Driver[Any], conn: Any, number: int, dead: int, *, lent: bool) -> None:
    """In a forked child: the child's copy of an object no longer leads to the parent's connection.

    Sockets are closed, because their finalizers would close whatever has their numbers by then. So are objects that
    nobody has. One that is lent may be locked by a thread that the child does not have.

    Args:
        driver: The object's.
        conn: The object.
        number: The number of its descriptor in the parent.
        dead: A descriptor at which nothing can happen.
        lent: Whether a user has the object.
    """
    with contextlib.suppress(Exception):
        if driver.fileno(conn) == number >= 0:
            os.dup2(dead, number, inheritable=False)
    with contextlib.suppress(Exception):
        inner = getattr(conn, "sock", conn)
        if isinstance(inner, Pooled):
            inner._io_refs = 0  # type: ignore[attr-defined]
            inner.close()
        elif not lent:
            driver.close(conn)


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


def connect_unix(sock: socket.socket, path: str | bytes, seconds: float) -> None:
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


def readable(number: int) -> bool:
    """Whether the peer has closed, or said something."""
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([number], [], [], 0)[0])
    poller = select.poll()
    poller.register(number, select.POLLIN | select.POLLPRI)
    return bool(poller.poll(0))


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
        then: Of a stand-in: the connection that it stands for, to be closed to the end once the stand-in has ended.
        lent: A user may still read from it. Nothing is read away: that user would miss it, and not know.
    """

    __slots__ = ("_abort", "_cut", "_left", "_lent", "_sock", "_tcp", "_then", "asked")

    def __init__(
        self,
        sock: socket.socket,
        abort: Callable[[], None] | None = None,
        then: Ending | None = None,
        *,
        lent: bool = False,
    ) -> None:
        self._lent = lent
        self._then = then
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
        if self.asked < 0:
            return self._then is None or self._then.ended()
        if not self._has_ended():
            return False
        if self._then is None:
            return True
        self.asked = -1
        self._then.begin()
        return self._then.ended()

    def _has_ended(self) -> bool:
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
        if self._lent:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                return not self._sock.recv(1, _AT_ONCE | socket.MSG_PEEK)
            return False
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
        if self._then is not None:
            self._then.force()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        if self._tcp and sys.platform == "linux":
            from ..native import disconnect  # not to be had elsewhere

            disconnect(self._sock.fileno())

    def pause(self) -> float:
        """Seconds until the next look: 0.5 ms, then 1, 2, 4 ... up to 50 ms."""
        if self.asked < 0 and self._then is not None:
            return self._then.pause()
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
