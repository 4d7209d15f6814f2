"""The registry's connections: whoever says nothing holds nobody up, and is not waited for without end."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool import calls, manager
from sharedpool.arbiter import Arbiter
from sharedpool.errors import RegistryTimeout
from sharedpool.records import ROOM, Kept, Records
from tests.support.waiting import wait_until

KEY = b"k" * 32


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[str, Arbiter]]:
    """A registry served in this process, and the loop behind it in a thread."""
    directory = tmp_path / "sharedpool"
    directory.mkdir(mode=0o700)
    arbiter = Arbiter(None, KEY, 3600.0)
    dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    running = threading.Thread(target=arbiter.run)
    running.start()
    manager._serve_registry(arbiter, dirfd, KEY)
    yield str(directory), arbiter
    arbiter.end(at_once=True)
    running.join()
    arbiter.close()  # the directory stays open: multiprocess removes its socket when the process ends


def silent(directory: str) -> socket.socket:
    """A caller who connects, gets the challenge, and says nothing."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(os.path.join(directory, "registry.sock"))
    sock.settimeout(10)
    assert sock.recv(1)
    return sock


def call(directory: str, method: str, *arguments: object) -> object:
    with calls.within(10):
        return manager._call(directory, KEY, method, *arguments)


def test_callers_that_say_nothing_hold_up_nobody(registry: tuple[str, Arbiter]) -> None:
    directory, _ = registry
    stopped = [silent(directory) for _ in range(5)]
    assert call(directory, "names") == []
    for sock in stopped:
        sock.close()


def test_a_caller_that_says_nothing_loses_its_connection_and_its_thread(
    registry: tuple[str, Arbiter], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = registry
    monkeypatch.setattr(calls, "_CALLER_SECONDS", 0.1)
    before = threading.active_count()
    with silent(directory) as sock:
        while sock.recv(4096):  # the rest of the challenge, then why it was refused, then the end
            pass
    wait_until(lambda: threading.active_count() <= before)


def test_a_registry_that_does_not_answer_is_waited_for_as_long_as_was_said(tmp_path: Path) -> None:
    directory = tmp_path / "sharedpool"
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / "registry.sock"))
        listener.listen(1)
        with pytest.raises(BlockingIOError), calls.within(0.1):
            manager._call(str(directory), KEY, "ping")


def test_what_nobody_can_have_is_kept_up_to_a_bound_and_its_excess_counted() -> None:
    records = Records()
    for number in range(ROOM + 3):
        records.keep(Kept("sharedpool.arbiter", 30, str(number)))
    assert records.dropped == 3
    first = list(records.take())
    assert [record.text for record in first] == [str(number) for number in range(len(first))]
    assert 0 < len(first) < ROOM, "a flood goes out at a rate"


def test_a_record_of_a_pool_knows_its_pool() -> None:
    assert Kept("sharedpool.pool.a.b", 30, "").pool == "a.b"
    assert Kept("sharedpool.arbiter", 30, "").pool is None


def test_a_pools_mutex_that_stays_busy_is_an_error_of_the_call_and_not_of_the_loop(
    registry: tuple[str, Arbiter], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, arbiter = registry
    monkeypatch.setattr(manager, "_PATIENCE", 0.05)
    call(directory, "start_pool", "api", {}, os.getpid(), True)
    mutex = arbiter.pools["api"].table.mutex
    assert -mutex == 0
    try:
        with pytest.raises(RegistryTimeout):
            call(directory, "pause", "api")
    finally:
        +mutex
    assert call(directory, "pause", "api") is True
