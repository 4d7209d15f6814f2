"""The same answers for every HTTP client: nobody gets bytes that it did not ask for, and a login stays its user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import speakers
from tests.support.scope import Scope
from tests.support.scripted import Scripted, Talk
from tests.support.speakers import CLIENTS, ask, attempt, close, make, numbers, turn
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import ForkServer, Harness, Worker


def sized(body: bytes, *fields: bytes) -> bytes:
    head = b"".join(field + b"\r\n" for field in fields)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(body), head, body)


POISON = sized(b"poison")
MINE = (200, b"mine")
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmine\r\n"
LONG = sized(b"x" * 20_000)

#: What is sent at once; what is sent when the connection is used again; what its user must get (None: anything).
ANSWERS: dict[str, tuple[bytes, bytes, tuple[int, bytes] | None]] = {
    "103": (HINTS + sized(b"mine"), b"", MINE),
    "102, 103, 100": (
        b"HTTP/1.1 102 Processing\r\n\r\n" + HINTS + b"HTTP/1.1 100 Continue\r\n\r\n" + sized(b"mine"), b"", MINE
    ),
    "many 102": (b"HTTP/1.1 102 Processing\r\n\r\n" * 300 + sized(b"mine"), b"", MINE),
    "103 and 204": (HINTS + b"HTTP/1.1 204 No Content\r\n\r\n", b"", (204, b"")),
    "surplus": (sized(b"mine") + POISON, b"", MINE),
    "surplus, cut in its head": (sized(b"mine") + POISON[:9], POISON[9:], MINE),
    "surplus, cut after its head": (sized(b"mine") + POISON[:-6], POISON[-6:] + POISON, MINE),
    "one byte too many": (sized(b"mine") + b"H", POISON[1:], MINE),
    "an empty line too many": (sized(b"mine") + b"\r\n", POISON, MINE),
    "surplus after a long body": (LONG + POISON, b"", None),
    "surplus after chunks": (CHUNKED + b"0\r\n\r\n" + POISON, b"", MINE),
    "surplus after a trailer": (CHUNKED + b"0\r\nX: y\r\n\r\n" + POISON[:9], POISON[9:], MINE),
    "three answers": (sized(b"mine") + POISON + POISON, b"", MINE),
    "surplus after 103": (HINTS + sized(b"mine") + POISON[:9], POISON[9:], MINE),
    "204 with a body": (b"HTTP/1.1 204 No Content\r\n\r\n" + POISON, b"", None),
    "204 that speaks of a body": (b"HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\n", POISON, None),
    "304 with a body": (b"HTTP/1.1 304 Not Modified\r\n\r\n" + POISON, b"", None),
    "304 that speaks of a body": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\n", POISON, None),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nmine", POISON, None),
    "a length and chunks": (
        CHUNKED.replace(b"OK\r\n", b"OK\r\nContent-Length: 4\r\n") + b"0\r\n\r\n", POISON, None
    ),
    "a signed length": (b"HTTP/1.1 200 OK\r\nContent-Length: +4\r\n\r\nmine", POISON, None),
    "a folded length": (b"HTTP/1.1 200 OK\r\nContent-Length:\r\n 4\r\n\r\nmine", POISON, None),
    "line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 4\n\nmine", POISON, None),
    "close": (sized(b"mine", b"Connection: close"), POISON, MINE),
    "1.0": (sized(b"mine").replace(b"1.1", b"1.0"), POISON, MINE),
    "no length": (b"HTTP/1.1 200 OK\r\n\r\nmine", POISON, None),
    "101": (b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", POISON, None),
    "nonsense": (b"\r\n\r\n\x16\x03\x01", POISON, None),
}  # fmt: skip
#: Answers that a client waits for the end of: the server ends them.
ENDED = {"a signed length", "a folded length", "line feeds", "1.0", "no length", "nonsense", "close"}
SURPLUS = [name for name in ANSWERS if "surplus" in name or "too many" in name or name == "three answers"]


def odd(talk: Talk, path: str, fields: dict[str, str]) -> None:
    """`/NUMBER`: that odd answer; else one's own path."""
    if not path[1:].isdigit():
        talk.send(sized(path.encode()))
        return
    name = list(ANSWERS)[int(path[1:])]
    data, talk.later, _ = ANSWERS[name]
    talk.send(data)
    if name in ENDED:
        talk.finish()


