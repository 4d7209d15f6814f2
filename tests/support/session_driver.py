"""A driver whose connections have a session state, as a database's have; over the back end's plain sockets."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from sharedpool.drivers import Register
from sharedpool.drivers.sockets import PooledSocket
from sharedpool.drivers.tcp import TcpDriver
from sharedpool.errors import ConnectFailed


class SessionSocket(PooledSocket):
    """What it was opened or adopted with, and how often it was reset."""

    session: bytes = b""
    resets: int = 0
    heard: bytes = b""


class SessionDriver(TcpDriver):
    """`name`: of the kind. `moves`: whether what it opens can be exported. `fails`: its resets do."""

    name = "session"

    def __init__(self, *, exports: bool = True, fails: bool = False, parks: bool = True, always: bool = False) -> None:
        self.exports = exports
        self.fails = fails
        self.parks = parks
        self.always = always
        self.opened = 0
        self.closed: list[int] = []

    def open(self, host: str, port: int, timeout: float, register: Register) -> Any:
        plain = super().open(host, port, timeout, register)
        conn = SessionSocket(fileno=os.dup(plain.fileno()))
        socket.socket.close(plain)  # not its own close, which would end the connection
        conn.rest()
        self.opened += 1
        conn.session = f"{os.getpid()}/{self.opened} \xff\0".encode("latin-1")
        return conn

    def export(self, conn: Any) -> Any:
        return conn.session if self.exports else None

    def adopt(self, descriptor: int, state: bytes) -> Any:
        conn = SessionSocket(fileno=descriptor)
        conn.rest()
        conn.session = state
        return conn

    def reset(self, conn: Any) -> bool:
        conn.resets += 1
        if self.fails:
            raise ValueError("this one cannot be reset")
        return True

    def close(self, conn: Any) -> None:
        self.closed.append(conn.fileno())
        super().close(conn)


class HearingDriver(SessionDriver):
    """Knows that what an idle connection says unasked is harmless, as long as it is no `!`."""

    name = "hearing"

    def idle_readable(self, conn: Any) -> bool:
        conn.heard += conn.recv(100)
        return b"!" not in conn.heard


class StallingSocket(PooledSocket):
    """Who closes it waits until `over`: what its opening thread does about that comes first."""

    over: Any = None

    def close(self) -> None:
        super().close()
        limit = time.monotonic() + 20
        while self.over is not None and not self.over() and time.monotonic() < limit:
            time.sleep(0.001)


class StallingDriver(SessionDriver):
    """Is still opening, with a connection that is there, until its socket is closed under its hands."""

    name = "stalling"
    over: Any = None

    def open(self, host: str, port: int, timeout: float, register: Register) -> Any:
        conn = StallingSocket(socket.AF_INET, socket.SOCK_STREAM)
        register(conn)
        conn.connect((host, port))
        conn.over = lambda: self.over is None or self.over()
        limit = time.monotonic() + timeout
        while conn.fileno() >= 0 and time.monotonic() < limit:
            time.sleep(0.001)
        raise ConnectFailed("the socket was closed")


class HangingDriver(SessionDriver):
    """Is still opening, with a connection that is there, until somebody breaks it off."""

    name = "hanging"

    def open(self, host: str, port: int, timeout: float, register: Register) -> Any:
        conn = SessionSocket(socket.AF_INET, socket.SOCK_STREAM)
        register(conn)
        conn.connect((host, port))
        conn.settimeout(timeout)
        conn.recv(1)
        conn.close()
        raise ConnectFailed("broken off")
