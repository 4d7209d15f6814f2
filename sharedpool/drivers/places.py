"""Where an address counts: what it leads to depends on where the process is.

`127.0.0.1` is another machine's in another network namespace, `/run/x.sock` another file under another root, and a name
leads where the resolver's files say. A key has a text for each of these that matters to its connections. Nothing here
is on the way of a warm checkout: a place is read when a route is made, and again when a connection is opened.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Final

#: The network namespace: IP addresses, and Unix sockets in the abstract namespace.
NETWORK: Final = "network"
#: The resolver's files and variables: host names.
NAMES: Final = "names"
#: The mount namespace and the root directory: paths of Unix sockets.
FILES: Final = "files"

_RESOLVER: Final = ("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf")
_RESOLVER_ENVIRONMENT: Final = ("HOSTALIASES", "LOCALDOMAIN", "RES_OPTIONS", "RESOLV_HOST_CONF")
#: For statx(2): the directory, the masks of the mount's number and of the one that is never given again, its place.
_AT_FDCWD: Final = -100
_MNT_ID: Final = 0x1000 | 0x4000
_MNT_ID_AT: Final = 0x90

_SO_NETNS_COOKIE: Final = 71

#: Of a process that cannot say where it is: then it shares with nobody.
_alone = os.urandom(8).hex()


def of_host(host: str) -> tuple[str, ...]:
    """What matters to TCP connections to a host: an address needs no resolver."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return NETWORK, NAMES
    return (NETWORK,)


def here(matters: Iterable[str]) -> str:
    """This thread's place, as far as it matters. Equal texts mean: the same address leads to the same server."""
    if sys.platform != "linux":  # pools of one process only, and no namespaces
        return ""
    return "".join(map(_read, matters))


def still(place: str, matters: Iterable[str]) -> bool:
    """Whether this thread is still there; names may lead elsewhere in time, as they do without any namespaces."""
    if sys.platform != "linux":
        return True
    return all(_read(what) in place for what in matters if what != NAMES)


def is_here(sock: socket.socket) -> bool:
    """Whether a socket was made in this thread's network namespace; True where Linux does not say: before 5.14."""
    try:
        with socket.socket(sock.family) as ours:
            return _cookie(ours) == _cookie(sock)
    except OSError:
        return True


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


def _read(what: str) -> str:
    return f"<{what} {_READERS[what]()}>"


def _namespace(kind: str) -> str:
    """This thread's; a thread can leave its process's. No other gets the number while there is a socket in it."""
    try:
        status = os.stat(f"/proc/thread-self/ns/{kind}")
    except OSError:
        return f"unknown:{os.getpid()}:{_alone}"
    return f"{status.st_dev}:{status.st_ino}"


def _network() -> str:
    return _namespace("net")


def _files() -> str:
    root = os.stat("/")
    return f"{_namespace('mnt')}:{_mount_of_root()}:{root.st_dev}:{root.st_ino}"


def _mount_of_root() -> int:
    """The number of the mount that the root directory is on; from Linux 6.8 on, no other mount ever gets it."""
    buffer = ctypes.create_string_buffer(256)
    statx = getattr(ctypes.CDLL(None), "statx", None)
    if statx is None or statx(_AT_FDCWD, b"/", 0, _MNT_ID, buffer):
        return 0
    return int.from_bytes(buffer.raw[_MNT_ID_AT : _MNT_ID_AT + 8], sys.byteorder)


def _names() -> str:
    """A digest of what decides what names mean: containers of one pod, say, have equal files in different mounts."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _RESOLVER:
        digest.update(_content(path))
    for name in _RESOLVER_ENVIRONMENT:
        digest.update(f"{name}={os.environ.get(name)!r}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        return b"none"
    return b"%d:%s" % (len(content), content)


_READERS: Final[Mapping[str, Callable[[], str]]] = {NETWORK: _network, NAMES: _names, FILES: _files}
