"""The registry: the pools of a scope by name, and their limits. The control plane; no checkout ever calls it.

It is served by a `multiprocess` manager in the arbiter's process. A call costs a connection and pickling; workers use
it to declare and inspect pools, never to lease.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import logging
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import multiprocess.managers

from . import calls, launch, layout, mutex, roster, scope, seat, segment, succession, view
from .arbiter import FOR_EVER, Arbiter
from .drivers import Address
from .errors import DrainTimeout, PoolNotFound, RegistryTimeout, SharedPoolError, StartFailed
from .genserver import PoolServer
from .options import check_pool_name
from .policies import Drain
from .served import Later
from .stats import OTHER_KEYS, PoolStats

T = TypeVar("T")

_DEFAULT_LINGER = 10.0
#: The loop must not wait 5 ms for a registry thread that pickles.
_SWITCH_INTERVAL = 0.0005
#: A call of the registry may take so long, s, and what it asks of a pool whose mutex is busy, too.
_CALL_SECONDS = 10.0
_PATIENCE = 2.0
#: Another arbiter that has lost its directory has so long to come back to it, s; it is looked for so often.
_ASIDE = 5.0
_LOOK_AGAIN = 0.02
_STARTED = time.monotonic_ns()


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
            return pool.info(), warnings

        return self._patiently(declare)

    def stop_pool(self, name: str) -> bool:
        """Stop a pool; False if there was none."""

        def stop() -> bool:
            pool = self._arbiter.pools.get(name)
            if pool is None or pool.stopped:
                return False
            self._arbiter.stop_pool(pool)
            return True

        return self._arbiter.call(stop)

    def find_pool(self, name: str) -> dict[str, Any] | None:
        """A pool's facts, or None."""

        def find() -> dict[str, Any] | None:
            self._arbiter.check_kept(name)
            pool = self._arbiter.pools.get(name)
            return None if pool is None or pool.stopped else cast(dict[str, Any], pool.handle_call("info"))

        return self._patiently(find)

    def stats(self, name: str) -> PoolStats:
        """A pool's numbers; PoolNotFound if there is none."""
        return cast(PoolStats, self._with(name, lambda pool: pool.handle_call("stats")))

    def start_link(
        self, name: str, options: dict[str, Any], pid: int, update: bool, identity: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """As start_pool; a pool that is made by this call stops when the process dies."""

        def declare() -> tuple[dict[str, Any], list[str]]:
            segment.check_identity(identity, f"process {pid}")  # in another PID namespace the number is another's
            known = name in self._arbiter.names()
            pool, warnings = self._arbiter.declare(check_pool_name(name), options, pid, update=update)
            if not known:
                self._arbiter.link(pool, pid)
            return pool.info(), warnings

        return self._patiently(declare)

    def pool_call(self, name: str, request: str, *arguments: Any) -> tuple[Any]:
        """Ask a pool (PoolServer.handle_call); the answer, in a tuple to tell None from no arbiter."""
        return (self._with(name, lambda pool: pool.handle_call(request, *arguments)),)

    def pool_cast(self, name: str, request: str, *arguments: Any) -> tuple[Any]:
        """Tell a pool (PoolServer.handle_cast); what it gives, in a tuple."""
        return (self._with(name, lambda pool: pool.handle_cast(request, *arguments)),)

    def worker_stats(self, name: str) -> dict[int, dict[str, Any]]:
        """What each attached process has counted, by pid; PoolNotFound if there is no such pool."""
        return self._with(name, lambda pool: view.workers(pool.words, pool.segment.geometry))

    def names(self) -> list[str]:
        """The pools there are."""
        return self._arbiter.call(lambda: sorted(self._arbiter.names()))

    def ping(self) -> dict[str, int]:
        """The loop answers: its pid and its incarnation."""
        return self._arbiter.call(lambda: {"pid": os.getpid(), "incarnation": self._arbiter.incarnation})

    def pause(self, name: str) -> bool:
        """Nobody gets anything any more; PoolNotFound if there is no such pool."""
        self._with(name, PoolServer.pause)
        return True

    def resume(self, name: str) -> bool:
        """Those who wait are served; PoolNotFound if there is no such pool."""
        self._with(name, PoolServer.resume)
        return True

    def drain(self, name: str, address: Address | None, seconds: float | None) -> int:
        """Close idle connections now, leased ones at their checkin; gives how many. DrainTimeout, PoolNotFound.

        With `seconds` it waits, in this caller's own thread, until all have ended.
        """
        pool, drain = self._with(name, lambda pool: (pool, pool.drain(address, seconds)))
        if seconds is not None and not drain.done.wait(seconds):
            self._arbiter.call(lambda: _check_drained(pool, drain, seconds))
        return drain.number

    def kill(self, name: str, address: Address | None) -> int:
        """As drain; leased ones are shut down under their users' hands. Gives how many."""
        return self._with(name, lambda pool: pool.drain(address, None, kill=True).number)

    def reset_stats(self, name: str) -> bool:
        """Every counter starts from zero; PoolNotFound if there is no such pool."""
        self._with(name, PoolServer.reset_stats)
        return True

    def stop(self) -> None:
        """End the arbiter: all pools are stopped, waiters sent away."""

        def stop() -> None:
            for pool in list(self._arbiter.pools.values()):
                if not pool.stopped:
                    self._arbiter.stop_pool(pool)

        self._arbiter.call(stop)
        self._arbiter.end(at_once=True)

    def about(self) -> dict[str, Any]:
        """The arbiter's process: pid, incarnation, version, layout, Python, limit of open files, age in seconds."""
        return self._arbiter.call(lambda: _about(self._arbiter))

    def overview(self) -> list[dict[str, Any]]:
        """Every pool: the numbers of PoolStats, its options, whether it is paused, the longest wait and lease."""

        def look() -> list[dict[str, Any]]:
            pools = self._arbiter.pools
            return [_overview(pools[name]) for name in sorted(self._arbiter.names())]

        return self._arbiter.call(look)

    def workers(self, name: str) -> list[dict[str, Any]]:
        """The attached processes: pid, row, seconds since it attached, leases, counters."""
        return self._with(name, _workers)

    def leases(self, name: str) -> list[dict[str, Any]]:
        """The leases in force, the longest first: slot, pid, row, age in seconds, key."""
        return self._with(name, _leases)

    def keys(self, name: str) -> list[dict[str, Any]]:
        """The keys: where they lead, slots by state, how many wait, and counters, as in KeyStats."""
        return self._with(name, _keys)

    def _with(self, name: str, use: Callable[[PoolServer], T]) -> T:
        def run() -> T:
            self._arbiter.check_kept(name)
            pool = self._arbiter.pools.get(name)
            if pool is None or pool.stopped:
                raise PoolNotFound(
                    f"there is no pool {name!r}; pools here: {', '.join(sorted(self._arbiter.names())) or 'none'}"
                )
            return use(pool)

        return self._patiently(run)

    def _patiently(self, run: Callable[[], T]) -> T:
        """Run it in the loop; again, while the pool's mutex is held by somebody who does not let go."""
        limit = time.monotonic() + _PATIENCE
        while True:
            try:
                return self._arbiter.call(run)
            except Later:
                if time.monotonic() > limit:
                    raise RegistryTimeout("the pool's mutex stays busy: is its holder stopped?") from None
            time.sleep(0.005)


def _check_drained(pool: PoolServer, drain: Drain, seconds: float) -> None:
    """Say who keeps a drain from its end.

    Raises:
        DrainTimeout: Something is left of it.
    """
    if drain.left:
        pids = pool.policies.holders(drain)
        who = f"leased by {', '.join(f'process {pid}' for pid in pids)}" if pids else "being closed"
        raise DrainTimeout(
            f"pool {pool.name!r}: {len(drain.left)} of {drain.number} connections have not ended within {seconds:g} s:"
            f" {who}; they are closed as soon as they come back",
            left=len(drain.left), pids=pids,
        )  # fmt: skip


def _about(served: Arbiter) -> dict[str, Any]:
    import resource

    return {
        "pid": os.getpid(),
        "incarnation": served.incarnation,
        "version": getattr(sys.modules[__package__], "__version__", "unknown"),  # not imported: it loads a worker
        "layout": layout.LAYOUT,
        "python": platform.python_version(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "age": (time.monotonic_ns() - _STARTED) / 1e9,
    }


def _overview(pool: PoolServer) -> dict[str, Any]:
    stats = pool.handle_call("stats")
    return {
        "stats": dataclasses.asdict(stats),  # not pickled: versions may differ
        "options": pool.options.as_dict(),
        "paused": bool(pool.words[layout.GATE] & layout.PAUSED),
        "longest_wait": stats.longest_wait,
        "longest_lease": stats.longest_lease,
    }


def _workers(pool: PoolServer) -> list[dict[str, Any]]:
    now, w, geometry = time.monotonic_ns(), pool.words, pool.segment.geometry
    leases = collections.Counter(lease.row for lease in view.leases(w, geometry))
    return [
        {
            "pid": view.row_pid(w, row),
            "row": row,
            "age": (now - w[layout.HEADER + layout.ROW * row + layout.ROW_SINCE]) / 1e9,
            "leases": leases[row],
            "counters": view.worker_counts(w, geometry, row),
        }
        for row in view.live_rows(w, geometry)
    ]


def _leases(pool: PoolServer) -> list[dict[str, Any]]:
    now, w, geometry = time.monotonic_ns(), pool.words, pool.segment.geometry
    return [
        {
            "slot": lease.index,
            "pid": lease.pid,
            "row": lease.row,
            "age": (now - lease.since) / 1e9,
            "key": _key_name(pool, w[geometry.slot_base + layout.SLOT * lease.index + layout.KEY]),
        }
        for lease in view.leases(w, geometry)
    ]


def _keys(pool: PoolServer) -> list[dict[str, Any]]:
    found = view.keys(pool.words, pool.segment.geometry)
    rows = [
        {"key": _key_name(pool, key), "checkouts": numbers.checkouts, **dataclasses.asdict(numbers)}
        for key, numbers in found.items()
    ]
    return sorted(rows, key=lambda row: str(row["key"]))


def _key_name(pool: PoolServer, key: int) -> str:
    """Where a key leads, or its number, if nobody who knows has said so."""
    if not key:
        return OTHER_KEYS
    return pool.key_names.get(key, f"#{key:016x}")


class RegistryProxy(multiprocess.managers.BaseProxy):  # type: ignore[misc]
    """The registry's methods, as a caller sees them."""

    _exposed_ = (
        "start_pool", "stop_pool", "find_pool", "stats", "start_link", "pool_call", "pool_cast", "names", "ping",
        "pause", "resume", "drain", "kill", "reset_stats", "stop",
        "worker_stats", "about", "overview", "workers", "leases", "keys",
    )  # fmt: skip

    def call(self, method: str, *arguments: Any) -> Any:
        return self._callmethod(method, arguments)

    def close(self) -> None:
        """Let go of the server's reference and of the connection, which proxies keep per thread and address.

        An error keeps its proxy alive, in a cycle, and the same address may be another arbiter's at the next call.
        """
        self._close()


class SharedPoolManager(multiprocess.managers.BaseManager):  # type: ignore[misc]
    """The one manager. The arbiter registers its Registry with it; callers connect to it."""


SharedPoolManager.register("registry", proxytype=RegistryProxy, exposed=RegistryProxy._exposed_)


# --- the caller's side ------------------------------------------------------------------------------------------------


def call(directory: str, method: str, *arguments: Any, start: bool, seconds: float = _CALL_SECONDS) -> Any:
    """Call the registry of a scope's arbiter; None if no arbiter runs and none is to be started.

    Raises:
        StartFailed, AttachRefused, and whatever the registry's method raises.
        RegistryTimeout: The arbiter did not answer within `seconds`.
    """
    for attempt in (1, 2, 3):
        key = launch.caller(directory, start=start, seconds=launch.START_SECONDS if start else seconds)
        if key is None:
            if start or not _bereaved(directory):
                return None
            start = True
            continue
        try:
            with calls.within(seconds):
                return _call(directory, key, method, *arguments)
        except BlockingIOError as error:
            raise RegistryTimeout(f"the registry in {directory} did not answer within {seconds:g} s") from error
        except (ConnectionError, EOFError, FileNotFoundError, multiprocess.ProcessError) as error:
            if attempt == 3:
                raise StartFailed(f"the registry in {directory} does not answer: {error!r}") from error
            time.sleep(0.02)  # the arbiter was just ending
    return None


def _bereaved(directory: str) -> bool:
    """Whether processes have pools here whose arbiter has died: a successor starts, or is started to be asked."""
    noted = []
    with contextlib.suppress(FileNotFoundError):
        fd = scope.open_directory(directory)
        try:
            noted = roster.read(fd, succession.place())
        finally:
            os.close(fd)
    found, kept = succession.find(succession.scope_id(directory), noted)
    for taken in found.values():
        taken.let_go()
    return bool(kept) or any(not taken.words[layout.GATE] & layout.STOPPED for taken in found.values())


def _call(directory: str, key: bytes, method: str, *arguments: Any) -> Any:
    fd = scope.open_directory(directory)
    try:
        manager = SharedPoolManager(scope.inside(fd, scope.REGISTRY_SOCKET), authkey=key, serializer=calls.SERIALIZER)
        manager.connect()
        registry = cast(Any, manager).registry()  # with the manager's key: the process's own is the application's
        try:
            return registry.call(method, *arguments)
        finally:
            registry.close()
    finally:
        os.close(fd)


# --- the arbiter's process --------------------------------------------------------------------------------------------


def main(directory: str, ready: int) -> None:
    """Be the arbiter of a scope until nobody needs it. The exit code is never 3 or 4, which gunicorn reads."""
    code = 0
    try:
        if not _serve(directory, lambda: _say_ready(ready), _linger()):
            _say_ready(ready)  # somebody else leads: whoever started us finds that one
    except SharedPoolError as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        code = 1
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher reads it here
        os.write(2, f"{error!r}".encode())
        code = 1
    os._exit(code)


def serve(directory: str, ready: Callable[[], None]) -> None:
    """Be the arbiter of a scope in the foreground, clients or not, until SIGTERM or SIGINT.

    A signal drains: it goes when its last client has, after 90 s at the latest; a second signal ends it at once.

    Args:
        directory: The scope's runtime directory.
        ready: Called once it answers.

    Raises:
        StartFailed: Another arbiter serves the scope, or none can; NotSupported: see mutex.prove.
    """
    if not _serve(directory, ready, FOR_EVER):
        raise StartFailed(f"another arbiter serves {directory} already")


def _serve(directory: str, ready: Callable[[], None], linger: float) -> bool:
    """Be the arbiter until it is time to go; False if somebody else is."""
    _reset_signals()
    os.umask(0o077)
    mutex.prove()  # before any thread: it forks
    raise_file_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    here = seat.Seat(directory)
    identity = succession.scope_id(directory)
    heritage = _take(here, identity)
    if heritage is None:
        return False
    key = secrets.token_bytes(32)
    served = Arbiter(None, key, linger, scope=identity, seat=here)
    _log_to(served)
    for name, names in heritage.kept.items():
        served.keep(name, names)
    for name, taken in heritage.inherited.items():
        served.inherit(name, taken, heritage.noted)
    here.doors += [_RegistryDoor(served, here.fd, key), lambda: served.listen(seat.listen(here.fd))]
    here.open()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: served.end())
    signal.set_wakeup_fd(-1)
    gc.freeze()
    ready()
    try:
        while True:
            served.run()
            if here.leave(keep_roster=served.is_hidden_from_an_heir(), refuse=served.stop_listening):
                return True
            served.stay()
    finally:
        served.terminate("the arbiter ends")


@dataclasses.dataclass(slots=True)
class _Heritage:
    """What there is to go on with: see succession.find."""

    noted: list[roster.Attached]
    inherited: dict[str, segment.Segment]
    kept: dict[str, succession.Kept]


def _take(here: seat.Seat, identity: str) -> _Heritage | None:
    """Take the seat and all that was left behind; None if another arbiter lives.

    That one may have lost its directory, so that nothing in this one tells of it. But it has a lock on each of its
    segments. It comes back to its place within a second or so, and has that time.
    """
    until = time.monotonic() + _ASIDE
    while True:
        with contextlib.suppress(FileNotFoundError):  # the directory was removed just now
            if here.take():
                noted = roster.read(here.fd, succession.place())
                inherited, kept = succession.find(identity, noted)
                if all(taken.claim() for taken in inherited.values()):
                    return _Heritage(noted, inherited, kept)
                for taken in inherited.values():
                    taken.let_go()
                here.give_up()
        if time.monotonic() > until or _is_served(here.directory):
            return None
        time.sleep(_LOOK_AGAIN)


def _is_served(directory: str) -> bool:
    channel = launch.connect(directory)
    if channel is not None:
        channel.close()
    return channel is not None


def _log_to(served: Arbiter) -> None:
    """What the arbiter logs goes to the workers' logging; its own process has no place for it."""
    logger = logging.getLogger("sharedpool")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.addHandler(served.records)


def _reset_signals() -> None:
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # SIGKILL, SIGSTOP and libc's own
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # memory that is not to be had is an error
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


def _say_ready(ready: int) -> None:
    os.write(ready, b"ready")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
    os.close(ready)


class _RegistryDoor:
    """Serves the registry at its socket in the runtime directory; called again, at a new socket."""

    def __init__(self, served: Arbiter, directory: int, key: bytes) -> None:
        self._of = served, directory, key
        self._server: Any = None

    def __call__(self) -> None:
        """Open it."""
        if self._server is None:
            self._server = _serve_registry(*self._of)
        else:
            calls.listen_again(self._server, scope.inside(self._of[1], scope.REGISTRY_SOCKET))


def _serve_registry(served: Arbiter, dirfd: int, key: bytes) -> Any:
    """Answer calls of the registry in threads of their own; gives the manager's server."""
    registry = Registry(served)

    class Serving(SharedPoolManager):
        """The manager with the registry behind it."""

    Serving.register("registry", callable=lambda: registry, proxytype=RegistryProxy, exposed=RegistryProxy._exposed_)
    address = scope.inside(dirfd, scope.REGISTRY_SOCKET)
    server = Serving(address, authkey=key, serializer=calls.SERIALIZER).get_server()
    server.stop_event = threading.Event()
    threading.Thread(target=server.accepter, name="registry", daemon=True).start()
    return server
