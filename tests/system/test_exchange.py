"""When an exchange is over and its connection anybody's: byte by byte, cut everywhere, and fuzzed beside h11."""

from __future__ import annotations

import os
import random

import h11
import pytest

from sharedpool.exchange import MOST_INTERIM, End, Exchange

GET = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")
POST = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
CHUNKS = b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

CLEAN = [
    (GET, OK),
    (POST, OK),
    (CHUNKS, OK),
    (GET, b"HTTP/1.1 200\r\nX:\r\nContent-Length:2 \t\r\n\r\nok"),
    (GET, b"HTTP/1.1 404 \xe4\r\nConnection: Keep-Alive, x\r\nContent-Length: 0\r\n\r\n"),
    (GET, b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"),
    (GET, CHUNKED + b"2\r\nok\r\n0\r\n\r\n"),
    (GET, CHUNKED + b'a;b="c" \r\n0123456789\r\n00\r\nTrailer: a\r\nAnother:\r\n\r\n'),
    (HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n"),
    (HEAD, CHUNKED),
    (GET, b"HTTP/1.1 204 No Content\r\n\r\n"),
    (GET, b"HTTP/1.1 304 Not Modified\r\nETag: a\r\n\r\n"),
    (GET, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK),
    (GET, b"HTTP/1.1 102 Processing\r\n\r\n" * 5 + OK),
]
NOT_CLEAN = [
    (GET, b"HTTP/1.1 200 OK\r\n\r\nok"),
    (GET, OK.replace(b"1.1", b"1.0")),
    (GET, OK.replace(b"OK\r\n", b"OK\r\nConnection: a, Close\r\n")),
    (GET, OK.replace(b"OK\r\n", b"OK\r\nConnection: a\r\nconnection: close\r\n")),
    (GET, OK.replace(b"OK\r\n", b"OK\r\nContent-Length: 2\r\n")),
    (GET, OK.replace(b"OK\r\n", b"OK\r\nContent-Length: 3\r\n")),
    (GET, OK.replace(b": 2", b": 2, 2")),
    (GET, OK.replace(b": 2", b": +2")),
    (GET, OK.replace(b": 2", b": 0_2")),
    (GET, OK.replace(b": 2", b": -2")),
    (GET, OK.replace(b": 2", b":")),
    (GET, OK.replace(b": 2", b":\r\n 2")),
    (GET, OK.replace(b": 2", b" : 2")),
    (GET, OK.replace(b"\r\n", b"\n")),
    (GET, OK.replace(b"OK\r\n", b"OK\r\nTransfer-Encoding: chunked\r\n")),
    (GET, CHUNKED.replace(b"chunked", b"identity, chunked") + b"0\r\n\r\n"),
    (GET, CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n"),
    (GET, CHUNKED + b"-1\r\n\r\n"),
    (GET, CHUNKED + b"0x2\r\nok\r\n0\r\n\r\n"),
    (GET, CHUNKED + b"2\nok\n0\n\n"),
    (GET, CHUNKED + b"2\r\nok!\r\n0\r\n\r\n"),
    (GET, CHUNKED + b"0\r\nno colon\r\n\r\n"),
    (GET, b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n"),
    (GET, b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (GET, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n"),
    (GET, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\n\r\n"),
    (GET, b"HTTP/1.1 103 Early Hints\r\nContent-Length: 2\r\n\r\nok" + OK),
    (GET, b"\r\n" + OK),
    (GET, b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nok"),
    (GET, b"HTTP/1.1 99 Low\r\nContent-Length: 2\r\n\r\nok"),
    (POST[:-1], OK),  # a request that has not been sent whole
    (POST + b"d", OK),
    (CHUNKS[:-2], OK),
    (POST.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"), OK),
    (GET.replace(b"1.1", b"1.0"), OK),
    (GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), OK),
    (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
]


def over(request: bytes, *pieces: bytes, through: bool = True, legs: int = 0) -> End:
    exchange = Exchange(legs)
    if request:
        exchange.sent(request)
    for piece in pieces:
        exchange.came(memoryview(piece))
    return exchange.end(through=through)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@pytest.mark.parametrize(("request_", "answer"), CLEAN)
def test_a_whole_answer_leaves_its_connection_to_anybody_wherever_it_is_cut(request_: bytes, answer: bytes) -> None:
    assert over(request_, answer) is End.CLEAN
    assert over(request_, *bytewise(answer)) is End.CLEAN
    for at in range(len(answer)):
        assert over(request_, answer[:at], answer[at:]) is End.CLEAN, at
        assert over(request_, answer[:at]) is End.CLOSE, "what is cut off is not over"
    for at in range(len(request_)):
        exchange = Exchange()
        exchange.sent(request_[:at])
        exchange.sent(request_[at:])
        exchange.came(answer)
        assert exchange.end(through=True) is End.CLEAN, at
    assert over(request_, answer, through=False) is End.CLOSE, "its user has not read it"


@pytest.mark.parametrize(("request_", "answer"), CLEAN)
@pytest.mark.parametrize("more", [b"\r\n", b"H", OK, b"\0"])
def test_any_byte_beyond_an_answer_is_surplus(request_: bytes, answer: bytes, more: bytes) -> None:
    data = answer + more
    assert over(request_, data) is over(request_, answer, more) is over(request_, *bytewise(data)) is End.SURPLUS
    assert over(request_, data, through=False) is End.SURPLUS, "whoever has not read on"


@pytest.mark.parametrize(("request_", "answer"), NOT_CLEAN)
def test_what_ends_its_connection_or_is_unclear_is_closed_wherever_it_is_cut(request_: bytes, answer: bytes) -> None:
    assert over(request_, answer) is not End.CLEAN
    assert over(request_, *bytewise(answer)) is not End.CLEAN
    for at in range(len(answer)):
        assert over(request_, answer[:at], answer[at:]) is not End.CLEAN, at
        assert over(request_, answer[:at]) is not End.CLEAN, at


def test_without_a_request_nothing_may_come() -> None:
    assert Exchange().end(through=True) is End.CLEAN, "a connection that was leased and not used"
    assert over(b"", OK) is End.SURPLUS
    exchange = Exchange()
    exchange.sent_unseen()
    exchange.came(OK)
    assert exchange.end(through=True) is End.CLOSE


def test_heads_and_lines_without_an_end_are_not_kept() -> None:
    for start in (b"HTTP/1.1 200 OK\r\nA: ", CHUNKED + b"0\r\nA: ", CHUNKED + b"1;"):
        exchange = Exchange()
        exchange.sent(GET)
        exchange.came(start)
        for _ in range(20):
            exchange.came(b"x" * 50_000)
        assert len(exchange._answer._kept) == 0
        assert exchange.end(through=True) is End.CLOSE


def test_a_server_that_sends_interim_answers_only_is_noticed() -> None:
    exchange = Exchange()
    exchange.sent(GET)
    exchange.came(b"HTTP/1.1 102 Processing\r\n\r\n" * MOST_INTERIM)
    assert not exchange.flooded
    exchange.came(b"HTTP/1.1 102 Processing\r\n\r\n")
    assert exchange.flooded


LOGINS = [
    b"Authorization: NTLM abc=",
    b"authorization:NTLM",
    b"Authorization: nEgOtIaTe abc",
    b"Proxy-Authorization: Kerberos abc",
    b"Authorization: Basic abc\r\nAuthorization: Negotiate abc",
    b"Authorization: Basic abc, NTLM abc",
]
NO_LOGINS = [
    b"Authorization: Basic ntlm",
    b"Authorization: Bearer NTLM.abc",
    b'Authorization: Digest username="ntlm", realm="negotiate"',
    b"X-Authorization: NTLM abc",
    b"Authorization: NTLMish abc",
]


@pytest.mark.parametrize("field", LOGINS)
def test_a_request_that_logs_its_connection_in_ends_it(field: bytes) -> None:
    asked = GET.replace(b"Host: a", b"Host: a\r\n" + field)
    assert over(asked, OK) is End.CLOSE
    exchange = Exchange()
    fields = [
        (name.decode(), value.decode()) for name, _, value in (each.partition(b":") for each in field.split(b"\r\n"))
    ]
    exchange.asks("GET", fields, sound=True)
    exchange.came(OK)
    assert exchange.end(through=True) is End.CLOSE


@pytest.mark.parametrize("field", NO_LOGINS)
def test_a_login_of_the_request_alone_leaves_the_connection_to_anybody(field: bytes) -> None:
    assert over(GET.replace(b"Host: a", b"Host: a\r\n" + field), OK) is End.CLEAN


@pytest.mark.parametrize(
    ("status", "field", "end"),
    [
        (b"401", b"WWW-Authenticate: NTLM", End.OFFERED),
        (b"407", b"proxy-authenticate: Basic realm=a\r\nProxy-Authenticate: negotiate", End.OFFERED),
        (b"401", b'WWW-Authenticate: Basic realm="a", Negotiate, NTLM', End.OFFERED),
        (b"401", b"WWW-Authenticate: NTLM TlRMTVNTUAACAAAA==", End.BEGUN),
        (b"401", b"WWW-Authenticate: Basic realm=a, Negotiate YII=, NTLM", End.BEGUN),
        (b"200", b"WWW-Authenticate: Negotiate YII=", End.CLOSE),
        (b"200", b"Persistent-Auth: true", End.CLOSE),
        (b"200", b"Authentication-Info: a=b", End.CLOSE),
        (b"401", b'WWW-Authenticate: Basic realm="NTLMish"', End.CLEAN),
        (b"401", b"WWW-Authenticate: Digest nonce=ntlm", End.CLEAN),
        (b"200", b"Persistent-Auth: false", End.CLEAN),
    ],
)
def test_what_an_answer_says_of_logins_decides_who_may_have_the_connection(
    status: bytes, field: bytes, end: End
) -> None:
    answer = OK.replace(b"200 OK", status + b" x\r\n" + field)
    assert over(GET, answer) is end
    assert over(GET, *bytewise(answer)) is end
    assert over(GET, answer + b"x") is End.SURPLUS
    assert over(GET, answer, through=False) is End.CLOSE
    assert over(GET, answer.replace(b"x\r\n", b"x\r\nConnection: close\r\n", 1)) is End.CLOSE


def test_the_answer_to_digest_is_not_a_login_of_the_connection() -> None:
    asked = GET.replace(b"Host: a", b'Host: a\r\nAuthorization: Digest username="a"')
    assert over(asked, OK.replace(b"OK\r\n", b"OK\r\nAuthentication-Info: nextnonce=a\r\n")) is End.CLEAN


def test_after_a_login_has_begun_nobody_else_gets_the_connection_and_it_does_not_go_on_for_ever() -> None:
    begun = OK.replace(b"200 OK", b"401 x\r\nWWW-Authenticate: NTLM abc")
    offered = OK.replace(b"200 OK", b"401 x\r\nWWW-Authenticate: NTLM")
    assert over(GET, OK, legs=1) is End.CLOSE
    assert over(GET, begun, legs=1) is End.BEGUN
    assert over(GET, begun, legs=10) is End.CLOSE
    assert over(GET, offered, legs=1) is End.CLOSE, "offered again: the login has failed"
    assert Exchange(1).end(through=True) is End.CLOSE


def test_whatever_comes_a_clean_exchange_ends_where_h11_says_it_ends() -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print("SEED", seed)
    chance = random.Random(seed)
    pieces = [b"\r\n", b"\n", b" ", b"0", b":", b"\0", b"close", b"chunked", b"HTTP/1.1 ", b"Content-Length: 3\r\n", OK]
    found = 0
    for _ in range(5_000):
        request, answer = chance.choice(CLEAN)
        data = bytearray(answer)
        for _ in range(chance.randrange(3)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randrange(3)] = chance.choice(pieces)
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(5)))
        parts = [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        end = over(request, bytes(data))
        assert over(request, *parts) is end, (request, data, cuts)
        if end is End.CLEAN and b"HTTP/1.0" not in data:
            found += 1
            assert ends_for_h11(request, bytes(data)), (request, data)
    assert found > 200


def ends_for_h11(request: bytes, answer: bytes) -> bool:
    """Whether h11 finds the whole answer, nothing behind it, and a connection that stays."""
    ours = h11.Connection(h11.CLIENT)
    ours.send(h11.Request(method=request.split()[0], target="/a", headers=[("Host", "a")]))
    ours.send(h11.EndOfMessage())
    ours.receive_data(answer)
    while not isinstance(ours.next_event(), h11.EndOfMessage):
        pass
    return ours.their_state is h11.DONE and not ours.trailing_data[0]
