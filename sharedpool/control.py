"""The functions of the module: declaring, finding and stopping pools, by hackney's names."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import sys
import threading
from typing import Any

from . import drivers, options, scope, wire
from .errors import OptionError, PoolNotFound, PoolStopped, RegistryTimeout, StartFailed
from .lease import Lease
from .options import NOT_GIVEN, NotGiven, PoolInfo
from .pool import Permit, Pool, mode, parse_url
from .stats import PoolStats
from .wire import Kind, Message

log = logging.getLogger("sharedpool")

_lock = threading.Lock()
#: Keeps the arbiter of start() while this process lives.
_hold: socket.socket | None = None
#: The handles behind checkout(): by what chooses the scope, the pool's name and the options given.
_handles: dict[Any, Pool[socket.socket]] = {}


def attach(
    name: str = "default", *, app: str | None = None, update: bool = True,
    transport: str | drivers.Driver[Any] = "tcp", **given: Any,
) -> Pool[socket.socket]:  # fmt: skip
    """A handle on a pool, shared by all processes of the scope. Lazy: no I/O, no thread; safe at import, before forks.

    Args:
        name: The pool's name.
        app: The scope's name; not given: SHAREDPOOL_DIR, else SHAREDPOOL_APP, else "default".
        update: False: options that differ from the pool's raise PoolOptionsDiffer instead of being applied.
        transport: What its checkouts are by where they do not say: "tcp", "ssl", "unix", "permit", or a driver.
        **given: Options (see PoolOptions); they declare the pool. Those of the environment count as given, too.

    Raises:
        OptionError: A name, option or value is wrong; at once, also for the environment's.
    """
    name = options.check_pool_name(name)
    if app is not None:
        app = options.check_app_name(app)
    return Pool(name, options.given(name, given, os.environ), app=app, update=update, transport=transport)


def permit(
    name: str, *, app: str | None = None, update: bool = True,
    checkout_timeout: float | NotGiven | None = NOT_GIVEN, priority: str = "normal", **given: Any,
) -> Permit:  # fmt: skip
    """A cap for anything, without a connection: a context manager and a decorator.

    Args:
        name: The pool's name; all processes of the scope that use it share the cap.
        app: As for attach.
        update: As for attach.
        checkout_timeout: Seconds to wait for a permit; None: no limit.
        priority: "normal", or "high": served before those of normal priority, as for Pool.checkout.
        **given: Options, as for attach: max_connections is the cap.

    Raises:
        OptionError: As for attach.
    """
    if checkout_timeout is not NOT_GIVEN:
        given["checkout_timeout"] = checkout_timeout
    name = options.check_pool_name(name)
    if app is not None:
        app = options.check_app_name(app)
    values = options.given(name, given, os.environ)
    pool: Pool[None] = Pool(name, values, app=app, update=update, transport="permit")
    return Permit(pool, name, NOT_GIVEN, options.check_priority(priority))


def _after_fork_in_child() -> None:
    global _lock, _hold
    _lock = threading.Lock()  # another thread of the parent may have had it
    if _hold is not None:
        _hold.close()  # the arbiter stays for the parent, no longer
        _hold = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def start(dir: str | None = None, app: str | None = None) -> None:  # noqa: A002 - the issue's and the user's word
    """Start the scope's arbiter if none runs; it answers when this returns, and stays while this process lives.

    Args:
        dir: The runtime directory; a 0700 directory `sharedpool` is made inside. Exported as SHAREDPOOL_DIR.
        app: The scope's name instead, exported as SHAREDPOOL_APP. With neither, and neither in the environment, a
            private scope is made for this process and its descendants.

    Raises:
        StartFailed, AttachRefused, NotSupported, OptionError.
    """
    with _lock:
        if dir is not None:
            os.environ["SHAREDPOOL_DIR"] = os.path.abspath(os.fspath(dir))
        elif app is not None:
            os.environ["SHAREDPOOL_APP"] = options.check_app_name(app)
            os.environ.pop("SHAREDPOOL_DIR", None)
        elif mode() == "shared" and not os.environ.get("SHAREDPOOL_DIR") and not os.environ.get("SHAREDPOOL_APP"):
            os.environ["SHAREDPOOL_DIR"] = scope.private_directory(os.environ)
        _keep()


def keep() -> None:
    """As start, in the environment's scope, whichever that is: no private one is made.

    Raises:
        StartFailed, AttachRefused, NotSupported, OptionError.
    """
    with _lock:
        _keep()


def _keep() -> None:
    global _hold
    if mode() == "local" or (_hold is not None and _alive(_hold)):
        return
    from . import launch

    _hold = launch.hold(_directory(), launch.START_SECONDS)


def _alive(channel: socket.socket) -> bool:
    try:
        channel.setblocking(False)
        return channel.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def stop() -> None:
    """Stop all pools of the scope and end its arbiter, which has gone when this returns. Waiters get PoolStopped.

    Nothing happens if none runs.
    """
    global _hold
    if mode() == "local":
        _registry("stop", start=False)
        return
    from . import launch

    directory = _directory(make=False)
    _registry("stop", start=False)
    launch.wait_until_gone(directory)
    with _lock:
        if _hold is not None:
            _hold.close()
            _hold = None
        if scope.is_private(directory):
            os.environ.pop("SHAREDPOOL_DIR", None)


def start_pool(name: str = "default", *, update: bool = True, **given: Any) -> PoolInfo:
    """Make a pool, or find the one that there is; an arbiter is started if none runs.

    Options that differ from an existing pool's are applied, with a WARNING that names old and new, where they can
    change while it runs.

    Args:
        name: The pool's name.
        update: False: options that differ raise instead.
        **given: Options (see PoolOptions), and hackney's names `timeout` (idle_timeout) and `pool_size`.

    Raises:
        OptionError, PoolOptionsDiffer, StartFailed, AttachRefused, NotSupported.
    """
    return _declare("start_pool", name, update, given)


def _declare(method: str, name: str, update: bool, given: dict[str, Any], more: tuple[Any, ...] = ()) -> PoolInfo:
    name = options.check_pool_name(name)
    values = options.given(name, given, os.environ)
    facts, warnings = _registry(method, name, values, os.getpid(), update, *more, start=True)
    for text in warnings:
        log.warning("%s", text)
    return _info(facts)


def find_pool(name: str = "default") -> PoolInfo | None:
    """The pool of that name, or None; never a stale one, and no arbiter is started to find out."""
    facts = _registry("find_pool", options.check_pool_name(name), start=False)
    return None if facts is None else _info(facts)


def pool_stats(name: str = "default") -> PoolStats:
    """The pool's numbers, without attaching to it.

    Raises:
        PoolNotFound: There is none.
    """
    found = _registry("stats", options.check_pool_name(name), start=False)
    if found is None:
        raise PoolNotFound(f"there is no pool {name!r}: no arbiter runs in this scope")
    assert isinstance(found, PoolStats)
    return found


def worker_stats(name: str = "default") -> dict[int, dict[str, Any]]:
    """What each attached process has counted, host-wide, by pid: the counters of PoolStats, and "closes" by reason.

    Raises:
        PoolNotFound: There is no such pool.
    """
    found = _registry("worker_stats", options.check_pool_name(name), start=False)
    if found is None:
        raise PoolNotFound(f"there is no pool {name!r}: no arbiter runs in this scope")
    return dict(found)


def get_stats(name: str = "default") -> dict[str, int | str]:
    """Hackney's five numbers: name, max, in_use_count, free_count, queue_count.

    Raises:
        PoolNotFound: There is no such pool.
    """
    return pool_stats(name).as_hackney()


def checkout(
    host: str, port: int = 0, transport: str | None = None, *, pool: str = "default",
    connect_timeout: float | NotGiven = NOT_GIVEN, checkout_timeout: float | NotGiven | None = NOT_GIVEN,
    priority: str = "normal", **given: Any,
) -> Lease[socket.socket]:  # fmt: skip
    """Lease a connection of a pool, by its name alone; waits in line when the cap is reached.

    A pool that is not there is made: with the options given, as `attach` does; the pool "default" without any, too.

    Args:
        host: A host name or address; for `transport="unix"` the socket's path, port 0. Or a URL, `tcp://h:p`.
        port: The port.
        transport: "tcp" (the default) or "unix".
        pool: The pool's name.
        connect_timeout: Seconds for opening a connection. Not given: 8.0, or what the environment says for this pool.
        checkout_timeout: Seconds for all of it; None: no limit. Not given: connect_timeout.
        priority: "normal", or "high": served before those of normal priority, as for Pool.checkout.
        **given: Options (see PoolOptions), as for attach.

    Raises:
        PoolNotFound: Nobody declared a pool of that name, and no options were given.
        PoolTimeout, ConnectTimeout, ConnectFailed, TooManyWaiting, OptionError, StartFailed, AttachRefused.
        PoolStopped: The pool was stopped while this checkout waited.
    """
    handle = _handle(pool, given)
    how: dict[str, Any] = {
        "checkout_timeout": checkout_timeout, "connect_timeout": connect_timeout, "priority": priority,
    }  # fmt: skip
    try:
        return handle.checkout(host, port, transport, **how)
    except PoolStopped as error:
        if error.waited:
            raise
    if pool != "default" and not handle.declares:
        raise PoolNotFound(f"pool {pool!r} was stopped, and no options were given to declare it with")
    start_pool(pool, **given)
    return handle.checkout(host, port, transport, **how)


def checkin(lease: Lease[Any]) -> None:
    """Give a connection back: `lease.checkin()`. One that is closed, or has unread bytes, is closed for the next.

    Raises:
        LeaseError: It is not in force here (checked in before, say); nothing changes.
        OptionError: This is no lease.
    """
    if not isinstance(lease, Lease):
        raise OptionError(
            f"option 'lease' has the value {lease!r} (from the call); allowed is what checkout gave",
            option="lease", value=lease, source="the call", allowed="a Lease",
        )  # fmt: skip
    lease.checkin()


def count(name: str = "default", key: tuple[str, int] | tuple[str, int, str] | str | None = None) -> int:
    """Idle connections of a pool, over all processes; with a key those to that address only.

    Args:
        name: The pool's name.
        key: (host, port), (host, port, transport), or a URL, `tcp://h:p` or `unix:///path`.

    Raises:
        PoolNotFound: There is no such pool.
        OptionError: The key is none.
    """
    return int(_ask("pool_call", name, "count", *([] if key is None else [_address(key)])))


def max_connections(name: str = "default") -> int:
    """The cap of a pool.

    Raises:
        PoolNotFound: There is no such pool.
    """
    return int(_ask("pool_call", name, "max_connections"))


def set_max_connections(name: str, value: int) -> None:
    """Change the cap of a pool at once: raised, it serves waiters in their order; lowered, it closes idle ones.

    Leased ones beyond a lowered cap are closed when they come back.

    Raises:
        PoolNotFound: There is no such pool.
        OptionError: The value is not allowed.
    """
    _ask("pool_cast", name, "set_max_connections", options.check("max_connections", value), os.getpid())


def timeout(name: str = "default") -> float | None:
    """The idle timeout of a pool in seconds; None: idle connections stay.

    Raises:
        PoolNotFound: There is no such pool.
    """
    value = _ask("pool_call", name, "timeout")
    return None if value is None else float(value)


def set_timeout(name: str, seconds: float | None) -> None:
    """Change the idle timeout of a pool at once, for those that are idle already, too.

    Args:
        name: The pool's name.
        seconds: How long a connection may be idle; None: for ever.

    Raises:
        PoolNotFound: There is no such pool.
        OptionError: The value is not allowed.
    """
    _ask("pool_cast", name, "set_timeout", options.check("timeout", seconds), os.getpid())


def notify(name: str, message: Any) -> int:
    """Send a message to every process attached to a pool, where `Pool.on_notify` has its callbacks.

    Args:
        name: The pool's name.
        message: Anything that JSON knows, some 60,000 bytes at most; it arrives as JSON gives it back.

    Returns:
        How many processes got it. One that does not read its events (a stopped one, say) may not.

    Raises:
        PoolNotFound: There is no such pool.
        OptionError: JSON cannot say it, or it is too long.
    """
    return int(_ask("pool_cast", name, "notify", _as_json(message)))


def start_link(name: str = "default", *, update: bool = True, **given: Any) -> PoolInfo:
    """As start_pool; a pool that is made by this call stops when this process dies.

    A pool that is there already stays as long as before: it belongs to whoever made it.

    Args:
        name: The pool's name.
        update: As for start_pool.
        **given: As for start_pool.

    Raises:
        OptionError, PoolOptionsDiffer, StartFailed, AttachRefused, NotSupported.
    """
    return _declare("start_link", name, update, given, _identity())


def _identity() -> tuple[dict[str, Any], ...]:
    if mode() == "local":
        return ()
    from . import segment

    return (dict(segment.identity()),)


def _handle(name: str, given: dict[str, Any]) -> Pool[socket.socket]:
    """The handle that stands for these arguments: one for each scope, name and set of options."""
    read = os.environ.get
    try:
        key = (name, read("SHAREDPOOL_DIR"), read("SHAREDPOOL_APP"), read("SHAREDPOOL_MODE"), frozenset(given.items()))
        known = _handles.get(key)
    except TypeError:  # a value that is no option's
        return attach(name, **given)
    if known is None:
        known = _handles.setdefault(key, attach(name, **given))
    return known


def _as_json(message: Any) -> str:
    try:
        wire.pack(Message(Kind.NOTIFY, body={"message": message}))
        return json.dumps(message, allow_nan=False)
    except (TypeError, ValueError, RecursionError, wire.WireError) as error:
        raise OptionError(
            f"option 'message' cannot be sent: {error}; allowed is what JSON knows, {wire.LONGEST} bytes at most",
            option="message", value=message, source="the call", allowed="what JSON knows",
        ) from error  # fmt: skip


def _ask(method: str, name: str, request: str, *arguments: Any) -> Any:
    """A call or a cast of the pool's object in the arbiter."""
    answer = _registry(method, options.check_pool_name(name), request, *arguments, start=False)
    if answer is None:
        raise PoolNotFound(f"there is no pool {name!r}: no arbiter runs in this scope")
    return answer[0]


