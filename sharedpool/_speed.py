"""Whether the modules of the hot path run compiled or as they are written.

`compiled/` holds extension modules of the same names, made of the same sources (speed/build.py). Where it is there, it
is searched first. SHAREDPOOL_SPEED=pure leaves it out.
"""

from __future__ import annotations

import os
import sys

_WORDS = ("auto", "pure", "compiled")


def choose(path: list[str]) -> str:
    """Put the compiled modules in front of the package's search path; gives "compiled" or "pure".

    Raises:
        ImportError: SHAREDPOOL_SPEED is "compiled", and there are none for this Python; or it is another word.
    """
    chosen = os.environ.get("SHAREDPOOL_SPEED", "").strip().lower() or "auto"
    if chosen not in _WORDS:
        raise ImportError(f"SHAREDPOOL_SPEED has the value {chosen!r}; allowed is one of {', '.join(_WORDS)}")
    directory = os.path.join(path[0], "compiled")
    found = chosen != "pure" and _usable(path[0], directory)
    if found:
        path.insert(0, directory)
        return "compiled"
    if chosen == "compiled":
        raise ImportError(f"SHAREDPOOL_SPEED=compiled, but {directory} has no modules for this Python, or old ones")
    return "pure"


def _usable(sources: str, directory: str) -> bool:
    """Whether there are modules for this Python; in a source tree (which has a stamp), not older than their sources."""
    tag = sys.implementation.cache_tag
    try:
        names = [name for name in os.listdir(directory) if f".{tag}-" in name]
    except OSError:
        return False
    try:
        compiled = os.stat(os.path.join(directory, f"{tag}.stamp")).st_mtime
    except OSError:
        return bool(names)
    for name in names:
        try:
            if os.stat(os.path.join(sources, name.partition(".")[0] + ".py")).st_mtime > compiled:
                return False
        except OSError:  # one that has no source of its own
            continue
    return bool(names)
