"""A back end in a process of its own that counts its connections exactly as a real server would have to hold them.

Run as `python backend_server.py FD`, where FD is one end of a stream socket pair: commands come in as lines of JSON and
each is answered by one line. The process ends when that channel does, so it can never outlive its test.

How it counts: a connection is open from its accept until this process has closed it, which it does when it has read the
client's end of stream (unless it was told to hold its closes back). New connections are accepted *before* anything is
read, so a client that opens a connection while its earlier one is not yet closed here is seen as two.

The protocol of a connection is lines: `TEXT` is answered by `ID TEXT` where ID is the connection's number, never used
twice. So each answer says which connection it came over and to whom it belongs. A line that starts with `!late` is not
answered until the control channel says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

LATE = b"!late"
#: Of what came over a connection, and of what happened, so much is kept: a long run must not fill the memory.
KEPT = 1 << 16


class Listener:
    """One address. A second, never listening socket holds its TCP port, so that it stays ours while it refuses."""

    def __init__(self, name: str, path: str | None, backlog: int) -> None:
        self.name, self.path, self.backlog = name, path, backlog
        self.accepting = True
        self.fillers: list[socket.socket] = []
        self.guard: socket.socket | None = None
        self.port = 0
        if path is None:
            self.guard = _bound(("127.0.0.1", 0))
            self.port = self.guard.getsockname()[1]
        self.sock: socket.socket | None = None
        self.listen(backlog)

    def listen(self, backlog: int) -> None:
        sock = _bound(("127.0.0.1", self.port)) if self.path is None else _bound(self.path)
        sock.listen(backlog)
        sock.setblocking(False)
        self.sock = sock

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        for filler in self.fillers:
            filler.close()
        self.fillers.clear()


class Connection:
    """One accepted connection."""

    def __init__(self, number: int, sock: socket.socket, listener: str, peer: object) -> None:
        self.number, self.sock, self.listener, self.peer = number, sock, listener, peer
        self.address = sock.getsockname()
        self.buffer = b""
        self.received = b""
        self.late: list[bytes] = []
        self.ended = False  # the client's end of stream was read, the close is held back
        self.said_goodbye = False  # and so the client cannot see when it is closed

    def describe(self) -> dict[str, Any]:
        return {
            "id": self.number,
            "listener": self.listener,
            "peer": self.peer,
            "address": self.address,
            "received": self.received.decode("latin-1"),
            "ended": self.ended,
        }


class Server:
    """The loop. Every `do_NAME` is a command of the control channel; its keyword arguments are the command's fields."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, self._on_control)
        self.listeners: dict[str, Listener] = {}
        self.connections: dict[int, Connection] = {}
        self.serial = 0
        self.open_by_listener: dict[str, int] = {}
        self.accepted: dict[str, int] = {}
        self.peak = 0
        self.closed: dict[str, int] = {}
        self.events: deque[list[object]] = deque(maxlen=KEPT)
        self.held: set[str] = set()
        self.release_at = math.inf
        self.pending = b""
        self.running = True

    def run(self) -> None:
        while self.running:
            for key, _ in self.selector.select(self._until_release()):
                # Accepting first, before every single read, is what makes an overlap of two connections visible.
                self._accept_all()
                key.data(key.fileobj)

    # -- connections ---------------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        for listener in self.listeners.values():
            while listener.sock is not None and listener.accepting:
                try:
                    sock, peer = listener.sock.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    break
                self._accepted(listener, sock, peer)

    def _on_listener(self, _: object) -> None:
        """The accepting itself was done by run()."""

    def _accepted(self, listener: Listener, sock: socket.socket, peer: object) -> None:
        # To which both sides have said goodbye, that is over for the client: it cannot know when it is read here.
        for each in [each for each in self.connections.values() if each.said_goodbye]:
            while self._readable(each):
                pass
        sock.setblocking(False)
        self.serial += 1
        connection = Connection(self.serial, sock, listener.name, peer if isinstance(peer, tuple) else None)
        self.connections[self.serial] = connection
        self.accepted[listener.name] = self.accepted.get(listener.name, 0) + 1
        self.open_by_listener[listener.name] = self.open_by_listener.get(listener.name, 0) + 1
        self.peak = max(self.peak, len(self.connections))
        self.selector.register(sock, selectors.EVENT_READ, lambda _, c=connection: self._readable(c))
        self._log("accept", connection, str(connection.peer))

    def _readable(self, connection: Connection) -> bool:
        """Read once; whether something came."""
        if connection.number not in self.connections or connection.ended:
            return False  # closed by an earlier event of the same round
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            self._close(connection, "reset")
            return False
        if not data:
            self._end_of_stream(connection)
            return False
        connection.received = (connection.received + data)[-KEPT:]
        connection.buffer += data
        while b"\n" in connection.buffer and connection.number in self.connections:
            line, connection.buffer = connection.buffer.split(b"\n", 1)
            self._line(connection, line)
        return True

    def _line(self, connection: Connection, line: bytes) -> None:
        answer = b"%d %s\n" % (connection.number, line)
        if line.startswith(LATE):
            connection.late.append(answer)
        else:
            self._send(connection, answer)

    def _send(self, connection: Connection, data: bytes) -> bool:
        try:
            connection.sock.settimeout(5)
            connection.sock.sendall(data)
            connection.sock.setblocking(False)
        except OSError:
            self._close(connection, "reset")
            return False
        return True

    def _end_of_stream(self, connection: Connection) -> None:
        if (connection.listener in self.held or "*" in self.held) and not connection.said_goodbye:
            connection.ended = True
            self.selector.unregister(connection.sock)
            self._log("end", connection, "")
        else:
            self._close(connection, "eof")

    def _close(self, connection: Connection, cause: str) -> None:
        if not connection.ended:
            self.selector.unregister(connection.sock)
        if cause == "rst":
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sock.close()
        del self.connections[connection.number]
        self.open_by_listener[connection.listener] -= 1
        self.closed[cause] = self.closed.get(cause, 0) + 1
        self._log("close", connection, cause)

    def _log(self, what: str, connection: Connection, cause: str) -> None:
        self.events.append(
            [time.monotonic(), what, connection.number, connection.listener, cause, len(self.connections)]
        )

    def _chosen(self, ids: list[int] | None, listener: str | None) -> list[Connection]:
        return [
            connection
            for connection in list(self.connections.values())
            if (ids is None or connection.number in ids) and listener in (None, connection.listener)
        ]

    # -- the control channel -------------------------------------------------------------------------------------

    def _on_control(self, _: object) -> None:
        data = self.control.recv(65536)
        if not data:
            self.running = False
            return
        self.pending += data
        while b"\n" in self.pending:
            line, self.pending = self.pending.split(b"\n", 1)
            self.control.sendall(json.dumps(self._answer(json.loads(line))).encode() + b"\n")

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            handler: Callable[..., Any] = getattr(self, "do_" + command.pop("do"))
            return {"value": handler(**command)}
        except Exception as error:
            return {"error": repr(error)}

    def do_listen(self, name: str, path: str | None = None, backlog: int = 1024) -> int:
        """Open an address; a Unix socket if `path` is given. Returns the port."""
        listener = self.listeners[name] = Listener(name, path, backlog)
        self._watch(listener)
        return listener.port

    def do_refuse(self, name: str) -> None:
        """From now on connects are refused; the address stays ours."""
        self._unwatch(self.listeners[name])
        self.listeners[name].close()

    def do_accept_again(self, name: str) -> None:
        listener = self.listeners[name]
        self._unwatch(listener)
        listener.close()
        listener.accepting = True
        listener.listen(listener.backlog)
        self._watch(listener)

    def do_pause(self, name: str) -> None:
        """Connects succeed in the kernel; this process accepts none of them until do_accept_again or do_resume."""
        self._unwatch(self.listeners[name])
        self.listeners[name].accepting = False

    def do_resume(self, name: str) -> None:
        self.listeners[name].accepting = True
        self._watch(self.listeners[name])
        self._accept_all()

    def do_hang(self, name: str) -> None:
        """Fill the backlog, so that the next connect gets no answer at all."""
        listener = self.listeners[name]
        self._unwatch(listener)
        listener.close()
        listener.listen(0)
        listener.accepting = False
        while not _backlog_is_full(listener):
            if listener.path is None:
                with contextlib.suppress(TimeoutError):  # a client took the last place: no answer, as is wanted
                    listener.fillers.append(_connect_nowait(listener))

    def do_counts(self) -> dict[str, Any]:
        self._accept_all()
        return {
            "open": len(self.connections),
            "peak": self.peak,
            "accepted": sum(self.accepted.values()),
            "accepted_by": self.accepted,
            "open_by": self.open_by_listener,
            "closed": self.closed,
        }

    def do_connections(self) -> list[dict[str, Any]]:
        self._accept_all()
        return [connection.describe() for connection in self.connections.values()]

    def do_reset_peak(self) -> None:
        self.peak = len(self.connections)

    def do_log(self) -> list[list[object]]:
        return list(self.events)

    def do_send(self, data: str, ids: list[int] | None = None) -> int:
        """Send bytes that nobody asked for."""
        chosen = [connection for connection in self._chosen(ids, None) if not connection.ended]
        return sum(self._send(connection, data.encode("latin-1")) for connection in chosen)

    def do_answer(self, ids: list[int] | None = None) -> int:
        """Send the answers held back by `!late`. Returns how many."""
        sent = 0
        for connection in self._chosen(ids, None):
            if connection.ended:
                continue
            late, connection.late = connection.late, []
            sent += sum(self._send(connection, answer) for answer in late)
        return sent

    def do_close(self, ids: list[int] | None = None, listener: str | None = None, how: str = "told") -> int:
        """Close connections; `how` is "told" for an ordinary close, "rst" for a reset."""
        chosen = self._chosen(ids, listener)
        for connection in chosen:
            self._close(connection, how)
        return len(chosen)

    def do_half_close(self, ids: list[int] | None = None) -> int:
        """Say that nothing more will be sent, and go on reading."""
        chosen = [connection for connection in self._chosen(ids, None) if not connection.ended]
        for connection in chosen:
            with contextlib.suppress(OSError):  # it has just gone
                connection.sock.shutdown(socket.SHUT_WR)
                connection.said_goodbye = True
                self._log("half close", connection, "")
        return len(chosen)

    def do_hold_closes(self, listener: str = "*", seconds: float = math.inf) -> None:
        """From now on a client's end of stream is read but not answered by a close; for so long at most."""
        self.held.add(listener)
        self.release_at = time.monotonic() + seconds

    def _until_release(self) -> float | None:
        """Answer what was held back, if it is time; else how long that is to come."""
        left = self.release_at - time.monotonic()
        if left <= 0:
            self.release_at = math.inf
            self.do_release_closes()
        return None if self.release_at == math.inf else left

    def do_release_closes(self, ids: list[int] | None = None, keep_holding: bool = False) -> int:
        if not keep_holding:
            self.held.clear()
        ended = [connection for connection in self._chosen(ids, None) if connection.ended]
        for connection in ended:
            self._close(connection, "eof")
        return len(ended)

    def _watch(self, listener: Listener) -> None:
        assert listener.sock is not None
        self.selector.register(listener.sock, selectors.EVENT_READ, self._on_listener)

    def _unwatch(self, listener: Listener) -> None:
        if listener.sock is not None and listener.sock in self.selector.get_map():
            self.selector.unregister(listener.sock)


