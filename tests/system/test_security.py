"""Who may reach a scope, and what of its secrets can be seen: nobody else, and nothing."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool import AttachRefused, SharedPoolError, fdpass, launch, wire
from sharedpool import scope as scopes
from sharedpool.wire import Kind, Message
from tests.support import commands
from tests.support.backend import Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

SOMEBODY = 12345


def directory_of(scope: Scope) -> Path:
    (found,) = {Path(name).parent for name in scope.files()}
    return found


def as_somebody_else(state: State, act: Callable[..., Any], *arguments: Any) -> Any:
    """Carry something out in a forked child of another uid; gives what it gave, as text, or what was raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
            said = repr(act(*arguments))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def knock(descriptor: int) -> bytes:
    """Ask the arbiter for the registry's key over a channel that is connected already."""
    with socket.socket(fileno=descriptor) as channel:
        channel.settimeout(20)
        fdpass.send(channel, wire.pack(Message(Kind.CALLER)), wait=True)
        return fdpass.receive(channel, wire.LONGEST)[0]


def connect_as_somebody(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(path)
        return knock(channel.detach())


def connect_by_module(directory: str) -> object:
    return launch.connect(directory)


def test_another_user_is_kept_out_by_the_directory_and_by_the_arbiter_itself(
    worker: Worker, scope: Scope, tcp: Target
) -> None:
    worker.use(tcp)
    directory = directory_of(scope)
    said = worker.call(as_somebody_else, connect_by_module, str(directory))
    assert "StartFailed" in said or "Permission" in said
    socket_path = str(directory / scopes.ARBITER_SOCKET)
    try:  # as if the directory's mode were no protection
        for path in (scope.directory.parent, scope.directory, directory):
            path.chmod(0o777)
        os.chmod(socket_path, 0o777)
        said = worker.call(as_somebody_else, connect_as_somebody, socket_path)
        assert said == "b''" or said.startswith(("ConnectionResetError", "BrokenPipeError")), said
    finally:
        for path in (directory, scope.directory, scope.directory.parent):
            path.chmod(0o700)
    assert worker.use(tcp) == 1


def test_an_arbiter_of_another_user_is_refused_with_both_uids(scope: Scope, harness: Harness, tcp: Target) -> None:
    worker = harness.start()
    directory = scope.directory / "sharedpool"
    directory.mkdir(0o700)
    path = str(directory / scopes.ARBITER_SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        os.seteuid(SOMEBODY)
        try:  # the kernel remembers who it was that listened
            os.seteuid(0)
            listener.bind(path)
            os.seteuid(SOMEBODY)
            listener.listen(8)
        finally:
            os.seteuid(0)
        error = worker.fails(AttachRefused, commands.use, tcp)
    assert str(SOMEBODY) in str(error)
    assert str(os.geteuid()) in str(error)
    os.unlink(path)
    assert worker.use(tcp) == 1


def hold_key(state: State) -> str:
    """The registry's key, as a caller gets it."""
    key = launch.caller(scopes.directory_for(os.environ), start=False)
    assert key is not None
    return key.hex()


def everything_logged(state: State) -> None:
    logger = logging.getLogger("sharedpool")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(commands._Collect(state.log))


def logged(state: State) -> str:
    return "\n".join(message for _, message in state.log)


def test_the_registrys_key_is_in_no_arguments_environment_file_or_log(
    worker: Worker, scope: Scope, tcp: Target
) -> None:
    worker.call(everything_logged)
    worker.use(tcp)
    worker.call(commands.library, "start_pool", "other", max_connections=3)
    worker.call(commands.library, "stop_pool", "other")
    worker.fails(SharedPoolError, commands.library, "pause", "nothing")
    key = worker.call(hold_key)
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    seen = {
        f"/proc/{pid}/{name}": Path(f"/proc/{pid}/{name}").read_bytes()
        for pid in (scope.arbiter(), worker.pid)
        for name in ("cmdline", "environ", "comm")
    }
    seen["the log"] = worker.call(logged).encode()
    assert b"attached to pool" in seen["the log"]
    seen |= {name: Path(name).read_bytes() for name in scope.files() if not Path(name).is_socket()}
    seen |= {name: name.encode() for name in scope.files()}
    for where, text in seen.items():
        for form in (key.encode(), bytes.fromhex(key)):
            assert form not in text, where
    assert scopes.START_LOCK in " ".join(seen)


def test_every_arbiter_has_a_key_of_its_own(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].use(tcp)
    first = two[0].call(hold_key)
    two[0].call(commands.library, "stop")
    wait_until(lambda: not scope.arbiters())
    two[1].use(tcp)
    assert two[1].call(hold_key) != first


def registry_without_the_key(state: State) -> str:
    import multiprocess.managers

    directory = os.open(scopes.directory_for(os.environ), os.O_RDONLY)
    manager = multiprocess.managers.BaseManager(scopes.inside(directory, scopes.REGISTRY_SOCKET), authkey=b"guessed")
    try:
        manager.connect()
    except Exception as error:
        return type(error).__name__
    finally:
        os.close(directory)
    return "let in"


def test_the_registry_lets_nobody_in_without_the_key(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    assert worker.call(registry_without_the_key) == "AuthenticationError"
    assert worker.call(commands.library, "find_pool", "default").name == "default"


def knock_with_any_claim(state: State, path: str, claims: list[dict[str, Any]]) -> list[str]:
    """Ask for the key, and to be attended to, whatever one has to say of oneself; gives what was answered."""
    said = []
    for claim in claims:
        for kind in (Kind.CALLER, Kind.HOLD):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
                channel.settimeout(20)
                channel.connect(path)
                fdpass.send(channel, wire.pack(Message(kind, body=claim)), wait=True)
                said.append(wire.unpack(fdpass.receive(channel, wire.LONGEST)[0]).kind.name)
    return said


def namespace(pid: int) -> str:
    status = os.stat(f"/proc/{pid}/ns/pid")
    return f"{status.st_dev}:{status.st_ino}"


@pytest.mark.parametrize("where", ["below", "beside"])
def test_a_process_of_another_pid_namespace_gets_no_key_whatever_it_says(
    harness: Harness, scope: Scope, tcp: Target, where: str
) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("binary unshare is missing")
    apart = ("unshare", "--pid", "--fork", "--kill-child")
    ours = harness.start() if where == "below" else harness.execute(*apart)
    ours.use(tcp)
    foreign = harness.execute(*apart)
    claims = [{}] + [
        {"pid_namespace": namespace(worker.pid), "pid": pid}
        for worker in (ours, foreign) for pid in (foreign.pid, foreign.inner_pid, ours.pid, 0)
    ]  # fmt: skip
    path = str(directory_of(scope) / scopes.ARBITER_SOCKET)
    assert set(foreign.call(knock_with_any_claim, path, claims)) == {"REFUSED"}
    error = foreign.fails(AttachRefused, commands.library, "find_pool", "default")
    assert "namespace" in str(error)
    assert ours.call(commands.library, "find_pool", "default").name == "default"
    ours.call(commands.library, "stop")  # before its namespace ends, and the arbiter with it
    wait_until(lambda: not scope.files())


def call_from_threads(state: State, threads: int, calls: int) -> set[bytes]:
    """Use the registry in many threads; gives every key that the application's own processes had meanwhile."""
    import multiprocess.process

    process = multiprocess.process.current_process()
    process.authkey = b"the application's"
    seen: set[bytes] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.add(bytes(process.authkey))

    def ask() -> None:
        for _ in range(calls):
            assert sharedpool.ping() is not None

    watching = threading.Thread(target=look)
    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in (watching, *asking):
        thread.start()
    for thread in asking:
        thread.join()
    ended.set()
    watching.join()
    return seen | {bytes(process.authkey)}


def test_the_registry_leaves_the_applications_own_authkey_alone(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    assert worker.call(call_from_threads, 4, 20) == {b"the application's"}


if os.geteuid() != 0:  # being somebody else for a moment needs root
    del test_another_user_is_kept_out_by_the_directory_and_by_the_arbiter_itself
    del test_an_arbiter_of_another_user_is_refused_with_both_uids
    del test_a_process_of_another_pid_namespace_gets_no_key_whatever_it_says
