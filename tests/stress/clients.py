"""Chaos with redis-py and urllib3: workers and arbiters are killed all the time; the servers say who was connected.

    scripts/stress --clients --seconds 300

Redis is asked without a pause who is connected, and has room for nobody above the cap; the HTTP servers keep count.
Every user sets values of its own and asks for them again, so that an answer that is another's is seen. No server ends
a connection unasked, so none may be lost, but where leases are reclaimed, and Redis is told to end some.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, ClassVar

import redis
import urllib3
from redis.backoff import NoBackoff
from redis.retry import Retry

import sharedpool
from sharedpool import errors
from sharedpool.integrations.redis import SharedConnectionPool
from sharedpool.integrations.urllib3 import SharedPoolManager
from tests.stress import users
from tests.stress.board import Board
from tests.stress.harm import CLOSE_TIMEOUT, Harm, Report
from tests.stress.looking import looking
from tests.stress.users import Crossed, Turns
from tests.support import commands
from tests.support.redises import RedisServer
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.tls import Authority
from tests.support.waiting import wait_until
from tests.support.workers import Harness
from tests.system.servers import Web

CAP, WORKERS, THREADS = 4, 8, 3
REDIS, HTTP, HTTPS = POOLS = ("cache", "plain", "secure")
#: Seconds that one waits for a lease, and for an answer.
WAIT, PATIENCE = 4.0, 10.0
#: A turn has several of them, ns.
_TURN = 60_000_000_000
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"order": "fifo", "idle_timeout": 0.2},
    {"order": "sticky", "max_lifetime": 0.5, "steal_after": 0.01},
    {"move": False},
    {"max_idle": 2, "steal_after": 0.01},
    {"lease_timeout": 0.05, "reclaim": True},
)


class ClientsChaos(Harm):
    """One run.

    Args:
        harness: Starts the workers; quicker where its fork server has loaded this module.
        scope: Where the arbiters are.
        servers: Which judge it.
        seed: Of all that chance decides.
    """

    harmful: ClassVar = {
        **Harm.harmful,
        "connection killed": 4,
    }
    pools = POOLS

    def __init__(self, harness: Harness, scope: Scope, servers: Servers, seed: int) -> None:
        super().__init__(harness, scope, seed, KINDS, WORKERS, THREADS)
        self.servers = servers
        self.given = {"max_connections": CAP, "close_timeout": CLOSE_TIMEOUT, **self.report.kind}
        for name in POOLS:
            self.operator.attach(name, **self.given)
            self.operator.stats(name)
        for index in range(WORKERS):
            self._begin(index)

    def _begin(self, index: int) -> None:
        seed = self.chance.randrange(10**9)
        self.workers[index].begin(begin, index, self._where(), self.servers.addresses, seed, self.given)

    def run(self, seconds: float) -> Report:
        with looking(self.servers.look):
            return super().run(seconds)

    def _connection_killed(self) -> bool:
        """By Redis, where connections may end in their users' hands."""
        return bool(self.given.get("reclaim")) and self.servers.kill_one(self.chance)

    def _look(self) -> None:
        """The looking is done by a thread, without a pause."""
        self.report.peak = self.servers.most
        if self.servers.most > CAP and not self.report.over:
            told = "\n".join(self.told)
            numbers = self.operator.stats(REDIS)
            self.report.over.append(f"Redis had {self.servers.most} connections, cap {CAP}:\n{told}\n{numbers}")

    def _look_at_what_is_left(self) -> None:
        super()._look_at_what_is_left()
        for name in POOLS:
            self.operator.call(commands.library, "drain", name)
            self.operator.wait_stats(name, used=0)
        self.servers.judge(self.report)

    def _settled(self, **more: int) -> None:
        for name in POOLS:
            try:
                self.operator.wait_stats(name, in_use=0, opening=0, granted=0, waiting=0, closing=0, **more)
                self.operator.call(users.check, name)
                if name == REDIS:
                    wait_until(lambda: self.servers.connected() == self.operator.stats(REDIS).idle)
            except Exception as error:
                self.report.lost.append(f"{name!r} does not come to rest: {error!r}"[:4000])


