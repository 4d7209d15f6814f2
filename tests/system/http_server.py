"""A small HTTP/1.1 server in a process of its own, for the scenarios that need one. Ends with its standard input.

`/page` answers 200, `/redirect` 307 to `/page`, `/missing` 404, `/close` 200 and then the end of the connection,
`/never` not at all, until the client ends the connection;
`/numbers` tells how many connections are open, how many were at once, and how many there have been.
"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from typing import Any

PATHS = {"/page": (200, b"the page\n"), "/redirect": (307, b"over there\n"), "/close": (200, b"the last\n")}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    open = peak = accepted = 0
    lock = threading.Lock()

    def setup(self) -> None:
        with Handler.lock:
            Handler.open += 1
            Handler.accepted += 1
            Handler.peak = max(Handler.peak, Handler.open)
        super().setup()

    def finish(self) -> None:
        super().finish()
        with Handler.lock:
            Handler.open -= 1

    def do_GET(self) -> None:
        if self.path == "/never":
            self.rfile.read(1)
            self.close_connection = True
            return
        status, body = PATHS.get(self.path, (404, b"nothing\n"))
        if self.path == "/numbers":
            status, body = (
                200,
                json.dumps({"open": Handler.open, "peak": Handler.peak, "accepted": Handler.accepted}).encode(),
            )
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 307:
            self.send_header("Location", "/page")
        if self.path == "/close":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A thread for each connection, none of which outlives it."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
