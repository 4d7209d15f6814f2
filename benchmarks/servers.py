"""Real servers for the benchmarks: each in its own temporary directory, on loopback ports of its own.

Every one is a context manager that returns once the server answers a connection and leaves nothing behind; it is
stopped through its own process, never by name. A program that isn't installed raises `Missing`.
"""

from __future__ import annotations

import multiprocessing
import os
import pwd
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.harness import Missing, say

HOST = "127.0.0.1"
BODY = b"0123456789abcdef" * 4
_SPAWN = multiprocessing.get_context("spawn")


def wait_until(predicate: Callable[[], bool], deadline: float = 10.0, what: str = "") -> None:
    """Polls for a fact that only the kernel knows.

    Raises:
        TimeoutError: not true within `deadline` seconds.
    """
    end = time.monotonic() + deadline
    while not predicate():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline:g} s: {what or predicate}")
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def connect(port: int) -> socket.socket:
    """A plain blocking connection without Nagle's delay, as a careful client has it."""
    sock = socket.create_connection((HOST, port), 10)
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def program(name: str, *places: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if path is None:
        raise Missing(f"binary {name} is missing")
    return path


def raise_nofile() -> None:
    """A thousand connections need more descriptors than the usual soft limit of 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def temp_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sharedpool-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def scope() -> Iterator[Path]:
    """A fresh sharedpool scope in the environment, so that all actors started inside share one arbiter."""
    with temp_dir() as path:
        before = os.environ.get("SHAREDPOOL_DIR")
        os.environ["SHAREDPOOL_DIR"] = str(path)
        try:
            yield path
        finally:
            stop_scope(path)
            os.environ.pop("SHAREDPOOL_DIR")
            if before is not None:
                os.environ["SHAREDPOOL_DIR"] = before


def stop_scope(path: Path) -> None:
    """Ends the scope's arbiter from a process of its own, so that the benchmark itself is never attached."""
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.harness import library; library().stop()"],
        env={**os.environ, "SHAREDPOOL_DIR": str(path)},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode and "harness.Missing" not in done.stderr:
        say(f"the arbiter could not be stopped: {done.stderr.strip()}")


def _answers(port: int, child: subprocess.Popen[bytes], log: Path) -> bool:
    if child.poll() is not None:
        raise RuntimeError(f"{child.args!r} ended with {child.returncode}: {log.read_text(errors='replace')[-2000:]}")
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def running(
    argv: list[str], port: int, directory: Path, stop: signal.Signals = signal.SIGTERM, user: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    log = directory / "output.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            user=user,
            extra_groups=[] if user else None,
        )
    try:
        wait_until(lambda: _answers(port, child, log), what=f"{argv[0]} answers on port {port}")
        yield child
    finally:
        child.send_signal(stop)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@dataclass(slots=True)
class Nginx:
    """A backend that also counts: `port` answers GET / with 64 bytes, `status_port` tells what it has seen."""

    port: int
    status_port: int
    _own: int = 1  # the connection that found it ready

    def accepted(self) -> int:
        """How many connections it has accepted since the start, without those that only asked for this number."""
        self._own += 1
        with socket.create_connection((HOST, self.status_port), 5) as link:
            link.sendall(b"GET / HTTP/1.0\r\n\r\n")
            text = b""
            while piece := link.recv(4096):
                text += piece
        return int(text.split(b"server accepts handled requests")[1].split()[0]) - self._own


_NGINX = """
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  default_type text/plain;
  keepalive_requests 1000000000;
  keepalive_timeout 3600s;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server {{ listen {host}:{port} backlog=1024{tls}; location / {{ return 200 "{body}"; }} }}
  server {{ listen {host}:{status_port}; location / {{ stub_status; }} }}
}}
"""


@contextmanager
def certificates() -> Iterator[tuple[Path, Path]]:
    """A file with a certificate for `HOST` and its key, and one with the authority that has issued it."""
    try:
        import trustme
    except ModuleNotFoundError as exc:
        raise Missing("package trustme is missing") from exc
    with temp_dir() as directory:
        authority = trustme.CA()
        certificate, trusted = directory / "server.pem", directory / "authority.pem"
        authority.issue_cert(HOST, "localhost").private_key_and_cert_chain_pem.write_to_path(str(certificate))
        authority.cert_pem.write_to_path(str(trusted))
        yield certificate, trusted


@contextmanager
def nginx(certificate: Path | None = None) -> Iterator[Nginx]:
    """One nginx worker with keep-alive that never ends by itself; over TLS with a file of a certificate and its key."""
    tls = f" ssl; ssl_certificate {certificate}; ssl_certificate_key {certificate}" if certificate else ""
    binary = program("nginx")
    with temp_dir() as directory:
        directory.chmod(0o755)
        server = Nginx(free_port(), free_port())
        config = directory / "nginx.conf"
        config.write_text(
            _NGINX.format(
                directory=directory,
                host=HOST,
                port=server.port,
                status_port=server.status_port,
                body=BODY.decode(),
                tls=tls,
            )
        )
        argv = [binary, "-p", str(directory), "-c", str(config), "-e", str(directory / "error.log")]
        with running(argv, server.status_port, directory):
            yield server


_HAPROXY = """
global
  maxconn 1000
  nbthread 1
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout queue 60s
  timeout http-keep-alive 1h
frontend clients
  bind {host}:{port}
  default_backend servers
backend servers
  server one {host}:{backend} maxconn {cap}{tls}
"""


@contextmanager
def haproxy(backend: int, cap: int, authority: Path | None = None) -> Iterator[int]:
    """A port behind which at most `cap` connections to `backend` exist; idle ones are shared by all clients.

    One thread, because that is HAProxy at its best here: with its default of one per core on two cores shared with
    the clients it did 14,000 requests/s instead of 32,000, a p99 of 8 ms instead of 0.45, and reconnected.
    """
    binary = program("haproxy")
    with temp_dir() as directory:
        port = free_port()
        config = directory / "haproxy.cfg"
        tls = f" ssl verify required ca-file {authority} verifyhost localhost" if authority else ""
        config.write_text(_HAPROXY.format(host=HOST, port=port, backend=backend, cap=cap, tls=tls))
        with running([binary, "-db", "-f", str(config)], port, directory):
            yield port


@contextmanager
def redis() -> Iterator[int]:
    binary = program("redis-server")
    with temp_dir() as directory:
        port = free_port()
        argv = [
            binary,
            "--port",
            str(port),
            "--bind",
            HOST,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(directory),
        ]
        with running(argv, port, directory):
            yield port


def _server_user() -> str | None:
    """PostgreSQL refuses to run as root: use its own account, else nobody's."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def postgres() -> Iterator[str]:
    """A new cluster; gives a conninfo string."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    places = [str(path) for path in versions]
    initdb, server = program("initdb", *places), program("postgres", *places)
    user = _server_user()
    with temp_dir() as directory:
        if user:
            shutil.chown(directory, user)
        data, port = directory / "data", free_port()
        subprocess.run(
            [initdb, "-D", str(data), "-A", "trust", "-U", "bench", "--no-sync", "-E", "UTF8", "--locale=C"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=directory,
            user=user,
            extra_groups=[] if user else None,
        )
        argv = [server, "-D", str(data), "-p", str(port), "-h", HOST, "-k", str(directory), "-F"]
        with running(argv, port, directory, signal.SIGINT, user):
            conninfo = f"host={HOST} port={port} user=bench dbname=postgres"
            wait_until(lambda: _accepts(conninfo), what="PostgreSQL takes sessions")
            yield conninfo


def _accepts(conninfo: str) -> bool:
    try:
        import psycopg
    except ModuleNotFoundError:
        return True  # the rows that need it will say so
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def echo(ports: int = 1) -> Iterator[list[int]]:
    """Sends back what it gets, closes as soon as its peer has; listens on as many ports as asked for."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_echo, args=(theirs, ports), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join(5)
        ours.close()


def _echo(report: Connection, ports: int) -> None:
    raise_nofile()
    with ExitStack() as stack, selectors.EpollSelector() as selector:
        listeners = [stack.enter_context(socket.create_server((HOST, 0), backlog=1024)) for _ in range(ports)]
        for listener in listeners:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ, "listener")
        report.send([listener.getsockname()[1] for listener in listeners])
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if key.data == "listener":
                    _accept(selector, sock)
                else:
                    _return(selector, sock)


def _accept(selector: selectors.BaseSelector, listener: socket.socket) -> None:
    try:
        sock, _ = listener.accept()
    except BlockingIOError:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(sock, selectors.EVENT_READ, "peer")


def _return(selector: selectors.BaseSelector, sock: socket.socket) -> None:
    try:
        data = sock.recv(65536)
        if data:
            sock.sendall(data)
            return
    except ConnectionError:
        pass
    selector.unregister(sock)
    sock.close()
