"""What the test's own process has open: to see that a test opened nothing that it left open."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter


def open_descriptors() -> Counter[str]:
    """What this process has open, by what the kernel calls it (a socket or pipe with its inode).

    Subtract an earlier answer to get what has been opened since: what a thread of an earlier test closes meanwhile is
    then not taken for something of this test.
    """
    gc.collect()  # a segment stays mapped, and so open, as long as anything refers to it
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory that was listed, or another thread's
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found
