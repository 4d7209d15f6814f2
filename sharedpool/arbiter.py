"""The arbiter's loop: channels, deaths, timers, and the calls of the registry. One thread; nothing in it blocks.

`step` does one turn and can be driven by a test; `run` does turns until the arbiter ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from . import fdpass, foreign, layout, options, processes, seat, segment, succession, view, wire
from .errors import (
    ArbiterLost,
    AttachRefused,
    PoolNotFound,
    PoolOptionsDiffer,
    SharedPoolError,
    StartFailed,
    file_limit,
)
from .genserver import PoolServer
from .layout import HEADER, INCARNATION, ROW, ROW_NONCE, ROW_SINCE
from .processes import Process
from .records import Records
from .roster import Attached, Roster
from .served import Later, options_in
from .stats import REASONS
from .succession import Kept
from .wire import Kind, Message, WireError

T = TypeVar("T")

#: Messages read from one channel before the next one's turn: a flood does not starve the others.
_BATCH: Final = 32
#: A process that lost its channel may come back for its row within this, ns, and while it is stopped (after an exec,
#: which keeps the pid, nobody comes back).
_RETURN_TIME: Final = 1_000_000_000
#: How long a successor lets newcomers wait for the processes that have a pool already, ns. Then it refuses them.
#: The last second of a worker's own patience is longer.
_COMING_BACK: Final = 800_000_000
#: Without pidfds, processes are looked at so often, ns.
_POLL_PROCESSES: Final = 100_000_000
#: Whoever started an arbiter has so long to come, seconds, however short the linger time.
_FIRST: Final = 2.0
_BEAT_EVERY: Final = 1_000_000_000
#: While its place in the runtime directory is another's, or cannot be taken, it is tried again so often, ns.
_SEAT_AGAIN: Final = 50_000_000
#: That it cannot be taken is said so often, ns.
_SEAT_SAID: Final = 60_000_000_000
#: The linger time of an arbiter that stays without clients: thirty years in s, which still fit into 64 bits of ns.
FOR_EVER: Final = 1e9
_DRAIN_SECONDS: Final = 90.0
#: Without a descriptor left, nobody is accepted for so long, ns, instead of trying without end.
_ACCEPT_AGAIN: Final = 100_000_000
#: That nobody can be accepted is said so often, ns.
_SAY_EVERY: Final = 1_000_000_000
_LONG: Final = select.EPOLLRDHUP | select.EPOLLET
_UNKNOWN: Final = Process(0, 0)
#: What a handler gives after which there is nothing else to do in a turn.
_ANSWERED: Final = object()

log = logging.getLogger("sharedpool.arbiter")


@dataclasses.dataclass(slots=True, eq=False)
class Client:
    """One channel: a worker of one pool, or somebody who only holds the arbiter or asks for the key.

    Without a channel from the beginning: a process to whose life a pool is linked.
    """

    channel: socket.socket | None
    pid: int
    events: socket.socket | None = None
    pool: PoolServer | None = None
    linked: PoolServer | None = None
    row: int = 0
    nonce: int = 0
    pidfd: int = -1
    process: Process = _UNKNOWN
    orphaned: int = 0
    attached: int = 0
    expected: bool = False


class Arbiter:
    """Serves the pools of one scope.

    Args:
        listener: A listening SOCK_SEQPACKET socket, or None in tests.
        authkey: What the registry's callers are told.
        linger: Seconds without any client after which it wants to end.
        clock: Gives the time in monotonic ns.
        scope: What tells this scope's segments from those of others.
        seat: Its place in the runtime directory; None in tests.
    """

    def __init__(
        self,
        listener: socket.socket | None,
        authkey: bytes,
        linger: float,
        clock: Callable[[], int] = time.monotonic_ns,
        scope: str = "",
        seat: seat.Seat | None = None,
    ) -> None:
        self.listener: socket.socket | None = None
        self._clock = clock
        self.pools: dict[str, PoolServer] = {}
        self._kept: dict[str, Kept] = {}
        self._seat = seat
        self._roster = None if seat is None else Roster(seat.fd, succession.place(), self._all_attached)
        self._seat_at = 0
        self._seat_said = -_SEAT_SAID
        self.incarnation = 1
        self._authkey = authkey
        self._scope = scope
        self._unanswered: dict[Client, tuple[int, int, int]] = {}
        self._hellos: list[tuple[Client, Message, socket.socket]] = []
        self._linger = linger
        self._epoll = select.epoll()
        self._clients: set[Client] = set()
        self._by_fd: dict[int, Callable[[int], object]] = {}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._quiet_since = self._seconds() + _FIRST
        self._ending_at: float | None = None
        self._now_ending = False
        self.records = Records()
        self._attached = 0
        self._due = 0
        self._stirred = True
        self._accept_at = 0
        self._accept_said = -_SAY_EVERY
        self._spare = os.dup(self._bell)
        self._watch(self._bell, select.EPOLLIN, self._ring)
        if listener is not None:
            self.listen(listener)

    def _seconds(self) -> float:
        return self._clock() / 1e9

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do turns until the arbiter should end: nobody needs it, or it was asked to."""
        wait = 0.0
        while not self.over:
            wait = self.step(wait)

    def step(self, longest: float = 0.0) -> float:
        """Wait for at most so many seconds, do what is to be done; gives how long the next wait may be."""
        due_now = [(fd, events, self._by_fd.get(fd)) for fd, events in self._epoll.poll(longest)]
        self._stirred = not due_now
        for fd, events, handler in due_now:
            if handler is not None and self._by_fd.get(fd) is handler:  # else an earlier one of the batch closed it
                if self._guarded(handler, events) is not _ANSWERED:
                    self._stirred = True
        while self._calls:
            self._stirred = True
            self._answer(*self._calls.popleft())
        now = self._clock()
        if not self._stirred and now < self._due:  # as if nobody had asked: he may wait for this very processor
            return (self._due - now) / 1e9
        due = now + _BEAT_EVERY
        for pool in list(self.pools.values()):
            due = min(due, self._turn_of(pool, now))
        due = min(due, self._look_after_processes(now))
        if self._unanswered or self._hellos:
            self._answer_the_rest()
            due = min(due, now + 2_000_000)
        if self._accept_at:
            due = min(due, self._accept_again(now))
        self._ship_records()
        if not self._clients:
            due = min(due, int((self._quiet_since + self._linger) * 1e9))
        due = min(due, self._look_after_files(now))
        for name in [name for name, pool in self.pools.items() if pool.stopped and pool.empty and not self._rows(pool)]:
            self.pools.pop(name).segment.let_go()
        self._due = due
        return max(0.0, (due - self._clock()) / 1e9)

    def _answer_the_rest(self) -> None:
        """What could not be answered when it came: an heir did not know yet, or a pool's mutex was busy."""
        unanswered, self._unanswered = self._unanswered, {}
        for client, asked in unanswered.items():
            if client.pool is not None:
                self._within(client, functools.partial(self._fetch, client, client.pool, *asked))
        hellos, self._hellos = self._hellos, []
        for client, message, events in hellos:
            if client.channel is None or client.pool is not None:  # it has not waited for so long, or asks twice
                foreign.close_socket(events)
            else:
                self._within(client, functools.partial(self._hello, client, message, events))

    def _turn_of(self, pool: PoolServer, now: int) -> int:
        """One pool's turn; whatever is wrong with one pool, the others go on."""
        try:
            return pool.turn(now)
        except Exception:
            log.exception("pool %r: the arbiter goes on after an error", pool.name)
            return now + _BEAT_EVERY

    def _guarded(self, handler: Callable[[int], object], events: int) -> object:
        """One client's misbehaviour, or one busy mutex, must not end the loop. Gives what the handler gives."""
        try:
            return handler(events)
        except Later:
            pass  # found again by the pool's next turn
        except Exception:
            log.exception("the arbiter goes on after an error")
        return None

    @property
    def over(self) -> bool:
        """Whether it is time to end: asked to, or nobody was there for the linger time."""
        if self._now_ending:
            return True
        if self._clients:
            self._quiet_since = self._seconds()
            return self._ending_at is not None and self._seconds() > self._ending_at
        return self._ending_at is not None or self._seconds() - self._quiet_since >= self._linger

    def end(self, *, at_once: bool = False) -> None:
        """End once no client is left, after 90 s at the latest; or at once."""
        if at_once or self._ending_at is not None:
            self._now_ending = True
        self._ending_at = self._seconds() + _DRAIN_SECONDS
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Let go of everything; for tests, an arbiter's process just ends."""
        for pool in self.pools.values():
            for index in list(pool.held):
                pool.forget(index)
            pool.segment.let_go()
        for _, _, events in self._hellos:
            foreign.close_socket(events)
        self._epoll.close()
        os.close(self._bell)
        if self._spare >= 0:
            os.close(self._spare)

    def stay(self) -> None:
        """The end was called off: somebody came."""
        self._quiet_since = self._seconds()

    def call(self, function: Callable[[], T], seconds: float = 10.0) -> T:
        """Run a function in the loop, from another thread, and give its result or raise its error."""
        future: Future[T] = Future()
        self._calls.append((function, future))
        os.eventfd_write(self._bell, 1)
        return future.result(seconds)

    def _answer(self, function: Callable[[], Any], future: Future[Any]) -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            future.set_exception(error)
        else:
            future.set_result(result)

    def _ring(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _watch(self, fd: int, events: int, handler: Callable[[int], object]) -> None:
        self._by_fd[fd] = handler
        self._epoll.register(fd, events)

    def _unwatch(self, fd: int) -> None:
        if self._by_fd.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    # --- its place ----------------------------------------------------------------------------------------------------

    def listen(self, listener: socket.socket) -> None:
        """Let workers come here, and no longer where they came before."""
        self.stop_listening()
        self.listener = listener
        listener.setblocking(False)
        if not self._accept_at:
            self._watch(listener.fileno(), select.EPOLLIN, self._accept)

    def stop_listening(self) -> None:
        """Let nobody come any more."""
        if self.listener is not None:
            self._unwatch(self.listener.fileno())
            seat.refuse_callers(self.listener)
            self.listener = None

    def _look_after_files(self, now: int) -> int:
        """See to what belongs into the runtime directory; gives when to look again."""
        if self._roster is None:
            return now + _BEAT_EVERY
        if now >= self._seat_at:
            self._seat_at = now + (_BEAT_EVERY if self._keeps_its_seat() else _SEAT_AGAIN)
            self._roster.keep()
        return self._seat_at

    def _keeps_its_seat(self) -> bool:
        """Whether newcomers find this arbiter. If its files were taken away, it makes them anew.

        Somebody else's arbiter may be there instead by then. If it has seen this one's pools, it makes room. There is
        nothing to see of an arbiter without pools, so this one ends.
        """
        if self._seat is None or self._seat.is_whole():
            return True
        if self._seat.is_gone() and not self._clients and self._linger < FOR_EVER:
            self._now_ending = True  # nobody needs it
            return False
        try:
            done, why = self._seat.take_again(), "another arbiter serves there"
        except (OSError, StartFailed) as error:
            done, why = False, str(error)
        else:
            self._now_ending = self._now_ending or not (done or self.pools or self._kept)
        if done:
            log.warning("files in %s were removed, and are made anew", self._seat.directory)
            if self._roster is not None:
                self._roster.write()
        elif self._clock() >= self._seat_said + _SEAT_SAID:
            self._seat_said = self._clock()
            log.error("files in %s were removed, and no process can come there: %s", self._seat.directory, why)
        return done

    # --- channels -----------------------------------------------------------------------------------------------------

    def _accept(self, events: int) -> None:
        assert self.listener is not None
        for _ in range(_BATCH):
            try:
                channel, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if self._spare < 0:
                    self._stop_accepting(error)
                    return
                os.close(self._spare)  # so that whoever comes is told why he is refused
                self._spare = -1
                continue
            pid, uid, _ = fdpass.credentials(channel)
            if uid != os.geteuid():
                foreign.end_channel(channel)
                continue
            channel.setblocking(False)
            client = Client(channel, pid)
            self._clients.add(client)
            self._watch(channel.fileno(), select.EPOLLIN, functools.partial(self._readable, client))

    def _stop_accepting(self, error: OSError) -> None:
        """The limit of open files: who wants to come waits, in the listener's queue, until there is room."""
        assert self.listener is not None
        now = self._clock()
        self._unwatch(self.listener.fileno())
        self._accept_at = now + _ACCEPT_AGAIN
        if now >= self._accept_said + _SAY_EVERY:
            self._accept_said = now
            log.error("%s", file_limit(error, "accept a connection", "the arbiter"))

    def _accept_again(self, now: int) -> int:
        """Try again when it is time; gives when that is."""
        if now < self._accept_at:
            return self._accept_at
        self._accept_at = 0
        if self._spare < 0:
            with contextlib.suppress(OSError):
                self._spare = os.dup(self._bell)
        if self.listener is not None and self.listener.fileno() >= 0:
            self._watch(self.listener.fileno(), select.EPOLLIN, self._accept)
        return now

    def _readable(self, client: Client, events: int) -> object:
        return self._read(client, short=True)

    def _read(self, client: Client, *, short: bool = False) -> object:
        """Read and carry out what a client sent.

        Args:
            client: Whose channel to read.
            short: Whether to come back at once after the answer to a FETCH, for which somebody waits.

        Returns:
            _ANSWERED if it did, and the pool has taken no notice.
        """
        for number in range(_BATCH):
            if client.channel is None:
                return None
            try:
                data, descriptor = fdpass.receive(client.channel, wire.LONGEST, wait=False)
            except BlockingIOError:
                return None
            except fdpass.NoRoom as error:
                if not self._within(client, functools.partial(self._unreceived, client, error)):
                    return None
                continue
            except OSError as error:
                log.warning("process %d: %s", client.pid, str(error))
                self._lost(client)
                return None
            if not data:
                if descriptor is not None:
                    foreign.close(descriptor)
                self._lost(client)
                return None
            if short and not number and descriptor is None and client.pool is not None:
                asked = wire.unpack_plainly(data)
                if asked is not None:
                    act = functools.partial(self._fetch, client, client.pool, *asked, plain=True)
                    return _ANSWERED if self._within(client, act) else None
            if not self._within(client, functools.partial(self._carry_out, client, data, descriptor)):
                return None
        return None

    def _within(self, client: Client, act: Callable[[], None]) -> bool:
        """Do what a client asks for; whatever is wrong with it costs this client its channel, and nobody else."""
        try:
            act()
        except Later:
            pass  # found again by the pool's next turn
        except WireError as error:
            log.warning("process %d sent %s", client.pid, str(error))  # not its traceback, which has the pool
            self._lost(client)
            return False
        except Exception:
            log.exception("process %d: the arbiter goes on after an error, without it", client.pid)
            self._lost(client)
            return False
        return True

    def _unreceived(self, client: Client, error: fdpass.NoRoom) -> None:
        """A message whose descriptor did not come: no room is left for it here."""
        message = wire.unpack(error.data)
        now = self._clock()
        if now >= self._accept_said + _SAY_EVERY:
            self._accept_said = now
            log.error("process %d sent a %s: %s", client.pid, message.kind.name, error)
        if client.pool is None:
            refusal = file_limit(OSError(errno.EMFILE, str(error)), "attach another process", "the arbiter")
            self._reply(client, _refusal(message, refusal))
            self._lost(client)
        elif message.kind in (Kind.REGISTER, Kind.HOLDS):
            client.pool.unheld(client.row, message.slot, message.generation, now)

    def _carry_out(self, client: Client, data: bytes, descriptor: int | None) -> None:
        """One message; its descriptor, if any, is wrapped and closed again unless somebody keeps it."""
        sock = None if descriptor is None else _socket_of(descriptor)
        try:
            message = wire.unpack(data)
        except WireError:
            if sock is not None:
                foreign.close_socket(sock)
            raise
        kind = message.kind
        if sock is not None and kind is Kind.HELLO and client.pool is None:
            self._hello(client, message, sock)
        elif sock is not None and kind is Kind.REGISTER and client.pool is not None:
            driver, state = wire.driver_of(message), wire.state_of(message)
            client.pool.register(client.row, message.slot, message.generation, sock, driver, state)
        elif sock is not None and kind is Kind.HOLDS and client.pool is not None:
            driver, state = wire.driver_of(message), wire.state_of(message)
            if message.body.get("beside"):
                client.pool.stands_for(message.slot, message.generation, sock, driver, state)
            else:
                client.pool.holds(client.row, message.slot, message.generation, sock, driver, state)
        elif sock is not None:
            foreign.close_socket(sock)
            raise WireError(f"a descriptor with a {kind.name}")
        elif kind in (Kind.CALLER, Kind.HOLD) and client.pool is None:
            self._answer_caller(client, message)
        elif client.pool is None:
            raise WireError(f"a {kind.name} before its hello")
        else:
            self._for_pool(client, client.pool, message)

    def _answer_caller(self, client: Client, message: Message) -> None:
        """Somebody who attaches to no pool: it asks for the registry's key, or wants the arbiter to stay.

        On an attached channel nobody gets the key: its process may have changed its user since it connected.
        """
        try:
            _check_peer(client, message)
        except AttachRefused as error:
            self._reply(client, _refusal(message, error))
            self._lost(client)
        else:
            key = Message(Kind.KEY, message.request, body={"key": self._authkey.hex()})
            self._reply(client, key if message.kind is Kind.CALLER else Message(Kind.OK, message.request))

    def _for_pool(self, client: Client, pool: PoolServer, message: Message) -> None:
        """What an attached worker says of its pool."""
        kind = message.kind
        if kind is Kind.FETCH:
            self._fetch(client, pool, message.request, message.slot, message.generation)
        elif kind is Kind.DECLARE:
            self._declare(client, pool, message)
        elif kind is Kind.KEY_NAME:
            pool.name_key(message.generation, message.body.get("name"))
        elif kind is Kind.CLOSE:
            pool.begin_closing(message.slot, self._clock())
        elif kind is Kind.FORGET:
            pool.forget(message.slot, message.generation)
        elif kind is Kind.DETACH:
            self._gone(client)
        elif kind is Kind.WATCH:
            pool.look_for_grants()
        elif kind is Kind.REGISTERED:
            pool.registered(client.row, self._clock())
        else:
            raise WireError(f"a {kind.name} that does not belong here")

    def _reply(self, client: Client, message: Message, descriptor: int | None = None) -> None:
        """Answer; a client that does not read its answers loses its channel."""
        self._send_answer(client, wire.pack(message), descriptor)

    def _send_answer(self, client: Client, data: bytes, descriptor: int | None) -> None:
        if client.channel is None:
            return
        try:
            fdpass.send(client.channel, data, descriptor)
        except OSError:
            self._lost(client)

    def _fetch(
        self, client: Client, pool: PoolServer, request: int, slot: int, generation: int, *, plain: bool = False
    ) -> None:
        found = pool.fetch(client.row, slot, generation)
        if found is not None and plain:
            data = wire.pack_plainly(Kind.CONNECTION, request, slot, generation, found.state or b"")
            self._send_answer(client, data, found.sock.fileno())
        elif found is not None:
            body = wire.with_state(found.driver, found.state)
            answer = Message(Kind.CONNECTION, request, slot, generation, body)
            self._reply(client, answer, found.sock.fileno())
        elif pool.expected:  # whoever holds it has not said so yet
            self._stirred = True
            self._unanswered[client] = request, slot, generation  # a worker asks one thing at a time
        else:
            self._reply(client, Message(Kind.GONE, request, slot, generation))

    # --- attaching ----------------------------------------------------------------------------------------------------

    def _hello(self, client: Client, message: Message, events: socket.socket) -> None:
        """A worker attaches to a pool, or comes back for its row after its channel broke."""
        try:
            if events.family != socket.AF_UNIX or events.type != socket.SOCK_SEQPACKET:
                raise WireError("a HELLO with a socket that is no event channel")
            _check_peer(client, message)
            if message.body.get("row"):
                self._take_what_is_brought(client, message.body, events)
                body = self._return_to_row(client, message.body)
            else:
                body = self._attach(client, message)
        except Later:
            self._hellos.append((client, message, events))
            return
        except BaseException as error:
            foreign.close_socket(events)
            if isinstance(error, WireError) or not isinstance(error, SharedPoolError):
                raise
            self._reply(client, _refusal(message, error))
            return
        client.events = events
        events.setblocking(False)
        assert client.pool is not None
        self._reply(client, Message(Kind.WELCOME, message.request, body=body), client.pool.segment.fd)

    def _attach(self, client: Client, message: Message) -> dict[str, Any]:
        body = message.body
        name, version = options.check_pool_name(body.get("pool")), layout_of(body)
        self._check_layout(name, version, client.pid)
        self.check_kept(name, client.pid)
        pool, warnings = self.declare(
            name, _part(message, "options"), client.pid, defaults=_part(message, "defaults"),
            update=bool(body.get("update", True)), implicit=not body.get("declares"), attaching=True,
        )  # fmt: skip
        nonce = secrets.randbits(63) | 1
        row = pool.claim_row(client.pid, nonce, self._clock())
        if row is None:
            raise AttachRefused(f"pool {pool.name!r} has no row left: too many processes are attached")
        pool.layouts[row] = version
        self._attached += 1
        self._leave_behind(pool, client.pid)
        client.pool, client.row, client.nonce, client.attached = pool, row, nonce, self._attached
        client.process = processes.find(client.pid)
        try:
            self._watch_process(client)
            self._write_down(client, pool)
        except BaseException:
            self._end_row(client)
            client.pool = None
            raise
        return {
            "row": row,
            "nonce": nonce,
            "arbiter_pid": os.getpid(),
            "options": pool.options.as_dict(),
            "processes": len(self._rows(pool)),
            "warnings": warnings,
        }

    def _write_down(self, client: Client, pool: PoolServer) -> None:
        """Into the roster, before the process has the segment.

        Raises:
            AttachRefused: That cannot be written, and an heir would not see by itself that the process has it.
        """
        if self._roster is None or self._roster.note(_attached(client, pool)):
            return
        log.warning("process %d could not be written into the roster of %r", client.pid, pool.name)
        if succession.has(client.process, self._scope, pool.name) is None:
            raise AttachRefused(
                f"process {client.pid} cannot be written down in the runtime directory (is its file system full?), and"
                " /proc does not show what the process has open: an arbiter's successor would not know of it"
            )

    def _all_attached(self) -> list[Attached]:
        """Who has which pool, in the order in which they attached."""
        kept = [Attached(name, kept.memory, each) for name, kept in self._kept.items() for each in kept.processes]
        clients = sorted((client for client in self._clients if client.pool), key=lambda client: client.attached)
        return kept + [_attached(client, client.pool) for client in clients if client.pool]

    def is_hidden_from_an_heir(self) -> bool:
        """Whether a living process has a pool of which an heir must know, and /proc does not show it.

        Of a stopped pool that is what is still leased.
        """
        unneeded = {name for name, pool in self.pools.items() if pool.stopped and not pool.lends}
        having = [each for each in self._all_attached() if each.pool not in unneeded]
        return any(succession.has(each.process, self._scope, each.pool, each.memory) is None for each in having)

    def _take_what_is_brought(self, client: Client, body: Mapping[str, Any], events: socket.socket) -> None:
        """A process that comes back for its row brings the segment, in the event channel that came with the message.

        Raises:
            AttachRefused: It is not what it should be.
        """
        if not body.get("brings"):
            return
        try:
            _, descriptor = fdpass.receive(events, wire.LONGEST, wait=False)
        except OSError:  # it could not be sent, or does not fit into our limit of open files
            return
        if descriptor is None:
            return
        name = str(body.get("pool"))
        if name in self.pools:
            foreign.close(descriptor)
            return
        kept = self._kept.get(name)
        if kept is not None and not kept.memory:
            foreign.close(descriptor)
            raise AttachRefused(f"pool {name!r} is not taken over: {kept.why}", fact=kept.fact)
        try:
            memory = kept.memory if kept is not None else ""
            row, nonce = body.get("row"), body.get("nonce")
            taken = succession.brought(descriptor, self._scope, name, memory, row, client.pid, nonce)
        except AttachRefused as error:
            if error.fact != "row":  # it is the pool, and can never be taken over
                others = kept.processes if kept is not None else []
                self.keep(name, Kept(str(error), error.fact, "", [processes.find(client.pid), *others]))
            raise
        if not taken.claim():
            taken.let_go()
            raise AttachRefused(f"pool {name!r} of process {client.pid} is another arbiter's, which lives", fact="row")
        self.inherit(name, taken)

    def _leave_behind(self, pool: PoolServer, pid: int) -> None:
        """Rows of which this process will tell no heir: it left while nobody was there to be told, or was exec'd."""
        for other in self._rows(pool):
            if other.expected and other.pid == pid:
                other.orphaned = other.orphaned or self._clock()

    def _check_layout(self, name: str, version: int, pid: int) -> None:
        """Refuse a process of an older version that does not know the pool's layout."""
        pool = self.pools.get(name)
        ours = layout.LAYOUT if pool is None else pool.segment.layout
        if version < ours:
            raise AttachRefused(
                f"process {pid} has layout {version}, pool {name!r} has {ours}: restart the processes that run the"
                " older version of sharedpool", fact="layout", theirs=version, ours=ours,
            )  # fmt: skip

    def _declare(self, client: Client, pool: PoolServer, message: Message) -> None:
        """Another handle of an attached process has options of its own."""
        try:
            _, warnings = self.declare(
                pool.name, _part(message, "options"), client.pid,
                update=bool(message.body.get("update")), attaching=True,
            )  # fmt: skip
            answer = Message(Kind.OK, message.request, body={"warnings": warnings})
        except Later:
            busy = SharedPoolError(f"pool {pool.name!r}: its mutex stays busy: is its holder stopped?")
            answer = _refusal(message, busy)
        except WireError:
            raise
        except SharedPoolError as error:
            answer = _refusal(message, error)
        self._reply(client, answer)

    def _return_to_row(self, client: Client, body: Any) -> dict[str, Any]:
        for other in self._clients:
            if other is not client and other.pool is not None and other.pool.name == body.get("pool"):
                if (other.row, other.nonce, other.pid) == (body["row"], body.get("nonce"), client.pid):
                    break
        else:
            kept = self._kept.get(str(body.get("pool")))
            if kept is not None and kept.memory:
                raise ArbiterLost(f"pool {body['pool']!r} is waited for, and process {client.pid} did not bring it")
            text = f"row {body['row']} of pool {body.get('pool')!r} is no longer this process's"
            raise AttachRefused(text, fact="row")
        self._drop_channel(other)
        other.pool.layouts[other.row] = layout_of(body)
        client.pool, client.row, client.nonce, client.pidfd, client.process, client.attached = (
            other.pool, other.row, other.nonce, other.pidfd, other.process, other.attached,
        )  # fmt: skip
        if client.pidfd >= 0:
            self._by_fd[client.pidfd] = lambda events: self._died(client)
        self._clients.discard(other)
        assert client.pool is not None
        self._leave_behind(client.pool, client.pid)
        return {
            "row": client.row, "nonce": client.nonce, "arbiter_pid": os.getpid(), "options": {}, "warnings": [],
            "register": client.row in client.pool.expected,
        }  # fmt: skip

    def declare(
        self, name: str, given: dict[str, Any], pid: int, *,
        defaults: Mapping[str, Any] | None = None, update: bool = True, implicit: bool = False,
        attaching: bool = False,
    ) -> tuple[PoolServer, list[str]]:  # fmt: skip
        """Find a pool, make it, or apply what differs; gives it and the warnings for whoever declared.

        What workers declare when they attach is the configuration: a worker that repeats it, after a recycling say,
        does not undo what an operator has set meanwhile.

        Args:
            name: The pool's name.
            given: The options that were set by somebody, validated again here.
            pid: Who declares.
            defaults: What else a pool is made with that is not there; one that is there keeps what it has.
            update: False: differing options raise instead of being applied.
            implicit: True: no options were given on purpose, so only the pool "default" is made.
            attaching: True: compare with what was declared before, not with what is in force.

        Raises:
            AttachRefused, PoolNotFound, PoolOptionsDiffer, OptionError, StartFailed.
        """
        values = {option: options.check(option, value, f"process {pid}") for option, value in given.items()}
        self.check_kept(name)
        pool = self.pools.get(name)
        if pool is None or pool.stopped:
            for option, value in (defaults or {}).items():
                values.setdefault(option, options.check(option, value, f"the configuration of process {pid}"))
            if implicit and not values and name != "default":
                raise PoolNotFound(
                    f"nobody declared a pool {name!r} here; give options, as in attach({name!r}, max_connections=20);"
                    f" pools here: {', '.join(sorted(self.names())) or 'none'}"
                )
            return self._make(pool, name, options.make(values), pid), []
        return pool, self._change(pool, values, pid, update, attaching)

    def keep(self, name: str, kept: Kept) -> None:
        """No pool of this name before it comes back, or before the processes that have it have ended."""
        if kept.memory:
            kept.until = self._clock() + _COMING_BACK
        self._kept[name] = kept
        pids = ", ".join(str(process.pid) for process in kept.processes)
        log.log(
            logging.INFO if kept.memory else logging.ERROR, "pool %r is kept for the processes %s: %s", name, pids,
            kept.why,
        )  # fmt: skip

    def check_kept(self, name: str, newcomer: int = 0) -> None:
        """Nobody gets a pool that others have, and that this arbiter does not have.

        Args:
            name: The pool's name.
            newcomer: The process that wants to attach. If the pool is waited for, this process has left it.

        Raises:
            Later: They may still come back.
            AttachRefused: They have not.
        """
        kept = self._kept.get(name)
        if kept is None:
            return
        late = self._clock() >= kept.until
        left = newcomer if late and kept.memory else 0
        kept.processes = [
            process for process in kept.processes
            if process.pid != left
            and succession.has(process, self._scope, name, kept.memory) is not False
        ]  # fmt: skip
        if not kept.processes:
            del self._kept[name]
            return
        if not late:
            raise Later
        pids = ", ".join(str(process.pid) for process in kept.processes)
        raise AttachRefused(
            f"pool {name!r} is in use by the processes {pids}, and there is no second one: {kept.why}", fact=kept.fact
        )

    def _make(self, pool: PoolServer | None, name: str, wanted: options.PoolOptions, pid: int) -> PoolServer:
        if pool is not None and all(getattr(pool.options, fixed) == getattr(wanted, fixed) for fixed in options.FIXED):
            pool.init(wanted, pid)
            return pool
        if pool is not None:
            raise PoolOptionsDiffer(
                f"pool {name!r} was stopped and still has connections; until they have gone, these stay:"
                f" {', '.join(sorted(options.FIXED))}"
            )
        if not self._keeps_its_seat():
            raise Later  # the same name may be declared to the arbiter that is there instead
        pool = self._serve(name, wanted, pid)
        pool.words[INCARNATION] = self.incarnation
        if pool.segment.claim() and self._keeps_its_seat():  # another one looks after it has come, so it sees the claim
            return pool
        self.pools.pop(name).segment.let_go()
        raise Later

    def _serve(self, name: str, wanted: options.PoolOptions, pid: int, **more: Any) -> PoolServer:
        pool = self.pools[name] = PoolServer(
            name, wanted, pid, publish=self._publish, watch=self._watch_remote, unwatch=self._unwatch_remote,
            tell_closed=self._tell_closed, tell=self._tell, drain=self._drain_pool, clock=self._clock,
            scope=self._scope, **more,
        )  # fmt: skip
        return pool

    def inherit(self, name: str, inherited: segment.Segment, noted: Iterable[Attached] = ()) -> None:
        """Go on with the pool of an arbiter that was killed: its limits, counters and queue are in its table.

        Its workers come back by themselves, and tell what they hold.

        Args:
            name: The pool's name.
            inherited: Its segment.
            noted: Who had which pool.
        """
        w, geometry = inherited.words, inherited.geometry
        pool = self._serve(name, options_in(w), 0, inherited=inherited)
        self.incarnation = max(self.incarnation, w[INCARNATION] + 1)
        w[INCARNATION] = self.incarnation
        kept = self._kept.pop(name, None)
        known = {process.pid: process for process in kept.processes} if kept else {}
        known |= {each.process.pid: each.process for each in noted if each.pool == name}
        for row in view.live_rows(w, geometry):
            at, pid = HEADER + ROW * row, view.row_pid(w, row)
            process = known.get(pid) or self._as_old_as(processes.find(pid), w[at + ROW_SINCE])
            client = Client(None, pid, pool=pool, row=row, nonce=w[at + ROW_NONCE], expected=True, process=process)
            pool.expected.add(row)
            self._clients.add(client)
            self._watch_process(client)
        pool.registered(0, self._clock())
        if self._roster is not None and not self._roster.write():
            log.error("the roster of the processes that have pools cannot be written: is the file system full?")

    def _as_old_as(self, process: Process, since: int) -> Process:
        """The process, unless it has certainly started after that time; then one that has ended."""
        since_boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return Process(process.pid, -1) if process.is_younger_than(since, self._clock(), since_boot) else process

    def _change(self, pool: PoolServer, values: dict[str, Any], pid: int, update: bool, attaching: bool) -> list[str]:
        """Apply options that differ; gives a warning for each."""
        old = pool.options.as_dict()
        differing = options.differing(pool.declared if attaching else old, values)
        if not differing:
            return []
        texts = [
            f"{name}: {old.get(name)!r} (by process {pool.declared_by}) -> {value!r}"
            for name, value in differing.items()
        ]
        refused = sorted(set(differing) & options.FIXED) if update else sorted(differing)
        if refused:
            why = "cannot change while it runs" if update else "differ, and update=False"
            raise PoolOptionsDiffer(f"pool {pool.name!r}: {', '.join(refused)} {why}: {'; '.join(texts)}")
        pool.apply(dataclasses.replace(pool.options, **differing))
        pool.note_declared(differing)
        pool.declared_by = pid
        return [f"pool {pool.name!r}: option {text} (by process {pid})" for text in texts]

    def link(self, pool: PoolServer, pid: int) -> None:
        """Stop the pool when that process dies; while it lives the arbiter stays."""
        client = Client(None, pid, linked=pool)
        self._clients.add(client)
        try:
            self._watch_process(client)
        except BaseException:
            self._clients.discard(client)
            raise

    def stop_pool(self, pool: PoolServer) -> None:
        """Stop a pool, to whomever it was linked."""
        pool.stop()
        for client in [client for client in self._clients if client.linked is pool]:
            client.linked = None
            self._gone(client)

    def terminate(self, reason: str) -> None:
        """The arbiter ends: every pool says its last."""
        for pool in self.pools.values():
            pool.terminate(reason)

    def names(self) -> list[str]:
        """The pools that are not stopped."""
        return [name for name, pool in self.pools.items() if not pool.stopped]

    # --- processes ----------------------------------------------------------------------------------------------------

    def _rows(self, pool: PoolServer) -> list[Client]:
        return [client for client in self._clients if client.pool is pool]

    def _watch_process(self, client: Client) -> None:
        if not client.process.pid:
            client.process = processes.find(client.pid)
        try:
            client.pidfd = os.pidfd_open(client.pid)
        except ProcessLookupError:
            self._died(client)
            return
        except OverflowError:  # a damaged row of an arbiter that was killed: no such process
            self._died(client)
            return
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS):
                raise file_limit(error, f"watch process {client.pid}", "the arbiter") from error
            return  # an old sandbox without pidfds: looked at again and again
        self._watch(client.pidfd, select.EPOLLIN, lambda events: self._died(client))

    def _died(self, client: Client) -> None:
        """A worker is dead. What it sent before is read first: a registration may be among it."""
        while client.channel is not None and _readable(client.channel):
            self._read(client)
        self._gone(client)

    def _lost(self, client: Client) -> None:
        """A channel ended; the process may live, and come back for its row."""
        self._stirred = True
        self._drop_channel(client)
        if client.pool is None:
            self._clients.discard(client)
        else:
            client.orphaned = self._clock()

    def _drop_channel(self, client: Client) -> None:
        if client.channel is not None:
            self._unwatch(client.channel.fileno())
            foreign.end_channel(client.channel)
            client.channel = None
        if client.events is not None:
            foreign.end_channel(client.events)
            client.events = None

    def _gone(self, client: Client) -> None:
        """A worker's row ends; or the pool does that was linked to a process."""
        if client.linked is not None:
            client.orphaned = max(1, self._clock() - _RETURN_TIME)  # should it be too busy: again at the next turn
            client.linked.stop()
        self._drop_channel(client)
        self._clients.discard(client)
        self._end_row(client)

    def _end_row(self, client: Client) -> None:
        if client.pidfd >= 0:
            self._unwatch(client.pidfd)
            os.close(client.pidfd)
            client.pidfd = -1
        if client.pool is not None and client.row:
            row, client.row = client.row, 0
            client.pool.handle_info(("DOWN", row))

    def _look_after_processes(self, now: int) -> int:
        due = now + _BEAT_EVERY
        for client in list(self._clients):
            if client.orphaned:
                if now - client.orphaned >= _RETURN_TIME:
                    if processes.is_stopped(client.pid):
                        client.orphaned = now
                    else:
                        self._guarded(functools.partial(self._ended, client), 0)
                due = min(due, client.orphaned + _RETURN_TIME)
            elif client.expected:
                if client.pool is not None and not self._may_come_back(client, client.pool):
                    self._guarded(functools.partial(self._ended, client), 0)
            elif client.pidfd < 0 and client.process.pid:
                due = min(due, now + _POLL_PROCESSES)
                if not client.process.lives():
                    self._guarded(functools.partial(self._died_at, client), 0)
        return due

    def _may_come_back(self, client: Client, pool: PoolServer) -> bool:
        """Whether a row's process has not executed another program, and is no stranger who was given its pid."""
        return succession.has(client.process, self._scope, pool.name) is not False

    def _ended(self, client: Client, events: int) -> None:
        self._gone(client)

    def _died_at(self, client: Client, events: int) -> None:
        self._died(client)

    # --- what the pools ask for ---------------------------------------------------------------------------------------

    def _watch_remote(self, pool: PoolServer, index: int, sock: socket.socket) -> None:
        def ended(events: int) -> None:
            if events & select.EPOLLRDHUP:
                pool.handle_info(("remote_ended", index))

        self._watch(sock.fileno(), _LONG, ended)

    def _unwatch_remote(self, sock: socket.socket) -> None:
        self._unwatch(sock.fileno())

    def _tell_closed(self, pool: PoolServer, rows: Iterable[int], slot: int, generation: int, reason: str) -> None:
        number = REASONS.index(reason) + 1 if reason in REASONS else 0
        data = wire.pack(Message(Kind.CLOSED, number, slot, generation))
        for client in self._rows(pool):
            if client.row in rows and client.events is not None:
                with contextlib.suppress(OSError):  # full or gone: it finds out by itself
                    fdpass.send(client.events, data)

    def _tell(self, pool: PoolServer, rows: Iterable[int] | None, message: Message) -> set[int]:
        """Send an event to the processes of these rows, or to all; gives who got it: not who does not read them."""
        data = wire.pack(message)
        clients = [client for client in self._rows(pool) if rows is None or client.row in rows]
        return {client.pid for client in clients if self._send_event(client, data)}

    def _publish(self, pool: PoolServer, message: Message) -> int:
        return len(self._tell(pool, None, message))

    def _ship_records(self) -> None:
        """What was logged here goes to the logging of one worker: of the pool that it is about, else of any."""
        for record in self.records.take():
            data = wire.pack(Message(Kind.LOG, body=dataclasses.asdict(record)))
            if not any(self._send_event(client, data) for client in self._readers(record.pool)):
                self.records.keep(record)

    def _readers(self, pool: str | None) -> list[Client]:
        """The workers that could log a record, the longest attached first."""
        workers = (client for client in self._clients if client.events is not None and client.pool is not None)
        found = [client for client in workers if pool is None or (client.pool and client.pool.name == pool)]
        return sorted(found, key=lambda client: client.attached)

    def _send_event(self, client: Client, data: bytes) -> bool:
        if client.events is None:
            return False
        try:
            fdpass.send(client.events, data)
        except OSError:
            return False
        return True

    def _drain_pool(self, pool: PoolServer) -> None:
        self._stirred = True
        for client in self._rows(pool):
            self._read(client)


