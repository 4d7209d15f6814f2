"""When an HTTP/1.1 exchange is over, and who may have its connection then. This is the one place that decides it.

The client libraries parse answers in their own ways, and each forgives other mistakes of a server. So an `Exchange`
reads along: it gets every byte that was sent and every byte that came, before the library does. It is strict. An answer
that can be understood in two ways ends its connection. It never changes what the library's user gets.

Pure: it knows no socket, no clock, no thread and no library. (RFC 9110, RFC 9112.)
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

#: A client gives up after so many interim answers (1xx) to one request.
MOST_INTERIM: Final = 1000
#: A head, or a line of a chunked body, that is longer is not followed, bytes.
_LONGEST_HEAD: Final = 1 << 18
_LONGEST_LINE: Final = 1 << 16

_NAME: Final = rb"[!#-'*+\-.0-9A-Z^-z|~]+"
_LINE: Final = rb"[\t -~\x80-\xff]*"
_FIELDS: Final = rb"((?:" + _NAME + rb":" + _LINE + rb"\r\n)*)\r\n"
_ANSWER: Final = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: (" + _LINE + rb"))?\r\n" + _FIELDS)
_REQUEST: Final = re.compile(rb"(" + _NAME + rb") [!-~\x80-\xff]+ HTTP/1\.([01])\r\n" + _FIELDS)
_FIELD: Final = re.compile("([^:]+):[\t ]*([^\r]*)\r\n")
_TRAILER: Final = re.compile(_NAME + rb":" + _LINE)
_CHUNK: Final = re.compile(rb"([0-9a-fA-F]{1,15})(?:;" + _LINE + rb"|[\t ]*)")
_LENGTH: Final = re.compile("[0-9]{1,18}")

#: Fields that say where a message ends, whether its connection stays, or who its user is.
_TELLING: Final = frozenset({
    "content-length", "transfer-encoding", "connection", "proxy-connection", "authorization", "proxy-authorization",
    "www-authenticate", "proxy-authenticate", "persistent-auth", "authentication-info", "proxy-authentication-info",
})  # fmt: skip
_OF_LOGINS: Final = frozenset({
    "www-authenticate", "proxy-authenticate", "persistent-auth", "authentication-info", "proxy-authentication-info",
})  # fmt: skip
#: A scheme that logs a connection in, and not a request (RFC 4559, MS-NTHT), and its token if there is one.
_SCHEME: Final = re.compile(
    r"(?:^|,)[ \t]*(?:ntlm|negotiate|kerberos|nego2|credssp|pku2u|tsssp)(?![^\s,])"
    r"(?:[ \t]+([a-z0-9._~+/-]+=*)(?=[ \t]*(?:,|$)))?",
    re.IGNORECASE,
)


class End(enum.Enum):
    """What becomes of a connection when its user gives it back."""

    #: The exchange is over, and nothing is left of it: anybody may have the connection.
    CLEAN = "clean"
    #: The exchange is not over, or the connection ends with it, or belongs to somebody: close it.
    CLOSE = "close"
    #: Bytes came beyond the answer: close it, as unclean.
    SURPLUS = "surplus"
    #: The server has offered a login for the connection: keep it a moment for its user's next request.
    OFFERED = "offered"
    #: A login for the connection has begun: keep it for its user's next request.
    BEGUN = "begun"


#: For how many seconds a connection is kept for its user's next request; and after how many such requests no more.
KEPT: Final = {End.OFFERED: 0.2, End.BEGUN: 5.0}
_MOST_LEGS: Final = 10


class Head(NamedTuple):
    """The head of an answer; `length` is its own, bytes."""

    version: int
    status: int
    reason: str
    fields: list[tuple[str, str]]
    length: int


class _Body(enum.Enum):
    """What bytes belong to, of one message."""

    HEAD = enum.auto()
    COUNTED = enum.auto()
    SIZE = enum.auto()
    CHUNK = enum.auto()
    CHUNK_END = enum.auto()
    TRAILERS = enum.auto()
    ENDLESS = enum.auto()
    OVER = enum.auto()
    BROKEN = enum.auto()


class _Message:
    """Finds the end of one message. What is unclear is BROKEN, and has no end.

    Attributes:
        state: What the next byte belongs to.
        beyond: Whether bytes came after the end.
        begun: Whether anything came.
    """

    __slots__ = ("_kept", "_left", "begun", "beyond", "state")

    def __init__(self) -> None:
        self.state = _Body.HEAD
        self.beyond = self.begun = False
        self._kept = bytearray()
        self._left = 0

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes of the connection."""
        at, end = 0, len(data)
        self.begun = self.begun or end > 0
        while at < end:
            state = self.state
            if state is _Body.COUNTED or state is _Body.CHUNK:
                took = min(self._left, end - at)
                at += took
                self._left -= took
                if not self._left:
                    self.state = _Body.OVER if state is _Body.COUNTED else _Body.CHUNK_END
            elif state is _Body.OVER:
                self.beyond = True
                return
            elif state is _Body.BROKEN or state is _Body.ENDLESS:
                return
            elif state is _Body.HEAD:
                at = self._head(data, at)
            else:
                at = self._line(data, at)

    def _head(self, data: bytes | memoryview, at: int) -> int:
        kept = self._kept
        known = len(kept)
        kept += data[at:]
        end = kept.find(b"\r\n\r\n", max(0, known - 3)) + 4
        if end < 4:
            if len(kept) > _LONGEST_HEAD:
                self.fail()
            return len(data)
        head = bytes(kept[:end])
        kept.clear()
        self._understand(head)
        return at + end - known

    def _line(self, data: bytes | memoryview, at: int) -> int:
        kept = self._kept
        piece = bytes(data[at : at + _LONGEST_LINE])
        end = piece.find(b"\n") + 1
        kept += piece[:end] if end else piece
        if end and kept.endswith(b"\r\n"):
            line = bytes(kept[:-2])
            kept.clear()
            self._take_line(line)
        elif end or len(kept) > _LONGEST_LINE:
            self.fail()
        return at + (end or len(piece))

    def _take_line(self, line: bytes) -> None:
        if self.state is _Body.SIZE:
            size = _CHUNK.fullmatch(line)
            if size is None:
                self.fail()
                return
            self._left = int(size[1], 16)
            self.state = _Body.CHUNK if self._left else _Body.TRAILERS
        elif self.state is _Body.CHUNK_END:
            if line:
                self.fail()
            else:
                self.state = _Body.SIZE
        elif not line:
            self.state = _Body.OVER
        elif not _TRAILER.fullmatch(line):
            self.fail()

    def _understand(self, head: bytes) -> None:
        """Go on after a whole head."""
        raise NotImplementedError

    def _frame(self, told: dict[str, list[str]], modern: bool, otherwise: _Body) -> None:
        """Where the body ends, by the head's fields; more than one length, or two kinds of them, is no answer."""
        lengths, codings = told.get("content-length"), told.get("transfer-encoding")
        if codings is not None:
            chunked = modern and lengths is None and [each.lower() for each in codings] == ["chunked"]
            self.state = _Body.SIZE if chunked else _Body.BROKEN
        elif lengths is None:
            self.state = otherwise
        elif len(lengths) != 1 or not _LENGTH.fullmatch(lengths[0]):
            self.fail()
        else:
            self._left = int(lengths[0])
            self.state = _Body.COUNTED if self._left else _Body.OVER

    def fail(self) -> None:
        """It cannot be followed any further."""
        self.state = _Body.BROKEN
        self._kept.clear()


