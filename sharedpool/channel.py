"""A worker's two channels to the arbiter: requests, one at a time, and events, which the arbiter sends unasked."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from . import errors, fdpass, launch, layout, segment, wire
from .errors import NO_DESCRIPTOR, ArbiterLost, AttachRefused, FileLimit, SharedPoolError, file_limit
from .wire import Kind, Message

#: Between two attempts to reach an arbiter, ns.
#: Seconds for one attempt to come back; a checkout without a limit makes another.
_COME_BACK: Final = 30.0
_PAUSE: Final = 5_000_000
#: A successor reads at least one message within this, s.
_TELL_SECONDS: Final = 30.0


class Channel:
    """The request channel of one process and pool.

    Every request has a number and every reply repeats it; a reply that nobody awaits any more is closed with the
    descriptor it brought. Any abnormal end closes the channel, and the next request opens a new one, to a successor
    if the arbiter is dead.

    Args:
        directory: The scope's runtime directory.
        pool: The pool's name.
        given: Options for the hello.
        declares: Whether they make the pool.
        update: Whether options that differ are applied.
        holdings: Gives what a successor has to know, each message with a descriptor that is closed after it was sent.
        defaults: What else the pool is made with, if this hello makes it.

    Attributes:
        memory: The pool's segment, once this process has it.
    """

    def __init__(
        self, directory: str, pool: str, given: dict[str, Any], *,
        declares: bool, update: bool, holdings: Callable[[], Iterator[tuple[Message, int | None]]],
        defaults: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._hello = {
            "pool": pool,
            "pid": os.getpid(),
            "options": given,
            "defaults": defaults or {},
            "declares": declares,
            "update": update,
            "identity": dict(segment.identity()),
            "layout": layout.LAYOUT,
        }
        self._lock = threading.Lock()
        self._request = 0
        self._socket: socket.socket | None = None
        self.events: socket.socket | None = None
        self._left = False
        self._holdings = holdings
        self.memory: segment.Segment | None = None

    def attach(self, seconds: float) -> tuple[dict[str, Any], int]:
        """Say hello; gives what the arbiter answered, and the segment's descriptor.

        Raises:
            StartFailed, ArbiterLost, AttachRefused, PoolNotFound, PoolOptionsDiffer, OptionError.
        """
        body, descriptor = self._greet(seconds)
        self._hello.update(row=body["row"], nonce=body["nonce"], options={})
        return body, descriptor

    def _greet(self, seconds: float) -> tuple[dict[str, Any], int]:
        try:
            return self._say_hello(seconds)
        except SharedPoolError:
            raise
        except OSError as error:
            raise file_limit(error, f"attach to pool {self._hello['pool']!r}") from error

    def _say_hello(self, seconds: float) -> tuple[dict[str, Any], int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            message = Message(Kind.HELLO, body={**self._hello, "brings": self._bring(ours)})
            channel, answer, descriptor = launch.greet(self._directory, message, seconds, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if answer.kind is not Kind.WELCOME or descriptor is None:
            ours.close()
            channel.close()
            raise _refusal(answer)
        try:
            if answer.body.get("register"):
                self._tell_holdings(channel)
        except BaseException:
            os.close(descriptor)
            ours.close()
            channel.close()
            raise
        channel.setblocking(False)  # who only tells the arbiter something never waits for it
        self._socket, self.events = channel, ours
        return dict(answer.body), descriptor

    def _bring(self, events: socket.socket) -> bool:
        """Put the pool's segment into the event channel: a successor may have no other way to it."""
        memory = self.memory
        if memory is None or "row" not in self._hello:
            return False
        number = memory.fd
        if number < 0:
            return False
        try:
            copy = os.dup(number)
        except OSError:
            return False
        try:
            if memory.fd != number:  # closed meanwhile by another thread: the number may be a stranger's by now
                return False
            fdpass.send(events, wire.pack(Message(Kind.SEGMENT)), copy)
        except OSError:
            return False
        finally:
            os.close(copy)
        return True

    def _tell_holdings(self, channel: socket.socket) -> None:
        """A successor learns every descriptor that this process has: no slot is free before all have told."""
        channel.settimeout(_TELL_SECONDS)
        try:
            for message, descriptor in self._holdings():
                try:
                    fdpass.send(channel, wire.pack(message), descriptor, wait=True)
                finally:
                    if descriptor is not None:
                        os.close(descriptor)
            fdpass.send(channel, wire.pack(Message(Kind.REGISTERED)), wait=True)
        except OSError as error:
            raise ArbiterLost(f"a successor could not be told what this process holds: {error}") from error

    def tell(self, message: Message) -> None:
        """Send a message that has no answer, if that needs no waiting.

        Raises:
            ArbiterLost: It could not be sent.
        """
        channel = self._socket
        if channel is None:
            raise ArbiterLost(f"there is no arbiter just now that could be told {message.kind.name}")
        try:
            fdpass.send(channel, wire.pack(message))
        except BlockingIOError as error:  # it does not read just now; the channel is whole
            raise ArbiterLost(f"the arbiter does not listen to {message.kind.name}") from error
        except OSError as error:
            raise ArbiterLost(f"the arbiter cannot be told {message.kind.name}: {error}") from error

    def deliver(self, message: Message, descriptor: int, limit: int) -> None:
        """Send a message with a descriptor; waits for a successor if the arbiter is dead, and for one that is busy.

        Args:
            message: It has no answer.
            descriptor: What goes with it.
            limit: Until when to try, monotonic ns; once it is tried in any case.

        Raises:
            ArbiterLost: It could not be sent in time.
            StartFailed: No successor could be started.
        """
        while True:
            channel = self._socket
            try:
                if channel is None:
                    with self._locked(limit):
                        channel = self._socket or self._reopen(limit)
                fdpass.send(channel, wire.pack(message), descriptor)
                return
            except BlockingIOError as error:
                if time.monotonic_ns() >= limit:
                    raise ArbiterLost(f"the arbiter does not listen to {message.kind.name}") from error
                assert channel is not None
                _await(channel, min(limit, time.monotonic_ns() + _PAUSE), select.POLLOUT)
            except (OSError, ArbiterLost) as error:
                if channel is not None and error.errno in NO_DESCRIPTOR:  # too many on the way; the channel is whole
                    raise file_limit(error, f"tell the arbiter {message.kind.name}") from error
                self._forget(channel)
                if time.monotonic_ns() >= limit:
                    raise ArbiterLost(f"the arbiter cannot be told {message.kind.name}: {error}") from error
                time.sleep(_PAUSE / 1e9)

    @contextlib.contextmanager
    def _locked(self, limit: int) -> Iterator[None]:
        """The channel for this thread alone.

        Raises:
            ArbiterLost: It stayed busy until the deadline.
        """
        self._lock_it(limit)
        try:
            yield
        finally:
            self._lock.release()

    def _lock_it(self, limit: int) -> None:
        left = (limit - time.monotonic_ns()) / 1e9
        if not self._lock.acquire(timeout=min(max(left, 0.0), 3600.0)):
            raise ArbiterLost("the channel to the arbiter stayed busy until the deadline")

    @property
    def busy(self) -> bool:
        """Whether a thread is waiting for an answer."""
        return self._lock.locked()

    def declare(self, given: dict[str, Any], *, update: bool, seconds: float = 10.0) -> list[str]:
        """Options of another handle; gives the warnings.

        Raises:
            PoolOptionsDiffer, OptionError, ArbiterLost.
        """
        with self._lock:
            channel = self._socket or self._reopen(time.monotonic_ns() + int(seconds * 1e9))
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

    def fetch(
        self, slot: int, generation: int, limit: int, meanwhile: Callable[[], object] | None = None
    ) -> tuple[int, bytes] | None:
        """The descriptor of a leased connection and its session's state, or None if the arbiter has none.

        Args:
            slot: The slot's number.
            generation: Its connection's.
            limit: Until when to wait, monotonic ns.
            meanwhile: Called once, while the arbiter looks for the answer; takes microseconds, and does not fail.

        Raises:
            ArbiterLost: It could not be asked, or did not answer in time.
        """
        self._lock_it(limit)
        try:
            while True:
                try:
                    self._request = request = self._request + 1 & 0xFFFF_FFFF
                    channel = self._socket or self._reopen(limit)
                    fdpass.send(channel, wire.pack_plainly(Kind.FETCH, request, slot, generation))
                    if meanwhile is not None:
                        first, meanwhile = meanwhile, None
                        first()
                    return self._hear(channel, request, slot, generation, limit)
                except FileLimit:
                    raise
                except (OSError, ArbiterLost) as error:
                    self._broken()
                    if time.monotonic_ns() >= limit:
                        raise ArbiterLost(f"the arbiter did not hand over a connection: {error}") from error
                except BaseException:
                    self._broken()
                    raise
                time.sleep(_PAUSE / 1e9)
        finally:
            self._lock.release()

    def _hear(
        self, channel: socket.socket, request: int, slot: int, generation: int, limit: int
    ) -> tuple[int, bytes] | None:
        """The answer to that request; those to others, which were given up, are dropped."""
        plain = wire.pack_plainly(Kind.CONNECTION, request, slot, generation)
        while True:
            lost: fdpass.NoRoom | None = None
            try:
                data, descriptor = fdpass.receive(channel, wire.LONGEST, wait=False)
            except BlockingIOError:
                _await(channel, limit)
                continue
            except fdpass.NoRoom as error:
                data, descriptor, lost = error.data, None, error
            if not data:
                raise ConnectionResetError("the arbiter closed the channel")
            try:
                if descriptor is not None and data.startswith(plain):
                    found, descriptor = (descriptor, data[wire.HEAD :]), None
                    return found
                answer = wire.unpack(data)
                if lost is not None and answer.request == request:
                    raise FileLimit(f"a connection could not be taken over: {lost}") from lost
                if (answer.request, answer.slot, answer.generation) == (request, slot, generation):
                    if descriptor is None:
                        return None
                    found, descriptor = (descriptor, wire.state_of(answer) or b""), None
                    return found
            finally:
                if descriptor is not None:  # of a request that was given up, or with an answer that is none
                    os.close(descriptor)

    def _reopen(self, limit: int) -> socket.socket:
        """Come back for the same row after the channel broke, to a successor if need be."""
        if self._left:
            raise ArbiterLost("this process has left the pool")
        left = (limit - time.monotonic_ns()) / 1e9
        _, descriptor = self._greet(min(max(0.1, left), _COME_BACK))
        os.close(descriptor)  # mapped already
        assert self._socket is not None
        return self._socket

    def somebody_answers(self) -> bool:
        """Whether an arbiter is there, without starting one."""
        with contextlib.suppress(OSError, SharedPoolError):
            channel = launch.connect(self._directory)
            if channel is not None:
                channel.close()
                return True
        return False

    def come_back(self, events: socket.socket, seconds: float = _COME_BACK) -> socket.socket:
        """The event channel `events` ended: gives the one that took its place.

        Raises:
            AttachRefused: The row is no longer this process's.
            StartFailed, ArbiterLost: No arbiter answers.
        """
        with self._lock:
            if self.events is events:
                self._broken()
                self._reopen(time.monotonic_ns() + int(seconds * 1e9))
            if self.events is None:
                raise ArbiterLost("this process has left the pool")
            return self.events

    def kill_arbiter(self) -> None:
        """End an arbiter that has stopped working, so that it can be succeeded; it loses nothing by design.

        The kernel tells who is at the other end of the channel; as long as that has not ended, it is still he.
        """
        channel = self._socket
        if channel is None:
            return
        with contextlib.suppress(OSError):
            pid, _, _ = fdpass.credentials(channel)
            process = os.pidfd_open(pid)
            try:
                poller = select.poll()
                poller.register(channel, 0)
                if not poller.poll(0):  # neither HUP nor ERR
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)

    def _forget(self, channel: socket.socket | None) -> None:
        """This one is broken; another one, which somebody has opened meanwhile, is not."""
        if channel is not None and self._socket is channel:
            self._broken()

    def _broken(self) -> None:
        channel, self._socket = self._socket, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Close both channels; the row ends with them."""
        self._left = True
        self._broken()
        events, self.events = self.events, None
        if events is not None:
            events.close()


def _await(channel: socket.socket, limit: int, what: int = select.POLLIN) -> None:
    """Wait until something can be read (or written), or until `limit`, monotonic ns.

    Raises:
        TimeoutError: Nothing came.
    """
    poller = select.poll()
    poller.register(channel, what)
    left = max(0, limit - time.monotonic_ns())
    if not poller.poll(min(3_600_000, left // 1_000_000 + 1)):
        raise TimeoutError("nothing came in time")


def _refusal(answer: Message) -> SharedPoolError:
    """The error that the arbiter named, or AttachRefused."""
    kind = getattr(errors, str(answer.body.get("error")), AttachRefused)
    if not (isinstance(kind, type) and issubclass(kind, SharedPoolError)):
        kind = AttachRefused
    text = str(answer.body.get("text") or f"the arbiter answered {answer.kind.name} to a hello")
    return AttachRefused(text, fact=str(answer.body.get("fact", ""))) if kind is AttachRefused else kind(text)
