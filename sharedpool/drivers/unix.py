"""Unix stream sockets: the host is the path, the port 0."""

from __future__ import annotations

import socket

from ..errors import ConnectFailed, ConnectTimeout, file_limit
from . import Register, check_host, check_port, register
from .places import FILES
from .sockets import PooledSocket, StreamDriver, connect_unix, fresh


class UnixDriver(StreamDriver):
    """`transport="unix"`: host is the absolute path of a listening socket, port is 0."""

    name = "unix"

    def address(self, host: str, port: int) -> tuple[str, int]:
        """Paths are compared as they are written. A relative one would lead elsewhere after a chdir()."""
        allowed = "the absolute path of a Unix socket"
        return check_host(host, allowed, absolute=True), check_port(port, 0, 0)

    def matters(self, host: str) -> tuple[str, ...]:
        """The mount namespace and the root directory."""
        return (FILES,)

    def open(self, host: str, port: int, timeout: float, register: Register) -> PooledSocket:
        """Connect to the path; a full queue is waited for."""
        where = f"unix:{host}"
        try:
            conn = fresh(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise file_limit(error, f"open {where}") from error
        try:
            register(conn)
            connect_unix(conn, host, timeout)
            conn.rest()
        except TimeoutError as error:
            conn.close()
            raise ConnectTimeout(f"{where} did not answer within {timeout:.3g} s (connect_timeout)") from error
        except OSError as error:
            conn.close()
            raise ConnectFailed(f"{where} cannot be reached: {error}") from error
        except BaseException:
            conn.close()
            raise
        return conn


register(UnixDriver())
