"""What users hold: a Pool, which attaches at first use, and the context managers around its leases."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from sys import _getframe
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, Protocol, Self, TypeVar
from urllib.parse import unquote, urlsplit

from . import options
from .errors import NotSupported, OptionError, PoolStopped
from .events import OURS, Place, where_taken
from .hooks import Callback, Hooks
from .lease import Lease
from .notices import Callbacks, Notices
from .options import NOT_GIVEN, NotGiven
from .stats import KeyStats, PoolStats

if TYPE_CHECKING:
    from .attachment import Attachment
    from .drivers import Driver

T = TypeVar("T")
P = ParamSpec("P")

MODES: Final = ("shared", "local")

log = logging.getLogger("sharedpool")


class Attached(Protocol):
    """What a Pool needs once it is attached; shared over processes, or local to this one."""

    lost: bool
    notices: Notices
    hooks: Hooks
    on_checkout: list[Callback]
    noting: bool
    places: dict[int, Place | None]

    @property
    def welcome(self) -> Mapping[str, Any]: ...

    def route(self, transport: Any, host: str, port: int) -> Any: ...
    def urgent(self, route: Any) -> Any: ...
    def take_own(self, route: Any) -> Lease[Any] | None: ...
    def checkout(self, route: Any, patience: float | None, connect_timeout: float) -> Lease[Any]: ...
    def stats(self) -> PoolStats: ...
    def own_counters(self) -> dict[str, int]: ...
    def key_stats(self) -> dict[str, KeyStats]: ...
    def prewarm(self, route: Any, count: int | None, connect_timeout: float) -> None: ...
    def detach(self) -> None: ...


def mode() -> str:
    """Either "shared" or "local": SHAREDPOOL_MODE, else shared on Linux and local elsewhere.

    Raises:
        OptionError: SHAREDPOOL_MODE has another value.
        NotSupported: Shared mode cannot work with this interpreter or platform.
    """
    chosen = os.environ.get("SHAREDPOOL_MODE", "").strip().lower()
    if chosen and chosen not in MODES:
        raise OptionError(
            f"option 'mode' has the value {chosen!r} (from the environment's SHAREDPOOL_MODE); allowed is one of"
            f" {', '.join(MODES)}",
            option="mode", value=chosen, source="the environment's SHAREDPOOL_MODE", allowed=MODES,
        )  # fmt: skip
    if chosen == "local":
        return "local"
    if sys.platform != "linux":
        if chosen == "shared":
            raise NotSupported(f"shared mode needs Linux, this is {sys.platform}; set SHAREDPOOL_MODE=local")
        _warn_local()
        return "local"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise NotSupported(
            "shared mode relies on the GIL, and this interpreter runs without it; use a build with the GIL,"
            " or set PYTHON_GIL=1, or SHAREDPOOL_MODE=local for one process"
        )
    return "shared"


@functools.cache
def _warn_local() -> None:
    log.warning("sharedpool is in local mode on %s: each process has a cap of its own", sys.platform)


def _check_uwsgi() -> None:
    """Refuse to attach in the process that uWSGI is going to fork: it does not run Python's functions after a fork.

    Its workers would take the master's row and its channels for their own. (Its option py-call-osafterfork ends the
    workers of CPython 3.13.)

    Raises:
        NotSupported: This is uWSGI's master, or its first process before the others.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    if uwsgi is None or not hasattr(uwsgi, "masterpid"):  # the module is uWSGI's own, and there only under it
        return
    if uwsgi.worker_id() == 0 and uwsgi.mule_id() == 0 and uwsgi.masterpid() in (0, os.getpid()):
        raise NotSupported(
            "uWSGI forks its workers without telling Python, so no pool can be used before: make the handle at import"
            " and use it in a worker, or set lazy-apps = true"
        )


@dataclasses.dataclass(slots=True)
class _Shared:
    """This process's attachment to one pool, for all handles on it."""

    attached: Attachment
    handles: weakref.WeakSet[_Handle[Any]]
    declared: dict[str, Any]


_sharing = threading.Lock()
#: Held while modules are loaded at the first use, and while this process forks: a child would wait for ever for a
#: module that a thread of its parent was loading.
_loading = threading.RLock()
_shared: dict[tuple[str, str], _Shared] = {}


