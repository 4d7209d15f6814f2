"""The command `sharedpool`: looking at the pools of a scope, changing them, and serving them in the foreground.

typer and rich (extra `cli`) are loaded only here; without them there is one sentence and exit code 1.
"""

from __future__ import annotations

import sys
from typing import NoReturn

_MISSING = (
    "sharedpool: the command line needs the packages typer and rich, and {} is missing: pip install 'sharedpool[cli]'"
)


def main() -> NoReturn:
    """Run the command line of this process and exit; the codes are those of `exits.Exit`."""
    try:
        from .commands import run

        run()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich", "click"):
            raise
        sys.stderr.write(_MISSING.format(package) + "\n")
        sys.exit(1)
