"""Children that share a segment with the process that forked them."""

from __future__ import annotations

import os

from sharedpool import native
from sharedpool.segment import Segment

#: What lies in a segment before its words.
_HEADER_BYTES = 4096


def fork_with(made: Segment | None) -> int:
    """As os.fork. A child loses its parent's segments; it gets this one back, at the same place."""
    pid = os.fork()
    if pid == 0 and made is not None:
        try:
            native.map_over(made.words_address - _HEADER_BYTES, _HEADER_BYTES + made.geometry.size, made.fd)
        except BaseException:
            os._exit(1)
    return pid
