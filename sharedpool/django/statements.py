"""Which statements change their session, or ask what an earlier statement left in it, as far as their text says.

A text cannot say everything: a function may do the same, and so may a trigger or a view that calls one. This is enough
for an error that names the statement. Whether a session is set back must not depend on it.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

#: Where a comment or something quoted may begin; by what is there, all of it. After an "E" backslashes are escapes.
_OPENING: Final = re.compile(r"""[-/'"$]""")
_ESCAPED: Final = re.compile(r"'((?:[^'\\]|\\.|'')*)'", re.DOTALL)
_WHOLE: Final = {
    "-": re.compile(r"--[^\n]*"),
    "/": re.compile(r"/\*.*?\*/", re.DOTALL),
    "'": re.compile(r"'((?:[^']|'')*)'"),
    '"': re.compile(r'"((?:[^"]|"")*)"'),
    "$": re.compile(r"\$((?:[^\W\d]\w*)?)\$(.*?)\$\1\$", re.DOTALL),
}
#: A text without any of these needs no closer look, which takes a microsecond for each character.
_HINTS: Final = (
    "set", "listen", "load", "declare", "prepare", "discard", "temp", "advisory_lock", "replication_origin",
    "dblink_connect", "currval", "lastval",
)  # fmt: skip
#: Statements by their first words; in a block of PL/pgSQL a statement begins after these words, too.
_BEGINNINGS: Final = re.compile(
    r"(?:^|;|\b(?:BEGIN|THEN|ELSE|LOOP)\b)\s*(?:"
    r"LISTEN|LOAD|DECLARE\s+\S+\s+(?:\w+\s+)*CURSOR|PREPARE(?!\s+TRANSACTION\b)|RESET|DISCARD"
    r"|SET(?!\s+(?:LOCAL|CONSTRAINTS|TRANSACTION)\b)"
    r"|CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:GLOBAL|LOCAL)\s+)?TEMP(?:ORARY)?\b"
    r")\b",
    re.IGNORECASE,
)
#: The same by what is called or named anywhere. set_config() with a true at its end lasts for a transaction only.
_ANYWHERE: Final = re.compile(
    r"\bINTO\s+(?:(?:GLOBAL|LOCAL)\s+)?TEMP(?:ORARY)?\b|\bCREATE\b[^;]*\bpg_temp\s*\."
    r"|\bset_config\s*\((?!(?:[^()]|\([^()]*\))*,\s*true\s*\))"
    r"|\b(?:pg_(?:try_)?advisory_lock(?:_shared)?|pg_replication_origin_session_setup|dblink_connect(?:_u)?"
    r"|setseed|set_limit|currval|lastval)\s*\(",
    re.IGNORECASE,
)
_SIMPLE_NAME: Final = re.compile(r"\w+")
_BLOCK: Final = re.compile(r"\s*DO\b", re.IGNORECASE)
#: A string in a block may be what it executes; a string in that is as deep as anybody looks.
_DEPTH: Final = 3
#: What is longer is put together for one use, and not remembered.
_LONG: Final = 4096


def needs_its_session(statement: Any) -> bool:
    """Whether a statement is about the session, so that it and those after it need one and the same.

    Args:
        statement: Text, bytes, or what psycopg's `sql` composes.
    """
    text = _text(statement)
    return _remembered(text) if len(text) < _LONG else _found(text)


def _text(statement: Any) -> str:
    if isinstance(statement, str):
        return statement
    if isinstance(statement, bytes | bytearray | memoryview):
        return bytes(statement).decode(errors="replace")
    if hasattr(statement, "as_string"):
        return str(statement.as_string(None))
    return "".join(getattr(statement, "strings", ()))  # a template string


def _found(text: str, depth: int = _DEPTH) -> bool:
    lower = text.lower()
    if not any(hint in lower for hint in _HINTS):
        return False
    bare, strings = _bared(text)
    if _BEGINNINGS.search(bare) or _ANYWHERE.search(bare):
        return True
    if depth < _DEPTH or _BLOCK.match(bare):
        return depth > 0 and any(_found(string, depth - 1) for string in strings)
    return False


_remembered: Final = functools.lru_cache(1024)(_found)


def _bared(text: str) -> tuple[str, list[str]]:
    """A text without comments and what is in quotes, and its strings."""
    bare, strings, at = [], [], 0
    while (opening := _OPENING.search(text, at)) is not None:
        begin, mark = opening.start(), opening[0]
        escapes = mark == "'" and text[begin - 1 : begin] in ("E", "e")
        whole = (_ESCAPED if escapes else _WHOLE[mark]).match(text, begin)
        if whole is None:
            bare.append(text[at : begin + 1])
            at = begin + 1
            continue
        bare += text[at:begin], " "
        at = whole.end()
        if mark == '"':
            bare.append(whole[1] if _SIMPLE_NAME.fullmatch(whole[1]) else '""')
        elif mark in "'$":
            bare.append("''")
            strings.append(whole[2] if mark == "$" else whole[1].replace("''", "'"))
    bare.append(text[at:])
    return "".join(bare).strip(), strings