def _last_handle(pool: _Handle[Any], attached: Attached) -> bool:
    """One handle less; whether none is left."""
    with _sharing:
        for key, shared in list(_shared.items()):
            if shared.attached is attached:
                shared.handles.discard(pool)
                if shared.handles and not attached.lost:
                    return False
                del _shared[key]
    return True


def _warn(texts: list[str]) -> None:
    for text in texts:
        log.warning("%s", text)


class _Handle(Generic[T]):
    """What a Pool is made of; compiled, it is a class that cannot be changed."""

    def __init__(
        self, name: str, given: dict[str, Any], *, app: str | None = None, update: bool = True,
        transport: str | Driver[Any] = "tcp",
    ) -> None:  # fmt: skip
        self.name = name
        self.transport = transport
        self._given = given
        self._app = app
        self._update = update
        made = options.make(given)
        self._connect: float = made.connect_timeout
        self._limited = made.checkout_timeout is not NOT_GIVEN
        self._patience = made.checkout_timeout if self._limited else made.connect_timeout
        self._lock = threading.Lock()
        self._attached: Attached | None = None
        self._routes: dict[tuple[Any, str, int], Any] = {}
        self._notices: Callbacks = {}
        self._callbacks: list[tuple[str, Callback]] = []
        self._warm: dict[tuple[Any, str, int], int | None] = {}
        _pools.add(self)

    @property
    def declares(self) -> bool:
        """Whether options were given, so that this handle makes a pool that is not there."""
        return bool(self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what arrives in a spawned process, is another handle on the pool, not attached yet."""
        make = functools.partial(type(self), app=self._app, update=self._update, transport=self.transport)
        return make, (self.name, self._given)

    def __repr__(self) -> str:
        return f"<Pool {self.name!r}{'' if self._attached is None else ' attached'}>"

    # --- attaching ----------------------------------------------------------------------------------------------------

    def open(self, timeout: float = 30.0) -> Self:
        """Attach now instead of at the first use, to fail early.

        Raises:
            StartFailed, AttachRefused, PoolNotFound, PoolOptionsDiffer, NotSupported.
        """
        if threading.Lock is not _made_of:
            _locks_anew()
        with self._lock:
            if self._attached is None:
                self._routes = {}
                attached = self._attach(timeout)
                attached.notices.join(self._notices)
                for event, callback in self._callbacks:
                    attached.hooks.of(event).append(callback)
                self._attached = attached
                for (transport, host, port), count in self._warm.items():
                    attached.prewarm(attached.route(transport, host, port), count, self._connect)
        return self

    def _attach(self, seconds: float) -> Attached:
        defaults = _configured.get(self.name) if self._app is None else None
        if mode() == "local":
            from . import local

            return local.attach(self.name, self._given, app=self._app, update=self._update, defaults=defaults)
        _check_uwsgi()
        with _loading:
            from . import scope
            from .attachment import Attachment

        directory = scope.directory_for(os.environ, app=self._app)
        ours = {name: value for name, value in self._given.items() if name not in options.OF_THE_HANDLE}
        with _sharing:
            shared = _shared.get((directory, self.name))
            if shared is not None and not shared.attached.lost:
                if ours and ours != shared.declared:
                    _warn(shared.attached.channel.declare(ours, update=self._update))
                    shared.declared.update(ours)
                shared.handles.add(self)
                return shared.attached
            attached = Attachment(
                directory, self.name, ours, declares=bool(self._given), update=self._update, seconds=seconds,
                defaults=defaults,
            )  # fmt: skip
            _shared[directory, self.name] = _Shared(attached, weakref.WeakSet([self]), ours)
        _warn(attached.welcome["warnings"])
        log.info(
            "attached to pool %r (max %s) in %s, arbiter %s, %s processes", self.name,
            attached.welcome["options"].get("max_connections"), directory, attached.welcome["arbiter_pid"],
            attached.welcome["processes"],
        )  # fmt: skip
        return attached

    def close(self) -> None:
        """Detach. With the last handle of this process on the pool its leases end; its idle connections stay there."""
        attached = self._attached
        if attached is not None:
            self._leave(attached)

    def _leave(self, attached: Attached) -> None:
        """Detach from this attachment, unless another thread did already."""
        with self._lock:
            if self._attached is not attached:
                return
            self._attached = None
            self._routes = {}
            for event, callback in self._callbacks:
                _remove(attached.hooks.of(event), callback)
        attached.notices.part(self._notices)
        if _last_handle(self, attached):
            attached.detach()

    @property
    def attached(self) -> Attached | None:
        """This process's side of the pool, or None before the first use; for tests and tools, not for users."""
        return self._attached

    @property
    def patience(self) -> float | None:
        """Seconds that a checkout takes at most if nothing is said there; None: no limit."""
        found: Any = self._patience
        return None if found is None else float(found)

    @property
    def app(self) -> str | None:
        """The scope's name, if the handle was made with one."""
        return self._app

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def forget(self) -> None:
        """In a forked child: what was inherited is the parent's."""
        self._lock = threading.Lock()
        self._attached = None
        self._routes = {}

    # --- checkout -----------------------------------------------------------------------------------------------------

    def checkout(
        self,
        host: str,
        port: int = 0,
        transport: str | Driver[Any] | None = None,
        *,
        checkout_timeout: float | NotGiven | None = NOT_GIVEN,
        connect_timeout: float | NotGiven = NOT_GIVEN,
        priority: str = "normal",
    ) -> Lease[T]:
        """Lease a connection; waits in line when the cap is reached.

        Args:
            host: A host name or address; for `transport="unix"` the socket's path, port 0. Or a URL, `tcp://h:p`.
            port: The port.
            transport: "tcp" (the default), "ssl", "unix", "permit", or a driver.
            checkout_timeout: Seconds for all of it. None: no limit. Not given: the pool's, else connect_timeout.
            connect_timeout: Seconds for opening a connection. Not given: the pool's, 8.0 by default.
            priority: "normal", or "high": if it has to wait, it is served before those of normal priority, and in the
                order of asking among its like. Between two of normal priority at most 7 are served that asked later:
                behind n of its like, one of normal priority is passed by 7 * (n + 1) at most.

        Raises:
            PoolTimeout: None became free in time.
            ConnectFailed, ConnectTimeout: The remote refused or did not answer.
            TooManyWaiting, PoolStopped, PoolNotFound, PoolOptionsDiffer, OptionError, StartFailed, AttachRefused.
        """
        return self._take(host, port, transport, checkout_timeout, connect_timeout, priority)

    def _take(
        self, host: str, port: int, transport: str | Driver[Any] | None,
        checkout_timeout: float | NotGiven | None, connect_timeout: float | NotGiven, priority: str,
    ) -> Lease[T]:  # fmt: skip
        attached = self._attached or self.open()._attached
        assert attached is not None
        route, patience, connect = self.plan(
            attached, host, port, transport, checkout_timeout, connect_timeout, priority
        )
        try:
            lease: Lease[T] = attached.checkout(route, patience, connect)
        except PoolStopped as error:
            if error.waited or not attached.lost:
                raise
            self._leave(attached)  # its arbiter was stopped; there may be a new one
            return self._take(host, port, transport, checkout_timeout, connect_timeout, priority)
        if attached.noting:
            frame = _getframe(_CALLER)
            code = frame.f_code
            if OURS[code.co_filename]:
                attached.places[lease.place] = where_taken(frame.f_back)
            else:  # the same, without the call
                attached.places[lease.place] = code, frame.f_lasti
        if attached.on_checkout:
            attached.hooks.tell("checkout", lease)
        return lease

    def plan(
        self, attached: Attached, host: str, port: int, transport: str | Driver[Any] | None,
        checkout_timeout: float | NotGiven | None, connect_timeout: float | NotGiven, priority: str,
    ) -> tuple[Any, float | None, float]:  # fmt: skip
        """A checkout's arguments as its route, its patience (seconds; None: no limit) and its time-out for connecting.

        Raises:
            OptionError: One of them is wrong.
        """
        try:
            route = self._routes[transport or self.transport, host, port]
        except (KeyError, TypeError):
            route = None
        if route is None:  # not in the handler: what is wrong has nothing to do with this dictionary
            route = self._route(attached, transport, host, port)
        if priority != "normal":
            options.check_priority(priority)
            route = attached.urgent(route)
        connect: Any = self._connect
        patience: Any = self._patience
        if connect_timeout is not NOT_GIVEN:
            connect = options.check("connect_timeout", connect_timeout)
            if not self._limited:
                patience = connect
        if checkout_timeout is not NOT_GIVEN:
            patience = options.check("checkout_timeout", checkout_timeout)
        return route, patience, connect

    def _route(self, attached: Attached, transport: str | Driver[Any] | None, host: str, port: int) -> Any:
        kind, where, number = transport or self.transport, host, port
        if "://" in str(host):
            kind, where, number = parse_url(host, port, transport)
        with _loading:  # a driver's module may be loaded
            route = attached.route(kind, where, number)
        if attached is self._attached:
            self._routes[transport or self.transport, host, port] = route
        return route

    def connection(
        self,
        host: str,
        port: int = 0,
        transport: str | Driver[Any] | None = None,
        *,
        checkout_timeout: float | NotGiven | None = NOT_GIVEN,
        connect_timeout: float | NotGiven = NOT_GIVEN,
        priority: str = "normal",
    ) -> AbstractContextManager[T]:
        """Lease a connection for a with block, as `checkout` does; an exception in the block discards it."""
        return _Leasing(self, host, port, transport, checkout_timeout, connect_timeout, priority)

    def checkin(self, lease: Lease[Any]) -> None:
        """The same as `lease.checkin()`."""
        if lease is None:  # compiled, the type lets None through
            raise OptionError(
                "option 'lease' has the value None (from the call); allowed is what checkout gave",
                option="lease", value=None, source="the call", allowed="a Lease",
            )  # fmt: skip
        lease.checkin()

    def discard(self, lease: Lease[Any]) -> None:
        """The same as `lease.discard()`."""
        lease.discard()

    # --- what others say ----------------------------------------------------------------------------------------------

    def on_notify(self, callback: Callable[[Any], object]) -> Callable[[], None]:
        """Call `callback(message)` for every `notify` to this pool that reaches this process; gives what undoes it.

        It reaches processes that are attached: `open` attaches without a checkout. Attaches nothing by itself, so that
        it may stand before a fork; the children are told as well. Callbacks run in the thread that reads the arbiter's
        events (in local mode in the thread that notifies) and should return soon. What they raise is logged on
        `sharedpool.pool.NAME`.

        Raises:
            OptionError: It cannot be called.
        """
        if not callable(callback):
            raise OptionError(
                f"option 'callback' has the value {callback!r} (from the call); allowed is what can be called with"
                " one argument",
                option="callback", value=callback, source="the call", allowed="a callable",
            )  # fmt: skip
        key = object()
        self._notices[key] = callback
        return functools.partial(self._unsubscribe, key)

    def _unsubscribe(self, key: object) -> None:
        self._notices.pop(key, None)

    # --- keeping connections ready ------------------------------------------------------------------------------------

    def prewarm(
        self, host: str, port: int = 0, transport: str | Driver[Any] | None = None, count: int | None = None
    ) -> None:
        """Name a key of which so many connections are to exist, over all processes together, whoever leases them.

        A background thread of this process opens what is missing, now and whenever one has gone, as long as this
        handle is attached. It takes no permit that anybody waits for, closes no other key's connection, and breaks an
        opening off as soon as somebody queues. In local mode they are opened by this call, and only by it.

        Args:
            host: As for checkout.
            port: As for checkout.
            transport: As for checkout; not "permit", which has no connections.
            count: How many. None: the pool's option min_idle; 0: no longer.

        Raises:
            OptionError: The address, the transport or the count is wrong.
        """
        if count is not None:
            count = options.check("min_idle", count)
        kind, where, number = transport or self.transport, host, port
        if "://" in str(host):
            kind, where, number = parse_url(host, port, transport)
        attached = self._attached or self.open()._attached
        assert attached is not None
        with _loading:
            route = attached.route(kind, where, number)
        if not route.driver.connects:
            raise OptionError(
                f"option 'transport' has the value {kind!r} (from the call), of which there is nothing to keep ready;"
                " allowed is one that connects",
                option="transport", value=kind, source="the call", allowed="one that connects",
            )  # fmt: skip
        self._warm[kind, where, number] = count
        attached.prewarm(route, count, self._connect)

    # --- events -------------------------------------------------------------------------------------------------------

    def on(self, event: str, callback: Callback) -> Callable[[], None]:
        """Have a callback called when something happens in this process, to whichever handle on this pool.

        Its errors are logged on `sharedpool.pool.NAME` and change nothing. It runs in the thread where the thing
        happens: keep it short. A handle's callbacks go with it when it is closed, and hold in forked children, too.

        Args:
            event: "open" (called with the address), "close" (the reason, see `sharedpool.stats.REASONS`), "checkout"
                and "checkin" (the lease; also for `discard`), "wait" (seconds in the queue, once it is over),
                "abandoned" (as the option lease_timeout says).
            callback: Is called with that one argument.

        Returns:
            A function that ends it.

        Raises:
            OptionError: There is no such event.
        """
        Hooks(self.name).of(event)
        entry = (event, callback)
        with self._lock:
            self._callbacks.append(entry)
            if self._attached is not None:
                self._attached.hooks.of(event).append(callback)

        def end() -> None:
            with self._lock:
                if entry in self._callbacks:
                    self._callbacks.remove(entry)
                    if self._attached is not None:
                        _remove(self._attached.hooks.of(event), callback)

        return end

    def on_open(self, callback: Callable[[str], object]) -> Callable[[], None]:
        """`on("open", …)`: this process opened a connection; called with the address, as in `tcp://host:port`."""
        return self.on("open", callback)

    def on_close(self, callback: Callable[[str], object]) -> Callable[[], None]:
        """`on("close", …)`: a connection that this process held was closed; called with the reason.

        It may come on the pool's event thread, where others decided it.
        """
        return self.on("close", callback)

    def on_checkout(self, callback: Callable[[Lease[Any]], object]) -> Callable[[], None]:
        """`on("checkout", …)`: called with the new lease, before its user has it."""
        return self.on("checkout", callback)

    def on_checkin(self, callback: Callable[[Lease[Any]], object]) -> Callable[[], None]:
        """`on("checkin", …)`: called with the lease that is about to be given back or discarded, still in force."""
        return self.on("checkin", callback)

    def on_wait(self, callback: Callable[[float], object]) -> Callable[[], None]:
        """`on("wait", …)`: a checkout has been in the queue; called with the seconds, also if it gave up."""
        return self.on("wait", callback)

    def on_abandoned(self, callback: Callback) -> Callable[[], None]:
        """`on("abandoned", …)`: a lease of this process lasts longer than lease_timeout."""
        return self.on("abandoned", callback)

    # --- numbers ------------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """The pool's numbers over all processes of the scope; no message is sent."""
        attached = self._attached or self.open()._attached
        assert attached is not None
        return attached.stats()

    def worker_stats(self) -> dict[str, int]:
        """What this process has counted: the counters of PoolStats by name; empty before the first use."""
        attached = self._attached
        return {} if attached is None else attached.own_counters()

    def key_stats(self) -> dict[str, KeyStats]:
        """The numbers of every address that this process has used, over all processes, by `tcp://host:port`.

        "other" has what belongs to no address, or to one beyond the 2,048 lines that a pool has for pairs of a process
        and an address; it is missing while that is nothing.
        """
        attached = self._attached or self.open()._attached
        assert attached is not None
        return attached.key_stats()


class Pool(_Handle[T]):
    """A handle on one pool. Lazy: making it does no I/O and starts no thread; the first use attaches.

    Safe to make at import and before a fork; threads may share it. In a forked child it attaches anew by itself.

    Args:
        name: The pool's name; processes of one scope that use the same name share it.
        given: Options that were set by the call or by the environment.
        app: The scope's name, instead of SHAREDPOOL_DIR or SHAREDPOOL_APP.
        update: Whether options that differ from the pool's are applied (with a warning), or raise.
        transport: What checkouts are for unless they say otherwise.
    """

    # A class of Python's own, so that users' tests can replace its methods, and those of a handle.


def _remove(callbacks: list[Callback], callback: Callback) -> None:
    with contextlib.suppress(ValueError):
        callbacks.remove(callback)


class _Leasing(Generic[T]):
    """`with pool.connection(...)`; may be entered once."""

    __slots__ = ("_connect", "_host", "_lease", "_patience", "_pool", "_port", "_priority", "_transport")

    _lease: Lease[T]

    def __init__(
        self, pool: _Handle[T], host: str, port: int, transport: str | Driver[Any] | None,
        checkout_timeout: float | NotGiven | None, connect_timeout: float | NotGiven, priority: str,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._host = host
        self._port = port
        self._transport = transport
        self._patience = checkout_timeout
        self._connect = connect_timeout
        self._priority = priority

    def __enter__(self) -> T:
        self._lease = self._pool._take(
            self._host, self._port, self._transport, self._patience, self._connect, self._priority
        )
        return self._lease.conn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lease.__exit__(kind, error, trace)


class Permit:
    """The cap without a connection: `with permit:`, or a decorator. Threads may share one; it may be nested.

    Args:
        pool: The pool that counts; its transport is "permit".
        name: What the permit is for.
        checkout_timeout: Seconds to wait for it; None: no limit.
        priority: "normal" or "high", as for `Pool.checkout`.
    """

    def __init__(
        self, pool: Pool[None], name: str, checkout_timeout: float | NotGiven | None, priority: str = "normal"
    ) -> None:
        self.pool = pool
        self.name = name
        self._patience = checkout_timeout
        self._priority = priority
        self._held = threading.local()

    def __enter__(self) -> Self:
        lease = self.pool.checkout(self.name, 0, "permit", checkout_timeout=self._patience, priority=self._priority)
        try:
            self._held.leases.append(lease)
        except AttributeError:
            self._held.leases = [lease]
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(AttributeError, IndexError):
            lease = self._held.leases.pop()
            if lease.in_force:
                lease.checkin()

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Every call of the function holds a permit.

        Raises:
            OptionError: Calling it only makes a coroutine or generator, which runs later.
        """
        kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
        if any(kind(function) for kind in kinds):
            raise OptionError(
                f"option 'function' has the value {function!r} (from the call); allowed is a function that does its"
                " work when it is called", option="function", value=function, source="the call", allowed="a function",
            )  # fmt: skip

        @functools.wraps(function)
        def permitted(*args: P.args, **kwargs: P.kwargs) -> T:
            with self:
                return function(*args, **kwargs)

        return permitted


def parse_url(url: str, port: int, transport: object) -> tuple[str, str, int]:
    """(transport, host, port) of `tcp://host:port`, `ssl://host:port` or `unix:///path`.

    Raises:
        OptionError: It is neither, or a port or transport is given beside it.
    """
    try:
        parts = urlsplit(url)
        number = parts.port
    except ValueError as error:
        raise _bad_url(url, str(error)) from None
    if port or transport or parts.query or parts.fragment or parts.username is not None:
        raise _bad_url(url, "a port, transport, user, query or fragment beside it")
    if parts.scheme == "unix" and not parts.netloc and parts.path:
        return "unix", unquote(parts.path), 0
    if parts.scheme in ("tcp", "ssl") and parts.hostname and number and parts.path in ("", "/"):
        return parts.scheme, parts.hostname, number
    raise _bad_url(url, "another form")


def _bad_url(url: str, why: str) -> OptionError:
    allowed = "tcp://host:port, ssl://host:port or unix:///path"
    url = re.sub("//[^/@]*@", "//***@", url)  # a password is for nobody's log
    return OptionError(
        f"option 'host' has the value {url!r} (from the call: {why}); allowed is {allowed}",
        option="host", value=url, source="the call", allowed=allowed,
    )  # fmt: skip


#: From `Pool._take` to who called `checkout` or entered `connection`. Compiled methods have no frames.
_CALLER: Final = 2 if isinstance(vars(_Handle).get("_take"), FunctionType) else 0

_pools: weakref.WeakSet[_Handle[Any]] = weakref.WeakSet()
#: What pools are made with, beside what their handles give: a server's configuration. Forked children have it, too.
_configured: dict[str, dict[str, Any]] = {}


def configure(name: str, values: dict[str, Any]) -> None:
    """From now on this process, and whatever it forks, makes this pool with these options where it is not there.

    One that is there keeps what it has, so that a worker of an old configuration does not undo a new one. What a handle
    gives itself comes first; handles that name another scope (`app`) are not concerned.
    """
    _configured[name] = values


def close_all() -> None:
    """Detach every handle of this process, in whatever scope; each attaches anew at its next use."""
    for pool in list(_pools):
        pool.close()


#: What locks are: gevent's monkey patching puts something else there.
_made_of: Any = threading.Lock


def _locks_anew() -> None:
    """Under locks of before the patching two greenlets would wait for each other for ever."""
    global _sharing, _loading, _made_of
    _made_of = threading.Lock
    _sharing = threading.Lock()
    _loading = threading.RLock()
    for pool in list(_pools):
        pool._lock = threading.Lock()


def _before_fork() -> None:
    _loading.acquire()


def _after_fork_in_parent() -> None:
    _loading.release()


def _after_fork_in_child() -> None:
    global _sharing, _loading
    _sharing = threading.Lock()
    _loading = threading.RLock()
    _shared.clear()
    for name in ("attachment", "local"):
        module = sys.modules.get(f"{__package__}.{name}")
        if module is not None:
            module.forked()
    for pool in list(_pools):
        pool.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
