"""The options of a pool: what exists, what is allowed, what is in force, and where each value came from.

The one place where options are decided. Precedence: call > environment > default. Nothing here reads the environment
by itself: callers pass a mapping.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, cast

from .errors import OptionError

#: A slot's number and a cell's number must fit into 16 bits of a slot word.
MOST_CONNECTIONS: Final = 32_768
#: As many places to wait at has a pool.
MOST_WAITING: Final = 16_384
LONGEST: Final = 2_000_000.0  # seconds; a socket timeout must fit into an int of milliseconds

POOL_NAME: Final = re.compile(r"[A-Za-z0-9_.:@-]{1,100}")
_NOT_OF_A_NAME: Final = re.compile(r"[^A-Za-z0-9_.:@-]")
APP_NAME: Final = re.compile(r"[A-Za-z0-9_.@-]{1,60}")


class NotGiven:
    """The type of NOT_GIVEN, which tells "no value" from None where None means "no limit"."""

    _only: NotGiven | None = None

    def __new__(cls) -> NotGiven:
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def __reduce__(self) -> tuple[type[NotGiven], tuple[()]]:
        return (NotGiven, ())

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Final = NotGiven()


@dataclasses.dataclass(frozen=True, slots=True)
class _Seconds:
    """A duration in seconds, above zero; None, where allowed, means no limit."""

    none: bool = False
    zero: bool = False

    @property
    def allowed(self) -> str:
        low = "0" if self.zero else "above 0"
        return f"seconds as a number, {low} to {LONGEST:.0f}" + (", or None for no limit" if self.none else "")

    def read(self, text: str) -> Any:
        if self.none and text.strip().lower() == "none":
            return None
        return float(text)

    def check(self, value: Any) -> Any:
        if value is None and self.none:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError
        if not (0 <= value if self.zero else 0 < value) or value > LONGEST:
            raise ValueError
        return float(value)


@dataclasses.dataclass(frozen=True, slots=True)
class _Count:
    low: int
    high: int
    none: bool = False

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}" + (", or None for no limit" if self.none else "")

    def read(self, text: str) -> Any:
        if self.none and text.strip().lower() == "none":
            return None
        return int(text)

    def check(self, value: Any) -> Any:
        if value is None and self.none:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class _Flag:
    allowed: str = "True or False (in the environment: 1, true, yes, on or 0, false, no, off)"

    def read(self, text: str) -> Any:
        word = text.strip().lower()
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise ValueError

    def check(self, value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(repr(word) for word in self.words)

    def read(self, text: str) -> Any:
        return text.strip().lower()

    def check(self, value: Any) -> Any:
        if value not in self.words:
            raise ValueError
        return value


_Rule = _Seconds | _Count | _Flag | _Choice

RULES: Final[Mapping[str, _Rule]] = {
    "max_connections": _Count(1, MOST_CONNECTIONS),
    "max_per_key": _Count(1, MOST_CONNECTIONS, none=True),
    "max_waiting": _Count(1, MOST_WAITING, none=True),
    "reserve": _Count(0, MOST_CONNECTIONS - 1),
    "idle_timeout": _Seconds(none=True),
    "checkout_timeout": _Seconds(none=True, zero=True),
    "connect_timeout": _Seconds(),
    "close_timeout": _Seconds(),
    "steal_after": _Seconds(zero=True),
    "move": _Flag(),
    "order": _Choice(("auto", "fifo", "sticky")),
    "max_idle": _Count(0, MOST_CONNECTIONS, none=True),
    "max_lifetime": _Seconds(none=True),
    "lease_timeout": _Seconds(none=True),
    "reclaim": _Flag(),
    "min_idle": _Count(0, MOST_CONNECTIONS),
    "check": _Choice(("poll", "none", "active")),
    "check_after": _Seconds(zero=True),
    "max_foreign": _Count(0, MOST_CONNECTIONS, none=True),
}

#: hackney's names.
ALIASES: Final[Mapping[str, str]] = {"pool_size": "max_connections", "timeout": "idle_timeout"}

#: Laid down when the pool is made; every other host-wide option can change while it runs.
FIXED: Final = frozenset({"move", "order", "check"})

#: These belong to the handle that gives them, not to the pool, so they never differ.
OF_THE_HANDLE: Final = frozenset({"checkout_timeout", "connect_timeout"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """The options of one pool, validated. Durations are seconds.

    Attributes:
        max_connections: The cap over all processes of the scope: opening, idle, in use, on the way and closing.
        max_per_key: No more than so many of the connections lead to one address (of permits: are of one name), over all
            processes; None: no limit. Who waits for an address that has all it may is passed over by those who wait
            for others. With it the order is first come, first served, and a warm checkout and checkin take about
            twice as long.
        max_waiting: A checkout that would have to queue while so many wait raises TooManyWaiting at once; None: no
            limit. Those who wait already when it is lowered go on waiting.
        reserve: So many of the connections are for checkouts with priority="high" only: one of normal priority is
            served while fewer than max_connections - reserve are in use by anybody (idle ones are not in use), and
            waits else, although something is free. Below max_connections. With a reserve, high priority comes before
            normal without bound, the order is first come, first served, and a warm checkout and checkin take about
            twice as long.
        idle_timeout: An idle connection is closed after this; None: never.
        checkout_timeout: A checkout waits so long at most; None: no limit; not given: connect_timeout, as in hackney.
        connect_timeout: Opening a connection may take so long.
        close_timeout: How long a closed connection's permit waits for the remote to close, too.
        steal_after: With sticky order: the longest wait after which a connection that can't move is closed for its
            permit, and one that can is handed over; one that was idle for a tenth of it goes at once. Not given: 20
            times the measured connect time, within 0.05 and 0.5 s; 0.05 s for what can move.
        move: False: only permits move between processes, never a socket.
        order: "fifo": first come, first served over all processes; "sticky": a process's own waiters and newcomers
            first, up to steal_after: more leases a second, and longer waits; "auto": fifo for what can move, sticky for
            what can't.
        max_idle: At most so many idle connections over all processes; the least recently used are closed first. None:
            no limit but max_connections.
        max_lifetime: A connection older than this is closed once nobody leases it, up to 10 % earlier so that those
            opened together do not end together; None: never.
        lease_timeout: A lease held longer is abandoned: reported once, in the log and to the hooks; None: never.
        reclaim: True: the connection of an abandoned lease is shut down and its permit goes on.
        min_idle: So many connections exist of every key that a process has named by `Pool.prewarm`, over all processes
            together; they are opened in the background, as far as the cap allows and nobody waits.
        check: What is asked of an idle connection before it is leased. "poll": whether it has ended or says what nobody
            asked; "none": nothing; "active": as "poll" and, where the transport's driver has a check of its own (tcp
            and unix have none), that one too, for connections that were idle for longer than check_after.
        check_after: Seconds.
        max_foreign: A process keeps at hand so many connections that others use or have left idle, the most recently
            used, and takes them over without asking the arbiter; each costs it two descriptors. None: no limit.
    """

    max_connections: int = 50
    max_per_key: int | None = None
    max_waiting: int | None = None
    reserve: int = 0
    idle_timeout: float | None = 150.0
    checkout_timeout: float | NotGiven | None = NOT_GIVEN
    connect_timeout: float = 8.0
    close_timeout: float = 1.0
    steal_after: float | NotGiven = NOT_GIVEN
    move: bool = True
    order: str = "auto"
    max_idle: int | None = None
    max_lifetime: float | None = None
    lease_timeout: float | None = None
    reclaim: bool = False
    min_idle: int = 0
    check: str = "poll"
    check_after: float = 30.0
    max_foreign: int | None = 64

    @property
    def patience(self) -> float | None:
        """checkout_timeout as it is in force: connect_timeout where not given; None is no limit."""
        if isinstance(self.checkout_timeout, NotGiven):
            return self.connect_timeout
        return self.checkout_timeout

    def as_dict(self) -> dict[str, Any]:
        """Every option that has a value, as plain data."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in pairs if value is not NOT_GIVEN}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolInfo:
    """A pool that exists: its name, its options in force, and the process that watches it."""

    name: str
    options: PoolOptions
    arbiter_pid: int


