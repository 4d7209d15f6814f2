"""FastAPI, uvicorn, SQLAlchemy and asyncpg: clients hang up, queries are over their time, and the server is the judge.

What a client does not wait for any more is held up at the server by the judge's lock: it ends only if it is cancelled.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.combinations.clients import DEADLINE, Asked, AtOnce, Clients, Question, not_right
from tests.combinations.harm import kill, wait_at_rest
from tests.stress.looking import looking
from tests.support import processes
from tests.support.postgres import CLIENTS, Postgres
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.system.servers import Server

CAP, USERS, HANG_UPS = 4, 6, 8

HELD = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
TABLES = """
CREATE ROLE desk LOGIN;
CREATE TABLE note (
    id bigserial PRIMARY KEY, owner text NOT NULL DEFAULT current_setting('desk.user'), text text NOT NULL
);
ALTER TABLE note ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON note USING (owner = current_setting('desk.user'));
GRANT ALL ON note, note_id_seq TO desk;
"""


@pytest.fixture
def postgres(nothing_left_behind: None) -> Iterator[Postgres]:
    server = Postgres()
    try:
        server.begin()
        server.ask(TABLES)
        yield server
    finally:
        server.end()


class Desk(Server):
    """uvicorn with two workers."""

    def __init__(self, directory: Path, scope: Scope, postgres: Postgres) -> None:
        super().__init__(
            directory, scope, None, sys.executable, "-m", "uvicorn", "--workers", "2",
            "--uds", str(directory / "server.sock"), "--timeout-worker-healthcheck", str(int(DEADLINE)),
            "tests.combinations.desk:app", workers=2,
            DESK_POSTGRES=f"postgresql+asyncpg://desk@127.0.0.1:{postgres.port}/postgres?ssl=disable",
            DESK_CAP=str(CAP), SHAREDPOOL_DESK_CLOSE_TIMEOUT="20",
        )  # fmt: skip

    def workers(self, master: int | None = None) -> set[int]:
        """Its children but for `multiprocessing`'s resource tracker."""
        return {pid for pid in super().workers(master) if "spawn_main" in processes.command_line(pid)}

    @contextlib.contextmanager
    def streaming(self, path: str, lines: int) -> Iterator[list[str]]:
        """Ask and read so many lines of the body; at the block's end the client hangs up."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(self.address)
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: desk\r\n\r\n".encode())
            with sock.makefile("r") as answer:
                if lines:
                    while answer.readline().strip():
                        pass
                    answer.readline()  # a chunk's length
                yield [answer.readline().strip() for _ in range(lines)]


def question(kind: str, user: int, words: str) -> Question:
    """What a user asks, and what only that one may see."""
    name = f"u{user % USERS}"
    return f"/{kind}/{name}/{words}", "later" if kind == "later" else f"['{name}'] ['{words}']"


def asking(client: int, chance: random.Random) -> Iterator[Question]:
    kinds = "write", "write", "limit", "later"
    return (question(chance.choice(kinds), client + n, f"c{client}x{n}") for n in itertools.count())


def hanging_up(desk: Desk, client: int, chance: random.Random) -> list[Any]:
    """One that hangs up each time, at once or when it has its note; what it read that was not its own."""
    wrong = []
    for n in range(HANG_UPS):
        path, right = question("stream", client + n, f"h{client}x{n}")
        lines = chance.choice([0, 1, 1])
        with desk.streaming(path, lines) as found:
            if found != [right] * lines:
                wrong.append((path, found))
    return wrong


def test_what_nobody_waits_for_any_more_ends_at_the_server_and_the_cap_and_the_rows_are_right(
    directory: Path, scope: Scope, postgres: Postgres, seeded: random.Random
) -> None:
    most = [0]
    with postgres.judge() as ask, postgres.judge() as also, Desk(directory, scope, postgres) as desk:

        def look() -> None:
            most[0] = max(most[0], len(also(CLIENTS)))

        def sessions() -> list[int]:
            return [row[0] for row in ask(CLIENTS)]

        chances = [random.Random(seeded.random()) for _ in range(2 * USERS)]
        with looking(look):
            ask("SELECT pg_advisory_lock(1)")
            with Clients(desk.get, [asking(client, chances.pop()) for client in range(USERS)]) as clients:
                with ThreadPoolExecutor(USERS) as threads:
                    hung_up = [threads.submit(hanging_up, desk, client, chances.pop()) for client in range(USERS)]
                clients.wait_more(20)
            print(f"{clients}; at most {most[0]} sessions")
            # Nobody has let go yet: what is still at work was not cancelled.
            wait_until(lambda: not ask(HELD), DEADLINE, "no query is left that nobody waits for")
            after_a_kill = a_worker_is_killed(desk, lambda: len(ask(HELD)), seeded)
            wait_until(lambda: not ask(HELD), DEADLINE, "no query is left of the one that was killed")
            ask("SELECT pg_advisory_unlock(1)")
            wait_at_rest(desk.get, "desk", lambda: len(sessions()))
        afterwards = {each.path.rpartition("/")[2] for each in clients.asked if each.path.startswith("/later/")}
        notes = dict(ask("SELECT text, string_agg(owner, ' ') FROM note GROUP BY text"))
    assert [each for hanging in hung_up for each in hanging.result()] == []
    assert not_right(clients.asked) == not_right(after_a_kill) == []
    assert afterwards <= notes.keys()
    for each in clients.asked:
        _, _, owner, text = each.path.split("/")
        assert notes[text] == owner
    assert not any(text.startswith("never") for text in notes)
    assert most[0] <= CAP


def a_worker_is_killed(desk: Desk, held: Callable[[], int], chance: random.Random) -> list[Asked]:
    """While some queries hold sessions, which may be those of the killed one; others go on."""
    path = question("stream", 0, "held")[0]
    with contextlib.ExitStack() as streams:
        for _ in range(CAP - 1):
            streams.enter_context(desk.streaming(path, 1))
        wait_until(lambda: held() == CAP - 1, DEADLINE, "the queries are at work")
        kill(chance.choice(sorted(desk.workers())))
        with AtOnce(desk.get, [question("write", n, f"again{n}") for n in range(2 * USERS)]) as again:
            again.begin()
    wait_until(lambda: len(desk.workers()) == 2, DEADLINE, "there is another worker")
    return again.asked