@pytest.fixture(scope="session")
def fork_server_with_clients(fork_server: ForkServer) -> Iterator[ForkServer]:
    """One that has loaded all clients."""
    forks = ForkServer("tests.support.speakers", "sharedpool.integrations.httpx", "sharedpool.integrations.httpx2")
    yield forks
    forks.stop()


@pytest.fixture
def harness(directory: Path, scope: Scope, fork_server_with_clients: ForkServer) -> Iterator[Harness]:
    harness = Harness(directory, scope.env, fork_server_with_clients)
    yield harness
    harness.close()


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(two: list[Worker], client: str) -> list[Worker]:
    for worker in two:
        worker.call(make, client, max_connections=1)
    return two


def test_nobody_gets_what_a_server_said_beyond_an_answer(pair: list[Worker], client: str) -> None:
    alice = pair[0]
    bob = alice if client == "aiohttp" else pair[1]  # whose connections stay in their process
    with Scripted(odd) as server:
        for number, (name, (_, _, right)) in enumerate(ANSWERS.items()):
            before = alice.call(numbers).closes["unclean"]
            got = alice.call(attempt, f"{server.url}/{number}")
            if right is not None:
                assert got == repr(right), name
            assert bob.call(ask, f"{server.url}/bob") == (200, b"/bob"), name
            if name in SURPLUS:
                assert alice.call(numbers).closes["unclean"] == before + 1, name
            assert alice.call(ask, f"{server.url}/alice") == (200, b"/alice"), name
        for worker in pair:
            worker.call(close)


def test_after_an_interim_answer_the_connection_is_used_again(pair: list[Worker], client: str) -> None:
    with Scripted(odd) as server:
        for name in ("103", "102, 103, 100", "many 102"):
            assert pair[0].call(ask, f"{server.url}/{list(ANSWERS).index(name)}") == MINE
        assert server.accepted == 1
        for worker in pair:
            worker.call(close)


def test_a_server_that_never_comes_to_its_answer_is_given_up(pair: list[Worker], client: str) -> None:
    def never(talk: Talk, path: str, fields: dict[str, str]) -> None:
        while path != "/bob":
            talk.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
        talk.send(sized(b"/bob"))

    with Scripted(never) as server:
        assert "(" not in pair[0].call(attempt, f"{server.url}/alice"), "an error"
        assert pair[1].call(ask, f"{server.url}/bob") == (200, b"/bob")
        for worker in pair:
            worker.call(close)


# --- logins -----------------------------------------------------------------------------------------------------------


def ntlm(talk: Talk, path: str, fields: dict[str, str]) -> None:
    """As NTLM: an offer, a challenge that belongs to the connection, and then the connection is that user."""
    kind, _, token = fields.get("authorization", "").partition(" ")
    if kind.lower() == "ntlm" and token == f"answer-{talk.number}":
        talk.user = "alice"
    if talk.user:
        talk.send(sized(f"{talk.user} {talk.number}".encode()))
        return
    challenge = f" challenge-{talk.number}==" if kind.lower() == "ntlm" and token == "hello" else ""
    answer = sized(f"nobody {talk.number}".encode(), f"WWW-Authenticate: NTLM{challenge}".encode())
    talk.send(answer.replace(b"200 OK", b"401 Unauthorized"))


def test_a_login_is_completed_on_one_connection_which_then_is_nobody_elses(pair: list[Worker]) -> None:
    alice, bob = pair
    with Scripted(ntlm) as server:
        alice.call(speakers.keep_logins_for, 1000.0)  # a loaded machine may take its time
        for number in (1, 3):  # in between, number 2 is Bob's
            assert alice.call(ask, server.url) == (401, b"nobody %d" % number)
            assert alice.call(ask, server.url, Authorization="NTLM hello") == (401, b"nobody %d" % number)
            waiting = bob.begin(ask, server.url)
            wait_until(lambda: alice.call(numbers).waiting == 1, what="Bob waits for the only connection")
            answer = alice.call(ask, server.url, Authorization=f"NTLM answer-{number}")
            assert answer == (200, b"alice %d" % number)
            assert waiting.result() == (401, b"nobody %d" % (number + 1)), "who has not logged in"
        for worker in pair:
            worker.call(close)


