"""A process that keeps a pool there, for supervisors: it declares the pool and sees to it that an arbiter runs.

It leases nothing, and no worker needs it for a checkout. When the arbiter dies it starts a new one and declares the
pool again; at SIGTERM, or when its parent dies, it stops that pool and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import selectors
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from . import control, options, scope
from .errors import ArbiterLost, StartFailed
from .pool import mode

if TYPE_CHECKING:
    import multiprocess

log = logging.getLogger("sharedpool")

#: Between two attempts to start an arbiter anew, seconds; doubled after each.
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class ChildSpec:
    """How a supervisor starts and ends the process that keeps a pool; hackney's child_spec, and its words.

    Attributes:
        id: The pool's name.
        target: What the process runs.
        args: Its positional arguments.
        kwargs: Its keyword arguments: the pool's options.
        restart: "permanent": whoever supervises should start it again whenever it ends.
        shutdown: Seconds that it may take to end after SIGTERM.
        type: "worker": it supervises no other processes of the supervisor.
        modules: Where its code is.
    """

    id: str
    target: Callable[..., None]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    restart: str = "permanent"
    shutdown: float = 10.0
    type: str = "worker"
    modules: tuple[str, ...] = (__name__,)

    def process(self) -> multiprocess.Process:
        """A new `multiprocess.Process`, not started and no daemon, that keeps the pool until it is terminated."""
        import multiprocess

        return multiprocess.Process(
            target=self.target, args=self.args, kwargs=dict(self.kwargs), name=f"sharedpool-{self.id}", daemon=False
        )


def child_spec(name: str = "default", **given: Any) -> ChildSpec:
    """How to start a process that keeps this pool there; `.process()` gives one.

    Args:
        name: The pool's name.
        **given: Options (see PoolOptions), as for start_pool.

    Raises:
        OptionError: A name, option or value is wrong; at once.
    """
    name = options.check_pool_name(name)
    options.given(name, given, os.environ)
    return ChildSpec(name, keep, (name,), dict(given))


def keep(name: str, **given: Any) -> None:
    """Keep a pool there until SIGTERM or SIGINT, or until the parent dies; then stop it. For a process's main thread.

    Args:
        name: The pool's name.
        **given: Options, as for start_pool.

    Raises:
        OptionError, PoolOptionsDiffer, StartFailed, AttachRefused, NotSupported: At its start. Later it tries again.
    """
    told, tell = socket.socketpair()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: tell.close())
    ends = [told.fileno(), *_parent(tell)]
    if mode() == "local":
        control.start_pool(name, **given)
        _wait(ends, None, None)
    else:
        _keep_arbiter(name, given, ends)
    control.stop_pool(name)


def _keep_arbiter(name: str, given: dict[str, Any], ends: list[int]) -> None:
    """Have the pool declared at an arbiter that runs, until told to end."""
    arbiter: socket.socket | None = _declare(name, given)
    log.info("pool %r is kept by process %d", name, os.getpid())
    while arbiter is not None and not _wait(ends, arbiter, None):
        log.warning("pool %r: its arbiter has gone; process %d starts a new one", name, os.getpid())
        arbiter.close()
        arbiter = _declare_again(name, given, ends)


def _declare(name: str, given: dict[str, Any]) -> socket.socket:
    """Hold an arbiter and declare the pool there; gives the channel that ends with the arbiter."""
    from . import launch

    channel = launch.hold(scope.directory_for(os.environ, make=True), launch.START_SECONDS)
    try:
        control.start_pool(name, **given)
    except BaseException:
        channel.close()
        raise
    return channel


def _declare_again(name: str, given: dict[str, Any], ends: list[int]) -> socket.socket | None:
    """As `_declare`, again and again until it succeeds; None: told to end."""
    pause = _FIRST_PAUSE
    while True:
        try:
            return _declare(name, given)
        except (StartFailed, ArbiterLost) as error:
            log.warning("pool %r: no arbiter yet, trying again in %.1f s: %s", name, pause, error)
        if _wait(ends, None, pause):
            return None
        pause = min(_LONGEST_PAUSE, 2 * pause)


def _wait(ends: list[int], arbiter: socket.socket | None, seconds: float | None) -> bool:
    """Wait until told to end (True), or until the arbiter has gone or the time is over (False)."""
    with selectors.DefaultSelector() as selector:
        for fd in ends:
            selector.register(fd, selectors.EVENT_READ)
        if arbiter is not None:
            selector.register(arbiter, selectors.EVENT_READ)
        return any(key.fd in ends for key, _ in selector.select(seconds))


def _parent(tell: socket.socket) -> list[int]:
    """A descriptor that can be read when the process that started this one by `multiprocess` has died."""
    import multiprocess.process

    parent = multiprocess.process.parent_process()
    if parent is None:
        return []
    try:
        return [os.pidfd_open(parent.pid)]
    except ProcessLookupError:
        tell.close()
        return []
    except (OSError, AttributeError):  # no pidfds here: its pipe, which siblings may keep open
        return [parent.sentinel]
