"""A small HTTP/1.1 server in a process of its own, for the scenarios that need one. Ends with its standard input.

`/page` answers 200, `/redirect` 307 to `/page`, `/missing` 404, `/close` 200 and then the end of the connection,
`/never` not at all, until the client ends the connection; `/id` the number of the connection, `/chunked` in chunks,
`/large` a MiB, `/half` a half of it, `/large-close` a MiB and then the end of the connection, `/hangup` 200 and then
an end that was not announced, `/broken` an end in the midst of the answer, `/once/KEY` the same instead of its first
answer. A POST is sent back, or led on to `/echo` (307) from `/redirect`. It is a proxy, too: what is asked of another
server it answers itself, and CONNECT leads to that one. `/numbers` tells how many connections are open, how many were
at once, and how many there have been.

With arguments, a file with certificate and key and perhaps one with whose certificates clients need, it speaks TLS.
"""

from __future__ import annotations

import http.server
import json
import os
import select
import socket
import ssl
import sys
import threading
from typing import Any, ClassVar
from urllib.parse import urlsplit

LARGE = b"0123456789abcdef" * 65536
PATHS = {
    "/page": (200, b"the page\n"),
    "/redirect": (307, b"over there\n"),
    "/close": (200, b"the last\n"),
    "/hangup": (200, b"bye\n"),
}
PATHS |= {"/half": (200, LARGE[: 1 << 19]), "/large": (200, LARGE), "/large-close": (200, LARGE)}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    open = peak = accepted = 0
    asked: ClassVar[set[str]] = set()
    lock = threading.Lock()

    def setup(self) -> None:
        with Handler.lock:
            Handler.open += 1
            Handler.accepted += 1
            Handler.peak = max(Handler.peak, Handler.open)
            self.number = Handler.accepted
        super().setup()

    def finish(self) -> None:
        super().finish()
        with Handler.lock:
            Handler.open -= 1

    def do_GET(self) -> None:
        path = urlsplit(self.path).path  # a proxy is asked for a whole URL
        if path == "/never":
            self.rfile.read(1)
            self.close_connection = True
        elif path == "/broken" or (path.startswith("/once/") and path not in Handler.asked):
            Handler.asked.add(path)
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.close_connection = True
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"one ", b"two ", b"three"):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif path == "/id":
            self._answer(200, str(self.number).encode())
        elif path == "/numbers":
            numbers = {"open": Handler.open, "peak": Handler.peak, "accepted": Handler.accepted}
            self._answer(200, json.dumps(numbers).encode())
        else:
            self._answer(*PATHS["/page"] if path.startswith("/once/") else PATHS.get(path, (404, b"nothing\n")))
            if path == "/hangup":
                self.close_connection = True

    def do_POST(self) -> None:
        if self.headers["Transfer-Encoding"] == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(length)
            if len(body) < length:  # its client was shut down in the midst of it: that is no request
                self.close_connection = True
                return
        self._answer(307 if self.path == "/redirect" else 200, body)

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: there, there: self.connection}
            while all(end.fileno() >= 0 for end in ends):
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        self.close_connection = True
                        return
                    ends[end].sendall(data)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 307:
            self.send_header("Location", "/echo" if self.command == "POST" else "/page")
        if self.path.endswith("close"):
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection, none of which outlives it."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone, or refuses our certificate."""


def main() -> None:
    server = Server(("127.0.0.1", 0), Handler)
    if sys.argv[1:]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1])
        if sys.argv[2:]:
            context.load_verify_locations(sys.argv[2])
            context.verify_mode = ssl.CERT_REQUIRED
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
