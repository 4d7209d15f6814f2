"""A real nginx over TLS that notes down, with each request, how many connections there were."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.support.postgres import Daemon, Missing, Ports, private_directory
from tests.support.waiting import wait_until

BODY = "the page"
_CONFIGURATION = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 512; }}
http {{
  log_format numbers "$connection $connections_active $uri";
  access_log {directory}/access.log numbers;
  keepalive_timeout 3600s;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{ listen 127.0.0.1:{ready}; }}
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {certificate};
    default_type text/plain;
    location / {{ return 200 "{body}"; }}
  }}
}}
"""


@dataclass(frozen=True)
class Request:
    """One that was answered: the number of its connection, how many connections were open then, and the path."""

    connection: int
    open: int
    path: str


class Nginx(Daemon):
    """One, with a certificate for localhost and its key in a file."""

    def __init__(self, certificate: str) -> None:
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin")
        if program is None:
            raise Missing("binary nginx is missing")
        directory, ports = private_directory("sp-nginx-"), Ports()
        port, self._ready = ports.take(), ports.take()
        self.url = f"https://localhost:{port}"
        mine = shutil.copy(certificate, directory / "server.pem")
        text = _CONFIGURATION.format(directory=directory, certificate=mine, port=port, ready=self._ready, body=BODY)
        (directory / "nginx.conf").write_text(text)
        super().__init__(
            directory,
            [program, "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", str(directory / "error.log")],
            ports,
        )

    def __enter__(self) -> Self:
        self.start(self._ready)  # a port of its own, because whoever looks is counted
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def requests(self, path: str, number: int) -> list[Request]:
        """So many for this path that it has answered, in order; waits for them, because it writes after it answers."""

        def found() -> list[Request]:
            lines = (line.split() for line in (self.directory / "access.log").read_text().splitlines())
            return [Request(int(line[0]), int(line[1]), line[2]) for line in lines if line[2:] == [path]]

        wait_until(lambda: len(found()) >= number, what=f"nginx has noted down {number} requests for {path}")
        return found()