def stop_pool(name: str = "default") -> None:
    """Stop a pool: waiters get PoolStopped at once, idle connections are closed now and leased ones at checkin.

    Nothing happens if there is none.
    """
    _registry("stop_pool", options.check_pool_name(name), start=False)


# --- operations, from any process of the scope ------------------------------------------------------------------------

Key = tuple[str, int] | tuple[str, int, Any] | str


def pause(name: str = "default", *, app: str | None = None) -> None:
    """From now on nobody gets a connection or permit: checkouts wait within their deadlines. Leases go on.

    Args:
        name: The pool's name.
        app: The scope's name, if it is not the environment's.

    Raises:
        PoolNotFound: There is no such pool.
        RegistryTimeout: The arbiter does not answer.
    """
    _operate("pause", name, app=app)


def resume(name: str = "default", *, app: str | None = None) -> None:
    """End a pause: those who wait are served at once, in their order. Nothing happens to a pool that is not paused.

    Raises:
        PoolNotFound, RegistryTimeout: As for pause.
    """
    _operate("resume", name, app=app)


def drain(name: str = "default", key: Key | None = None, *, wait: float | None = None, app: str | None = None) -> int:
    """Close connections: idle ones now, leased ones when they are given back. The pool stays usable; new ones open.

    Args:
        name: The pool's name.
        key: Only those to this address: (host, port), (host, port, transport), or a URL. None: all.
        wait: Return only when the remote has seen the end of all of them, after so many seconds at most. A
            DROP DATABASE needs it.
        app: As for pause.

    Returns:
        How many there were.

    Raises:
        DrainTimeout: Not all have ended in time; it names the processes that lease the rest, which are still closed
            when they come back.
        PoolNotFound, RegistryTimeout, OptionError.
    """
    if wait is not None:
        wait = options.check_seconds("wait", wait)
    drained = _operate("drain", name, _address(key), wait, app=app, seconds=10.0 + (wait or 0.0))
    assert isinstance(drained, int)
    return drained


