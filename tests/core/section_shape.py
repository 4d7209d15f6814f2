"""Walks the byte code of a critical section, from trylock to unlock, and says what must not be in there.

CPython looks for signals and for other threads after calls, at backward jumps and at function starts. Between the two
operators there may be nothing of the kind, nothing that runs Python code, and no way out that leaves the mutex locked.
"""

from __future__ import annotations

import dis
import errno
import types
from collections.abc import Callable, Iterator
from typing import Any

#: Neither look for anything nor raise: they may stand outside of the try block, too.
CANNOT_RAISE = {
    "CACHE", "COPY", "EXTENDED_ARG", "JUMP_FORWARD", "JUMP_NO_INTERRUPT", "LOAD_CONST", "LOAD_CONST_IMMORTAL",
    "LOAD_CONST_MORTAL", "LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_BORROW_LOAD_FAST_BORROW", "LOAD_FAST_LOAD_FAST",
    "LOAD_SMALL_INT", "NOP", "NOT_TAKEN", "POP_EXCEPT", "POP_TOP", "PUSH_EXC_INFO", "STORE_FAST",
    "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "SWAP",
    "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_IF_FALSE", "POP_JUMP_IF_TRUE",
    "JUMP_IF_FALSE_OR_POP", "JUMP_IF_TRUE_OR_POP",
}  # fmt: skip