def _telling(fields: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The values of the fields that matter here, by their names in lower case."""
    told: dict[str, list[str]] = {}
    for name, value in fields:
        kind = name.lower()
        if kind in _TELLING:
            told.setdefault(kind, []).append(value.strip("\t "))
    return told


def _stays(told: dict[str, list[str]], modern: bool) -> bool:
    """Whether the connection outlives the message."""
    if "connection" not in told and "proxy-connection" not in told:
        return modern
    words = {
        word.strip().lower()
        for name in ("connection", "proxy-connection")
        for value in told.get(name, ())
        for word in value.split(",")
    }
    return "close" not in words and (modern or "keep-alive" in words)


def _schemes(told: dict[str, list[str]], *names: str) -> list[str]:
    """The tokens that come with schemes that log a connection in; empty ones for those without a token."""
    return [token for name in names for value in told.get(name, ()) for token in _SCHEME.findall(value)]


def logs_in(fields: Iterable[tuple[str, str]]) -> bool:
    """Whether a request with these fields logs its connection in, or goes on with that."""
    return bool(_schemes(_telling(fields), "authorization", "proxy-authorization"))


class _Request(_Message):
    """What is sent.

    Attributes:
        method: In upper case; empty until it is known.
        stays: Whether it lets the connection live.
        logs_in: Whether it logs the connection in, or tries to.
        digest: Whether it has a login of its own that answers with Authentication-Info.
    """

    __slots__ = ("digest", "logs_in", "method", "stays")

    def __init__(self) -> None:
        super().__init__()
        self.method = ""
        self.stays = True
        self.logs_in = self.digest = False

    def _understand(self, head: bytes) -> None:
        found = _REQUEST.fullmatch(head)
        if found is None:
            self.fail()
            return
        modern = found[2] == b"1"
        told = _telling(_FIELD.findall(found[3].decode("latin-1")))
        self.note(found[1].decode("ascii"), told, modern)
        self._frame(told, modern, _Body.OVER)

    def note(self, method: str, told: dict[str, list[str]], modern: bool) -> None:
        """What the head says beside its framing."""
        self.method = method.upper()
        self.stays = _stays(told, modern) and self.method != "CONNECT"
        if "authorization" not in told and "proxy-authorization" not in told:
            return
        self.logs_in = bool(_schemes(told, "authorization", "proxy-authorization"))
        self.digest = any(
            value.lower().startswith("digest ")
            for name in ("authorization", "proxy-authorization")
            for value in told.get(name, ())
        )


class _Answer(_Message):
    """What comes: interim answers, then the final one."""

    __slots__ = ("_request", "head", "interim", "login", "stays")

    def __init__(self, request: _Request) -> None:
        super().__init__()
        self._request = request
        self.interim = 0
        self.head: Head | None = None
        self.stays = False
        self.login: End | None = None

    def _understand(self, head: bytes) -> None:
        found = _ANSWER.fullmatch(head)
        if found is None:
            self.fail()
            return
        status = int(found[2])
        if status < 200 and status != 101:
            self.interim += 1
            return
        fields: list[tuple[str, str]] = _FIELD.findall(found[4].decode("latin-1"))
        told = _telling(fields)
        modern = found[1] == b"1"
        self.head = Head(10 + modern, status, (found[3] or b"").decode("latin-1").strip(), fields, len(head))
        self.stays = _stays(told, modern)
        self.login = _login(status, told, self._request)
        if status == 101:
            self.fail()  # from here on it is no HTTP
        elif self._request.method == "HEAD":
            self._frame(told, modern, _Body.OVER)
            self.state = _Body.BROKEN if self.state is _Body.BROKEN else _Body.OVER
        elif status in (204, 304):  # a server that speaks of a body may send one, though it must not
            self.state = _Body.OVER
            silent = "transfer-encoding" not in told and told.get("content-length", ["0"]) == ["0"]
            self.stays = self.stays and silent
        else:
            self._frame(told, modern, _Body.ENDLESS)


def _login(status: int, told: dict[str, list[str]], request: _Request) -> End | None:
    """Whether an answer logs its connection in, or offers that; and what becomes of the connection then."""
    if not request.logs_in and told.keys().isdisjoint(_OF_LOGINS):
        return None
    challenges = _schemes(told, "www-authenticate", "proxy-authenticate")
    if challenges and status in (401, 407):
        return End.BEGUN if any(challenges) else End.OFFERED
    info = not request.digest and (told.keys() & {"authentication-info", "proxy-authentication-info"})
    persistent = any(value.lower() != "false" for value in told.get("persistent-auth", ()))
    return End.CLOSE if challenges or info or persistent or request.logs_in else None


class Exchange:
    """One request and its answer, as they went over the connection.

    Args:
        legs: How often the connection was kept for its user's next request. After that nobody else may have it.

    Attributes:
        legs: As given.
    """

    __slots__ = ("_answer", "_pieces", "_request", "legs")

    def __init__(self, legs: int = 0) -> None:
        self.legs = legs
        self._request = _Request()
        self._answer = _Answer(self._request)
        self._pieces = 0

    def asks(self, method: str, fields: Iterable[tuple[str, str]], *, sound: bool) -> None:
        """For a library that does not show what it sends: the request's head.

        Args:
            method: Its method.
            fields: Its fields.
            sound: Whether its body is as long as its head says.
        """
        request = self._request
        request.note(method, _telling(fields), True)
        request.begun = True
        request.state = _Body.OVER if sound else _Body.BROKEN

    def sent(self, data: bytes | memoryview) -> None:
        """These bytes were sent."""
        self._request.feed(data)

    def sent_unseen(self) -> None:
        """Something was sent that cannot be looked at."""
        self._request.begun = True
        self._request.fail()

    def came(self, data: bytes | memoryview) -> None:
        """These bytes came."""
        self._pieces += 1
        self._answer.feed(data)

    @property
    def surplus(self) -> bool:
        """Whether bytes came beyond the answer, or without a request."""
        answer = self._answer
        return answer.beyond or (answer.begun and not self._request.begun)

    @property
    def flooded(self) -> bool:
        """Whether the server sends one interim answer after the other."""
        return self._answer.interim > MOST_INTERIM

    @property
    def head(self) -> Head | None:
        """The final answer's head, once it has come."""
        return self._answer.head

    @property
    def came_at_once(self) -> bool:
        """Whether the final answer has come whole, in one piece, with nothing before or beyond it."""
        answer = self._answer
        return self._pieces == 1 and answer.state is _Body.OVER and not answer.beyond and not answer.interim

    def end(self, *, through: bool) -> End:
        """What becomes of the connection.

        Args:
            through: Whether the library has read the answer to its end, and would use the connection again.
        """
        request, answer = self._request, self._answer
        if self.surplus:
            return End.SURPLUS
        if not through or not (self._over if request.begun else not self.legs):
            return End.CLOSE
        if answer.login is End.BEGUN and self.legs < _MOST_LEGS:
            return End.BEGUN
        if answer.login is End.OFFERED and not self.legs:  # offered again: it was not taken, or has failed
            return End.OFFERED
        return End.CLOSE if self.legs or answer.login is not None else End.CLEAN

    @property
    def _over(self) -> bool:
        request, answer = self._request, self._answer
        return (
            request.state is _Body.OVER
            and not request.beyond
            and request.stays
            and answer.state is _Body.OVER
            and answer.stays
        )
