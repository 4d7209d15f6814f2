"""The arbiter's pool object with the callbacks of an OTP gen_server, as hackney_pool has them, and what each is for.

What others ask of a pool comes in by `handle_call` and `handle_cast`, what the loop sees by itself by `handle_info`;
`init` and `terminate` are the ends of a pool's life. An unknown call, cast or message never harms the pool.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import Any

from . import layout, options, view
from .drivers import Address
from .errors import AttachRefused, OptionError
from .layout import DECLARED_IDLE, DECLARED_MAX
from .options import NOT_GIVEN, PoolOptions
from .served import ServedPool, declared_in, nanoseconds
from .stats import PoolStats
from .wire import Kind, Message


class PoolServer(ServedPool):
    """One pool in the arbiter's process.

    Args:
        name: The pool's name.
        wanted: The options that it is made with.
        declared_by: The pid of who made it.
        publish: Sends a message to every attached process; gives how many got it.
        **hooks: What ServedPool asks for.

    Attributes:
        declared: The options as they were declared last; an operator may have set others since.
    """

    def __init__(
        self, name: str, wanted: PoolOptions, declared_by: int, *,
        publish: Callable[[PoolServer, Message], int], **hooks: Any,
    ) -> None:  # fmt: skip
        super().__init__(name, wanted, declared_by, **hooks)
        self.declared: dict[str, Any] = {}
        self._publish = publish
        self._alive = False
        if hooks.get("inherited") is None:
            self.init(wanted, declared_by)
        else:
            self.note_declared({**wanted.as_dict(), **declared_in(self.words)})
            self._alive = not self.stopped
            self._log.warning("pool %r: the arbiter was killed; this one goes on with it", name)

    # --- the six ------------------------------------------------------------------------------------------------------

    def init(self, wanted: PoolOptions, declared_by: int) -> None:
        """A life of the pool begins: it was made, or is declared again after it was stopped."""
        self.apply(wanted)
        self.declared = {}
        self.note_declared(wanted.as_dict())
        self.declared_by = declared_by
        self._alive = True
        self._log.debug("pool %r started by process %d (max %d)", self.name, declared_by, wanted.max_connections)

    def note_declared(self, values: Mapping[str, Any]) -> None:
        """Options were declared; a successor has to know those that an operator may change."""
        self.declared.update(values)
        self.words[DECLARED_MAX] = self.declared["max_connections"]
        self.words[DECLARED_IDLE] = nanoseconds(self.declared["idle_timeout"])

    def handle_call(self, request: str, *arguments: Any) -> Any:
        """Answer a question: count, info, max_connections, stats, timeout.

        Raises:
            OptionError: There is no such call.
        """
        calls: dict[str, Callable[..., Any]] = {
            "count": self._idle_of,
            "info": self.info,
            "max_connections": lambda: self.options.max_connections,
            "stats": self._stats,
            "timeout": lambda: self.options.idle_timeout,
        }
        return self._find("call", calls, request)(*arguments)

    def handle_cast(self, request: str, *arguments: Any) -> Any:
        """Carry out a change at once: set_max_connections, set_timeout, notify (which gives how many processes got it).

        Unlike in OTP, whoever cast it is told what is wrong with it.

        Raises:
            OptionError: There is no such cast, or its value is not allowed.
        """
        casts: dict[str, Callable[..., Any]] = {
            "notify": self._notify,
            "set_max_connections": lambda value, pid: self._set("max_connections", value, pid),
            "set_timeout": lambda value, pid: self._set("idle_timeout", value, pid),
        }
        return self._find("cast", casts, request)(*arguments)

    def handle_info(self, message: tuple[Any, ...]) -> None:
        """What the loop saw: ("DOWN", row), a process has gone; ("remote_ended", slot), the other side has closed."""
        if len(message) == 2 and message[0] == "DOWN":
            self.reap(message[1], self._clock())
            self.registered(message[1], self._clock())
        elif len(message) == 2 and message[0] == "remote_ended":
            self.remote_ended(message[1], self._clock())
        else:
            self._log.warning("pool %r got an unknown message, and goes on: %r", self.name, message)

    def terminate(self, reason: str) -> None:
        """A life of the pool ends, by a stop or with its arbiter: its last numbers are logged, once."""
        if self._alive:
            self._alive = False
            self._log.info("pool %r ended (%s): %s", self.name, reason, self._stats())

    def code_change(self, old_vsn: int, state: object = None, extra: object = None) -> int:
        """Serve a table that another version of sharedpool laid out.

        As long as processes of that version are attached the table stays as it is, and what came later is off. After
        the last of them it moves to this version's layout: no connection and no lease takes notice.

        Args:
            old_vsn: The layout that the table has.
            state: Nothing.
            extra: Nothing.

        Returns:
            The layout that it has now.

        Raises:
            AttachRefused: This version does not serve it; the message says what to restart.
        """
        if old_vsn not in layout.SERVED:
            served = " and ".join(map(str, layout.SERVED))
            raise AttachRefused(
                f"the table of pool {self.name!r} has layout {old_vsn}, this version of sharedpool serves {served}:"
                " restart all processes of the scope, the arbiter too (sharedpool.stop() ends it)"
            )
        if old_vsn < layout.LAYOUT and not self.old_rows():
            self.segment.move_to(layout.LAYOUT)
            self._log.info("pool %r: its table has layout %d now, no longer %d", self.name, layout.LAYOUT, old_vsn)
        return self.segment.layout

    def turn(self, now: int) -> int:
        """As ServedPool.turn; before it, a table of an older version is looked after."""
        if self.segment.layout != layout.LAYOUT:
            self.code_change(self.segment.layout)
        return super().turn(now)

    # --- what they do -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """As ServedPool.stop; then the pool's life has ended."""
        super().stop()
        self.terminate("stopped")

    def info(self) -> dict[str, Any]:
        """What find_pool tells.

        Only the options that differ from their defaults, and are in force: a process of an older version that is
        served need not know others.
        """
        usual = PoolOptions().as_dict()
        given = {name: value for name, value in self.options.as_dict().items() if usual.get(name, NOT_GIVEN) != value}
        if self.segment.layout < layout.WITH_KEYS:
            given.pop("max_per_key", None)
        return {"name": self.name, "options": given, "arbiter_pid": os.getpid()}

    def _find(self, kind: str, known: Mapping[str, Callable[..., Any]], request: str) -> Callable[..., Any]:
        found = known.get(request)
        if found is None:
            self._log.warning("pool %r got an unknown %s, and goes on: %r", self.name, kind, request)
            allowed = ", ".join(sorted(known))
            raise OptionError(
                f"pool {self.name!r} has no {kind} {request!r}; there are: {allowed}",
                option=kind, value=request, source="the call", allowed=allowed,
            )  # fmt: skip
        return found

    def _stats(self) -> PoolStats:
        return view.stats(self.words, self.segment.geometry, self.name, monotonic_ns())

    def _idle_of(self, address: Address | None = None) -> int:
        """Idle connections: all, or those of one address as `drivers.key` gives it. Keys need the pool's secret."""
        if address is None:
            return self._stats().idle
        return sum(view.count_idle(self.words, self.segment.geometry, key) for key in self.keys_of(address))

    def _set(self, option: str, value: Any, pid: int) -> None:
        value = options.check(option, value, f"process {pid}")
        old = getattr(self.options, option)
        self.apply(dataclasses.replace(self.options, **{option: value}))
        self.declared_by = pid
        self._log.info("pool %r: %s: %r -> %r (by process %d)", self.name, option, old, value, pid)

    def _notify(self, text: str) -> int:
        return self._publish(self, Message(Kind.NOTIFY, body={"message": json.loads(text)}))