def kill(name: str = "default", key: Key | None = None, *, app: str | None = None) -> int:
    """Close connections at once, leased ones too: their users get errors, and their checkin then closes them.

    A lease stays in force, and its permit taken, until its user gives it back. Permits without a connection are not
    concerned.

    Args:
        name: The pool's name.
        key: As for drain.
        app: As for pause.

    Returns:
        How many there were.

    Raises:
        PoolNotFound, RegistryTimeout, OptionError.
    """
    killed = _operate("kill", name, _address(key), app=app)
    assert isinstance(killed, int)
    return killed


def reset_stats(name: str = "default", *, app: str | None = None) -> None:
    """Let every counter of the pool's statistics start from zero. What is open, leased or waiting still counts.

    A worker's own numbers (Pool.worker_stats) go on.

    Raises:
        PoolNotFound, RegistryTimeout: As for pause.
    """
    _operate("reset_stats", name, app=app)


def ping(*, app: str | None = None, timeout: float = 2.0) -> dict[str, int] | None:
    """Ask the scope's arbiter for an answer from its loop: {"pid": ..., "incarnation": ...}.

    None if none runs, or none answers within `timeout` seconds. None is started.
    """
    seconds = options.check_seconds("timeout", timeout)
    if mode() == "local":
        return {"pid": os.getpid(), "incarnation": 1}
    try:
        answer: dict[str, int] | None = _in_scope("ping", app=app, seconds=seconds)
    except (RegistryTimeout, StartFailed):
        return None
    return answer


