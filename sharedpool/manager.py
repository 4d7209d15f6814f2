"""The registry: the pools of a scope by name, and their limits. The control plane; no checkout ever calls it.

It is served by a `multiprocess` manager in the arbiter's process. A call costs a connection and pickling; workers use
it to declare and inspect pools, never to lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import multiprocess.managers
import multiprocess.process

from . import launch, mutex, scope, view
from .arbiter import Arbiter
from .errors import PoolNotFound, SharedPoolError, StartFailed
from .options import check_pool_name
from .served import ServedPool
from .stats import PoolStats

T = TypeVar("T")

_DEFAULT_LINGER = 10.0
#: The loop must not wait 5 ms for a registry thread that pickles.
_SWITCH_INTERVAL = 0.0005


class Registry:
    """What the manager serves. Every method runs in the arbiter's loop and answers with plain data."""

    def __init__(self, served_by: Arbiter) -> None:
        self._arbiter = served_by

    def start_pool(
        self, name: str, options: dict[str, Any], pid: int, update: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Find, make or change a pool; gives its facts and the warnings for the caller."""

        def declare() -> tuple[dict[str, Any], list[str]]:
            pool, warnings = self._arbiter.declare(check_pool_name(name), options, pid, update=update)
            return _facts(pool), warnings

        return self._arbiter.call(declare)

    def stop_pool(self, name: str) -> bool:
        """Stop a pool; False if there was none."""

        def stop() -> bool:
            pool = self._arbiter.pools.get(name)
            if pool is None or pool.stopped:
                return False
            pool.stop()
            return True

        return self._arbiter.call(stop)

    def find_pool(self, name: str) -> dict[str, Any] | None:
        """A pool's facts, or None."""

        def find() -> dict[str, Any] | None:
            pool = self._arbiter.pools.get(name)
            return None if pool is None or pool.stopped else _facts(pool)

        return self._arbiter.call(find)

    def stats(self, name: str) -> PoolStats:
        """A pool's numbers; PoolNotFound if there is none."""
        return self._with(name, lambda pool: view.stats(pool.words, pool.segment.geometry, name, time.monotonic_ns()))

    def worker_stats(self, name: str) -> dict[int, dict[str, Any]]:
        """What each attached process has counted, by pid; PoolNotFound if there is no such pool."""
        return self._with(name, lambda pool: view.workers(pool.words, pool.segment.geometry))

    def names(self) -> list[str]:
        """The pools there are."""
        return self._arbiter.call(lambda: sorted(self._arbiter.names()))

    def ping(self) -> dict[str, int]:
        """The loop answers: its pid and its incarnation."""
        return self._arbiter.call(lambda: {"pid": os.getpid(), "incarnation": self._arbiter.incarnation})

    def stop(self) -> None:
        """End the arbiter: all pools are stopped, waiters sent away."""

        def stop() -> None:
            for pool in list(self._arbiter.pools.values()):
                if not pool.stopped:
                    pool.stop()

        self._arbiter.call(stop)
        self._arbiter.end(at_once=True)

    def _with(self, name: str, use: Callable[[ServedPool], T]) -> T:
        def run() -> T:
            pool = self._arbiter.pools.get(name)
            if pool is None or pool.stopped:
                raise PoolNotFound(
                    f"there is no pool {name!r}; pools here: {', '.join(sorted(self._arbiter.names())) or 'none'}"
                )
            return use(pool)

        return self._arbiter.call(run)


def _facts(pool: ServedPool) -> dict[str, Any]:
    return {"name": pool.name, "options": pool.options.as_dict(), "arbiter_pid": os.getpid()}


class RegistryProxy(multiprocess.managers.BaseProxy):  # type: ignore[misc]
    """The registry's methods, as a caller sees them."""

    _exposed_ = ("start_pool", "stop_pool", "find_pool", "stats", "worker_stats", "names", "ping", "stop")

    def call(self, method: str, *arguments: Any) -> Any:
        return self._callmethod(method, arguments)


class SharedPoolManager(multiprocess.managers.BaseManager):  # type: ignore[misc]
    """The one manager. The arbiter registers its Registry with it; callers connect to it."""


SharedPoolManager.register("registry", proxytype=RegistryProxy, exposed=RegistryProxy._exposed_)


# --- the caller's side ------------------------------------------------------------------------------------------------


def call(directory: str, method: str, *arguments: Any, start: bool) -> Any:
    """Call the registry of a scope's arbiter; None if no arbiter runs and none is to be started.

    Raises:
        StartFailed, AttachRefused, and whatever the registry's method raises.
    """
    for attempt in (1, 2, 3):
        key = launch.caller(directory, start=start)
        if key is None:
            return None
        try:
            return _call(directory, key, method, *arguments)
        except (ConnectionError, EOFError, FileNotFoundError, multiprocess.ProcessError) as error:
            if attempt == 3:
                raise StartFailed(f"the registry in {directory} does not answer: {error!r}") from error
            time.sleep(0.02)  # the arbiter was just ending
    return None


def _call(directory: str, key: bytes, method: str, *arguments: Any) -> Any:
    fd = scope.open_directory(directory)
    try:
        manager = SharedPoolManager(scope.inside(fd, scope.REGISTRY_SOCKET), authkey=key)
        with _authkey(key):
            manager.connect()
            return cast(Any, manager).registry().call(method, *arguments)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _authkey(key: bytes) -> Iterator[None]:
    """Proxies authenticate with the process's own key while they are made; it is put back afterwards."""
    process = multiprocess.process.current_process()
    kept = process.authkey
    process.authkey = key
    try:
        yield
    finally:
        process.authkey = kept


# --- the arbiter's process --------------------------------------------------------------------------------------------


def main(directory: str, ready: int) -> None:
    """Be the arbiter of a scope until nobody needs it. The exit code is never 3 or 4, which gunicorn reads."""
    try:
        code = _serve(directory, ready)
    except SharedPoolError as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        code = 1
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher reads it here
        os.write(2, f"{error!r}".encode())
        code = 1
    os._exit(code)


def _serve(directory: str, ready: int) -> int:
    _reset_signals()
    mutex.prove()  # before any thread: it forks
    raise_file_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    leader = _lead(directory)
    if leader is None:
        _say_ready(ready)  # somebody else leads: whoever started us finds that one
        return 0
    dirfd = scope.open_directory(directory)
    key = secrets.token_bytes(32)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _unlink(dirfd, scope.ARBITER_SOCKET, scope.REGISTRY_SOCKET)
    served = Arbiter(listener, key, _linger())
    _serve_registry(served, dirfd, key)
    listener.bind(scope.inside(dirfd, scope.ARBITER_SOCKET))
    listener.listen(512)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: served.end())
    signal.set_wakeup_fd(-1)
    gc.freeze()
    _say_ready(ready)
    while True:
        served.run()
        if _leave(directory, dirfd, listener):
            os.close(leader)
            return 0
        served.stay()


