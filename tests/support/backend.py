"""The test's side of the counting back end (backend_server.py): starts it, commands it, asks for its counts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tests.support.waiting import DEADLINE, wait_until

SERVER = Path(__file__).with_name("backend_server.py")


class Target(NamedTuple):
    """Where a checkout goes: its three positional parts."""

    host: str
    port: int
    transport: str = "tcp"

    @property
    def url(self) -> str:
        return f"{self.transport}://{self.host}:{self.port}"


#: A TCP connection as the one side sees it: its own address, and the other one's.
_Ends = tuple[tuple[str, int], tuple[str, int]]


def _untouched(ends: set[_Ends]) -> set[_Ends]:
    """Those of these connections that are established and have nothing unread.

    A packet over loopback may be delivered after the call that sent it; only the kernel knows that it is there. A port
    alone does not name a connection: other programs may have a connection with the same port at another address.
    """
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state, queues, *_ = line.split()
        if state == "01" and int(queues.partition(":")[2], 16) == 0:
            found.add((_address(local), _address(remote)))
    return ends & found


def _address(text: str) -> tuple[str, int]:
    """An address as the kernel lists it: the host in the machine's byte order, the port as a number."""
    host, _, port = text.partition(":")
    return socket.inet_ntoa(int(host, 16).to_bytes(4, sys.byteorder)), int(port, 16)


class Backend:
    """A running back end with one TCP address, `tcp`; more by `listen` and `listen_unix`.

    Counts are those of the server (see backend_server.py); `open`, `peak` and `accepted` are over all addresses.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ours, theirs = socket.socketpair()
        ours.settimeout(DEADLINE)
        self._control = ours
        self._lines = ours.makefile("rb")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SERVER), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.tcp = self.listen("tcp")

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, command: str, **fields: Any) -> Any:
        """Carry out one command of the server; every `do_NAME` there is one."""
        self._control.sendall(json.dumps({"do": command, **fields}).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise AssertionError(f"the back end ended (exit status {self._process.poll()})")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(f"the back end can't {command}: {answer['error']}")
        return answer["value"]

    def listen(self, name: str) -> Target:
        """One more TCP address on 127.0.0.1."""
        return Target("127.0.0.1", self.do("listen", name=name))

    def listen_unix(self, name: str = "unix") -> Target:
        path = str(self.directory / f"{name}.sock")
        self.do("listen", name=name, path=path)
        return Target(path, 0, "unix")

    # -- what it counts ------------------------------------------------------------------------------------------

    @property
    def open(self) -> int:
        return int(self.do("counts")["open"])

    @property
    def peak(self) -> int:
        return int(self.do("counts")["peak"])

    @property
    def accepted(self) -> int:
        return int(self.do("counts")["accepted"])

    def counts(self) -> dict[str, Any]:
        value: dict[str, Any] = self.do("counts")
        return value

    def ids(self) -> list[int]:
        """The numbers of the open connections, in the order of their opening."""
        return [connection["id"] for connection in self.do("connections")]

    def received(self, number: int) -> str:
        """All that came over the open connection `number`."""
        return next(str(each["received"]) for each in self.do("connections") if each["id"] == number)

    # -- what it does, until it has arrived ----------------------------------------------------------------------

    def say(self, data: str, ids: list[int] | None = None) -> int:
        """Send bytes that nobody asked for; they are in the client's buffer when this returns."""
        return self._and_arrived("send", ids, data=data)

    def answer(self, ids: list[int] | None = None) -> int:
        """Send the answers held back by `!late`; they are in the client's buffer when this returns."""
        return self._and_arrived("answer", ids)

    def close(self, ids: list[int] | None = None, how: str = "told") -> int:
        """Close connections ("told"), or reset them ("rst"); the client's side has it when this returns."""
        return self._and_arrived("close", ids, how=how)

    def half_close(self, ids: list[int] | None = None) -> int:
        """Say that nothing more will be sent; the client's side has it when this returns."""
        return self._and_arrived("half_close", ids)

    def _and_arrived(self, command: str, ids: list[int] | None, **fields: Any) -> int:
        chosen = [each for each in self.do("connections") if ids is None or each["id"] in ids]
        ends = {(tuple(each["peer"]), tuple(each["address"])) for each in chosen if each["peer"]}
        number = int(self.do(command, ids=[each["id"] for each in chosen], **fields))
        wait_until(lambda: not _untouched(ends), what=f"the client's side has noticed: {command}")
        return number

    def story(self, around: int = 12) -> str:
        """What happened up to the moment when the peak was reached, for the message of a test about the peak."""
        log = self.do("log")
        peak = self.peak
        at = next((i for i, event in enumerate(log) if event[5] == peak), len(log))
        return "\n".join(str(event) for event in log[max(0, at - around) : at + around])

    def wait_open(self, number: int) -> None:
        """Wait until exactly `number` connections are open."""
        wait_until(lambda: self.open == number, what=f"{number} connections open at the back end")

    # -- its end -------------------------------------------------------------------------------------------------

    def pause_process(self) -> None:
        """SIGSTOP: the kernel goes on accepting, nobody reads."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume_process(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE)

    def stop(self) -> None:
        self._lines.close()
        self._control.close()
        if self._process.poll() is None:
            self.resume_process()
        try:
            self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