def _operate(method: str, name: str, *arguments: Any, app: str | None, seconds: float = 10.0) -> Any:
    """Do something with a pool that must be there."""
    name = options.check_pool_name(name)
    if mode() == "local":
        from . import local

        return getattr(local.find(name, app=app), method)(*arguments)
    answer = _in_scope(method, name, *arguments, app=app, seconds=seconds)
    if answer is None:
        raise PoolNotFound(f"there is no pool {name!r}: no arbiter runs in this scope")
    return answer


def _in_scope(method: str, *arguments: Any, app: str | None, seconds: float) -> Any:
    from . import manager

    directory = scope.directory_for(os.environ, app=app, make=False)
    return manager.call(directory, method, *arguments, start=False, seconds=seconds)


def _address(key: Key | None) -> tuple[str, str, int] | None:
    """A key as the drivers write it: (transport, host, port).

    Raises:
        OptionError: It is none.
    """
    if key is None:
        return None
    if isinstance(key, str):
        transport, host, port = parse_url(key, 0, None)
    else:
        transport, host, port = _parts(key)
    driver = drivers.find(transport)
    return (driver.name, *driver.address(host, port))


def _parts(key: Any) -> tuple[str, str, int]:
    if isinstance(key, tuple | list) and len(key) in (2, 3):
        host, port, transport = (*key, "tcp")[:3]
        return transport, host, port
    raise options.refusal("key", key, "(host, port), (host, port, transport), a URL, or None for all")


