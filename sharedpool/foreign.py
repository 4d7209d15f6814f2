"""Closing descriptors that came from other processes. That must not wait.

`os.close` waits for unsent data where SO_LINGER is set, for the daemon of a FUSE file, for a terminal's output. It also
closes what lies unread in a Unix socket, and all of that may wait as well. What may wait is closed in a thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from typing import Final

_NO_LINGER: Final = struct.pack("ii", 0, 0)
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
#: Room for a sender's credentials.
_SENDER: Final = socket.CMSG_SPACE(12)

#: Those that close something now.
_threads: set[threading.Thread] = set()


def close(descriptor: int) -> None:
    """Close a descriptor that another process made, without waiting for anything."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:  # no socket, or one of a kind that Python does not know
        _close_elsewhere(descriptor)
    else:
        close_socket(sock)


def close_socket(sock: socket.socket) -> None:
    """The same for a socket."""
    if sock.fileno() < 0:
        return
    with contextlib.suppress(OSError, TypeError):  # TypeError: Python takes no bytes for AF_VSOCK
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    if sock.family in _INTERNET or _is_empty(sock):
        with contextlib.suppress(OSError):
            sock.close()
    else:
        _close_elsewhere(sock.detach())


def end_channel(channel: socket.socket) -> None:
    """Close our end of a channel. The other side sees that at once."""
    with contextlib.suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)
    close_socket(channel)


def settle(seconds: float = 10.0) -> bool:
    """Wait until everything is closed that was given to a thread; False if that takes longer. For tests."""
    limit = time.monotonic() + seconds
    for thread in list(_threads):
        with contextlib.suppress(RuntimeError):  # it is just being started
            thread.join(max(0.0, limit - time.monotonic()))
    return not _threads


def _is_empty(sock: socket.socket) -> bool:
    """Whether it is a Unix socket in which nothing lies unread: then nothing else is closed with it."""
    if sock.family != socket.AF_UNIX:
        return False
    with contextlib.suppress(OSError):
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
    try:
        data, control = _look_into(sock)
        return not data and not control
    except OSError:  # nothing is there now, or it was never connected
        return True


def _look_into(sock: socket.socket) -> tuple[bytes, object]:
    """What lies there first; both are empty at the end. An empty message has its sender, which the end has not."""
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        return sock.recvmsg(1, _SENDER, socket.MSG_PEEK | socket.MSG_DONTWAIT)[:2]
    finally:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, before)


def _close_elsewhere(descriptor: int) -> None:
    """Let a thread close it. Such descriptors are rare, and each may take its time."""
    thread = threading.Thread(target=_close, args=(descriptor,), name="sharedpool-close", daemon=True)
    _threads.add(thread)
    try:
        thread.start()
    except RuntimeError:  # the limit of threads
        _threads.discard(thread)
        _close(descriptor)


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)
    _threads.discard(threading.current_thread())
