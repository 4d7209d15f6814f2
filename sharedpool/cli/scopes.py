"""What `ls` says of one scope."""

from __future__ import annotations

from typing import Any

from .. import inspection
from ..errors import ArbiterLost, SharedPoolError
from ..inspection import NoArbiter


def describe(path: str) -> dict[str, Any]:
    """A scope's directory, its arbiter's pid and version, its pools, and its state in a word or a sentence."""
    row: dict[str, Any] = {"directory": path, "arbiter": "", "version": "", "pools": "", "state": "running"}
    try:
        about = inspection.ask(path, "about")
        row.update(arbiter=about["pid"], version=about["version"])
        row["pools"] = " ".join(inspection.ask(path, "names"))
    except NoArbiter:
        row["state"] = "no arbiter"
    except ArbiterLost:
        row["state"] = "does not answer"
    except (SharedPoolError, OSError) as error:
        row["state"] = str(error)
    return row