def _registry(method: str, *arguments: Any, start: bool) -> Any:
    """Call the registry. Imported here: a worker that only leases connections never needs it (80 ms)."""
    if mode() == "local":
        return getattr(_LocalRegistry, method)(*arguments)
    from . import manager

    return manager.call(_directory(make=start), method, *arguments, start=start)


class _LocalRegistry:
    """The registry's methods in local mode, where this process's own pools are all there are."""

    @staticmethod
    def start_pool(name: str, given: dict[str, Any], _pid: int, update: bool) -> tuple[dict[str, Any], list[str]]:
        from . import local

        local.declare(name, given, update=update)
        return _LocalRegistry.find_pool(name) or {}, []

    start_link = start_pool  # its pools end with this process anyway

    @staticmethod
    def find_pool(name: str) -> dict[str, Any] | None:
        from . import local

        pool = local.pools().get(name)
        return None if pool is None else {"name": name, "options": pool.options.as_dict(), "arbiter_pid": os.getpid()}

    @staticmethod
    def stats(name: str) -> PoolStats:
        found: PoolStats = _LocalRegistry._known(name).stats()
        return found

    @staticmethod
    def pool_call(name: str, request: str, *arguments: Any) -> tuple[Any]:
        return (_LocalRegistry._known(name).handle_call(request, *arguments),)

    @staticmethod
    def pool_cast(name: str, request: str, *arguments: Any) -> tuple[Any]:
        return (_LocalRegistry._known(name).handle_cast(request, *arguments),)

    @staticmethod
    def _known(name: str) -> Any:
        from . import local

        known = local.pools()
        if name not in known:
            raise PoolNotFound(f"there is no pool {name!r}; pools here: {', '.join(sorted(known)) or 'none'}")
        return known[name]

    @staticmethod
    def worker_stats(name: str) -> dict[int, dict[str, Any]]:
        from . import local

        stats, counters = _LocalRegistry.stats(name), local.pools()[name].own_counters()
        return {os.getpid(): {"checkouts": stats.checkouts, **counters, "closes": stats.closes}}

    @staticmethod
    def stop_pool(name: str) -> None:
        from . import local

        if name in local.pools():
            local.pools()[name].stop()

    @staticmethod
    def stop() -> None:
        from . import local

        for pool in local.pools().values():
            pool.stop(ended=True)


def _info(facts: dict[str, Any]) -> PoolInfo:
    return PoolInfo(name=facts["name"], options=options.make(facts["options"]), arbiter_pid=facts["arbiter_pid"])


def _directory(*, make: bool = True) -> str:
    return scope.directory_for(os.environ, make=make)


def leave() -> None:
    """This process is about to end: leave every pool, and start no arbiter any more."""
    if "sharedpool.attachment" in sys.modules:
        from . import attachment, launch

        launch.note_exit()
        attachment.detach_all()


atexit.register(leave)
