"""A worker's two channels to the arbiter: requests, one at a time, and events, which the arbiter sends unasked."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import Any

from . import errors, fdpass, launch, segment, wire
from .errors import ArbiterLost, AttachRefused, FileLimit, SharedPoolError
from .wire import Kind, Message


class Channel:
    """The request channel of one process and pool.

    Every request has a number and every reply repeats it; a reply that nobody awaits any more is closed with the
    descriptor it brought. Any abnormal end closes the channel, and the next request opens a new one.
    """

    def __init__(self, directory: str, pool: str, given: dict[str, Any], *, declares: bool, update: bool) -> None:
        self._directory = directory
        self._hello = {
            "pool": pool,
            "pid": os.getpid(),
            "options": given,
            "declares": declares,
            "update": update,
            "identity": dict(segment.identity()),
        }
        self._lock = threading.Lock()
        self._request = 0
        self._socket: socket.socket | None = None
        self.events: socket.socket | None = None

    def attach(self, seconds: float) -> tuple[dict[str, Any], int]:
        """Say hello; gives what the arbiter answered, and the segment's descriptor.

        Raises:
            StartFailed, ArbiterLost, AttachRefused, PoolNotFound, PoolOptionsDiffer, OptionError.
        """
        body, descriptor = self._greet(seconds, start=True)
        self._hello.update(row=body["row"], nonce=body["nonce"], options={})
        return body, descriptor

    def _greet(self, seconds: float, *, start: bool) -> tuple[dict[str, Any], int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            message = Message(Kind.HELLO, body=self._hello)
            if start:
                channel, answer, descriptor = launch.greet(self._directory, message, seconds, theirs.fileno())
            else:
                found = launch.connect(self._directory)
                if found is None:
                    raise ArbiterLost("no arbiter answers in " + self._directory)
                channel = found
                answer, descriptor = launch.ask(channel, message, seconds, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if answer.kind is not Kind.WELCOME or descriptor is None:
            ours.close()
            channel.close()
            raise _refusal(answer)
        channel.setblocking(False)  # who only tells the arbiter something never waits for it
        self._socket, self.events = channel, ours
        return dict(answer.body), descriptor

    def tell(self, message: Message, descriptor: int | None = None, seconds: float = 1.0) -> None:
        """Send a message that has no answer.

        Raises:
            ArbiterLost: It could not be sent.
        """
        channel = self._socket
        if channel is None:
            if not self._lock.acquire(timeout=seconds):
                raise ArbiterLost("the channel to the arbiter stayed busy")
            try:
                channel = self._socket or self._reopen(seconds)
            finally:
                self._lock.release()
        try:
            fdpass.send(channel, wire.pack(message), descriptor)
        except BlockingIOError as error:  # it does not read just now; the channel is whole
            raise ArbiterLost(f"the arbiter does not listen to {message.kind.name}") from error
        except OSError as error:
            self._broken()
            raise ArbiterLost(f"the arbiter cannot be told {message.kind.name}: {error}") from error

    def declare(self, given: dict[str, Any], *, update: bool, seconds: float = 10.0) -> list[str]:
        """Options of another handle; gives the warnings.

        Raises:
            PoolOptionsDiffer, OptionError, ArbiterLost.
        """
        with self._lock:
            channel = self._socket or self._reopen(seconds)
            self._request = self._request + 1 & 0xFFFF_FFFF
            message = Message(Kind.DECLARE, self._request, body={"options": given, "update": update})
            try:
                answer, _ = launch.ask(channel, message, seconds)
                channel.setblocking(False)
            except BaseException:
                self._broken()
                raise
        if answer.kind is not Kind.OK:
            raise _refusal(answer)
        return list(answer.body.get("warnings") or [])

    def fetch(self, slot: int, generation: int, limit: int) -> int | None:
        """The descriptor of a leased connection, or None if the arbiter has none.

        Args:
            slot: The slot's number.
            generation: Its connection's.
            limit: Until when to wait, monotonic ns.

        Raises:
            ArbiterLost: It could not be asked, or did not answer in time.
        """
        left = (limit - time.monotonic_ns()) / 1e9
        if left <= 0 or not self._lock.acquire(timeout=min(left, 3600.0)):
            raise ArbiterLost("the channel to the arbiter stayed busy until the deadline")
        try:
            return self._fetch(slot, generation, limit)
        except fdpass.PassError as error:
            self._broken()
            raise FileLimit(f"a connection could not be taken over: {error}") from error
        except OSError as error:
            self._broken()
            raise ArbiterLost(f"the arbiter did not hand over a connection: {error}") from error
        except BaseException:
            self._broken()
            raise
        finally:
            self._lock.release()

    def _fetch(self, slot: int, generation: int, limit: int) -> int | None:
        self._request = self._request + 1 & 0xFFFF_FFFF
        message = Message(Kind.FETCH, self._request, slot, generation)
        channel = self._socket
        if channel is None:
            channel = self._reopen(max(0.1, (limit - time.monotonic_ns()) / 1e9))
        fdpass.send(channel, wire.pack(message))
        while True:
            _await(channel, limit)
            data, descriptor = fdpass.receive(channel, wire.LONGEST, wait=False)
            if not data:
                raise ConnectionResetError("the arbiter closed the channel")
            answer = wire.unpack(data)
            if (answer.request, answer.slot, answer.generation) == (message.request, slot, generation):
                return descriptor
            if descriptor is not None:  # of a request that was given up
                os.close(descriptor)

    def _reopen(self, seconds: float) -> socket.socket:
        """Come back for the same row after the channel broke."""
        _, descriptor = self._greet(seconds, start=False)
        os.close(descriptor)  # mapped already
        assert self._socket is not None
        return self._socket

    def come_back(self, events: socket.socket, seconds: float = 1.0) -> socket.socket:
        """The event channel `events` ended: gives the one that took its place.

        Raises:
            AttachRefused: The row is no longer this process's.
            ArbiterLost: No arbiter answers.
        """
        with self._lock:
            if self.events is events:
                self._broken()
                self._reopen(seconds)
            if self.events is None:
                raise ArbiterLost("this process has left the pool")
            return self.events

    def _broken(self) -> None:
        channel, self._socket = self._socket, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Close both channels; the row ends with them."""
        self._broken()
        events, self.events = self.events, None
        if events is not None:
            events.close()


def _await(channel: socket.socket, limit: int) -> None:
    """Wait until something can be read, or until `limit`, monotonic ns.

    Raises:
        TimeoutError: Nothing came.
    """
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    left = max(0, limit - time.monotonic_ns())
    if not poller.poll(min(3_600_000, left // 1_000_000 + 1)):
        raise TimeoutError("nothing came in time")


def _refusal(answer: Message) -> SharedPoolError:
    """The error that the arbiter named, or AttachRefused."""
    kind = getattr(errors, str(answer.body.get("error")), AttachRefused)
    if not (isinstance(kind, type) and issubclass(kind, SharedPoolError)):
        kind = AttachRefused
    return kind(str(answer.body.get("text") or f"the arbiter answered {answer.kind.name} to a hello"))