#: Look for nothing, and run C code only, given ints and memoryviews.
MAY_RAISE = {"BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "LOAD_GLOBAL", "STORE_SUBSCR", "TO_BOOL", "UNARY_INVERT"}

BRANCHES = ("POP_JUMP", "JUMP_IF")

Code = list[dis.Instruction]


def trylocks(code: Code) -> list[int]:
    """Where the mutex is tried."""
    return [
        index for index, one in enumerate(code) if one.opname == "UNARY_NEGATIVE" and _loads(code[index - 1], "mutex")
    ]


def unlocks(code: Code, index: int) -> bool:
    """Whether this instruction is the unlock."""
    one = code[index]
    plus = one.opname == "UNARY_POSITIVE" or (one.opname == "CALL_INTRINSIC_1" and "UNARY_POSITIVE" in one.argrepr)
    return plus and _loads(code[index - 1], "mutex")


def _loads(one: dis.Instruction, name: str) -> bool:
    last = one.argval[-1] if isinstance(one.argval, tuple) else one.argval
    return one.opname.startswith("LOAD_FAST") and last == name


def refusals(function: Callable[..., Any], calls: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a function's critical sections; `calls` are the globals that may be called in there."""
    code = [one for one in dis.get_instructions(function) if one.opname not in ("CACHE", "EXTENDED_ARG")]
    starts = trylocks(code)
    if not starts:
        return ["no section: nothing is tried with -mutex"]
    walk = _Walk(function, code, calls)
    return [text for start in starts for text in walk.section(start)]


class _Walk:
    def __init__(self, function: Callable[..., Any], code: Code, calls: tuple[str, ...]) -> None:
        self.code = code
        self.calls = calls
        self.names = function.__globals__
        self.at = {one.offset: index for index, one in enumerate(code)}
        self.handlers = _handlers(function.__code__)

    def place(self, offset: int) -> int:
        """The index of the instruction at an offset, or of the next one that counts."""
        while offset not in self.at:
            offset += 2
        return self.at[offset]

    def handler(self, one: dis.Instruction) -> int | None:
        return next((self.place(target) for start, end, target in self.handlers if start <= one.offset < end), None)

    def section(self, start: int) -> Iterator[str]:
        """Everything wrong with the section whose trylock is at this index, and with what follows a holder's death."""
        held, other, wrong = self._test(start, {0})
        if not wrong:
            yield from self._held(held)
            held, _, wrong = self._test(other - 1, {errno.EOWNERDEAD})
        if wrong:
            yield wrong
        else:
            yield from self._held(held)

    def _held(self, entered: int) -> Iterator[str]:
        """Everything wrong from here, where the mutex is held, to its unlock."""
        seen: set[int] = set()
        todo = [entered]
        while todo:
            index = todo.pop()
            if index in seen:
                continue
            seen.add(index)
            if index >= len(self.code):
                yield "the end is reached with the mutex locked"
                continue
            if unlocks(self.code, index):
                continue
            yield from self._allowed(index)
            todo += self._next(index)

    def _test(self, start: int, codes: set[int]) -> tuple[int, int, str]:
        """After this index comes `rc == code` and nothing else: where it goes on if so, and if not."""
        names, compared, index = [], [], start + 1
        while index < len(self.code) and not self.code[index].opname.startswith("POP_JUMP"):
            one = self.code[index]
            names.append(one.opname)
            if one.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                compared.append(one.argval)
            elif one.opname == "LOAD_GLOBAL":
                compared.append(self.names.get(one.argval))
            elif one.opname == "COMPARE_OP":
                compared.append(one.argrepr)
            index += 1
        allowed = {"STORE_FAST", "STORE_FAST_LOAD_FAST", "LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_CONST"}
        allowed |= {"LOAD_SMALL_INT", "LOAD_GLOBAL", "COMPARE_OP", "TO_BOOL"}
        sound = len(compared) == 2 and compared[0] in codes and "==" in str(compared[1]) and set(names) <= allowed
        if not sound or index >= len(self.code) or not self.code[index].opname.endswith("IF_FALSE"):
            wanted = " or ".join(errno.errorcode.get(code, str(code)) for code in codes)
            return 0, 0, f"after trylock comes more than, or other than, `rc == {wanted}`: {names} {compared}"
        return index + 1, self.place(self.code[index].argval), ""

    def _allowed(self, index: int) -> Iterator[str]:
        one = self.code[index]
        where = f"line {line_of(self.code, index)}: {one.opname} {one.argrepr}"
        if one.opname in CANNOT_RAISE:
            pass
        elif one.opname == "RERAISE" or one.opname.startswith("RETURN"):
            yield f"{where} leaves with the mutex locked"
        elif "BACKWARD" in one.opname:
            yield f"{where} jumps backward"
        elif self.handler(one) is None:
            yield f"{where} may raise where nothing unlocks"
        elif one.opname == "LOAD_GLOBAL":
            value = self.names.get(one.argval)
            if type(value) is not int and one.argval not in self.calls:
                yield f"{where} is no int"
        elif one.opname in ("STORE_ATTR", "LOAD_ATTR"):
            if not self._is_the_leases_word(index):
                yield f"{where} is not the word of a lease"
        elif one.opname not in MAY_RAISE and not self._is_the_call(index):
            yield f"{where} is not on the white list"

    def _is_the_leases_word(self, index: int) -> bool:
        """`lease.word`, a slot; or, on the way into an allowed call, an attribute of self."""
        one, before = self.code[index], self.code[index - 1]
        return (one.argval == "word" and _loads(before, "lease")) or (bool(self.calls) and _loads(before, "self"))

    def _is_the_call(self, index: int) -> bool:
        return bool(self.calls) and self.code[index].opname in ("CALL", "PRECALL", "PUSH_NULL")

    def _next(self, index: int) -> list[int]:
        """Where it may go on from here."""
        one = self.code[index]
        following: list[int] = []
        if one.opname.startswith(BRANCHES) or one.opname.startswith("JUMP"):
            following.append(self.place(one.argval))
        if not one.opname.startswith(("JUMP_FORWARD", "JUMP_NO", "JUMP_BACKWARD", "RERAISE", "RETURN", "RAISE")):
            following.append(index + 1)
        handler = self.handler(one)
        if one.opname not in CANNOT_RAISE and handler is not None:
            following.append(handler)
        return following


def _handlers(code: types.CodeType) -> list[tuple[int, int, int]]:
    """(start, end, target) of the exception table, in bytes."""
    return [(entry.start, entry.end, entry.target) for entry in dis.Bytecode(code).exception_entries]  # type: ignore[attr-defined]


def line_of(code: Code, index: int) -> int:
    """The line of an instruction, for people."""
    for one in code[index::-1]:
        line = one.positions.lineno if one.positions else None
        if line is not None:
            return line
    return 0
