"""What a connection string means to a pool: which server, which key, and whether its sessions can move.

A library resolves its own strings; here are only the rules of libpq that depend on the host's name, because the host
that a library gets is a door of this process. Reference: the PostgreSQL documentation, "Database Connection Control
Functions", "Environment Variables", "The Password File".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pwd
import socket
import stat
import sys
from collections.abc import Mapping
from typing import Final

from ..drivers.places import FILES, NAMES, NETWORK, of_host
from ..drivers.postgres import Server
from ..options import automatic_name

log = logging.getLogger("sharedpool")

#: The oldest libpq that connects to abstract sockets.
OLDEST: Final = 140000

#: What libpq takes from the environment where the string says nothing. The last three are for the server alone.
_ENVIRONMENT: Final = {
    "host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER",
    "password": "PGPASSWORD", "passfile": "PGPASSFILE", "service": "PGSERVICE", "options": "PGOPTIONS",
    "application_name": "PGAPPNAME", "client_encoding": "PGCLIENTENCODING", "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION", "requirepeer": "PGREQUIREPEER", "gssencmode": "PGGSSENCMODE",
    "krbsrvname": "PGKRBSRVNAME", "gsslib": "PGGSSLIB", "channel_binding": "PGCHANNELBINDING",
    "target_session_attrs": "PGTARGETSESSIONATTRS", "load_balance_hosts": "PGLOADBALANCEHOSTS",
    "connect_timeout": "PGCONNECT_TIMEOUT", "require_auth": "PGREQUIREAUTH", "$datestyle": "PGDATESTYLE",
    "$timezone": "PGTZ", "$geqo": "PGGEQO",
}  # fmt: skip

#: Is no part of the address that people read: it says nothing about the session, or is secret.
_NOT_OF_THE_SESSION: Final = frozenset({
    "host", "hostaddr", "port", "dbname", "user", "password", "passfile", "connect_timeout", "keepalives",
    "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout", "sslpassword", "require_auth",
    "scram_client_key", "scram_server_key", "oauth_client_secret",
})  # fmt: skip

#: Of these the last two decide who is at the other end, or how that is proven: they are part of the key all the same.
_NOT_OF_THE_KEY: Final = _NOT_OF_THE_SESSION - {"host", "hostaddr", "port", "dbname", "user", "require_auth"}

_OF_THE_SERVER: Final = (
    "host", "hostaddr", "port", "passfile", "connect_timeout", "tcp_user_timeout", "target_session_attrs",
    "load_balance_hosts", "channel_binding", "gssencmode",
)  # fmt: skip

_TCP_OPTIONS: Final = {
    "keepalives_idle": (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
    "keepalives_interval": (socket.IPPROTO_TCP, "TCP_KEEPINTVL"),
    "keepalives_count": (socket.IPPROTO_TCP, "TCP_KEEPCNT"),
    "tcp_user_timeout": (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
}


#: Where a session goes, and as whom: these alone decide under which limit it counts. A label in `application_name`, or
#: anything else that makes sessions differ, is for the key.
_OF_THE_NAME: Final = ("hostaddr", "service", "servicefile")


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A connection string, resolved.

    Attributes:
        given: What the string and the keywords say, without the environment.
        all: The same with the environment.
        user: As libpq finds it.
        dbname: As libpq finds it.
        address: Where it leads, for people; without any secret.
        identity: What equal sessions have in common, likewise, and no two others: it is for the key.
        server: Where it leads; None where only libpq knows.
        stays: Why its sessions cannot move; "" if they can, as far as can be said before the server is asked.
    """

    given: Mapping[str, str]
    all: Mapping[str, str]
    user: str
    dbname: str
    address: str
    identity: str
    server: Server | None
    stays: str

    @property
    def matters(self) -> tuple[str, ...]:
        """What of this process's place decides which server that is."""
        server = self.server
        if server is None:
            return NETWORK, NAMES, FILES
        if server.is_unix:
            return (NETWORK,) if server.host[0] == "@" else (FILES,)
        return of_host(server.hostaddr or server.host)

    @property
    def name(self) -> str:
        """A pool's name, made of host, port, database and user: the same in every process, and without any secret."""
        host = self.all.get("host", "")
        place = {
            "host": host if host[:1] in ("/", "@") else host.lower(), "port": self.all.get("port") or "5432",
            "dbname": self.dbname, "user": self.user,
            **{name: self.all[name] for name in _OF_THE_NAME if self.all.get(name)},
        }  # fmt: skip
        shown = place["host"] or place.get("hostaddr") or place.get("service", "")
        return automatic_name(f"{self.user}@{shown}:{place['port']}/{self.dbname}", place)

    @property
    def connect_timeout(self) -> float:
        """Seconds, at least 2 as libpq has it; 0: no limit."""
        try:
            seconds = int(float(self.all.get("connect_timeout", 0)))
        except ValueError:
            return 0
        return max(2, seconds) if seconds > 0 else 0

    def at(self, door: str) -> dict[str, str]:
        """The parameters for a library that connects to a door of this process."""
        password = self.all.get("password") or self._password_of_file()
        return {**self._at(door), **({"password": password} if password else {})}

    def again_at(self, door: str) -> dict[str, str]:
        """The same for a session that is there already: nobody asks who it is."""
        nobody_asks = "require_auth" in self.given or "PGREQUIREAUTH" in os.environ
        return {**self._at(door), **({"require_auth": ""} if nobody_asks else {})}

    def _at(self, door: str) -> dict[str, str]:
        params = {name: value for name, value in self.given.items() if not _is_of_the_server(name)}
        elsewhere = {"hostaddr": ""} if "PGHOSTADDR" in os.environ else {}
        return {**params, **elsewhere, "host": door, "port": "5432", "sslmode": "disable", "gssencmode": "disable"}

    def _password_of_file(self) -> str:
        assert self.server is not None
        path = self.all.get("passfile") or os.path.expanduser("~/.pgpass")
        host = self.server.host
        return find_password(path, "localhost" if host in _DEFAULT_DIRECTORIES else host or self.server.hostaddr,
                             str(self.server.port), self.dbname, self.user)  # fmt: skip