def _bound(address: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    return sock


def _backlog_is_full(listener: Listener) -> bool:
    """Ask the kernel: on a listening TCP socket tcpi_unacked is the accept queue's length and tcpi_sacked its limit."""
    assert listener.sock is not None
    if listener.path is not None:
        return _unix_queue_is_full(listener)
    info = listener.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    unacked, sacked = struct.unpack_from("II", info, 24)
    return bool(unacked > sacked)


def _unix_queue_is_full(listener: Listener) -> bool:
    """Try one more: of a Unix socket a connect that would wait is refused with EAGAIN, whoever has filled the queue."""
    try:
        listener.fillers.append(_connect_nowait(listener))
    except BlockingIOError:
        return True
    return False


def _connect_nowait(listener: Listener) -> socket.socket:
    sock = socket.socket(socket.AF_INET if listener.path is None else socket.AF_UNIX, socket.SOCK_STREAM)
    if listener.path is None:
        sock.settimeout(1)
        try:
            sock.connect(("127.0.0.1", listener.port))
        except TimeoutError:
            sock.close()
            raise
        return sock
    sock.setblocking(False)
    try:
        sock.connect(listener.path)
    except BlockingIOError:
        sock.close()
        raise
    return sock


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    fcntl.fcntl(control, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    Server(control).run()


if __name__ == "__main__":
    main()
