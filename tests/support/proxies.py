"""A real HTTP proxy that does CONNECT (tinyproxy), behind one that speaks TLS and counts its clients (HAProxy)."""

from __future__ import annotations

import csv
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.postgres import Daemon, Missing, Ports, private_directory
from tests.support.waiting import wait_until

PLAIN, SECURE = "plain", "secure"

_TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 600
MaxClients 100
BasicAuth me hush
"""
_HAPROXY = """
global
  nbthread 1
  stats socket {counts}
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  default_backend proxy
frontend plain
  bind 127.0.0.1:{plain}
frontend ready
  bind 127.0.0.1:{ready}
frontend secure
  bind 127.0.0.1:{secure} ssl crt {certificate}
backend proxy
  server one 127.0.0.1:{port}
"""


class Proxy:
    """One at two ports, for the user "me" with the password "hush".

    Args:
        certificate: A file with a certificate for localhost, and its key.
    """

    def __init__(self, certificate: str) -> None:
        programs = [shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin") for name in ("tinyproxy", "haproxy")]
        for name, program in zip(("tinyproxy", "haproxy"), programs, strict=True):
            if program is None:
                raise Missing(f"binary {name} is missing")
        tinyproxy, haproxy = map(str, programs)
        self._directory, self._held = private_directory("sp-proxy-"), Ports()
        port, self._ready = self._held.take(), self._held.take()
        self._ports = {PLAIN: self._held.take(), SECURE: self._held.take()}
        mine = shutil.copy(certificate, self._directory / "server.pem")
        texts = {
            "tinyproxy": _TINYPROXY.format(port=port),
            "haproxy": _HAPROXY.format(
                port=port, counts=self._counts, certificate=mine, ready=self._ready, **self._ports
            ),
        }
        for name, text in texts.items():
            (self._directory / name).write_text(text)
        self._behind = Daemon(self._directory, [tinyproxy, "-d", "-c", str(self._directory / "tinyproxy")])
        self._before = Daemon(self._directory, [haproxy, "-db", "-f", str(self._directory / "haproxy")])
        self._port = port

    @property
    def _counts(self) -> Path:
        return self._directory / "counts"

    def __enter__(self) -> Self:
        try:
            self._behind.start(self._port)
            self._before.start(self._ready)  # a port of its own, because whoever looks is counted
            wait_until(self._counts.exists)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Stop both and remove what they left."""
        for daemon in (self._before, self._behind):
            daemon.stop()
        self._held.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def address(self, name: str, login: str = "") -> str:
        """The URL of one of the two; with or without a login."""
        scheme = "https" if name == SECURE else "http"
        return f"{scheme}://{login and login + '@'}localhost:{self._ports[name]}"

    def numbers(self, name: str) -> dict[str, int]:
        """How many connections there are to this port, how many there were at once, and how many in all."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._counts))
            sock.sendall(b"show stat\n")
            with sock.makefile() as answer:
                rows = list(csv.DictReader(answer.read().removeprefix("# ").splitlines()))
        (found,) = (row for row in rows if row["pxname"] == name and row["svname"] == "FRONTEND")
        return {"open": int(found["scur"]), "peak": int(found["smax"]), "accepted": int(found["stot"])}
