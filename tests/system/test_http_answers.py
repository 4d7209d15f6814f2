"""An answer that has come whole is understood as http.client would understand it, or left to http.client."""

from __future__ import annotations

import http.client
import io
from typing import Any

from sharedpool.exchange import Exchange
from sharedpool.integrations import urllib3

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"


WHOLE = [
    (PLAIN + b"\r\nok", "GET"),
    (PLAIN + b"Connection: Keep-Alive\r\nX-Y:  a b \t\r\nx-y:\r\nSet-Cookie: \xe4=1; x\r\n\r\nok", "GET"),
    (b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n", "POST"),
    (b"HTTP/1.1 404\r\nContent-Length: 0\r\n\r\n", "POST"),
    (PLAIN + b"\r\n", "HEAD"),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", "GET"),
    (b"HTTP/1.1 304 Not Modified\r\nETag: a\r\n\r\n", "GET"),
    (b"HTTP/1.1 204 No Content\r\nDate: a\r\n\r\n", "GET"),
    (PLAIN.replace(b": 2", b": 5000") + b"\r\n" + b"x" * 5000, "GET"),
]
OTHERS = [
    PLAIN + b"\r\nok!",  # more than the answer
    PLAIN + b"Connection: close\r\n\r\nok",
    PLAIN + b"Connection: keep-alive, upgrade\r\n\r\nok",
    PLAIN + b"Folded: a\r\n b\r\n\r\nok",
    PLAIN + b"Content-Length: 2\r\n\r\nok",
    PLAIN + b"No colon\r\n\r\nok",
    PLAIN + b"Spaced : a\r\n\r\nok",
    PLAIN + b"Control: \x0b\r\n\r\nok",
    PLAIN.replace(b"\r\n", b"\n") + b"\nok",
    PLAIN.replace(b"1.1", b"1.0") + b"\r\nok",
    b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n" + PLAIN + b"\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\n\r\nok",
]


class Sock:
    """A socket from which one answer comes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(io.BytesIO(self.data))  # type: ignore[arg-type]


class Connection:
    """What has the connection, or has let it go."""

    lets_go = False

    def let_go(self) -> None:
        self.lets_go = True


def both(data: bytes, method: str = "GET") -> tuple[Any, Any, bool]:
    connection = Connection()
    exchange = Exchange()
    exchange.sent(f"{method} / HTTP/1.1\r\n\r\n".encode())
    ours = urllib3._Answer(connection, exchange, Sock(data), method=method)  # type: ignore[arg-type]
    theirs = http.client.HTTPResponse(Sock(data), method=method)  # type: ignore[arg-type]
    ours.begin()
    theirs.begin()
    return ours, theirs, connection.lets_go


def facts(answer: Any) -> tuple[Any, ...]:
    found = [getattr(answer, name) for name in ("status", "reason", "version", "length", "will_close", "chunked")]
    return (*found, answer.getheaders(), answer.msg.as_string(), answer.headers.get_content_type(), answer.read())


def test_what_has_come_whole_is_understood_in_the_same_way() -> None:
    for data, method in WHOLE:
        ours, theirs, lets_go = both(data, method)
        assert lets_go, data
        assert facts(ours) == facts(theirs)
        assert ours.isclosed() == theirs.isclosed() is True


def test_anything_else_is_left_to_http_client_and_keeps_its_connection() -> None:
    for data in OTHERS:
        ours, theirs, lets_go = both(data)
        assert not lets_go, data
        assert ours.getheaders() == theirs.getheaders()


def test_two_tls_settings_with_one_digest_have_two_drivers(monkeypatch: Any) -> None:
    monkeypatch.setattr(urllib3, "_digest", lambda value: "one")
    pool = {"pool": "web", "cert_reqs": "CERT_REQUIRED", "server_hostname": "a"}
    drivers = [
        urllib3.SharedHTTPSConnectionPool("localhost", 443, **{**pool, **other})._new_conn()._where()[2]
        for other in (
            {}, {"cert_reqs": "CERT_NONE"}, {"server_hostname": "b"}, {"ca_certs": "/a.pem"}, {"ca_cert_data": "a"},
            {"ca_cert_data": "b"}, {"socket_options": []}, {"source_address": ("127.0.0.1", 0)},
        )
    ]  # fmt: skip
    assert len(set(map(id, drivers))) == len(drivers)
    assert len({driver.name for driver in drivers}) == 1
    sockets = [
        urllib3.SharedHTTPConnectionPool("localhost", 80, pool="web", **other)._new_conn()._where()[2]
        for other in ({"socket_options": []}, {"source_address": ("127.0.0.1", 0)}, {"source_address": ("::1", 0)})
    ]
    assert len(set(map(id, sockets))) == 3


def test_settings_that_are_equal_in_python_only_have_two_drivers() -> None:
    drivers = [
        urllib3.SharedHTTPSConnectionPool("localhost", 443, pool="web", assert_hostname=each)._new_conn()._where()[2]
        for each in (False, 0)
    ]
    assert drivers[0] is not drivers[1], "0 does not switch the check off"
    assert all(len(driver.name.partition("+")[2]) == 32 for driver in drivers), "16 bytes"
