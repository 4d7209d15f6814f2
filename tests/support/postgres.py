"""A real PostgreSQL, started for the tests in a directory of its own and stopped by its process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import glob
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until

try:
    import pytest

    _Skipped: type[BaseException] = pytest.skip.Exception
except ImportError:  # a benchmark
    _Skipped = Exception


class Missing(_Skipped):  # type: ignore[valid-type, misc]
    """A program is not installed; a test is skipped for that."""


#: Fast, because nothing has to survive a crash of the machine.
_SETTINGS = {
    "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "shared_buffers": "16MB",
    "max_connections": "100", "autovacuum": "off", "wal_level": "minimal", "max_wal_senders": "0",
    "dynamic_shared_memory_type": "mmap",  # of its own directory, which goes with it
    "log_min_messages": "warning", "timezone": "UTC", "logging_collector": "off",
}  # fmt: skip

#: The clients' sessions, but not the judge's.
CLIENTS = (
    "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> 'judge'"
    " ORDER BY backend_start"
)


def binary(name: str) -> str:
    """The path of one of PostgreSQL's programs; Debian keeps them off the PATH."""
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}")) or [shutil.which(name) or ""]
    if not found[-1]:
        raise Missing(f"binary {name} is missing (Debian: postgresql)")
    return found[-1]


class Ports:
    """Ports of 127.0.0.1 that the kernel gives to no other program until `close`.

    A free port that is not held may be gone before its server listens: any new connection can get it as its own port.
    So each port has a socket that is bound and never listens. It allows another socket to bind the same address, as
    servers do, too. While no server listens, a connection is refused.
    """

    def __init__(self) -> None:
        self._guards: list[socket.socket] = []

    def take(self) -> int:
        guard = socket.socket()
        self._guards.append(guard)
        guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        guard.bind(("127.0.0.1", 0))
        return int(guard.getsockname()[1])

    def close(self) -> None:
        for guard in self._guards:
            guard.close()


def as_somebody() -> list[str]:
    """What to put before a command that root may not run."""
    return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []


