"""The connections of the registry's `multiprocess` manager, with limits of time on both sides.

A peer that is stopped in the midst of the handshake, or never says what it wants, holds its own thread in the arbiter
for so long and no longer; and nobody waits for ever for an arbiter that is stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import multiprocess.connection
import multiprocess.managers

#: What the manager is told to serialize and connect by; known to `multiprocess` once this module is loaded.
SERIALIZER: Final = "sharedpool"
#: The arbiter waits so long for a caller's next bytes, s.
_CALLER_SECONDS: Final = 5.0
#: Without a descriptor left, nobody is accepted for so long, s, instead of trying without end.
_ACCEPT_AGAIN: Final = 0.1

_limits = threading.local()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Calls of this thread in the block take so long at most; then BlockingIOError (also when connecting)."""
    _limits.until = time.monotonic() + seconds
    try:
        yield
    finally:
        del _limits.until


def _limit(sock: socket.socket, seconds: float) -> None:
    """The kernel ends each read and write after so long: `multiprocess` reads below Python's time-outs."""
    whole = int(seconds)
    value = struct.pack("ll", whole, max(1, int((seconds - whole) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


class _Caller(multiprocess.connection.Connection):  # type: ignore[misc]
    """The arbiter's end of a caller's connection: one that says nothing in time has gone."""

    def recv(self) -> Any:
        """As Connection.recv; EOFError also where nothing came in time."""
        try:
            return super().recv()
        except BlockingIOError:
            raise EOFError("nothing came in time") from None


class _Listener(multiprocess.connection.Listener):  # type: ignore[misc]
    """Accepts callers; the handshake, and all that follows, is the business of a thread for each."""

    def accept(self) -> _Caller:
        """The next caller; only ever called by the manager's one accepting thread, which ignores OSError."""
        try:
            connection = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(_ACCEPT_AGAIN)
            raise
        descriptor = connection._handle
        connection._handle = None  # it is the other object's now
        with socket.socket(fileno=descriptor) as sock:
            _limit(sock, _CALLER_SECONDS)
            return _Caller(sock.detach())

    def end(self) -> None:
        """Take nobody any more. The path is left alone: it leads to another listener's socket by now."""
        listener = self._listener
        listener._unlink.cancel()
        listener._unlink = None
        listener._socket.shutdown(socket.SHUT_RDWR)  # the accepting thread wakes
        self.close()


def listen_again(server: Any, address: str) -> None:
    """Let a manager's server listen at a new socket, because its old one was taken away."""
    old, server.listener = server.listener, _Listener(address=address, backlog=128)
    old.end()


def _connect(address: str, *, authkey: bytes) -> Any:
    """As multiprocess.connection.Client, for Unix sockets, within the thread's limit."""
    now = time.monotonic()
    left = getattr(_limits, "until", now + 1.0) - now  # a proxy says goodbye when it is collected, whenever that is
    if left <= 0:
        raise BlockingIOError("no time is left")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _limit(sock, left)
        sock.connect(address)
        number = sock.detach()
        os.set_blocking(number, True)  # gevent's sockets are not, and `multiprocess` reads the bare descriptor
        connection = multiprocess.connection.Connection(number)
    try:
        multiprocess.connection.answer_challenge(connection, authkey)
        multiprocess.connection.deliver_challenge(connection, authkey)
    except BaseException:
        connection.close()
        raise
    return connection


multiprocess.managers.listener_client[SERIALIZER] = (_Listener, _connect)
