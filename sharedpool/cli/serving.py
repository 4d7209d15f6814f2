"""`sharedpool serve`: the arbiter in the foreground."""

from __future__ import annotations

import logging
import os
import socket
from typing import NoReturn

from .. import scope

log = logging.getLogger("sharedpool.arbiter")


def serve_here(level: int) -> NoReturn:
    """Serve the environment's scope until a signal ends it, and exit.

    Raises:
        StartFailed: Another arbiter serves it, or no directory can be used.
        NotSupported: The platform lacks what it needs.
    """
    from .. import manager

    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    directory = scope.directory_for(os.environ)

    def ready() -> None:
        log.info("serving %s as process %d", directory, os.getpid())
        notify_systemd("READY=1")

    manager.serve(directory, ready)
    log.info("the arbiter of %s ends", directory)
    logging.shutdown()
    os._exit(0)  # as every arbiter: finalizers would look for the files that it has just taken away


def notify_systemd(text: str) -> None:
    """Tell the service manager, where there is one (sd_notify(3)): a datagram to the socket that it named."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # abstract
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(text.encode(), address)
