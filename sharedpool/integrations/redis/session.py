"""One connection to a Redis server, as the shared pool has it, and what its users have done to it.

The server's side of a connection has a state: the protocol, who is logged in, the database. All that is set at the
handshake, and is the baseline in which the next user must find it. Most commands change nothing of it. All are known
here by their names, so that a connection is either as it was or closed: a name that is not known may be a command that
its server calls otherwise (`rename-command`), or a module's that logs in. And every command has an answer: they are
counted, because an answer that is still on its way would reach the next user.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from typing import Any, Final

from redis.exceptions import ExecAbortError

from ...drivers.sockets import Pooled

log = logging.getLogger("sharedpool")

#: What a command does to its session: nothing; it cannot be lent on; it begins, ends, watches or no longer watches.
_PLAIN, _SPOILS, _MULTI, _ENDS, _WATCH, _UNWATCH, _CLIENT, _SCRIPT = range(8)

#: Session state that nobody else must meet, and modes in which answers are no longer one for each command. Redis
#: documentation, "Commands": those of the group "connection", "pubsub" and "server" that are about the caller's own.
_SPOILING: Final = (
    "ASKING", "AUTH", "HELLO", "HIMPORT", "MONITOR", "PSUBSCRIBE", "PSYNC", "PUNSUBSCRIBE", "QUIT", "READONLY",
    "READWRITE", "REPLCONF", "RESET", "SELECT", "SHUTDOWN", "SSUBSCRIBE", "SUBSCRIBE", "SUNSUBSCRIBE", "SYNC",
    "UNSUBSCRIBE",
)  # fmt: skip
#: What is about keys or about the whole server. Redis 8, Valkey 8; "ARGET" and its like are redis-py's.
_PLAIN_NAMES: Final = """
ACL APPEND ARCOUNT ARDEL ARDELRANGE ARGET ARGETRANGE ARGREP ARINFO ARINSERT ARLASTITEMS ARLEN ARMGET ARMSET ARNEXT AROP
ARRING ARSCAN ARSEEK ARSET BGREWRITEAOF BGSAVE BITCOUNT BITFIELD BITFIELD_RO BITOP BITPOS BLMOVE BLMOVEM BLMPOP BLPOP
BRPOP BRPOPLPUSH BZMPOP BZPOPMAX BZPOPMIN CLUSTER COMMAND COMMANDLOG CONFIG COPY DBSIZE DEBUG DECR DECRBY DEL DELEX
DELIFEQ DIGEST DUMP ECHO EVAL EVALSHA EVALSHA_RO EVAL_RO EXISTS EXPIRE EXPIREAT EXPIRETIME FAILOVER FCALL FCALL_RO
FLUSHALL FLUSHDB FUNCTION GEOADD GEODIST GEOHASH GEOPOS GEORADIUS GEORADIUSBYMEMBER GEORADIUSBYMEMBER_RO GEORADIUS_RO
GEOSEARCH GEOSEARCHSTORE GET GETBIT GETDEL GETEX GETRANGE GETSET HDEL HEXISTS HEXPIRE HEXPIREAT HEXPIRETIME HGET HGETALL
HGETDEL HGETEX HINCRBY HINCRBYFLOAT HKEYS HLEN HMGET HMSET HOTKEYS HPERSIST HPEXPIRE HPEXPIREAT HPEXPIRETIME HPTTL
HRANDFIELD HSCAN HSET HSETEX HSETNX HSTRLEN HTTL HVALS INCR INCRBY INCRBYFLOAT INCREX INFO KEYS LASTSAVE LATENCY LCS
LINDEX LINSERT LLEN LMOVE LMOVEM LMPOP LOLWUT LPOP LPOS LPUSH LPUSHX LRANGE LREM LSET LTRIM MEMORY MGET MIGRATE MODULE
MOVE MSET MSETEX MSETNX OBJECT PERSIST PEXPIRE PEXPIREAT PEXPIRETIME PFADD PFCOUNT PFDEBUG PFMERGE PFSELFTEST PING
PSETEX PTTL PUBLISH PUBSUB RANDOMKEY RENAME RENAMENX REPLICAOF RESTORE ROLE RPOP RPOPLPUSH RPUSH RPUSHX SADD SAVE SCAN
SCARD SDIFF SDIFFCARD SDIFFSTORE SENTINEL SET SETBIT SETEX SETNX SETRANGE SINTER SINTERCARD SINTERSTORE SISMEMBER
SLAVEOF SLOWLOG SMEMBERS SMISMEMBER SMOVE SORT SORT_RO SPOP SPUBLISH SRANDMEMBER SREM SSCAN STRALGO STRLEN SUBSTR SUNION
SUNIONCARD SUNIONSTORE SWAPDB TIME TOUCH TTL TYPE UNLINK VADD VCARD VDIM VEMB VGETATTR VINFO VISMEMBER VLINKS
VRANDMEMBER VRANGE VREM VSETATTR VSIM WAIT WAITAOF XACK XACKDEL XADD XAUTOCLAIM XCFGSET XCLAIM XDEL XDELEX XGROUP XINFO
XLEN XNACK XPENDING XRANGE XREAD XREADGROUP XREVRANGE XSETID XTRIM ZADD ZCARD ZCOUNT ZDIFF ZDIFFSTORE ZINCRBY ZINTER
ZINTERCARD ZINTERSTORE ZLEXCOUNT ZMPOP ZMSCORE ZPOPMAX ZPOPMIN ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANGESTORE
ZRANK ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK ZREMRANGEBYSCORE ZREVRANGE ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN
ZSCORE ZUNION ZUNIONSTORE
""".split()  # noqa: SIM905 - a list with a line for each would be 270 lines
#: Modules that come with Redis: search, JSON, time series, and the probabilistic types. Their commands are about keys.
_PLAIN_MODULES: Final = frozenset({"BF", "CF", "CMS", "FT", "JSON", "TDIGEST", "TOPK", "TS"})
#: Of CLIENT's subcommands those that ask, or are about others.
_HARMLESS: Final = frozenset(
    {"GETNAME", "GETREDIR", "HELP", "ID", "INFO", "KILL", "LIST", "PAUSE", "TRACKINGINFO", "UNBLOCK", "UNPAUSE"}
)
_FIRST: Final = {
    **dict.fromkeys(_PLAIN_NAMES, _PLAIN), **dict.fromkeys(_SPOILING, _SPOILS),
    "MULTI": _MULTI, "EXEC": _ENDS, "DISCARD": _ENDS, "WATCH": _WATCH, "UNWATCH": _UNWATCH, "CLIENT": _CLIENT,
    "SCRIPT": _SCRIPT,
}  # fmt: skip
#: An error that is the answer to EXEC: the transaction has ended.
_ENDED: Final = ExecAbortError
#: Names as they were given, looked up once; more than so many different ones are no command names.
_known: dict[Any, int] = {}
_MOST_KNOWN: Final = 4096


def _text(part: Any) -> str:
    if isinstance(part, bytes | bytearray | memoryview):
        return bytes(part).decode("ascii", "replace").upper()
    if isinstance(part, str):
        return str.upper(part)  # of an Enum that is text, too: what redis-py sends is its value
    return str(part).upper()


def _kind(args: tuple[Any, ...]) -> int:
    """What a command does; the name may have its subcommand in it ("CLIENT ID"), as redis-py allows."""
    words = _text(args[0]).split()
    first = words[0] if words else ""
    kind = _FIRST.get(first, -1)
    if kind < 0:
        kind = _PLAIN if first.partition(".")[0] in _PLAIN_MODULES and "." in first else _unknown(first)
    if kind in (_ENDS, _UNWATCH) and len(words) > 1:
        return _SPOILS  # the server refuses what has too many words
    if kind in (_CLIENT, _SCRIPT):
        words += [_text(part) for part in args[1:2]]
        second = words[1] if len(words) > 1 else ""
        harmless = second in _HARMLESS if kind == _CLIENT else second != "DEBUG"
        return _PLAIN if harmless else _SPOILS
    if len(_known) < _MOST_KNOWN and isinstance(args[0], str | bytes):
        _known[args[0]] = kind
    return kind


def _unknown(name: str) -> int:
    """A command that nobody knows here: told once, because its connection is closed after each use."""
    if name not in _told and len(_told) < _MOST_KNOWN:
        _told.add(name)
        log.warning(
            "the Redis command %.40r is not known: it may change its connection, which is therefore closed after it"
            " instead of lent on", name,
        )  # fmt: skip
    return _SPOILS


_told: set[str] = set()


class Ledger:
    """What has been said on a connection since its handshake.

    Attributes:
        awaited: So many commands have not been answered.
        spoiled: It must not be lent on.
    """

    __slots__ = ("_multi", "_transacts", "_watch", "awaited", "spoiled")

    def __init__(self) -> None:
        self.awaited = 0
        self.spoiled = self._multi = self._watch = self._transacts = False

    def sends(self, commands: Iterable[tuple[Any, ...]] | None) -> None:
        """These commands are about to be sent; None: nobody knows which."""
        if commands is None:
            self.spoiled = True
            return
        for args in commands:
            self.awaited += 1
            try:
                kind = _known[args[0]]
            except (KeyError, TypeError):
                kind = _kind(args)
            if kind:
                self._note(kind, len(args))

    def _note(self, kind: int, words: int) -> None:
        """As the server does it: within MULTI all but its end is queued, and its end forgets the watches, too.

        What has more words than it may have is refused, and ends nothing.
        """
        self._transacts = True
        if kind == _SPOILS or (words > 1 and kind in (_ENDS, _UNWATCH)):
            self.spoiled = True
        elif kind == _MULTI:
            self._multi = True
        elif kind == _ENDS:
            if self._multi:
                self._multi = self._watch = False
        elif not self._multi:
            self._watch = kind == _WATCH

    def answered(self, error: Exception | None = None) -> None:
        """An answer was read. An error may mean that the end of a transaction was refused, which then goes on."""
        self.awaited -= 1
        if error is not None and self._transacts and not isinstance(error, _ENDED):
            self.spoiled = True
        if not (self.awaited or self._multi or self._watch):
            self._transacts = False  # all is answered, the end, too

    @property
    def clean(self) -> bool:
        """Whether the next user finds it as this one did: nothing on its way, no transaction, the first state."""
        return not (self.awaited or self.spoiled or self._multi or self._watch)


class Session(Ledger):
    """A connection's socket, its state at the handshake, and what has been said on it since.

    Attributes:
        sock: The socket.
        state: What another process needs besides the descriptor; None: it stays in this one.
        user: redis-py's object for it in this process, or None.
        greeting: The state as redis-py keeps it, once it was asked for.
        timed: The timeout that the socket was given last, s or None; the session itself: it was given none.
        fileno: Gives the socket's number; -1 once it is closed.
        inside: As of `Pooled`.
    """

    __slots__ = ("fileno", "greeting", "inside", "sock", "state", "timed", "user")

    def __init__(self, sock: socket.socket, state: bytes | None) -> None:
        super().__init__()
        self.sock = sock
        self.fileno = sock.number if isinstance(sock, Pooled) else sock.fileno
        self.inside: list[None] = sock.inside if isinstance(sock, Pooled) else []
        self.state = state
        self.user: Any = None
        self.greeting: dict[Any, Any] | None = None
        self.timed: Any = self
