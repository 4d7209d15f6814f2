"""A TLS socket's records, byte by byte: the other side is played by ssl's object over memory."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from sharedpool.drivers.tls import TlsDriver
from sharedpool.drivers.tlssocket import TlsSocket


class Peer:
    """A server whose records are sent by the test."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self.outgoing, server_side=True)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.conn = TlsSocket(socket.AF_INET, socket.SOCK_STREAM)
            self.conn.connect(listener.getsockname())
            self.sock, _ = listener.accept()
        self.sock.settimeout(20)

    def hear(self) -> None:
        self._incoming.write(self.sock.recv(1 << 16))

    def records(self, text: bytes) -> bytes:
        self.tls.write(text)
        return self.outgoing.read()


@pytest.fixture
def driver(tmp_path: Path) -> TlsDriver:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    driver = TlsDriver(cafile=tmp_path / "ca.pem")
    driver.authority = authority  # type: ignore[attr-defined]
    return driver


@pytest.fixture
def peer(driver: TlsDriver) -> Iterator[Peer]:
    """After the handshake, with its tickets still to be sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    driver.authority.issue_cert("here").configure_cert(context)  # type: ignore[attr-defined]
    peer = Peer(context)
    conn = peer.conn
    conn.start(driver.context, "here", None)
    conn.settimeout(0.0)
    for _ in range(2):  # hello, and the server's; finished, and its tickets
        with pytest.raises(TimeoutError):
            conn.shake_hands(0)
        peer.hear()
        try:
            peer.tls.do_handshake()
        except ssl.SSLWantReadError:
            peer.sock.sendall(peer.outgoing.read())
            conn.shake_hands(20)
            peer.hear()
            peer.tls.do_handshake()
            break
    conn.rest()
    conn.address = "here", 1
    yield peer
    conn.close()
    peer.sock.close()


def arrive(peer: Peer, data: bytes) -> None:
    """Send, and see that it is there."""
    peer.sock.sendall(data)
    while len(socket.socket.recv(peer.conn, 1 << 16, socket.MSG_PEEK)) < len(data):
        pass


def test_tickets_are_heard_whole_and_not_by_halves(driver: TlsDriver, peer: Peer) -> None:
    tickets = peer.outgoing.read()
    assert driver.clean(peer.conn)
    for part in (tickets[:3], tickets[3:40]):
        arrive(peer, part)
        assert not driver.idle_readable(peer.conn)
        assert not driver.clean(peer.conn)
    arrive(peer, tickets[40:])
    assert driver.idle_readable(peer.conn)
    assert driver.clean(peer.conn)
    arrive(peer, peer.records(b"what nobody asked for"))
    assert not driver.idle_readable(peer.conn)


def test_half_a_record_behind_what_was_read_is_not_clean(driver: TlsDriver, peer: Peer) -> None:
    second = peer.records(b"first") + peer.records(b"second")
    arrive(peer, peer.outgoing.read() + second[:-7])
    assert peer.conn.recv(100) == b"first"
    assert peer.conn.pending() == 0
    assert not driver.clean(peer.conn)
    arrive(peer, second[-7:])
    assert peer.conn.recv(3) == b"sec"
    assert not driver.clean(peer.conn)


def test_what_could_not_be_sent_is_sent_again_and_only_once(driver: TlsDriver, peer: Peer) -> None:
    conn = peer.conn
    socket.socket.setsockopt(conn, socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    conn.settimeout(0.0)
    data, sent, heard = b"0123456789abcdef" * 200_000, 0, b""
    blocked = False
    while sent < len(data):
        try:
            sent += conn.send(data[sent:])
        except BlockingIOError:
            blocked = True
            assert not driver.clean(conn)
            if select.select([peer.sock], [conn], [], 20)[0]:
                peer.hear()
    while len(heard) < len(data):
        try:
            heard += peer.tls.read(1 << 16)
        except ssl.SSLWantReadError:
            peer.hear()
    assert blocked
    assert heard == data
    assert driver.clean(conn)
    assert conn.gettimeout() is None


def test_what_would_bypass_tls_is_refused(peer: Peer) -> None:
    conn = peer.conn
    for call in (
        lambda: conn.recv(1, socket.MSG_PEEK), lambda: conn.send(b"x", socket.MSG_OOB), lambda: conn.recvmsg(1),
        lambda: conn.sendmsg([b"x"]), lambda: conn.sendto(b"x", ("127.0.0.1", 1)), conn.dup,
    ):  # fmt: skip
        with pytest.raises(OSError, match="not possible on a TLS connection"):
            call()
