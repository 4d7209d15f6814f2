"""gunicorn: pools declared in its configuration file, before it forks. Optional: workers find each other without it.

    # at the end of gunicorn.conf.py
    from sharedpool.integrations import gunicorn as sp

    sp.install(globals(), pools={"db": {"max_connections": 20}})

Workers then say `sharedpool.attach("db")`, and the number stands in one place. Loads nothing of gunicorn's by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .. import control, options, pool
from ..errors import SharedPoolError

Hook = Callable[[Any], object]

#: What this master has declared last, by pool: a HUP declares only what has changed since, so that it does not undo
#: what an operator has set meanwhile.
_declared: dict[str, dict[str, Any]] = {}


def install(namespace: dict[str, Any], pools: Mapping[str, Mapping[str, Any]]) -> None:
    """Declare pools when the master starts, and what has changed of them when it reloads (HUP).

    Nothing but checks happens at once, so `gunicorn --check-config` starts nothing. The arbiter stays while the master
    lives, and longer if somebody else still needs it.

    Args:
        namespace: The configuration file's `globals()`. Its hooks on_starting and on_reload are wrapped: call this
            below them.
        pools: The options of each pool by its name. SHAREDPOOL_<POOL>_<OPTION> in the environment comes first.

    Raises:
        OptionError: An option is wrong; gunicorn then ends, before it forks.
    """
    wanted = {options.check_pool_name(name): _checked(name, given) for name, given in pools.items()}
    for name, values in wanted.items():
        pool.configure(name, values)

    def on_starting(server: Any) -> None:
        try:
            _declare(wanted)
        except SharedPoolError as error:
            server.log.error("sharedpool: %s", error)
            sys.exit(1)

    def on_reload(server: Any) -> None:
        try:
            _declare({name: values for name, values in wanted.items() if values != _declared.get(name)})
        except SharedPoolError as error:  # raised here it would end the master, and leave its workers alone
            server.log.error("sharedpool: nothing is changed: %s", error)

    for ours in (on_starting, on_reload):
        namespace[ours.__name__] = _both(ours, namespace.get(ours.__name__), namespace.get("__name__", ""))


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one pool, those of the environment over those of the configuration."""
    for option in sorted(options.OF_THE_HANDLE & set(given)):
        raise options.refusal(option, given[option], f"options of the pool; this one is attach({name!r}, {option}=…)'s")
    return {**options.given(name, given, {}), **options.given(name, {}, os.environ)}


def _declare(wanted: Mapping[str, dict[str, Any]]) -> None:
    control.keep()
    for name, values in wanted.items():
        control.start_pool(name, **values)
        _declared[name] = values


def _both(ours: Hook, users: Hook | str | None, module: str) -> Hook:
    """The user's hook after ours, once the pools are there."""

    def hook(server: Any) -> None:
        if server.cfg.config == f"python:{module}":
            sys.modules.pop(module, None)  # gunicorn imports it: so that a HUP reads it anew, as it does a file
        ours(server)
        if users is not None:
            _callable(users)(server)

    return hook


def _callable(hook: Hook | str) -> Hook:
    """The hook itself: a configuration may also give its name."""
    if not isinstance(hook, str):
        return hook
    from gunicorn.config import validate_callable

    found: Hook = validate_callable(1)(hook)
    return found
