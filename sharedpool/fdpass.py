"""One message with at most one descriptor over a Unix socket of type SOCK_SEQPACKET.

`socket.send_fds` and `recv_fds` ignore their flags before 3.13 and lose close-on-exec, so the control messages are
made here. Descriptors that came unasked, or of which some were cut off, are closed at once.
"""

from __future__ import annotations

import array
import socket
import struct

from . import foreign

_INT = struct.calcsize("i")
#: Room for all descriptors that a message can have (SCM_MAX_FD), although one is allowed. The kernel closes what finds
#: no room, in the middle of `recvmsg`, and that may wait.
_ROOM = socket.CMSG_SPACE(253 * _INT)

# As plain numbers: the socket module's are of enumerations, whose sums take microseconds.
_SEND = int(socket.MSG_NOSIGNAL)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
_AT_ONCE = int(socket.MSG_DONTWAIT)
_CUT_OFF = int(socket.MSG_TRUNC)
_CONTROL_CUT_OFF = int(socket.MSG_CTRUNC)
_LEVEL = int(socket.SOL_SOCKET)
_RIGHTS = int(socket.SCM_RIGHTS)


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
    flags = _SEND if wait else _SEND | _AT_ONCE
    try:
        if descriptor is None:
            channel.send(data, flags)
        else:
            channel.sendmsg([data], [(_LEVEL, _RIGHTS, array.array("i", [descriptor]))], flags)
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
    flags = _RECEIVE if wait else _RECEIVE | _AT_ONCE
    try:
        data, control, answer, _ = channel.recvmsg(longest, _ROOM, flags)
    except TimeoutError as error:
        raise _in_time(error, wait) from None
    if not control and not answer & (_CONTROL_CUT_OFF | _CUT_OFF):
        return data, None
    descriptors = array.array("i")
    for level, kind, content in control:
        if level == _LEVEL and kind == _RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % _INT])
    if len(descriptors) > 1 or answer & (_CONTROL_CUT_OFF | _CUT_OFF):
        for descriptor in descriptors:
            foreign.close(descriptor)
        if not descriptors and not answer & _CUT_OFF:
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
