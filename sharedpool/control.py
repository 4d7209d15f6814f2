"""The functions of the module: declaring, finding and stopping pools, by hackney's names."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
from typing import Any

from . import options, scope
from .errors import PoolNotFound
from .options import NOT_GIVEN, NotGiven, PoolInfo
from .pool import Permit, Pool, mode
from .stats import PoolStats

log = logging.getLogger("sharedpool")

_lock = threading.Lock()
#: Keeps the arbiter of start() while this process lives: (the process, the channel).
_hold: tuple[int, socket.socket] | None = None


def attach(name: str = "default", *, app: str | None = None, update: bool = True, **given: Any) -> Pool[socket.socket]:
    """A handle on a pool, shared by all processes of the scope. Lazy: no I/O, no thread; safe at import, before forks.

    Args:
        name: The pool's name.
        app: The scope's name; not given: SHAREDPOOL_DIR, else SHAREDPOOL_APP, else "default".
        update: False: options that differ from the pool's raise PoolOptionsDiffer instead of being applied.
        **given: Options (see PoolOptions); they declare the pool. Those of the environment count as given, too.

    Raises:
        OptionError: A name, option or value is wrong; at once, also for the environment's.
    """
    name = options.check_pool_name(name)
    if app is not None:
        app = options.check_app_name(app)
    return Pool(name, options.given(name, given, os.environ), app=app, update=update)


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


def start(dir: str | None = None, app: str | None = None) -> None:  # noqa: A002 - the issue's and the user's word
    """Start the scope's arbiter if none runs; it answers when this returns, and stays while this process lives.

    Args:
        dir: The runtime directory; a 0700 directory `sharedpool` is made inside. Exported as SHAREDPOOL_DIR.
        app: The scope's name instead, exported as SHAREDPOOL_APP. With neither, and neither in the environment, a
            private scope is made for this process and its descendants.

    Raises:
        StartFailed, AttachRefused, NotSupported, OptionError.
    """
    global _hold
    with _lock:
        if dir is not None:
            os.environ["SHAREDPOOL_DIR"] = os.path.abspath(os.fspath(dir))
        elif app is not None:
            os.environ["SHAREDPOOL_APP"] = options.check_app_name(app)
            os.environ.pop("SHAREDPOOL_DIR", None)
        elif mode() == "shared" and not os.environ.get("SHAREDPOOL_DIR") and not os.environ.get("SHAREDPOOL_APP"):
            os.environ["SHAREDPOOL_DIR"] = scope.private_directory(os.environ)
        if mode() == "local" or (_hold is not None and _hold[0] == os.getpid() and _alive(_hold[1])):
            return
        from . import launch
        from .wire import Kind, Message

        channel, _, _ = launch.greet(_directory(), Message(Kind.HOLD), launch.START_SECONDS)
        _hold = (os.getpid(), channel)


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
            _hold[1].close()
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
    name = options.check_pool_name(name)
    values = options.given(name, given, os.environ)
    facts, warnings = _registry("start_pool", name, values, os.getpid(), update, start=True)
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


def get_stats(name: str = "default") -> dict[str, int | str]:
    """Hackney's five numbers: name, max, in_use_count, free_count, queue_count.

    Raises:
        PoolNotFound: There is no such pool.
    """
    return pool_stats(name).as_hackney()


def stop_pool(name: str = "default") -> None:
    """Stop a pool: waiters get PoolStopped at once, idle connections are closed now and leased ones at checkin.

    Nothing happens if there is none.
    """
    _registry("stop_pool", options.check_pool_name(name), start=False)


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

    @staticmethod
    def find_pool(name: str) -> dict[str, Any] | None:
        from . import local

        pool = local.pools().get(name)
        return None if pool is None else {"name": name, "options": pool.options.as_dict(), "arbiter_pid": os.getpid()}

    @staticmethod
    def stats(name: str) -> PoolStats:
        from . import local

        known = local.pools()
        if name not in known:
            raise PoolNotFound(f"there is no pool {name!r}; pools here: {', '.join(sorted(known)) or 'none'}")
        return known[name].stats()

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


def _at_exit() -> None:
    if "sharedpool.attachment" in sys.modules:
        from . import attachment, launch

        launch.note_exit()
        attachment.detach_all()


atexit.register(_at_exit)
