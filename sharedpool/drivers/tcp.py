"""Plain TCP: a connected socket."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from typing import Final

from ..errors import NO_DESCRIPTOR, ConnectFailed, ConnectTimeout, file_limit
from . import Register, check_host, check_port, named, register
from .places import of_host
from .sockets import PooledSocket, StreamDriver, connect, fresh

SocketOptions = tuple[tuple[int, int, int | bytes], ...]

#: What is set on every socket: no waiting for more to send.
NODELAY: Final[SocketOptions] = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)


class TcpDriver(StreamDriver):
    """`transport="tcp"`: host is a name or an address, port 1 to 65535. TCP_NODELAY is set.

    Args:
        name: What people read. Other settings are part of the key, and of a name that is not given.
        options: What is set on the socket before it connects: level, name and value of each.
        source: The local address to connect from; port 0: any.
    """

    name = "tcp"
    _options = NODELAY
    _source: tuple[str, int] | None = None
    identity = ""

    def __init__(self, name: str = "", options: SocketOptions = NODELAY, source: tuple[str, int] | None = None) -> None:
        self._options = options
        self._source = source
        plain = tuple(map(tuple, options)) == NODELAY and source is None
        self.identity = "" if plain else repr((tuple(map(tuple, options)), source and tuple(source)))
        usual = "tcp" if plain else f"tcp+{hashlib.blake2b(self.identity.encode(), digest_size=6).hexdigest()}"
        self.name = name or usual

    def address(self, host: str, port: int) -> tuple[str, int]:
        """Host names are compared in lower case; an interface's name, after the `%` of an address, as it is written."""
        name, percent, zone = check_host(host, "a host name or an address").partition("%")
        return name.lower() + percent + zone, check_port(port, 1, 65535)

    def matters(self, host: str) -> tuple[str, ...]:
        """The network namespace; for a name the resolver, too."""
        return of_host(host)

    def make(self, family: int, kind: int, protocol: int) -> PooledSocket:
        """The object that is to be connected."""
        return fresh(family, kind, protocol)

    def open(self, host: str, port: int, timeout: float, register: Register) -> PooledSocket:
        """Try the host's addresses in turn within one timeout."""
        limit = time.monotonic() + timeout
        where = named(self.name, host, port)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a label of more than 63 characters
            raise ConnectFailed(f"{where}: the name cannot be resolved: {error}") from error
        except OSError as error:
            limit_hit = _no_descriptor(error)
            if limit_hit is not None:
                raise file_limit(limit_hit, f"resolve {where}") from error
            raise ConnectFailed(f"{where}: the name cannot be resolved: {error}") from error
        last: ConnectFailed | ConnectTimeout = ConnectFailed(f"{where} has no address")
        for family, kind, protocol, _, address in found:
            try:
                conn = self.make(family, kind, protocol)
            except OSError as error:
                raise file_limit(error, f"open {where}") from error
            try:
                for option in self._options:
                    conn.setsockopt(*option)
                if self._source is not None:
                    self._bind(conn, self._source, where)
                register(conn)
                connect(conn, address, where, limit - time.monotonic())
                return conn
            except (ConnectFailed, ConnectTimeout) as error:
                last = error
            except BaseException:
                conn.close()
                raise
        raise last

    def _bind(self, conn: PooledSocket, source: tuple[str, int], where: str) -> None:
        try:
            conn.bind(source)
        except OSError as error:
            conn.close()
            raise ConnectFailed(f"{where} cannot be reached from {source[0]}:{source[1]}: {error}") from error


def _no_descriptor(error: OSError) -> OSError | None:
    """The error that no descriptor is left, if that is why a name could not be resolved: the resolver does not say."""
    if error.errno in NO_DESCRIPTOR:
        return error
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError as other:
        return other if other.errno in NO_DESCRIPTOR else None
    return None


register(TcpDriver())
