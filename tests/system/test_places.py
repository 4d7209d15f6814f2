"""An address leads elsewhere in another namespace: connections are lent only to those for whom it leads there, too."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import sharedpool
from sharedpool import ConnectFailed, OptionError
from sharedpool.drivers import abort_of, aborts
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker, clean_environment

HOST = "127.0.0.1"
CLONE_NEWNET = 0x40000000


def unshare(*kinds: str) -> list[str]:
    """A command that gives a worker namespaces of its own; who is not root needs one for users, too."""
    if shutil.which("unshare") is None:
        pytest.skip("binary unshare is missing")
    return ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), *kinds]


def raise_loopback(state: State) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 1)  # SIOCSIFFLAGS, IFF_UP
        fcntl.ioctl(sock, 0x8914, request)


def serve(state: State, name: str, host: str = HOST, port: int = 0) -> int:
    """Answer every message with this name; gives the port."""
    listener = socket.create_server((host, port))
    state.things[name] = listener
    threading.Thread(target=_accept, args=(listener, name.encode()), daemon=True).start()
    return int(listener.getsockname()[1])


def _accept(listener: socket.socket, name: bytes) -> None:
    while True:
        conn, _ = listener.accept()
        threading.Thread(target=_answer, args=(conn, name), daemon=True).start()


def _answer(conn: socket.socket, name: bytes) -> None:
    with conn:
        while conn.recv(100):
            conn.sendall(name)


def ask(state: State, host: str, port: int, transport: Any = "tcp", pool: str = "default", **options: Any) -> str:
    """Who answers."""
    with commands.pool_of(state, pool).connection(host, port, transport, **options) as conn:
        conn.sendall(b"who?")
        answer: bytes = conn.recv(100)
    return answer.decode()


@pytest.fixture
def apart(harness: Harness) -> tuple[Worker, Worker, int]:
    """Two workers with network namespaces of their own, a server in each, and the port of both."""
    home, away = harness.start(), harness.execute(*unshare("--net"))
    port = int(home.call(serve, "home"))
    away.call(raise_loopback)
    away.call(serve, "away", port=port)
    return home, away, port


@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_processes_of_two_network_namespaces_share_the_cap_and_no_connection(
    apart: tuple[Worker, Worker, int], host: str
) -> None:
    home, away, port = apart
    home.attach(max_connections=1)
    answers = [worker.call(ask, host, port) for worker in (home, away, home, away)]
    assert answers == ["home", "away", "home", "away"]
    assert home.stats().connections == 1


def test_a_dead_ones_connection_goes_to_its_own_network_namespace_only(
    apart: tuple[Worker, Worker, int], harness: Harness
) -> None:
    home, away, port = apart
    late = harness.start()
    home.attach(max_connections=4)
    dying = harness.start()
    home.stats()
    assert dying.call(ask, HOST, port) == "home"
    dying.kill()
    late.wait_stats(adopted=1)
    assert (away.call(ask, HOST, port), late.call(ask, HOST, port)) == ("away", "home")
    assert late.stats().takeovers == 1


def prewarm(state: State, host: str, port: int) -> None:
    commands.pool_of(state, "default").prewarm(host, port, count=1)


def test_what_is_kept_warm_is_so_for_each_network_namespace(apart: tuple[Worker, Worker, int]) -> None:
    home, away, port = apart
    home.attach(max_connections=4)
    home.call(prewarm, HOST, port)
    home.wait_stats(idle=1)
    away.call(prewarm, HOST, port)
    home.wait_stats(idle=2)
    assert (away.call(ask, HOST, port), home.call(ask, HOST, port)) == ("away", "home")


def test_an_operator_closes_the_connections_of_an_address_wherever_they_lead(
    apart: tuple[Worker, Worker, int],
) -> None:
    home, away, port = apart
    home.attach(max_connections=4)
    assert (home.call(ask, HOST, port), away.call(ask, HOST, port)) == ("home", "away")
    assert home.call(commands.library, "count", "default", (HOST, port)) == 2
    assert home.call(commands.library, "drain", "default", (HOST, port), wait=20) == 2
    assert home.stats().connections == 0


def leave_network(state: State) -> None:
    """This thread goes into a network namespace of its own, as others of its process do not."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    raise_loopback(state)


def attach_another(state: State, **options: Any) -> None:
    """One more handle on the same pool."""
    state.pools["another"] = sharedpool.attach("default", **options)