class Servers:
    """Redis with room for the cap and one judge, and two HTTP servers, one of them over TLS.

    Attributes:
        addresses: Where they are, and whom to trust.
        most: The most connections that Redis had at a look.
    """

    def __init__(self, directory: Path) -> None:
        authority = Authority(directory)
        self._redis = RedisServer(maxclients=str(CAP + 1))
        self._webs = Web(), Web(Path(authority.client("localhost")))
        self.addresses = {REDIS: str(self._redis.port), HTTP: self._webs[0].url, HTTPS: self._webs[1].url}
        self.addresses["ca"] = authority.file
        self.most = 0

    def __enter__(self) -> Servers:
        self._redis.begin()
        self._asking = self._redis.judge(alone=True)
        wait_until(lambda: self._asking.info("clients")["connected_clients"] == 1)
        self._rejected = self._numbers()["rejected_connections"]
        return self

    def __exit__(self, *_: object) -> None:
        self._asking.close()
        self._redis.end()
        for web in self._webs:
            web.__exit__(None, None, None)

    def _clients(self) -> list[str]:
        found: Any = self._asking.client_list()
        return [client["id"] for client in found if client["user"] != "judge"]

    def connected(self) -> int:
        """How many are, besides the judge."""
        return len(self._clients())

    def kill_one(self, chance: random.Random) -> bool:
        """End one of Redis' connections, whoever has it."""
        clients = self._clients()
        return bool(clients) and self._asking.client_kill_filter(_id=chance.choice(clients)) == 1

    def _numbers(self) -> dict[str, int]:
        found: Any = self._asking.info("stats")
        return dict(found)

    def look(self) -> None:
        """Note how many are connected."""
        self.most = max(self.most, self.connected())

    def judge(self, report: Report) -> None:
        """What they have counted. Nobody may be connected any more, because the question is a connection, too."""
        numbers = self._numbers()
        report.peak, report.accepted = self.most, numbers["total_connections_received"]
        refused = numbers["rejected_connections"] - self._rejected
        if refused:
            report.over.append(f"Redis had no room for {refused} connections")
        for web in self._webs:
            found = web.numbers()
            report.accepted += found["accepted"]
            report.peak = max(report.peak, found["peak"])
            if found["peak"] > CAP:
                report.over.append(f"{web.url} had {found['peak']} connections, cap {CAP}")


# --- in a worker ------------------------------------------------------------------------------------------------------


def begin(
    state: State, worker: int, board: tuple[str, int, int], addresses: dict[str, str], seed: int, given: dict[str, Any]
) -> None:
    """Start the users of this worker: one of Redis, the others of it or of HTTP, with or without TLS."""
    for name in POOLS:
        state.pools[name] = sharedpool.attach(name, **given)
    pool = SharedConnectionPool(
        REDIS, port=int(addresses[REDIS]), timeout=WAIT, socket_timeout=PATIENCE, retry=Retry(NoBackoff(), 0), **given
    )
    client = redis.Redis(connection_pool=pool)
    limits = {"timeout": urllib3.Timeout(connect=PATIENCE, read=PATIENCE), "checkout_timeout": WAIT, **given}
    managers = [
        (SharedPoolManager(HTTP, **limits), addresses[HTTP]),
        (SharedPoolManager(HTTPS, ca_certs=addresses["ca"], **limits), addresses[HTTPS]),
    ]
    ends = bool(given.get("reclaim"))

    def make(numbers: Board, number: int) -> Turns:
        kind = number % 3
        if kind == 0:
            return RedisUser(client, numbers, worker, number, seed, ends)
        return HttpUser(*managers[kind - 1], numbers, worker, number, seed, ends)

    users.start(state, board, make)


