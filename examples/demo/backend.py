"""The back end, and what it saw: nginx where it is installed, else a small server of ours.

Both write one line for each request to a log of the demonstration: the connection's number, and how many connections
were open *in the back end's own count* when the request began. Nothing is sampled: no request has ever been served
while more connections were open than the greatest of these numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .processes import answers, free_port, running

#: The first nginx that has auth_delay (1.17.10) and -e (1.19.5).
OLDEST_NGINX = (1, 19, 5)

# Each answer takes a moment, as a query or a call would: auth_delay is nginx's own way to wait without a process.
NGINX_CONF = """\
daemon off;
{user}
worker_processes 1;
pid {dir}/nginx.pid;
error_log {dir}/nginx-error.log warn;
events {{ worker_connections 1024; }}
http {{
    log_format seen "$connection $seen";
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    default_type text/plain;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
    server {{
        listen 127.0.0.1:{port};
        set $seen $connections_active;
        access_log {log} seen;
        location / {{ {wait} error_page 401 =200 @answer; {answer} }}
        location @answer {{ return 200 "hello from nginx\\n"; }}
    }}
}}
"""
WAIT = 'auth_basic "-"; auth_basic_user_file {dir}/nobody; auth_delay {milliseconds}ms;'
NO_WAIT = "try_files /nothing @answer;"


@dataclasses.dataclass(frozen=True, slots=True)
class Backend:
    """A running back end."""

    name: str
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def connections_now(self) -> int:
        """How many connections were open at the latest request."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 200))
            lines = file.read().split(b"\n")[:-1]  # what comes after the last newline is still being written
        return int(lines[-1].split()[1]) if lines else 0

    def seen(self) -> Seen:
        """What it saw in all."""
        connections, peak, requests = set(), 0, 0
        with self.log.open() as file:
            for line in file:
                number, active = line.split()
                connections.add(number)
                peak = max(peak, int(active))
                requests += 1
        return Seen(peak=peak, connections=len(connections), requests=requests)


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """The back end's own count: most connections at once, connections in all, requests."""

    peak: int
    connections: int
    requests: int


@contextlib.contextmanager
def running_backend(kind: str, directory: Path, milliseconds: int) -> Iterator[Backend]:
    """Run a back end (auto, nginx or own) whose answers take some milliseconds."""
    directory.mkdir()
    log = directory / "connections.log"
    log.touch()
    version = nginx_version() if kind != "own" else None
    if kind == "nginx" and version is None:
        raise FileNotFoundError("nginx is not installed, or is older than " + ".".join(map(str, OLDEST_NGINX)))
    port = free_port()
    name, command = (
        (f"nginx {version}", nginx_command(directory, log, port, milliseconds))
        if version
        else ("a small server of our own", own_command(log, port, milliseconds))
    )
    with running(command, directory / "output.log", ready=lambda: answers(("127.0.0.1", port))):
        yield Backend(name, port, log)


def find_nginx() -> str | None:
    """Debian has it in /usr/sbin, which is not on everybody's PATH."""
    return shutil.which("nginx", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin")


def nginx_version() -> str | None:
    """Its version, if it is installed and not too old."""
    if (binary := find_nginx()) is None:
        return None
    output = subprocess.run([binary, "-V"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", output)
    if not found or tuple(map(int, found.groups())) < OLDEST_NGINX or "http_stub_status" not in output:
        return None
    return ".".join(found.groups())


def nginx_command(directory: Path, log: Path, port: int, milliseconds: int) -> list[str]:
    """Write nginx's configuration; everything it needs is in the directory."""
    (directory / "nobody").touch()
    conf = directory / "nginx.conf"
    conf.write_text(
        NGINX_CONF.format(
            dir=directory,
            log=log,
            port=port,
            user="user root;" if os.geteuid() == 0 else "",  # else its worker could not enter a directory of root's
            wait=WAIT.format(dir=directory, milliseconds=milliseconds) if milliseconds else "",
            answer="" if milliseconds else NO_WAIT,
        )
    )
    return [find_nginx() or "nginx", "-e", str(directory / "nginx-error.log"), "-c", str(conf)]


def own_command(log: Path, port: int, milliseconds: int) -> list[str]:
    """Our own server, as a process."""
    return [sys.executable, "-m", "examples.demo.own_server", str(port), str(log), str(milliseconds)]
