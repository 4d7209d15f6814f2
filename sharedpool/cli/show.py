"""Rows as a table for people or as JSON for programs. rich is loaded when a table is drawn, not before."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Nothing that is printed once is cut off.
_WIDE: Final = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its title, and how it is got from a row."""

    title: str
    get: Callable[[dict[str, Any]], object]


def of(title: str, key: str = "") -> Column:
    """A column that shows the row's value of that key, which is the title's lower case unless given."""
    name = key or title.lower().replace(" ", "_")
    return Column(title, lambda row: row[name])


def seconds(title: str, key: str) -> Column:
    """A column with a duration."""
    return Column(title, lambda row: duration(row[key]))


def duration(value: float) -> str:
    """Seconds for people: 0.12s, 7.5s, 3m05s, 2h04m, 3d02h; nothing for 0."""
    if not value:
        return ""
    if value < 60:
        return f"{value:.2f}s" if value < 1 else f"{value:.1f}s"
    whole = int(value)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"


def rows(columns: Sequence[Column], found: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows."""
    found = list(found)
    if as_json:
        json_text(found)
    else:
        console().print(table(columns, found))


def json_text(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON; dataclasses are objects."""
    print(json.dumps(value, indent=indent, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def table(columns: Sequence[Column], found: Iterable[dict[str, Any]]) -> Table:
    """The rows as a table to be printed."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    cells = [[column.get(row) for column in columns] for row in found]
    for number, column in enumerate(columns):
        right = cells and all(isinstance(row[number], int) for row in cells)
        made.add_column(column.title, justify="right" if right else "left", no_wrap=True)
    for row in cells:
        made.add_row(*(Text(printable(str(cell))) for cell in row))  # Text: no markup in what others named
    return made


def console(*, fitting: bool = False) -> Console:
    """Standard output; `fitting` cuts off what its terminal has no room for, otherwise long lines are wrapped by it."""
    from rich.console import Console

    return Console(highlight=False, width=None if fitting and sys.stdout.isatty() else _WIDE)


def printable(text: str) -> str:
    """Text without anything that a terminal would obey: names come from other processes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def say(text: str) -> None:
    """One line of an answer."""
    print(printable(text))


def complain(text: str) -> None:
    """One line on standard error."""
    print(f"sharedpool: {printable(text)}", file=sys.stderr)
