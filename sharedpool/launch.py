"""Finding the scope's arbiter, or starting one. A worker's side of the first handshake.

An arbiter is exec'd, never forked from the application: a new interpreter, in a session of its own, that nobody has to
wait for. Launchers take turns by a lock; who has to wait finds the arbiter that the other one started.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import fdpass, scope, segment, wire
from .errors import NO_DESCRIPTOR, ArbiterLost, AttachRefused, RegistryTimeout, StartFailed, file_limit
from .wire import Kind, Message

#: A new interpreter needs 0.1 s, beside many busy processes 0.5 s; a machine that needs longer than this is stuck.
START_SECONDS = 20.0

_BOOT = (
    "import os, sys\n"
    "if os.fork(): os._exit(0)\n"  # so that it is never the child of an application server
    "sys.path.extend(p for p in sys.argv[3].split(os.pathsep) if p not in sys.path)\n"
    "from sharedpool.manager import main\n"
    "main(sys.argv[1], int(sys.argv[2]))\n"
)

_exiting = False


def note_exit() -> None:
    """From now on this process starts no arbiter: it is on its way out."""
    global _exiting
    _exiting = True


def exiting() -> bool:
    """Whether this process is on its way out."""
    return _exiting


def reach(directory: str, seconds: float) -> socket.socket:
    """A channel to the scope's arbiter, which is started if none answers.

    Raises:
        StartFailed: None could be started in time.
        AttachRefused: The socket there belongs to another user.
    """
    limit = time.monotonic() + max(seconds, START_SECONDS)
    channel = connect(directory)
    while channel is None:
        if _exiting:
            raise ArbiterLost("no arbiter runs, and this process is exiting: it starts none")
        with _start_lock(directory, limit):
            channel = connect(directory)
            if channel is None:
                with _starting:
                    _start(directory, limit)
                channel = connect(directory)
        if channel is None and time.monotonic() > limit:
            raise StartFailed(f"an arbiter was started in {directory}, but none answers there")
    return channel


def connect(directory: str) -> socket.socket | None:
    """A channel to the scope's arbiter, or None if none listens. Nothing is promised before it has answered."""
    try:
        fd = scope.open_directory(directory)
    except FileNotFoundError:
        return None
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.connect(scope.inside(fd, scope.ARBITER_SOCKET))
        _, uid, _ = fdpass.credentials(channel)
        if uid != os.geteuid():
            raise AttachRefused(f"the arbiter in {directory} runs as uid {uid}, this process as {os.geteuid()}")
        return channel
    except (FileNotFoundError, ConnectionRefusedError):
        channel.close()
        return None
    except BaseException:
        channel.close()
        raise
    finally:
        os.close(fd)


def ask(
    channel: socket.socket, message: Message, seconds: float, descriptor: int | None = None
) -> tuple[Message, int | None]:
    """Send one request on a channel nobody else uses yet, and wait for its answer.

    Raises:
        ArbiterLost: The channel ended or nothing came in time.
        AttachRefused: The arbiter refused, and says why.
    """
    channel.settimeout(seconds)
    try:
        fdpass.send(channel, wire.pack(message), descriptor, wait=True)
        data, received = fdpass.receive(channel, wire.LONGEST)
    except fdpass.NoRoom as error:
        raise file_limit(OSError(errno.EMFILE, str(error)), "take what the arbiter answers") from error
    except OSError as error:
        raise ArbiterLost(f"the arbiter did not answer a {message.kind.name}: {error}") from error
    if not data:
        raise ArbiterLost(f"the arbiter closed the channel instead of answering a {message.kind.name}")
    return wire.unpack(data), received


def greet(
    directory: str, message: Message, seconds: float, descriptor: int | None = None
) -> tuple[socket.socket, Message, int | None]:
    """Reach the arbiter and get its first answer; again, if it was just leaving.

    Raises:
        StartFailed, ArbiterLost, AttachRefused.
    """
    limit = time.monotonic() + seconds
    while True:
        channel = reach(directory, limit - time.monotonic())
        try:
            answer, received = ask(channel, message, max(1.0, limit - time.monotonic()), descriptor)
            return channel, answer, received
        except ArbiterLost:
            channel.close()
            if time.monotonic() > limit:
                raise
            time.sleep(0.01)  # an arbiter on its way out needs a moment to let go of its lock
        except BaseException:
            channel.close()
            raise


def hold(directory: str, seconds: float) -> socket.socket:
    """A channel to the scope's arbiter, which stays as long as it is open; it is started if none answers.

    Raises:
        StartFailed, ArbiterLost, AttachRefused.
    """
    channel, answer, _ = greet(directory, asking(Kind.HOLD), seconds)
    if answer.kind is not Kind.OK:
        channel.close()
        raise AttachRefused(f"the arbiter answered {answer.kind.name}: {answer.body.get('text')}")
    return channel


def asking(kind: Kind) -> Message:
    """A message of somebody who attaches to no pool; it says who asks."""
    return Message(kind, body={"pid_namespace": segment.identity()["pid_namespace"], "pid": os.getpid()})


def wait_until_gone(directory: str, seconds: float = 5.0) -> None:
    """Wait until the arbiter that was told to end has taken its files away, and the directory if it was all its own."""
    limit = time.monotonic() + seconds
    while os.path.lexists(os.path.join(directory, scope.START_LOCK)) and time.monotonic() < limit:
        time.sleep(0.002)
    limit = time.monotonic() + 0.05
    while os.path.isdir(directory) and time.monotonic() < limit:
        time.sleep(0.001)


