"""TLS over TCP: verified by default, and never moved, because its keys and counters are this process's own."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any, Final, cast

from ..errors import ConnectFailed, ConnectTimeout, OptionError, file_limit
from . import Register, named, register
from .sockets import PooledSocket, ended_if_it_fails, pooled
from .tcp import TcpDriver
from .tlssocket import TlsSocket, tls_on

#: Sessions of so many addresses are kept for resumption.
_SESSIONS: Final = 1024
_LABEL: Final = re.compile(r"[A-Za-z0-9_-]{0,40}")


class TlsDriver(TcpDriver):
    """`transport="ssl"`: TLS over TCP; host is a name or an address, port 1 to 65535.

    Certificates and host names are verified against the system's store. What is given here is part of the key, as a
    digest, so that only equal ones share; make one driver for a process, and lend by that: objects of one driver are
    never lent by another.

    Connections stay in their process (see the option `order`), and sessions are resumed by the process that had them,
    and by those that it forks later. A server that cannot be verified raises ConnectFailed, with ssl's error as the
    cause.

    Args:
        context: What decides instead of cafile, alpn and certfile. Contexts cannot be compared: see `label`.
        cafile: Certificates of the authorities to be trusted instead of the system's.
        server_hostname: The name to ask for (SNI) and to check, if not the host.
        alpn: Protocols to offer, the best first.
        certfile: The client's certificate, with its key unless there is a keyfile.
        keyfile: Its key.
        password: Of the key; not part of the pool's key, and not kept.
        label: Letters, digits, - and _, for people who look at the pool, and to tell contexts apart.

    Raises:
        OptionError: An option is wrong, or a file cannot be used.
    """

    name = "ssl"
    moves = False

    def __init__(
        self, *, context: ssl.SSLContext | None = None, cafile: str | os.PathLike[str] | None = None,
        server_hostname: str | None = None, alpn: Iterable[str] = (),
        certfile: str | os.PathLike[str] | None = None, keyfile: str | os.PathLike[str] | None = None,
        password: str | bytes | None = None, label: str = "",
    ) -> None:  # fmt: skip
        if isinstance(alpn, str):
            raise _wrong("alpn", alpn, "a sequence of protocol names")
        if not _LABEL.fullmatch(str(label)):
            raise _wrong("label", label, "up to 40 letters, digits, - and _")
        if server_hostname is not None and not str(server_hostname).strip("."):
            raise _wrong("server_hostname", server_hostname, "a host name")
        given: dict[str, Any] = {
            "cafile": _path(cafile), "certfile": _path(certfile), "keyfile": _path(keyfile), "alpn": list(alpn)
        }  # fmt: skip
        self._given: dict[str, Any] = {**given, "server_hostname": server_hostname, "label": label}
        self._again = context is None and password is None
        self._server_hostname = server_hostname
        self._sessions: dict[tuple[str, int], ssl.SSLSession] = {}
        if context is None:
            self._context = _context(password=password, **given)
        elif not hasattr(context, "wrap_bio"):
            raise _wrong("context", context, "an ssl.SSLContext")
        else:
            for option, value in given.items():
                if value:
                    raise _wrong(option, value, "nothing, where there is a context")
            self._context = context
        if context is not None or any(self._given.values()):
            facts = json.dumps([context is not None, self._given], sort_keys=True).encode()
            digest = hashlib.blake2b(facts, digest_size=16).hexdigest()
            self.name = f"ssl.{label}{'.' if label else ''}{digest}"

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._again:
            raise TypeError("a TlsDriver with a context or a password cannot be pickled: make it in each process")
        return functools.partial(type(self), **self._given), ()

    def __repr__(self) -> str:
        return f"<TlsDriver {self.name}>"

    @property
    def context(self) -> ssl.SSLContext:
        """What decides whom to trust."""
        return self._context

    def make(self, family: int, kind: int, protocol: int) -> TlsSocket:
        """One of ours."""
        return tls_on(pooled())(family, kind, protocol)

    def open(self, host: str, port: int, timeout: float, register: Register) -> TlsSocket:
        """Connect, then shake hands, within one timeout.

        Raises:
            ConnectTimeout, ConnectFailed.
        """
        limit = time.monotonic() + timeout
        conn = cast("TlsSocket", super().open(host, port, timeout, register))
        where = named(self.name, host, port)
        try:
            try:
                copy = socket.socket(fileno=os.dup(conn.number()))
            except OSError as error:
                raise file_limit(error, f"open {where}") from error
            with ended_if_it_fails(copy, ConnectFailed):  # a server that was connected to counts until it has closed
                self._shake_hands(conn, host, port, where, limit, timeout)
        except BaseException:
            conn.close()
            raise
        conn.rest()
        return conn

    def _shake_hands(self, conn: TlsSocket, host: str, port: int, where: str, limit: float, timeout: float) -> None:
        try:
            conn.address = host, port
            conn.start(self._context, self._server_hostname or host, self._sessions.get((host, port)))
            conn.shake_hands(limit - time.monotonic())
        except TimeoutError as error:
            raise ConnectTimeout(
                f"{where} did not finish the TLS handshake within {timeout:.3g} s (connect_timeout)"
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise ConnectFailed(f"{where}: its certificate was refused: {error.verify_message}") from error
        except (OSError, ValueError) as error:
            why = "the server closed the connection" if isinstance(error, ssl.SSLEOFError) else error
            raise ConnectFailed(f"{where}: the TLS handshake failed: {why}") from error

    def clean(self, conn: PooledSocket) -> bool:
        """Nothing unread, decrypted or not, nothing unsent, no file object; timeouts back at the baseline."""
        tls = cast("TlsSocket", conn)
        if not tls.at_rest() or not super().clean(conn):
            return False
        if tls.looks:
            self._look_for_session(tls)
        return True

    def _look_for_session(self, conn: TlsSocket) -> None:
        """Keep the session for the next connection to the same address, once it can be resumed."""
        conn.looks -= 1
        session = conn.ssl_object.session
        if session is None or not (session.has_ticket or conn.version() != "TLSv1.3"):
            return
        conn.looks = 0
        address = conn.address
        self._sessions.pop(address, None)
        if len(self._sessions) >= _SESSIONS:
            self._sessions.pop(next(iter(self._sessions)), None)
        self._sessions[address] = session

    def idle_readable(self, conn: TlsSocket) -> bool:
        """A server may send tickets whenever it likes; anything else is not for the next user."""
        return conn.hear()

    def goodbye(self, conn: TlsSocket) -> None:
        """Say close_notify; never blocks."""
        conn.goodbye()

    def export(self, conn: PooledSocket) -> None:
        """None: it cannot move."""

    def adopt(self, descriptor: int, state: bytes) -> PooledSocket:
        """Never called."""
        raise NotImplementedError


def _context(
    *, cafile: str | None, certfile: str | None, keyfile: str | None, alpn: list[str], password: str | bytes | None
) -> ssl.SSLContext:
    """What verifies everything; OptionError if a file cannot be used."""
    try:
        context = ssl.create_default_context(cafile=cafile)
    except (OSError, ssl.SSLError) as error:
        raise _wrong("cafile", cafile, "a file with certificates in PEM format", error) from error
    if keyfile and not certfile:
        raise _wrong("keyfile", keyfile, "one beside a certfile")
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile, password or "")
        except (OSError, ssl.SSLError) as error:
            raise _wrong("certfile", certfile, "a certificate and its key in PEM format", error) from error
    try:
        if alpn:
            context.set_alpn_protocols(alpn)
    except (TypeError, ValueError, AttributeError, ssl.SSLError) as error:
        raise _wrong("alpn", alpn, "names of protocols, of 1 to 255 bytes each", error) from error
    return context


def _path(file: str | os.PathLike[str] | None) -> str | None:
    return None if file is None else os.fsdecode(file)


def _wrong(option: str, value: object, allowed: str, why: object = "") -> OptionError:
    reason = f": {why}" if why else ""
    return OptionError(
        f"option {option!r} has the value {value!r} (from the call{reason}); allowed is {allowed}",
        option=option, value=value, source="the call", allowed=allowed,
    )  # fmt: skip


register(TlsDriver())