@pytest.mark.parametrize("mode", ["shared", "local"])
def test_a_thread_that_has_left_its_network_namespace_opens_nothing_for_those_who_stayed(
    harness: Harness, mode: str
) -> None:
    worker = harness.execute(*unshare("--mount"), SHAREDPOOL_MODE=mode)
    worker.attach(max_connections=4)
    port = int(worker.call(serve, "home"))
    assert worker.call(ask, HOST, port) == "home"
    label = worker.checkout(Target(HOST, port))  # the one that was idle
    worker.call(leave_network, thread="gone")
    worker.call(serve, "away", port=port, thread="gone")
    assert "attach" in str(worker.fails(ConnectFailed, ask, HOST, port, thread="gone"))
    worker.checkin(label)
    worker.call(attach_another, max_connections=4)
    answers = [worker.call(ask, HOST, port, pool="another", thread="gone"), worker.call(ask, HOST, port)]
    assert answers == ["away", "home"], "each handle lends what is its own, although it is one pool"


# --- paths and names --------------------------------------------------------------------------------------------------


def over(harness: Harness, what: object, where: object) -> Worker:
    """A worker in a mount namespace of its own, where one file is mounted over another."""
    script = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
    return harness.execute(*unshare("--mount"), "sh", "-ec", script, "sh", str(what), str(where))


def test_a_unix_path_is_another_one_in_another_mount_namespace(
    harness: Harness, backend: Backend, unix: Target
) -> None:
    other = backend.listen_unix("other")
    home, away = harness.start(), over(harness, other.host, unix.host)
    assert (home.use(unix), away.use(unix)) == (1, 2)
    assert backend.counts()["accepted_by"] == {"unix": 1, "other": 1}
    again = harness.start()
    assert again.use(unix) == 1


def hosts(directory: Path, name: str, address: str) -> Path:
    file = directory / name
    file.write_text(f"{address} alpha.test\n127.0.0.1 localhost\n")
    return file


def test_a_name_is_another_one_where_the_hosts_file_differs(harness: Harness, directory: Path) -> None:
    server = harness.start()
    port = int(server.call(serve, "one", "127.0.0.1"))
    server.call(serve, "two", "127.0.0.2", port)
    first = over(harness, hosts(directory, "hosts-1", "127.0.0.1"), "/etc/hosts")
    second = over(harness, hosts(directory, "hosts-2", "127.0.0.2"), "/etc/hosts")
    like_first = over(harness, hosts(directory, "hosts-3", "127.0.0.1"), "/etc/hosts")
    answers = [worker.call(ask, "alpha.test", port) for worker in (first, second, like_first)]
    assert answers == ["one", "two", "one"]
    assert (server.stats().opens, server.stats().takeovers) == (2, 1), "equal files mean that equal names are equal"


def test_a_relative_path_is_refused_because_it_leads_elsewhere_after_a_chdir(worker: Worker, unix: Target) -> None:
    name = Path(unix.host).name
    for path in (name, f"./{name}", f"@{name}", "~/x.sock"):
        error = worker.fails(OptionError, commands.use, Target(path, 0, "unix"))
        assert "absolute path" in str(error)
        assert error.option == "host"


ROOTS = """
import os, sys
from sharedpool.drivers import places
said = {places.here((places.FILES,))}
os.mkdir(sys.argv[1] + "/proc")
assert os.system("mount --bind /proc " + sys.argv[1] + "/proc") == 0
said.add(places.here((places.FILES,)))
assert len(said) == 1, "a mount below the root does not move it"
assert os.path.exists("/proc/self")
os.chroot(sys.argv[1])
os.chdir("/")
assert os.path.exists("/proc/self")
said.add(places.here((places.FILES,)))
assert len(said) == 2, said
"""


def test_a_unix_path_is_another_one_under_another_root(tmp_path: Path) -> None:
    command = [*unshare("--mount"), sys.executable, "-c", ROOTS, str(tmp_path)]
    done = subprocess.run(command, env=clean_environment({}), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


CONNECTED = """
import socket, sys, struct, fcntl
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 1))
listener = socket.create_server(("127.0.0.1", 0))
conn = socket.create_connection(listener.getsockname())
ours = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(ours, [b"x"], [conn.fileno()])
ours.recv(1)
"""


def test_work_is_called_off_only_where_the_server_is_who_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of a connection in another network namespace is somebody else's here."""
    called: list[Any] = []
    monkeypatch.setitem(aborts, "mine", lambda peer, family, state: called.append(peer))
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.create_server((HOST, 0)) as listener:
        command = [*unshare("--net"), sys.executable, "-c", CONNECTED, str(theirs.fileno())]
        with (
            subprocess.Popen(command, pass_fds=[theirs.fileno()]),
            contextlib.closing(ours),
        ):  # its end ends the process
            _, numbers, _, _ = socket.recv_fds(ours, 1, 1)
            with socket.socket(fileno=numbers[0]) as far, socket.create_connection(listener.getsockname()) as near:
                assert abort_of("mine", far, b"state") is None
                abort = abort_of("mine", near, b"state")
                assert abort is not None
                abort()
                wait_until(lambda: called, deadline=20)
                assert called == [listener.getsockname()]
