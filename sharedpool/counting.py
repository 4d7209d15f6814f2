"""Counting in shared memory: histograms, and moving a row's counts to the totals when the row ends. Pure.

A row has one process, whose threads may count at once: inside a section under the mutex, or outside of it by
`w[at] = w[at] + 1` in one statement, which is one stretch for CPython: it looks for other threads only after calls, at
backward jumps and at function starts. A process that is killed between a deed and its count takes that one with it.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from .layout import FOLD, FOLD_TO, FOLD_TOTAL, HEADER, LINE, MASK64, ROW, ROW_COUNTERS, TOTALS_ROW
from .stats import BOUNDS

BOUNDS_NS: Final = tuple(round(bound * 1e9) for bound in BOUNDS)
#: Where the sum of a histogram lies, after its buckets.
SUM: Final = len(BOUNDS) + 1

_PLACE: Final = 0xFFFF_FFFF
_ONE_FOLD: Final = 1 << 32


def bucket_of(nanoseconds: int) -> int:
    """The bucket of a duration: the first whose bound is not below it."""
    return bisect_left(BOUNDS_NS, nanoseconds)


class Durations:
    """A histogram of one row.

    Args:
        words: The table's words.
        at: Where its buckets begin.
    """

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview[int], at: int) -> None:
        self._words = words
        self._at = at

    def add(self, nanoseconds: int) -> None:
        """One more duration; below 0, as of clocks that differ, is 0."""
        w = self._words
        took = max(0, nanoseconds)
        at = self._at + bucket_of(took)
        total = self._at + SUM
        w[at] = w[at] + 1
        w[total] = w[total] + took


def fold(w: memoryview[int], row: int) -> None:
    """Move all counts of a row to the totals; broken off anywhere and run again, nothing is lost or counted twice.

    What each total becomes is written down first, with the place that it comes from. Only the arbiter folds.
    """
    finish(w)
    start = HEADER + ROW * row
    for offset in range(ROW_COUNTERS, ROW):
        _move(w, start + offset, HEADER + ROW * TOTALS_ROW + offset, 0)


def fold_line(w: memoryview[int], line: int, to: int) -> None:
    """Move all counts of a line to another line, or to a row, and free it; as `fold`. Nobody writes to it any more."""
    finish(w)
    for offset in range(ROW_COUNTERS, LINE):
        _move(w, line + offset, to + offset, to + offset)
    w[line] = 0


def _move(w: memoryview[int], place: int, to: int, noted: int) -> None:
    """Add one count to its total; `noted` is where that lies, or 0 for the same place of the totals' row."""
    if w[place]:
        w[FOLD_TO] = noted
        w[FOLD_TOTAL] = w[to] + w[place] & MASK64  # may be below zero, after a reset
        w[FOLD] = (w[FOLD] & ~_PLACE) + _ONE_FOLD | place
        finish(w)


def finish(w: memoryview[int]) -> None:
    """Do what a fold that was broken off had written down."""
    for place, value in on_its_way(w):
        w[place] = value
    w[FOLD] = w[FOLD] & ~_PLACE


def folding(w: memoryview[int]) -> int:
    """A number that differs whenever a count may have moved meanwhile."""
    return w[FOLD]


def on_its_way(w: memoryview[int]) -> tuple[tuple[int, int], ...]:
    """The count that is being moved: its total's place and what that becomes, its own place and 0. Else nothing."""
    place = w[FOLD] & _PLACE
    to = w[FOLD_TO] or HEADER + ROW * TOTALS_ROW + (place - HEADER) % ROW
    return ((to, w[FOLD_TOTAL]), (place, 0)) if place else ()
