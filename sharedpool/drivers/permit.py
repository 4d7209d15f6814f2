"""No connection at all: a permit only. The cap for anything that a pool cannot hold itself."""

from __future__ import annotations

from . import Register, check_host, check_port, register


class PermitDriver:
    """`transport="permit"`: host is any name, port is 0; the lease's conn is None."""

    name = "permit"
    moves = True
    connects = False

    def address(self, host: str, port: int) -> tuple[str, int]:
        """Names are compared as they are written."""
        return check_host(host, "any name"), check_port(port, 0, 0)

    def open(self, host: str, port: int, timeout: float, register: Register) -> None:
        """Nothing to open."""

    def fileno(self, conn: None) -> int:
        """There is none."""
        return -1

    def clean(self, conn: None) -> bool:
        """Always."""
        return True

    def adopt(self, descriptor: int, state: bytes) -> None:
        """Never called: nothing moves but the permit."""

    def export(self, conn: None) -> bytes:
        """Nothing."""
        return b""

    def close(self, conn: None) -> None:
        """Nothing to close."""


register(PermitDriver())
