"""Plain TCP: a connected socket."""

from __future__ import annotations

import os
import socket
import time

from ..errors import NO_DESCRIPTOR, ConnectFailed, ConnectTimeout, file_limit
from . import Register, check_host, check_port, named, register
from .sockets import PooledSocket, StreamDriver, connect, fresh


class TcpDriver(StreamDriver):
    """`transport="tcp"`: host is a name or an address, port 1 to 65535. TCP_NODELAY is set."""

    name = "tcp"

    def address(self, host: str, port: int) -> tuple[str, int]:
        """Host names are compared in lower case."""
        return check_host(host, "a host name or an address").lower(), check_port(port, 1, 65535)

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
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                register(conn)
                connect(conn, address, where, limit - time.monotonic())
                return conn
            except (ConnectFailed, ConnectTimeout) as error:
                last = error
            except BaseException:
                conn.close()
                raise
        raise last


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