def _reset_signals() -> None:
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # SIGKILL, SIGSTOP and libc's own
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def raise_file_limit() -> None:
    """It holds a duplicate of every connection of every pool: all the descriptors that it may have."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _linger() -> float:
    """Seconds without clients before it ends: SHAREDPOOL_LINGER, 0 to 86400."""
    text = os.environ.get("SHAREDPOOL_LINGER", "")
    try:
        value = float(text) if text else _DEFAULT_LINGER
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86_400:
        raise StartFailed(f"SHAREDPOOL_LINGER has the value {text!r}; allowed is seconds from 0 to 86400")
    return value


def _lead(directory: str) -> int | None:
    """Take the leader lock: a record lock, which a fork never inherits. None if another arbiter has it."""
    path = os.path.join(directory, scope.LEADER_LOCK)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # the file was exchanged: its lock is worth nothing


def _say_ready(ready: int) -> None:
    os.write(ready, b"ready")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
    os.close(ready)


def _serve_registry(served: Arbiter, dirfd: int, key: bytes) -> None:
    registry = Registry(served)

    class Serving(SharedPoolManager):
        """The manager with the registry behind it."""

    Serving.register("registry", callable=lambda: registry, proxytype=RegistryProxy, exposed=RegistryProxy._exposed_)
    multiprocess.process.current_process().authkey = key
    server = Serving(scope.inside(dirfd, scope.REGISTRY_SOCKET), authkey=key).get_server()
    server.stop_event = threading.Event()
    threading.Thread(target=server.accepter, name="registry", daemon=True).start()


def _leave(directory: str, dirfd: int, listener: socket.socket) -> bool:
    """Go, without leaving anything behind and without answering anybody by half; False if somebody is about to come."""
    lock = os.open(scope.inside(dirfd, scope.START_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    _unlink(dirfd, scope.ARBITER_SOCKET)
    _refuse_callers(listener)
    _unlink(dirfd, scope.REGISTRY_SOCKET, scope.LEADER_LOCK, scope.START_LOCK)
    with contextlib.suppress(OSError):  # somebody keeps something of his own in it
        os.rmdir(directory)
        if scope.is_private(directory):
            os.rmdir(os.path.dirname(directory))
    os.close(lock)
    return True


def _refuse_callers(listener: socket.socket) -> None:
    """Whoever has connected but was not accepted sees the end of his channel and looks for another arbiter."""
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
    listener.close()


def _unlink(dirfd: int, *names: str) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=dirfd)
