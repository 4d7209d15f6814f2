"""Counting by key: to which line of the table a process's counts of a key go.

A line has one row and one key and, like a row, one writer. There are fewer lines than there may be pairs of them: who
gets none counts in its row, so a row has what belongs to no key, or to a key beyond the room. The arbiter's lines are
those of TOTALS_ROW: it counts in them what it does itself, and what the dead had counted of the key.
"""

from __future__ import annotations

import time
from typing import Final

from . import view
from .counting import fold_line
from .errors import PoolStopped
from .layout import (
    ARBITER_ROW,
    HEADER,
    LINE,
    LINE_HIGH,
    LINE_ROW_SHIFT,
    LINE_USED,
    ROW,
    ROW_CLOSES,
    ROW_COUNTERS,
    TOTALS_ROW,
)
from .stats import COUNTERS, REASONS
from .table import BUSY, DONE, Table

#: How far behind a row's or a line's place its counters lie.
COUNTS: Final = {name: ROW_COUNTERS + index for index, name in enumerate(COUNTERS)}
#: The same of its closes, by reason.
CLOSES: Final = {name: ROW_CLOSES + index for index, name in enumerate(REASONS)}

#: A busy mutex is tried so often, 50 us apart; then what was to be counted is counted in the row, this time.
_TRIES: Final = 20


class Lines:
    """The lines of one process, or of the arbiter.

    Args:
        table: The table, as the process's row.

    Attributes:
        rest: The place of the row where it counts what has no line.
    """

    __slots__ = ("_places", "_room", "_row", "_share", "_table", "rest", "words")

    def __init__(self, table: Table) -> None:
        self._table = table
        self.words = table.words
        arbiter = table.row == ARBITER_ROW
        self._row = TOTALS_ROW if arbiter else table.row
        self.rest = HEADER + ROW * self._row
        lines = table.geometry.lines
        # A process that uses thousands of keys leaves lines to the others, and the last ones are the arbiter's.
        self._room, self._share = (lines, lines) if arbiter else (lines - lines // 8, lines // 4)
        self._places: dict[int, int] = {}
        if arbiter:
            self._places = {line.key: line.at for line in view.lines(self.words, table.geometry) if not line.row}

    def place(self, key: int) -> int:
        """Where a key is counted: the place of a line, or of this row. Counters lie behind it at the same offsets."""
        return self._places.get(key) or self._claim(key)

    def _claim(self, key: int) -> int:
        """A line for a key. Two threads may each get one, which does no harm: all lines of a key are added up."""
        if len(self._places) >= self._share:
            return self.rest
        word = self._row << LINE_ROW_SHIFT | LINE_USED
        try:
            for _ in range(_TRIES):
                at = self._free()
                if not at:
                    return self._places.setdefault(key, self.rest)
                result = self._table.claim_line(at, key, word)
                if result == DONE:
                    return self._places.setdefault(key, at)
                if result == BUSY:
                    time.sleep(50e-6)
        except PoolStopped:  # this process has left the pool
            pass
        return self.rest

    def _free(self) -> int:
        """The place of a free line, or 0."""
        base, used = self._table.geometry.line_base, self.words[LINE_HIGH]
        words = self.words[base : base + LINE * min(used, self._room) : LINE].tolist()
        if 0 in words:
            return base + LINE * words.index(0)
        return base + LINE * used if used < self._room else 0

    # --- the arbiter's ------------------------------------------------------------------------------------------------

    def fold(self, row: int) -> None:
        """A row's process has gone: its lines become the arbiter's, or are added to those; at any time done again."""
        for line in view.lines(self.words, self._table.geometry):
            if line.row == row:
                own = self._places.get(line.key)
                if own is None or own == self.rest:
                    self.words[line.at] = LINE_USED | TOTALS_ROW << LINE_ROW_SHIFT
                    self._places[line.key] = line.at
                else:
                    fold_line(self.words, line.at, own)

    def make_room(self) -> None:
        """Where lines get scarce: what only the dead had counted, of keys without connections, is added to the rest."""
        w, geometry = self.words, self._table.geometry
        if w[LINE_HIGH] < geometry.lines * 3 // 4:
            return
        lines = view.lines(w, geometry)
        if len(lines) < geometry.lines * 3 // 4:
            return
        used = view.keys_in_use(w, geometry) | {line.key for line in lines if line.row}
        for line in lines:
            if line.key not in used:
                self._places.pop(line.key, None)
                fold_line(w, line.at, self.rest)
        self._places = {key: at for key, at in self._places.items() if at != self.rest}  # ask again