def _is_of_the_server(name: str) -> bool:
    """Whether it is about the way to the server, so that a library that connects to a door must not be told."""
    return name in _OF_THE_SERVER or name.startswith(("ssl", "keepalives"))


#: A Unix socket in libpq's own directory is "localhost" in the password file.
_DEFAULT_DIRECTORIES: Final = ("/var/run/postgresql", "/tmp")


def resolve(given: Mapping[str, object], libpq: int, *, move: bool = True) -> Target:
    """What a connection string's parameters mean here.

    Args:
        given: By name, as the library has parsed them.
        libpq: Its version, as 160003.
        move: Whether sessions shall move.
    """
    params = {name: str(value) for name, value in given.items() if value is not None}
    found = {name: os.environ[env] for name, env in _ENVIRONMENT.items() if os.environ.get(env)}
    everything = {**found, **params}
    stays = "" if move else "move=False"
    stays = stays or _why_it_stays(everything, libpq)
    server = None
    if not stays:
        port = everything.get("port") or "5432"
        if not port.isdecimal():
            stays = f"port={port}: only libpq knows what that means"
        else:
            server = Server(
                everything.get("host", ""), everything.get("hostaddr", ""), int(port),
                asks_tls=everything.get("sslmode", "prefer") == "prefer", sockopts=_sockopts(everything),
            )  # fmt: skip
    user = everything.get("user") or _os_user()
    dbname = everything.get("dbname") or user
    address, identity = _address(everything, user, dbname), _identity(everything, user, dbname)
    return Target(params, everything, user, dbname, address, identity, server, stays)