def caller(directory: str, *, start: bool, seconds: float = START_SECONDS) -> bytes | None:
    """The registry's authkey, or None if no arbiter runs and none is to be started.

    Raises:
        RegistryTimeout: One runs, and does not answer.
        StartFailed, AttachRefused.
    """
    if start:
        channel, answer, _ = greet(directory, asking(Kind.CALLER), seconds)
    else:
        found = connect(directory)
        if found is None:
            return None
        channel = found
        try:
            answer, _ = ask(channel, asking(Kind.CALLER), seconds)
        except ArbiterLost as error:
            if isinstance(error.__cause__, TimeoutError):
                raise RegistryTimeout(f"the arbiter in {directory} did not answer within {seconds:g} s") from error
            return None
        finally:
            channel.close()
    channel.close()
    if answer.kind is not Kind.KEY:
        raise AttachRefused(f"the arbiter answered {answer.kind.name}: {answer.body.get('text')}")
    return bytes.fromhex(answer.body["key"])


@contextmanager
def _start_lock(directory: str, limit: float) -> Iterator[None]:
    """Hold the launchers' lock, on the file that is there now: an arbiter that ends takes its files along."""
    while True:
        fd = _lock_file(directory)
        _lock_fds.add(fd)
        try:
            if _flock(fd, limit) and _is_there(directory, fd):
                yield
                return
            if time.monotonic() > limit:
                raise StartFailed(f"another process holds {directory}/{scope.START_LOCK} and starts no arbiter")
        finally:
            _lock_fds.discard(fd)
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open, too
            os.close(fd)


#: The launchers' locks that threads of this process have open.
_lock_fds: set[int] = set()
#: Held while an arbiter is being started, and while this process forks: a child would have the pipes by which `Popen`
#: sees that the program runs, which would then wait for the child's end, and the child for the arbiter.
_starting = threading.RLock()


def _before_fork() -> None:
    _starting.acquire()


def _after_fork_in_parent() -> None:
    with contextlib.suppress(RuntimeError):  # this module was loaded by another thread while the fork was on its way
        _starting.release()


def _after_fork_in_child() -> None:
    """The lock belongs to the open file, which a child has as well: it would wait for itself, or outlive the parent."""
    global _starting
    _starting = threading.RLock()
    for fd in _lock_fds:
        os.close(fd)
    _lock_fds.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _lock_file(directory: str) -> int:
    while True:
        path = os.path.join(scope.prepare(directory), scope.START_LOCK)
        with contextlib.suppress(FileNotFoundError):  # the directory went with an arbiter that just ended
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.fchmod(fd, 0o600)  # a umask may have taken our own rights away
            return fd


def _flock(fd: int, limit: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)


def _is_there(directory: str, fd: int) -> bool:
    try:
        there = os.stat(os.path.join(directory, scope.START_LOCK))
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def interpreter() -> str:
    """The Python that runs the arbiter: SHAREDPOOL_PYTHON, or this one if it is one.

    Raises:
        StartFailed: sys.executable is no Python (embedded interpreters: uWSGI, mod_wsgi, frozen applications).
    """
    chosen = os.environ.get("SHAREDPOOL_PYTHON")
    if chosen:
        return chosen
    if getattr(sys, "frozen", False) or not sys.executable or "python" not in os.path.basename(sys.executable).lower():
        raise StartFailed(
            f"sys.executable is {sys.executable!r}, which is no Python that could run the arbiter:"
            " set SHAREDPOOL_PYTHON to one that has sharedpool installed"
        )
    return sys.executable


def _import_paths() -> str:
    """Where sharedpool and what it needs were found here: an isolated interpreter may not find them by itself."""
    paths = []
    for name in ("sharedpool", "multiprocess", "dill"):
        found = importlib.util.find_spec(name)
        if found is not None and found.origin:
            path = os.path.dirname(os.path.dirname(os.path.abspath(found.origin)))
            if path not in paths:
                paths.append(path)
    return os.pathsep.join(paths)


def _start(directory: str, limit: float) -> None:
    """Start an arbiter and wait until it listens.

    Raises:
        StartFailed: It did not come up; the message has what it said.
    """
    reading, writing = os.pipe()
    try:
        with subprocess.Popen(
            [interpreter(), "-I", "-c", _BOOT, directory, str(writing), _import_paths()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=writing,
            cwd="/",
            pass_fds=(writing,),
            start_new_session=True,
            restore_signals=True,
            env=_environment(),
        ) as process:
            os.close(writing)
            writing = -1
            process.wait()
        said = _read_until_end(reading, limit)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise file_limit(error, "start an arbiter") from error
        raise StartFailed(f"{interpreter()} cannot be run as the arbiter: {error}") from error
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    if said != b"ready":
        text = said.decode(errors="replace").strip() or "it said nothing"
        raise StartFailed(f"the arbiter did not start in {directory}: {text[-2000:]}")


def _environment() -> dict[str, str]:
    """The arbiter's: only what it reads, so that nothing instruments it by an import hook."""
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "SHAREDPOOL_LINGER")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _read_until_end(fd: int, limit: float) -> bytes:
    said = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while True:
        left = limit - time.monotonic()
        if left <= 0 or not poller.poll(int(left * 1000) + 1):
            return said + b" (no more came in time)"
        part = os.read(fd, 4096)
        if not part or said + part == b"ready":
            return said + part
        said += part
