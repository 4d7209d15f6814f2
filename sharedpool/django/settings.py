"""OPTIONS["pool"] as people write it: names from the README, numbers out of the environment."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured

#: Names of sharedpool.attach, and what ConnectionPool calls the same.
ALIASES: Final[Mapping[str, str]] = {
    "max_connections": "max_size", "min_idle": "min_size", "checkout_timeout": "timeout", "idle_timeout": "max_idle",
    "shared_name": "name",
}  # fmt: skip
#: What the engine gives by itself.
_OURS: Final = frozenset({"self", "conninfo", "kwargs", "open", "configure"})
_YES: Final = ("1", "true", "yes", "on")
_NO: Final = ("0", "false", "no", "off")


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_YES, *_NO):
        raise ValueError
    return word in _YES


#: How a text is read, and what is allowed.
_READERS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = {
    **dict.fromkeys(("min_size", "max_size", "max_waiting", "num_workers"), (int, "a whole number")),
    **dict.fromkeys(("timeout", "max_lifetime", "max_idle", "reconnect_timeout"), (float, "seconds as a number")),
    **dict.fromkeys(("move", "close_returns"), (_flag, "True or False")),
}


def read(given: Any) -> dict[str, Any]:
    """The same for ConnectionPool.

    Raises:
        ImproperlyConfigured: It is no dictionary, has a key that nobody knows, one thing twice, or a text that is not
            the number that it should be.
    """
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(f"OPTIONS['pool'] is {given!r}; allowed is a dictionary, True, False or None")
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name not in _allowed():
            raise ImproperlyConfigured(
                f"OPTIONS['pool'] has the key {key!r}, with the value {value!r}; allowed are {', '.join(_allowed())}"
            )
        if name in found:
            raise ImproperlyConfigured(f"OPTIONS['pool'] has {name!r} twice, once by another name: {key!r} is the same")
        found[name] = _number(key, name, value) if isinstance(value, str) else value
    return found


def _number(key: str, name: str, text: str) -> Any:
    if name not in _READERS:
        return text
    reader, allowed = _READERS[name]
    try:
        return reader(text)
    except ValueError:
        raise ImproperlyConfigured(f"OPTIONS['pool'][{key!r}] is {text!r}; allowed is {allowed}") from None


def _allowed() -> tuple[str, ...]:
    from ..postgres.base import BasePool

    known = inspect.signature(BasePool.__init__).parameters
    return (*sorted(known.keys() - _OURS), "lease")
