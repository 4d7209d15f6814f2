"""One message with at most one descriptor over a Unix socket of type SOCK_SEQPACKET.

`socket.send_fds` and `recv_fds` ignore their flags before 3.13 and lose close-on-exec, so the control messages are
made here. Descriptors that came unasked, or of which some were cut off, are closed at once.
"""

from __future__ import annotations

import array
import os
import socket
import struct

_INT = struct.calcsize("i")
#: Room for a few descriptors although one is allowed: more than one must be seen to be refused.
_ROOM = socket.CMSG_SPACE(8 * _INT)


class PassError(OSError):
    """What came was cut off, or had more descriptors than one."""


class NoRoom(PassError):
    """The message came whole, and its descriptor could not be received: the limit of open files.

    Attributes:
        data: The message. The channel is as good as before.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__("a descriptor could not be received: is the limit of open files (RLIMIT_NOFILE) reached?")
        self.data = data


def send(channel: socket.socket, data: bytes, descriptor: int | None = None, *, wait: bool = False) -> None:
    """Send one message, whole or not at all.

    Raises:
        BlockingIOError: The channel is full, and `wait` is false.
        OSError: The other side has gone.
    """
    flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
    control = []
    if descriptor is not None:
        control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor])))
    try:
        channel.sendmsg([data], control, flags)
    except TimeoutError as error:
        raise _in_time(error, wait) from None


def receive(channel: socket.socket, longest: int, *, wait: bool = True) -> tuple[bytes, int | None]:
    """Receive one message and the descriptor that came with it, which is close-on-exec and the caller's.

    `b""` means that the other side has closed.

    Raises:
        BlockingIOError: Nothing is there, and `wait` is false, or the socket's timeout is 0.
        NoRoom: No descriptor is left for the one that came (the limit of open files).
        PassError: The message was cut off, or more descriptors than one came.
    """
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    try:
        data, control, answer, _ = channel.recvmsg(longest, _ROOM, flags)
    except TimeoutError as error:
        raise _in_time(error, wait) from None
    descriptors = array.array("i")
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % _INT])
    if len(descriptors) > 1 or answer & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for descriptor in descriptors:
            os.close(descriptor)
        if not descriptors and not answer & socket.MSG_TRUNC:
            raise NoRoom(data)
        raise PassError(f"a message came cut off, or with {len(descriptors)} descriptors instead of one at most")
    return data, descriptors[0] if descriptors else None


def _in_time(error: TimeoutError, wait: bool) -> OSError:
    """A socket with a time-out waits for it even where a message must not wait; the error is the same all the same."""
    return error if wait else BlockingIOError(str(error))


def credentials(channel: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end, as the kernel knows them."""
    pid, uid, gid = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid
