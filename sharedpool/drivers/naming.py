"""A pool's name for what a DB-API library connects to, made of the library's own arguments.

Two servers under one name would share one limit, and one server under two names would have two. So the name has all
that may decide where a connection leads, as whom. It has no secret, not even within a digest, and no label: what
people change to find their process in a list must not change the limit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ..options import automatic_name

#: What libraries' keywords call what a connection leads to.
_USER: Final = ("user", "username")
_HOST: Final = ("host", "server", "unix_sock", "unix_socket")
_DATABASE: Final = ("database", "dbname", "db")
#: With one of these, that is not all: the library finds its server by it.
_ELSEWHERE: Final = frozenset({
    "dsn", "servicename", "service", "sid", "readdefaultfile", "readdefaultgroup", "optionfiles", "instance",
    "instancename", "connstr", "connectionstring", "odbcconnect", "url", "uri",
})  # fmt: skip
_SECRET: Final = re.compile(r"pass|pwd|secret|token|credential|key$|pin$")
_LABEL: Final = re.compile(
    r"timeout|charset|encoding|ssl|tls|^app|application|program|wsid|workstation|^conn(ection)?attr|serversettings"
    r"|^autocommit|^isolation|^driver$|^encrypt|^trustserver|^mars|^ansi|^unicode|^checksamethread|^cachedstatements"
    r"|^detecttypes|statementcache|^clientflag|^localinfile|^usepure|^clientinfo"
)
#: `key=value` of an ODBC string; a value in braces may have anything.
_PART: Final = re.compile(r"\s*([^=;{}]+?)\s*=\s*(\{(?:[^}]|\}\})*\}|[^;]*)(?:;|$)")
#: Who logs in, before the last @ of an address: `user:password@` or `user/password@`, after a scheme or not.
_LOGIN: Final = re.compile(r"^(\w[\w+.-]*://)?([^/:@?]*)[:/].*@", re.DOTALL)


class NotClear(ValueError):
    """Nothing says for sure where the connections lead."""


def name_of(library: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    """The name for what a library's `connect(*arguments, **keywords)` leads to.

    Raises:
        NotClear: The text says why.
    """
    user, host, database = (_first(keywords, names) for names in (_USER, _HOST, _DATABASE))
    port = str(keywords.get("port") or "")
    parts = {"library": library, "user": user, "host": host, "database": database, "port": port}
    parts["socket"] = _first(keywords, _HOST[2:])
    elsewhere = any(_plain(name) in _ELSEWHERE for name in keywords)
    if arguments or elsewhere or not (user and host and database):
        told = dict(_told(arguments, keywords))
        if not told:
            raise NotClear("its arguments do not say where it connects to")
        parts.update({f"told {name}": text for name, text in told.items()})
    return automatic_name(f"{library}-{user}@{host}{f':{port}' if port else ''}/{database}", parts)


def _first(keywords: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((_text(name, keywords[name]) for name in names if keywords.get(name)), "")


def _told(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All that may matter, under a name of its own."""
    for number, value in enumerate(arguments):
        yield f"argument {number}", _text(f"argument {number}", value)
    for name, value in keywords.items():
        plain = _plain(name)
        if _is_left_out(plain) and plain not in _ELSEWHERE:
            continue
        if value is not None and (_is_text(value) or plain in _ELSEWHERE):
            yield name, _text(name, value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes | int | float | os.PathLike)


def _text(name: str, value: Any) -> str:
    """A value without its secrets."""
    if isinstance(value, list | tuple):
        return repr([_text(name, part) for part in value])
    if not _is_text(value):
        raise NotClear(f"{name} is an object of {type(value).__name__}, which does not say where it leads")
    text = os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else str(value)
    return _without_secrets(name, text)


def _without_secrets(name: str, text: str) -> str:
    if (parts := _parts(text)) is not None:
        kept = {key: value for key, value in parts.items() if not _is_left_out(key)}
        return repr(sorted(kept.items()))
    address, _, query = _LOGIN.sub(r"\1\2@", text).partition("?")
    more = [part for part in query.split("&") if part and not _is_left_out(_plain(part.partition("=")[0]))]
    if "=" in text and _SECRET.search(_plain(address)):
        raise NotClear(f"{name} has a secret in a form that is not known here")
    return "&".join([address, *more])


def _parts(text: str) -> dict[str, str] | None:
    """What an ODBC string says, by its keywords in plain form; None if it is none."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        if part is None:
            return found if found and not text[at:].strip("; ") else None
        found[_plain(part[1])] = part[2].strip()
        at = part.end()
    return found if ";" in text else None


def _is_left_out(plain: str) -> bool:
    return bool(_SECRET.search(plain) or _LABEL.search(plain))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
