"""Every Python block of docs/ runs as it is pasted; its addresses are replaced by those of the tests' servers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.backend import Backend
from tests.support.postgres import Postgres
from tests.support.scope import Scope
from tests.support.tls import Authority, TlsServer
from tests.support.waiting import DEADLINE
from tests.support.workers import ROOT, Worker, clean_environment
from tests.system.servers import Web

#: Which of the tests' servers takes the place of an address. A block that connects to another address fails.
ADDRESSES = {
    "api.example.org:443": "tls",
    '"10.0.0.5", 443': "mutual_tls",
    '"127.0.0.1", 8080': "tcp",
    '"10.0.0.5", 7000': "tcp",
    "10.0.0.5:8080": "web",
    "host=10.0.0.5 dbname=shop user=app sslmode=disable": "postgres",
}
#: PostGIS needs libraries that are no Python packages; PostgreSQL's engine has the same base.
INSTEAD = {"django.contrib.gis.db.backends.postgis": "django.db.backends.postgresql"}


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.page} {self.number}"


def blocks() -> list[Block]:
    found: list[Block] = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        texts = re.findall(r"^```python.*\n((?s:.*?))^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found.extend(Block(path.name, number, text) for number, text in enumerate(texts, start=1))
    return found


def stand_in(name: str, request: pytest.FixtureRequest, directory: Path) -> str:
    """Start the server that takes an address's place, and give its address in the same form."""
    if name == "tcp":
        backend: Backend = request.getfixturevalue("backend")
        return f'"{backend.tcp.host}", {backend.tcp.port}'
    if name == "web":
        web: Web = request.getfixturevalue("web")
        return web.address
    if name == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        return postgres.conninfo
    authority = Authority(directory)
    names = ("localhost",) if name == "tls" else ("api.internal",)
    context = authority.server_context(*names, asks=name != "tls")
    context.set_alpn_protocols(["http/1.1"])
    server = TlsServer(context)
    server.__enter__()
    request.addfinalizer(lambda: server.__exit__(None, None, None))
    if name == "tls":
        return f"localhost:{server.port}"
    pair = Path(authority.client("client")).read_text()
    (directory / "client.key").write_text(pair)
    return f'"127.0.0.1", {server.port}'


def wants_postgres(block: Block) -> bool:
    return any(name == "postgres" and address in block.text for address, name in ADDRESSES.items())


Runs = Callable[[Block], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def runs(request: pytest.FixtureRequest, scope: Scope, directory: Path, worker: Worker) -> Runs:
    """Run a block, with servers for its addresses."""

    def run(block: Block) -> subprocess.CompletedProcess[str]:
        program, environment = block.text, clean_environment(scope.env)
        for name, other in INSTEAD.items():
            program = program.replace(name, other)
        for address, name in ADDRESSES.items():
            if address in program:
                program = program.replace(address, stand_in(name, request, directory))
                if name == "tls":
                    environment["SSL_CERT_FILE"] = str(directory / "ca.pem")
        for name in re.findall(r"sharedpool\.drain\(\"(\w+)\"", program):  # an operator's: the pool is there
            worker.attach(name, max_connections=2)
            worker.stats(name)
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=directory, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("block", [each for each in blocks() if not wants_postgres(each)], ids=str)
def test_a_block_of_a_page_runs_as_it_is_pasted(block: Block, runs: Runs) -> None:
    ended = runs(block)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr


@pytest.mark.parametrize("block", [each for each in blocks() if wants_postgres(each)], ids=str)
def test_a_block_that_asks_a_database_runs_as_it_is_pasted(postgres: Postgres, block: Block, runs: Runs) -> None:
    ended = runs(block)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr


def test_every_page_with_a_program_is_looked_at_and_every_address_is_on_a_page() -> None:
    texts = [block.text for block in blocks()]
    assert len(texts) >= 25
    for address in ADDRESSES:
        assert any(address in text for text in texts), address