def check(option: str, value: Any, source: str = "the call") -> Any:
    """Give the value back as it is stored, or say what is allowed.

    Raises:
        OptionError: Wrong name, type or range; names the option, the value, where it came from, and what is allowed.
    """
    name = ALIASES.get(option, option)
    rule = RULES.get(name)
    if rule is None:
        known = ", ".join(sorted([*RULES, *ALIASES]))
        raise OptionError(
            f"unknown option {option!r} (value {value!r}, from {source}); known are: {known}",
            option=option, value=value, source=source, allowed=known,
        )  # fmt: skip
    try:
        return rule.check(value)
    except (ValueError, TypeError, OverflowError):
        raise _refusal(option, value, source, rule.allowed) from None


def allows(option: str, value: Any) -> bool:
    """Whether an option may have this value; NOT_GIVEN always."""
    try:
        return value is NOT_GIVEN or RULES[option].check(value) == value
    except (ValueError, TypeError, OverflowError):
        return False


def _refusal(option: str, value: Any, source: str, allowed: str) -> OptionError:
    return OptionError(
        f"option {option!r} has the value {value!r} (from {source}); allowed is {allowed}",
        option=option, value=value, source=source, allowed=allowed,
    )  # fmt: skip


def refusal(option: str, value: Any, allowed: str) -> OptionError:
    """The error for an argument of a call that is no option of a pool."""
    return _refusal(option, value, "the call", allowed)