def _attached(client: Client, pool: PoolServer) -> Attached:
    return Attached(pool.name, pool.memory, client.process)


def _check_peer(client: Client, message: Message) -> None:
    """Only processes of this arbiter's PID namespace are answered: a robust mutex and a cap end with it.

    The kernel is asked first of all. Where it does not tell, what the process says of itself is compared.

    Raises:
        AttachRefused: It is of another one, or nobody can tell.
    """
    who = f"process {client.pid}" if client.pid else "a process that is not seen from here"
    said = message.kind is Kind.HELLO or "pid_namespace" in message.body
    if message.kind is Kind.HELLO:
        segment.check_identity(_part(message, "identity"), who)
    elif said:
        segment.check_identity({**segment.identity(), "pid_namespace": message.body["pid_namespace"]}, who)
    nested = processes.is_nested(client.pid) if client.pid else True
    if nested is None and not said:
        raise AttachRefused(f"{who} does not say of which PID namespace it is, and /proc does not show it")
    if nested or (said and client.pid != message.body.get("pid")):
        number = message.body.get("pid", "one")
        raise AttachRefused(
            f"process {number} is seen here as {client.pid}: another PID namespace; one container = one cap"
        )


def _readable(channel: socket.socket) -> bool:
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(0))


def _part(message: Message, name: str) -> dict[str, Any]:
    """An object in a message's body.

    Raises:
        WireError: It is something else.
    """
    value = message.body.get(name)
    if not isinstance(value, dict | None):
        raise WireError(f"a {message.kind.name} whose {name} is a {type(value).__name__}, not an object")
    return value or {}


def _refusal(message: Message, error: SharedPoolError) -> Message:
    body = {"error": type(error).__name__, "text": str(error), "fact": getattr(error, "fact", "")}
    return Message(Kind.REFUSED, message.request, body=body)


def _socket_of(descriptor: int) -> socket.socket:
    """A received descriptor as a stream or packet socket; anything else is refused and closed.

    Raises:
        WireError: It is none.
    """
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        foreign.close(descriptor)
        raise WireError(f"a descriptor that is no socket: {error}") from None
    if sock.type not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        foreign.close_socket(sock)
        raise WireError(f"a socket of type {sock.type}")
    return sock


def layout_of(hello: Mapping[str, Any]) -> int:
    """The newest layout that a process knows; the first version to serve two says it, those before only had one."""
    said = hello.get("layout", (hello.get("identity") or {}).get("layout"))
    return said if type(said) is int else 0