def test_a_login_that_is_not_gone_on_with_frees_its_permit_by_itself(pair: list[Worker]) -> None:
    alice, bob = pair
    with Scripted(ntlm) as server:
        alice.call(speakers.keep_logins_for, 0.05)
        assert alice.call(ask, server.url, Authorization="NTLM hello") == (401, b"nobody 1")
        if pair[0].call(_is_async):
            wait_until(lambda: alice.call(turn) and alice.call(numbers).used == 0)
        assert bob.call(ask, server.url) == (401, b"nobody 2")
        for worker in pair:
            worker.call(close)


def test_what_a_thread_or_task_that_has_ended_began_to_log_in_is_nobodys(pair: list[Worker]) -> None:
    alice = pair[0]
    with Scripted(ntlm) as server:
        alice.call(speakers.keep_logins_for, 0.5)
        for number, headers in ((1, {}), (3, {"Authorization": "NTLM hello"})):
            left = alice.call(speakers.ask_elsewhere, server.url, Authorization="NTLM hello")
            assert left == (401, b"nobody %d" % number)
            assert alice.call(speakers.ask_elsewhere, server.url, **headers) == (401, b"nobody %d" % (number + 1))
        for worker in pair:
            worker.call(close)


def test_a_request_without_a_login_does_not_get_a_connection_on_which_one_has_begun(pair: list[Worker]) -> None:
    alice = pair[0]
    with Scripted(ntlm) as server:
        alice.call(speakers.keep_logins_for, 0.5)
        assert alice.call(ask, server.url, Authorization="NTLM hello") == (401, b"nobody 1")
        assert alice.call(ask, server.url) == (401, b"nobody 2")
        for worker in pair:
            worker.call(close)


def _is_async(state: State) -> bool:
    return bool(state.things["client"] == "aiohttp")


def test_with_a_session_its_begun_login_ends(pair: list[Worker]) -> None:
    alice, bob = pair
    with Scripted(ntlm) as server:
        alice.call(speakers.keep_logins_for, 1000.0)
        assert alice.call(ask, server.url, Authorization="NTLM hello") == (401, b"nobody 1")
        alice.call(close)
        assert bob.call(ask, server.url) == (401, b"nobody 2")
        bob.call(close)


@pytest.mark.parametrize("scheme", ["Negotiate", "kerberos", "NTLM"])
def test_a_connection_that_was_logged_in_with_one_request_is_closed_after_it(pair: list[Worker], scheme: str) -> None:
    def answer(talk: Talk, path: str, fields: dict[str, str]) -> None:
        talk.user = talk.user or fields.get("authorization", "") or fields.get("proxy-authorization", "")
        talk.send(sized(talk.user.encode()))

    alice, bob = pair
    with Scripted(answer) as server:
        for field in ("Authorization", "Proxy-Authorization"):
            assert alice.call(ask, server.url, **{field: f"{scheme} a"}) == (200, f"{scheme} a".encode())
            assert bob.call(ask, server.url) == (200, b"")
            assert alice.call(ask, server.url) == (200, b""), "nor has its own session, without a login"
        for worker in pair:
            worker.call(close)


@pytest.mark.parametrize("client", ["urllib3", "aiohttp"])  # the others do not send such a request
def test_a_request_shorter_than_its_length_does_not_swallow_the_next_one(pair: list[Worker], client: str) -> None:
    """A server that answers early goes on to wait for the rest of the body: the next request would be it."""

    def answer(talk: Talk, path: str, fields: dict[str, str]) -> None:
        talk.send(sized(path.encode()))
        talk.read(int(fields.get("content-length", "0")))

    alice = pair[0]
    bob = alice if client == "aiohttp" else pair[1]
    with Scripted(answer) as server:
        assert alice.call(ask, f"{server.url}/alice", "POST", b"x", Content_Length="500") == (200, b"/alice")
        assert bob.call(ask, f"{server.url}/bob") == (200, b"/bob")
        assert bob.call(ask, f"{server.url}/bob", "POST", b"xyz") == (200, b"/bob")
        assert bob.call(ask, f"{server.url}/bob") == (200, b"/bob")
        assert server.accepted == 2
        for worker in pair:
            worker.call(close)