def check_seconds(option: str, value: Any) -> float:
    """An argument of a call that is a duration in seconds, 0 or more, or OptionError."""
    rule = _Seconds(zero=True)
    try:
        return float(rule.check(value))
    except (ValueError, TypeError, OverflowError):
        raise refusal(option, value, rule.allowed) from None


def given(pool: str, call: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """The options that somebody set for this pool, validated: the environment's, overruled by the call's.

    The environment's names are SHAREDPOOL_<POOL>_<OPTION>, the pool's name in capitals with every character that is
    no letter or digit as an underscore.

    Raises:
        OptionError: Any of them is wrong, or an option is given twice under two names.
    """
    prefix = "SHAREDPOOL_" + re.sub(r"[^A-Z0-9]", "_", pool.upper()) + "_"
    found: dict[str, Any] = {}
    for option in (*RULES, *ALIASES):
        variable = prefix + option.upper()
        if variable in environ:
            _once(found, option, _from_text(option, environ[variable], variable), f"the environment's {variable}")
    spoken: dict[str, Any] = {}
    for option, value in call.items():
        if value is NOT_GIVEN:
            continue
        _once(spoken, option, check(option, value, f"the call for pool {pool!r}"), f"the call for pool {pool!r}")
    values = {**found, **spoken}
    if "reserve" in values and "max_connections" in values:
        check_reserve(make(values), f"the options for pool {pool!r}")
    return values


def _once(found: dict[str, Any], option: str, value: Any, source: str) -> None:
    name = ALIASES.get(option, option)
    if name in found and found[name] != value:
        raise OptionError(
            f"option {name!r} is given twice in {source}, as {found[name]!r} and as {value!r} (alias {option!r})",
            option=option, value=value, source=source, allowed="one of the two names",
        )  # fmt: skip
    found[name] = value


def _from_text(option: str, text: str, variable: str) -> Any:
    return from_text(option, text, f"the environment's {variable}")


def from_text(option: str, text: str, source: str) -> Any:
    """The value of an option that was written as text, in the environment or on a command line.

    Raises:
        OptionError: As check.
    """
    rule = RULES.get(ALIASES.get(option, option))
    if rule is None:
        return check(option, text, source)  # which raises
    try:
        value = rule.read(text)
    except (ValueError, TypeError):
        raise _refusal(option, text, source, rule.allowed) from None
    return check(option, value, source)


def make(values: Mapping[str, Any]) -> PoolOptions:
    """PoolOptions from validated values; what is missing gets its default."""
    return PoolOptions(**cast(Any, dict(values)))


def differing(known: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are the pool's, not the handle's, and not known already."""
    return {
        name: value for name, value in values.items()
        if name not in OF_THE_HANDLE and known.get(name, NOT_GIVEN) != value
    }  # fmt: skip


PRIORITIES: Final = ("normal", "high")


def check_priority(priority: object) -> str:
    """The priority of a checkout, or OptionError."""
    if priority not in PRIORITIES:
        raise _refusal("priority", priority, "the call", "one of 'normal', 'high'")
    return str(priority)


def check_reserve(options: PoolOptions, source: str = "the call") -> None:
    """Refuse a reserve that leaves nothing for normal priority.

    Raises:
        OptionError: It is not below max_connections.
    """
    most = options.max_connections
    if options.reserve >= most:
        raise _refusal("reserve", options.reserve, source, f"less than max_connections, which is {most}")


def check_pool_name(name: object) -> str:
    """The pool's name, or OptionError."""
    if not isinstance(name, str) or not POOL_NAME.fullmatch(name):
        raise _refusal("name", name, "the call", "a string of 1 to 100 letters, digits and _ . : @ -")
    return name


def automatic_name(shown: str, parts: Mapping[str, str]) -> str:
    """A pool's name for those who give none: the same for equal parts, another for others.

    Args:
        shown: What people read of it.
        parts: What the digest is made of, none of which may be secret.
    """
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
    return f"{_NOT_OF_A_NAME.sub('_', shown)[:60]}-{digest}"


def check_app_name(name: object, source: str = "the call") -> str:
    """The app's name, which becomes a directory's name, or OptionError."""
    if not isinstance(name, str) or not APP_NAME.fullmatch(name) or name in (".", ".."):
        raise _refusal("app", name, source, "a string of 1 to 60 letters, digits and _ . @ -, not . or ..")
    return name
