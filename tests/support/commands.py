"""What a worker can be told to do. Each function runs inside the worker; its first argument is the worker's State."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import resource
import socket
import threading
import time
import traceback
from typing import Any

from tests.support.backend import Target
from tests.support.state import NoAnswer, State
from tests.support.worker_main import run

with contextlib.suppress(ImportError):  # so that the tests of the support itself run without the library
    import sharedpool

Lease = Any


def attach(state: State, name: str = "default", **options: Any) -> None:
    """Make the handle of a pool; by itself this touches nothing."""
    state.pools[name] = sharedpool.attach(name, **options)


def pool_of(state: State, name: str) -> Any:
    if name not in state.pools:
        attach(state, name)
    return state.pools[name]


def checkout(state: State, target: Target, *, pool: str = "default", label: str | None = None, **options: Any) -> str:
    """Take a lease and keep it under a label."""
    handle = pool_of(state, pool)
    lease = handle.checkout(target.host, target.port, transport=target.transport, **options)
    label = label or state.new_label()
    state.leases[label] = lease
    return label


def checkin(state: State, label: str) -> None:
    """Give a lease back; it stays known under its label, so that a second checkin can be tried."""
    state.leases[label].checkin()


def checkin_by_pool(state: State, label: str, pool: str = "default") -> None:
    state.pools[pool].checkin(state.leases[label])


def discard(state: State, label: str) -> None:
    state.leases[label].discard()


def forget(state: State, label: str) -> None:
    """Lose a lease without giving it back."""
    del state.leases[label]
    gc.collect()


def exchange(state: State, label: str, text: str = "hello", timeout: float = 20.0) -> int:
    """One line there, its answer back. Returns the connection's number at the back end."""
    return exchange_over(state.leases[label].conn, text, timeout)


def exchange_over(conn: socket.socket, text: str, timeout: float = 20.0) -> int:
    conn.settimeout(timeout)
    conn.sendall(text.encode() + b"\n")
    return parse_answer(read_line(conn), text)


def parse_answer(line: bytes, text: str) -> int:
    number, _, answered = line.decode().partition(" ")
    if answered != text:
        raise AssertionError(f"{text!r} was answered by {line!r}")
    return int(number)


def read_line(conn: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = conn.recv(65536)
        if not more:
            raise ConnectionError(f"the stream ended after {data!r}")
        data += more
    return data[:-1]


def use(state: State, target: Target, text: str = "hello", *, pool: str = "default", **options: Any) -> int:
    """Checkout, exchange, checkin."""
    handle = pool_of(state, pool)
    with handle.connection(target.host, target.port, transport=target.transport, **options) as conn:
        return exchange_over(conn, text)


def send(state: State, label: str, data: bytes) -> None:
    state.leases[label].conn.sendall(data)


def receive_line(state: State, label: str, timeout: float | None = 20.0) -> bytes:
    conn = state.leases[label].conn
    if timeout is not None:
        conn.settimeout(timeout)
    return read_line(conn)


def stats(state: State, pool: str = "default") -> Any:
    return pool_of(state, pool).stats()


def worker_stats(state: State, pool: str = "default") -> Any:
    return pool_of(state, pool).worker_stats()


def library(state: State, function: str, *arguments: Any, **options: Any) -> Any:
    """Call a public function of the library, such as start_pool, by its name."""
    return getattr(sharedpool, function)(*arguments, **options)


def hold_permit(state: State, name: str, label: str, **options: Any) -> None:
    """Enter a permit and keep it."""
    permit = sharedpool.permit(name, **options)
    permit.__enter__()
    state.things[label] = permit


def release_permit(state: State, label: str) -> None:
    state.things.pop(label).__exit__(None, None, None)


# -- load -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Load:
    """What a loop of requests did."""

    done: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)

    def __add__(self, other: Load) -> Load:
        return Load(self.done + other.done, self.errors + other.errors)


def requests(state: State, targets: list[Target], number: int, **options: Any) -> Load:
    """So many requests in this thread, over the targets in turn. Every answer is checked to be its own."""
    load = Load()
    for i in range(number):
        text = f"{os.getpid()}-{threading.get_ident()}-{i}"
        try:
            use(state, targets[i % len(targets)], text, **options)
            load.done += 1
        except Exception as error:
            load.errors.append("".join(traceback.format_exception(error)))
    return load


def requests_until_told(state: State, targets: list[Target], **options: Any) -> Load:
    """Requests until `tell_to_stop`, which may come first."""
    load = Load()
    stop = told_to_stop(state)
    while not stop.is_set():
        load = load + requests(state, targets, 20, **options)
    return load


def tell_to_stop(state: State) -> None:
    """For good: all loops of this process, those that begin later, too."""
    told_to_stop(state).set()


def told_to_stop(state: State) -> threading.Event:
    """What this process's loops look at."""
    event: threading.Event = state.things.setdefault("stop", threading.Event())
    return event


def checkin_at(state: State, label: str, moment: float) -> None:
    """Give a lease back at a moment of the monotonic clock, to provoke a race with a time-out of that moment."""
    while time.monotonic() < moment:
        pass
    state.leases[label].checkin()


# -- the process ----------------------------------------------------------------------------------------------------


def fork(state: State, address: str, token: str) -> int:
    """Fork; the child answers on a channel of its own and is a worker like its parent."""
    child = os.fork()
    if child:
        return child
    state.reconnect(address, token)
    raise NoAnswer


def start_child(state: State, method: str, address: str, token: str) -> int:
    """Start a worker by `multiprocess`."""
    import multiprocess

    process = multiprocess.get_context(method).Process(target=run, args=(address, token))
    process.start()
    state.things[token] = process
    return int(process.pid)


def leave(state: State, status: int = 0) -> None:
    """End as a program does that has come to its end: atexit functions and finalizers run."""
    raise SystemExit(status)


def leave_at_once(state: State, status: int = 0) -> None:
    os._exit(status)


def wait_children(state: State) -> None:
    """Collect all children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def set_environment(state: State, **values: str) -> None:
    os.environ.update(values)


def environment(state: State, name: str) -> str | None:
    return os.environ.get(name)


def thread_names(state: State) -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def limit_descriptors(state: State, number: int) -> None:
    """Set the soft RLIMIT_NOFILE."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class _Collect(logging.Handler):
    def __init__(self, records: list[tuple[str, str]]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelname, record.getMessage()))


def collect_log(state: State) -> None:
    """Keep what the library logs from now on."""
    logger = logging.getLogger("sharedpool")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Collect(state.log))


def log(state: State, level: str) -> list[str]:
    """The messages of this level."""
    return [message for name, message in state.log if name == level]