def _why_it_stays(params: Mapping[str, str], libpq: int) -> str:
    """Why only libpq can open it; "" if a relay can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no abstract sockets"
    if libpq < OLDEST:
        return f"libpq {libpq // 10000} knows no abstract sockets, 14 does"
    for name in ("service", "requirepeer", "krbsrvname", "gsslib", "replication"):
        if params.get(name):
            return f"{name}={params[name]} is for libpq alone"
    for name, harmless in _HARMLESS.items():
        if params.get(name, harmless[0]) not in harmless:
            return f"{name}={params[name]}{_BECAUSE.get(name, '')}"
    if "," in params.get("host", "") + params.get("hostaddr", "") + params.get("port", ""):
        return "it names several hosts"
    if not (params.get("host") or params.get("hostaddr")):
        return "it names no host; host=/var/run/postgresql or the like lets sessions move"
    return ""


_HARMLESS: Final = {
    "sslmode": ("prefer", "disable", "allow"),
    "sslnegotiation": ("postgres",),
    "gssencmode": ("disable",),
    "channel_binding": ("prefer", "disable"),
    "target_session_attrs": ("any",),
    "load_balance_hosts": ("disable",),
}
_BECAUSE: Final = {
    "sslmode": ": a session under TLS has its keys in one process",
    "gssencmode": ": an encrypted session has its keys in one process",
    "channel_binding": ": that needs TLS",
}


#: Of a session that is not where its pool's key says.
CHANGED: Final = "the connection string, or the environment, says something else than when it was first used"

#: A word for the option that keeps a session where it is; others are "other".
_WORDS: Final = {
    "sslmode": "tls", "sslnegotiation": "tls", "channel_binding": "tls", "gssencmode": "gssapi",
    "krbsrvname": "gssapi", "gsslib": "gssapi", "target_session_attrs": "hosts", "load_balance_hosts": "hosts",
    "service": "service",
}  # fmt: skip
#: The same where the reason names no option.
_PARTS: Final = (
    ("TLS", "tls"),
    ("GSSAPI", "gssapi"),
    ("several hosts", "hosts"),
    ("no host;", "no_host"),
    ("when it was first used", "changed"),
)


def word_for(why: str) -> str:
    """What a reason to stay is counted as."""
    option, given, _ = why.partition("=")
    if given and option.isidentifier():
        return _WORDS.get(option, "other")
    return next((word for part, word in _PARTS if part in why), "other")


def _address(params: Mapping[str, str], user: str, dbname: str) -> str:
    host = params.get("host") or params.get("hostaddr", "")
    rest = sorted((name, value) for name, value in params.items() if name not in _NOT_OF_THE_SESSION)
    if params.get("hostaddr"):
        rest.append(("hostaddr", params["hostaddr"]))
    more = f"?{hashlib.blake2b(repr(rest).encode(), digest_size=16).hexdigest()}" if rest else ""
    return f"{user}@{host}:{params.get('port') or '5432'}/{dbname}{more}"


def _identity(params: Mapping[str, str], user: str, dbname: str) -> str:
    """All that counts, each under its name, so that no value can pass for another."""
    found = {name: value for name, value in params.items() if name not in _NOT_OF_THE_KEY}
    return json.dumps({**found, "user": user, "dbname": dbname, "port": params.get("port") or "5432"}, sort_keys=True)


def _os_user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _sockopts(params: Mapping[str, str]) -> tuple[tuple[int, int, int], ...]:
    """As libpq sets them on a TCP connection."""
    wanted = []
    if params.get("keepalives", "1") != "0":
        wanted.append((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))
    for name, (level, option) in _TCP_OPTIONS.items():
        value = params.get(name, "0")
        if value.lstrip("-").isdecimal() and int(value) > 0 and hasattr(socket, option):
            wanted.append((level, getattr(socket, option), int(value)))
    return tuple(wanted)


def find_password(path: str, host: str, port: str, dbname: str, user: str) -> str:
    """The password in a password file, or ""; the first line that fits. Others' access to it makes it void."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return ""
            if status.st_mode & 0o077:
                log.warning("password file %r has group or world access; permissions should be 0600 or less", path)
                return ""
            for line in file:
                fields = _fields(line.rstrip("\r\n"))
                if len(fields) == 5 and all(
                    field in ("*", value) for field, value in zip(fields, (host, port, dbname, user), strict=False)
                ):
                    return fields[4]
    except OSError:
        pass
    return ""


def _fields(line: str) -> list[str]:
    r"""A line's fields, `\:` and `\\` unescaped."""
    if line.startswith("#"):
        return []
    fields: list[str] = []
    field = ""
    rest = iter(line)
    for char in rest:
        if char == ":" and len(fields) < 4:
            fields.append(field)
            field = ""
        else:
            field += next(rest, "") if char == "\\" else char
    return [*fields, field]