class ClientUser(Turns):
    """One that knows nothing of leases: errors are those of its library.

    Args:
        board: As for Turns.
        worker: As for Turns.
        number: As for Turns.
        seed: As for Turns.
        ends: Whether connections may end in its hands.
    """

    def __init__(self, board: Board, worker: int, number: int, seed: int, ends: bool) -> None:
        super().__init__(board, worker, number, seed)
        self._ends = ends

    def turn(self) -> str:
        self.timed(_TURN)
        return self.act(self.chance.random())

    def act(self, chance: float) -> str:
        """What chance decides; gives how it ended."""
        raise NotImplementedError

    def token(self) -> str:
        self.serial += 1
        return f"{self.name}-{self.serial}"

    def outcome_of(self, error: Exception) -> str:
        """By what it was raised from, which is the shared pool's error, if it is not the connection's."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, errors.SharedPoolError):
            cause = getattr(cause, "reason", None) or cause.__cause__
        if isinstance(cause, Exception):  # "stopped", too: an arbiter may give up the row of a process that was stopped
            return super().outcome_of(cause)
        lost = redis.ConnectionError | redis.WatchError | urllib3.exceptions.HTTPError | OSError  # watched, and lost
        ended = isinstance(error, lost)
        return "ended by the remote" if ended and (self._ends or Turns.leaving) else ""


class RedisUser(ClientUser):
    """Sets and gets values of its own, by commands, pipelines and transactions, and listens now and then."""

    def __init__(self, client: Any, *args: Any) -> None:
        super().__init__(*args)
        self._client = client
        self._values: dict[str, str] = {}

    def act(self, chance: float) -> str:
        if chance < 0.50:
            self._set_and_get()
        elif chance < 0.75:
            self._transact(watch=chance < 0.60)
        elif chance < 0.85:
            token = self.token()
            with self._client.pipeline(transaction=False) as pipe:
                _same([token.encode()] * 3, pipe.echo(token).echo(token).echo(token).execute())
        elif chance < 0.92:
            return self._leave_off()
        elif chance < 0.96:
            self._listen()
        else:
            connection = self._client.connection_pool.get_connection()
            try:
                time.sleep(self.chance.uniform(0.0, 0.02))
            finally:
                self._client.connection_pool.release(connection)
        return "done"

    def _set_and_get(self) -> None:
        key, token = f"{self.name}:{self.chance.randrange(5)}", self.token() * self.chance.choice((1, 1, 1, 5000))
        old = self._values.pop(key, None)
        if old is not None:
            _same(old.encode(), self._client.get(key))
        self._client.set(key, token)
        self._values[key] = token

    def _transact(self, watch: bool) -> None:
        key, token = f"{self.name}:transaction", self.token()
        with self._client.pipeline() as pipe:
            if watch:
                pipe.watch(key)
                pipe.get(key)
                pipe.multi()
            _same([True, token.encode(), token.encode()], pipe.set(key, token).get(key).echo(token).execute())

    def _leave_off(self) -> str:
        """A session that nobody else may have."""
        pool = self._client.connection_pool
        connection = pool.get_connection()
        try:
            for command in self.chance.choice(
                ((("MULTI",), ("SET", self.name, "x")), (("ECHO", self.token()),), (("SELECT", "1"),))
            ):
                connection.send_command(*command)
            if self.chance.random() < 0.5:
                connection.read_response()
        finally:
            pool.release(connection)
        return "left unread"

    def _listen(self) -> None:
        """To itself: who speaks needs a connection of its own."""
        channel, token = self.name, self.token()
        with self._client.pubsub() as listener:
            listener.subscribe(channel)
            _same("subscribe", (listener.get_message(timeout=PATIENCE) or {}).get("type"))
            self._client.publish(channel, token)
            _same(token.encode(), (listener.get_message(timeout=PATIENCE) or {}).get("data"))


class HttpUser(ClientUser):
    """Sends bodies of its own and reads them again; gives some answers up.

    None is longer than a MiB: a server that has more to say is reset (drivers.sockets.Ending), and without a processor
    it notices late.
    """

    def __init__(self, http: SharedPoolManager, url: str, *args: Any) -> None:
        super().__init__(*args)
        self._http, self._url = http, url

    def act(self, chance: float) -> str:
        if chance < 0.55:
            self._echo(self.token().encode() * self.chance.choice((1, 1, 1, 2000)))
        elif chance < 0.70:
            token = self.token().encode()
            body = self._ask("POST", "/echo", body=iter([token, token]), chunked=True).data
            _same(token * 2, body)
        elif chance < 0.80:
            _same(b"one two three", self._ask("GET", "/chunked").data)
        elif chance < 0.85:
            _same(b"the last\n", self._ask("GET", "/close").data)
            return "closed"
        elif chance < 0.90:
            answer = self._ask("GET", "/half", preload_content=False)
            answer.read(1000)  # and no more: the rest is nobody's
            self.chance.choice((answer.close, answer.release_conn))()
            return "given up"
        elif chance < 0.95:
            answer = self._ask("GET", "/half", preload_content=False)
            _same(1 << 19, sum(map(len, answer.stream(100_000))))
        else:
            self._ask("GET", "/half", preload_content=False)
            return "leaked"
        return "done"

    def _echo(self, body: bytes) -> None:
        path = self.chance.choice(("/echo", "/echo", "/redirect"))
        _same(body, self._ask("POST", path, body=body).data)

    def _ask(self, method: str, path: str, **given: Any) -> Any:
        retries = urllib3.Retry(connect=0, read=0, redirect=2, other=0)
        return self._http.request(method, self._url + path, retries=retries, **given)


def _same(right: object, found: object) -> None:
    if found != right:
        raise Crossed(f"{right!r:.200} was answered by {found!r:.200}")