def private_directory(prefix: str) -> Path:
    """A directory that belongs to whoever the server runs as."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    return path


class Daemon:
    """A server in the foreground, a child of the tests."""

    def __init__(self, directory: Path, command: list[str], ports: Ports | None = None) -> None:
        self.directory = directory
        self.command = command
        self.log_path = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.ports = ports or Ports()

    def __getstate__(self) -> dict[str, Any]:
        """A worker is told where it is; it is the tests' process."""
        return {**self.__dict__, "process": None, "ports": Ports()}

    def start(self, port: int) -> None:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*as_somebody(), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )  # fmt: skip  in the tests' own session: a process of another one is an arbiter to them
        wait_until(lambda: self._answers(port), what=f"{self.command[0]} answers; {self.log()[-1000:]}")

    def _answers(self, port: int) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.command[0]} has ended:\n{self.log()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return self.is_ready(port)
        return False

    def is_ready(self, port: int) -> bool:
        return True

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def end(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it, remove what it left, and let go of its ports."""
        self.stop(how)
        self.ports.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@functools.cache
def _template() -> Path:
    """An empty cluster to copy: making one takes a second."""
    directory = private_directory("sp-pg-template-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    subprocess.run(
        [*as_somebody(), binary("initdb"), "-D", str(directory / "data"), "-U", "app", "-A", "trust", "--no-sync",
         "--no-instructions", "-E", "UTF8", "--locale=C.UTF-8", "--wal-segsize=1"],
        check=True, cwd="/", stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return directory / "data"


class Postgres(Daemon):
    """One cluster: database "postgres", user "app", who is a superuser, and "plain", who is not (password "secret")."""

    def __init__(self, *, auth: str = "trust", socket_at: str = "", **settings: str) -> None:
        """With `socket_at` there is another Unix socket, in that directory or abstract."""
        program = binary("postgres")
        directory = private_directory("sp-pg-")
        self.data = directory / "data"
        ports = Ports()
        self.port = ports.take()
        given = {**_SETTINGS, **settings, "port": str(self.port)}
        given["unix_socket_directories"] = f"{directory},{socket_at}" if socket_at else str(directory)
        options = [part for name, value in given.items() for part in ("-c", f"{name}={value}")]
        super().__init__(directory, [program, "-D", str(self.data), "-h", "127.0.0.1", *options], ports)
        subprocess.run([*as_somebody(), "cp", "-a", str(_template()), str(self.data)], check=True, cwd="/")
        (self.data / "pg_hba.conf").write_text(f"local all all trust\nhost all all 127.0.0.1/32 {auth}\n")

    @classmethod
    def with_tls(cls, **settings: str) -> Postgres:
        """One that speaks TLS, with a certificate that it has signed itself; not started."""
        server = cls(ssl="on", **settings)
        if shutil.which("openssl") is None:
            server.end()
            raise Missing("binary openssl is missing")
        subprocess.run(
            [*as_somebody(), "openssl", "req", "-new", "-x509", "-days", "2", "-nodes", "-subj", "/CN=127.0.0.1",
             "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-out", server.data / "server.crt", "-keyout", server.data / "server.key"],
            check=True, cwd="/", capture_output=True,
        )  # fmt: skip
        return server

    def begin(self) -> Postgres:
        """Start it and wait until it answers queries."""
        self.start(self.port)
        return self

    def is_ready(self, port: int) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.OperationalError):
            self.ask("SELECT 1")
            return True
        return False

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=app dbname=postgres sslmode=disable"

    @property
    def local(self) -> str:
        """By its Unix socket, where nobody is asked for a password."""
        return f"host={self.directory} port={self.port} user=app dbname=postgres"

    def ask(self, query: str, *parameters: Any) -> Any:
        """All rows of an answer, on a connection of its own."""
        import psycopg

        with psycopg.connect(f"{self.local} application_name=judge", autocommit=True) as conn:
            cursor = conn.execute(query, parameters or None)
            return cursor.fetchall() if cursor.description else None

    @contextlib.contextmanager
    def judge(self) -> Iterator[Callable[..., Any]]:
        """The same on one connection for the whole block."""
        import psycopg

        with psycopg.connect(f"{self.local} application_name=judge", autocommit=True) as conn:
            yield lambda query, *parameters: conn.execute(query, parameters or None).fetchall()

    def backends(self) -> list[int]:
        """The process numbers of the clients' sessions that there are, but not the judge's."""
        return [row[0] for row in self.ask(CLIENTS)]

    def wait_until_alone(self) -> None:
        """Until nobody but the judge is connected."""
        wait_until(lambda: not self.backends(), what="no session is left")


class PgBouncer(Daemon):
    """pgbouncer before a server, in transaction mode unless said otherwise."""

    def __init__(self, postgres: Postgres, *, port: int = 0, login: str = "user=app", **settings: str) -> None:
        """With `port` it reaches the server there, by a detour."""
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise Missing("binary pgbouncer is missing")
        directory, ports = private_directory("sp-pgb-"), Ports()
        self.port = ports.take()
        given = {
            "listen_addr": "127.0.0.1", "listen_port": str(self.port), "auth_type": "any", "pool_mode": "transaction",
            "default_pool_size": "4", "max_client_conn": "200", "unix_socket_dir": "", "pidfile": "",
            "ignore_startup_parameters": "extra_float_digits", **settings,
        }  # fmt: skip
        config = directory / "pgbouncer.ini"
        lines = "\n".join(f"{name} = {value}" for name, value in given.items())
        database = f"postgres = host=127.0.0.1 port={port or postgres.port} {login} dbname=postgres"
        config.write_text(f"[databases]\n{database}\n[pgbouncer]\n{lines}\n")
        config.chmod(0o644)
        super().__init__(directory, [program, str(config)], ports)

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=app dbname=postgres sslmode=disable"

    def begin(self) -> PgBouncer:
        self.start(self.port)
        return self

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """As every server; with SIGINT it would wait for its clients."""
        super().end(how)


def too_many(log: str) -> list[str]:
    """The lines of a server's log that say that somebody was refused."""
    return re.findall(r".*(?:too many clients|remaining connection slots|too many connections).*", log)
