"""A real Redis server, started for the tests, and what a worker can be told to do with it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from sharedpool.integrations.redis import SharedConnectionPool
from sharedpool.integrations.redis import asyncio as asynchronous
from tests.support import commands
from tests.support.postgres import Daemon, Missing, Ports, as_somebody, private_directory
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.system import tasks


class RedisServer(Daemon):
    """One server without any data; its judge is the user "judge", everybody else is "default" or "app"/"secret"."""

    def __init__(self, *, tls: bool = False, more: Sequence[str] = (), **settings: str) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise Missing("binary redis-server is missing")
        directory, ports = private_directory("sp-redis-"), Ports()
        self.port, self.path = ports.take(), str(directory / "redis.sock")
        given = {
            "port": str(self.port), "bind": "127.0.0.1", "unixsocket": self.path, "unixsocketperm": "777", "save": "",
            "appendonly": "no", "dir": str(directory), "daemonize": "no", **settings,
        }  # fmt: skip
        self.certificate = str(directory / "server.crt")
        if tls:
            self.tls_port = ports.take()
            given.update({
                "tls-port": str(self.tls_port), "tls-cert-file": self.certificate,
                "tls-key-file": str(directory / "server.key"), "tls-auth-clients": "no",
            })  # fmt: skip
            make_certificate(self.certificate, given["tls-key-file"])
        options = [part for name, value in given.items() for part in (f"--{name}", value)]
        users = [part for who in ("app on >secret", "judge on >judge") for part in f"--user {who} ~* &* +@all".split()]
        super().__init__(directory, [program, *options, *more, *users], ports)

    def begin(self) -> RedisServer:
        """Start it and wait until it answers."""
        self.start(self.port)
        return self

    def is_ready(self, port: int) -> bool:
        with contextlib.suppress(redis.ConnectionError), self.judge() as judge:
            return bool(judge.ping())
        return False

    def judge(self, *, alone: bool = False) -> redis.Redis:
        """A client of the tests' own; `alone`: all its threads have one connection."""
        return redis.Redis(
            port=self.port, username="judge", password="judge", retry=Retry(NoBackoff(), 0),
            single_connection_client=alone,
        )  # fmt: skip

    def clients(self) -> list[dict[str, str]]:
        """The connections that there are, but not the judges'."""
        with self.judge() as judge:
            found: Any = judge.client_list()
        return [client for client in found if client["user"] != "judge"]

    def numbers(self) -> dict[str, int]:
        """How many connections were received (the judges' included), and how often each command was called."""
        with self.judge() as judge:
            stats: Any = judge.info("stats")
            calls: Any = judge.info("commandstats")
        return {
            "received": stats["total_connections_received"], "rejected": stats["rejected_connections"],
            **{name.removeprefix("cmdstat_"): value["calls"] for name, value in calls.items()},
        }  # fmt: skip

    def wait_until_alone(self) -> None:
        """Until nobody but judges is connected."""
        wait_until(lambda: not self.clients(), what="no connection is left")


def make_certificate(certificate: str, key: str) -> None:
    """One that it has signed itself, for 127.0.0.1."""
    program = shutil.which("openssl")
    if program is None:
        raise Missing("binary openssl is missing")
    subprocess.run(
        [*as_somebody(), program, "req", "-new", "-x509", "-days", "2", "-nodes", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-out", certificate, "-keyout", key],
        check=True, cwd="/", capture_output=True,
    )  # fmt: skip


# --- in a worker ------------------------------------------------------------------------------------------------------


def make(state: State, url: str, label: str = "r", retries: int = 0, **options: Any) -> None:
    """A client over a shared pool, under a label."""
    pool = SharedConnectionPool.from_url(url, retry=Retry(NoBackoff(), retries), **options)
    state.things[label] = redis.Redis(connection_pool=pool)


def make_async(state: State, url: str, label: str = "a", **options: Any) -> None:
    """The same for asyncio."""
    pool = asynchronous.SharedConnectionPool.from_url(url, **options)
    state.things[label] = redis.asyncio.Redis(connection_pool=pool)


class Tokens(redis.CredentialProvider):
    """Credentials as a cloud's provider has them: whose they are is not an attribute."""

    def __init__(self, *credentials: str) -> None:
        self.token = credentials
        self.times = 0

    def get_credentials(self) -> Any:
        self.times += 1
        return self.token


class Login:
    """A way to greet a server that is an object, or a method of one."""

    def __init__(self, who: str) -> None:
        self._who = who

    def __call__(self, conn: Any) -> None:
        log_in(self._who, conn)

    def greet(self, conn: Any) -> None:
        log_in(self._who, conn)


def log_in(who: str, conn: Any) -> None:
    """redis-py's handshake, and then as somebody else."""
    conn.on_connect()
    conn.send_command("AUTH", who, who[0])
    conn.read_response()


def alices_login(conn: Any) -> None:
    log_in("alice", conn)


class AlicesConnection(redis.Connection):
    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health)
        self.send_command("AUTH", "alice", "a", check_health=False)
        self.read_response()


def _login(how: str) -> Any:
    """A `redis_connect_func` of the kind that is named, for whom is named after it."""
    kind, _, who = how.rpartition(" ")
    if how == "module":
        return alices_login

    def closure(conn: Any) -> None:
        log_in(who, conn)

    login = Login(who)
    kinds = {"": closure, "partial": functools.partial(log_in, who), "method": login.greet, "object": login}
    return kinds.get(kind, lambda conn: log_in(who, conn))


def _class_of(who: str) -> Any:
    if who == "module":
        return AlicesConnection

    class OnesOwn(redis.Connection):
        def on_connect_check_health(self, check_health: bool = True) -> None:
            super().on_connect_check_health(check_health)
            log_in_again(self)

    def log_in_again(conn: Any) -> None:
        conn.send_command("AUTH", who, who[0], check_health=False)
        conn.read_response()

    return OnesOwn


def make_as(
    state: State, port: int, label: str = "r", *, provider: Any = None, login: str = "", of_class: str = "",
    asynchronously: bool = False, **given: Any,
) -> None:  # fmt: skip
    """A client that greets the server in its own way, over a pool of one connection."""
    if provider is not None:
        state.things["tokens"] = given["credential_provider"] = (
            redis.UsernamePasswordCredentialProvider("app", "secret") if provider == ["own"] else Tokens(*provider)
        )
    if login:
        given["redis_connect_func"] = _login(login)
    if of_class:
        given["connection_class"] = _class_of(of_class)
    kind: Any = asynchronous.SharedConnectionPool if asynchronously else SharedConnectionPool
    client: Any = redis.asyncio.Redis if asynchronously else redis.Redis
    pool = kind("people", max_connections=1, host="127.0.0.1", port=port, **given)
    state.things[label] = client(connection_pool=pool)


def seen(state: State, label: str = "r") -> dict[str, Any]:
    """What the server sees in a client, but for what is another each time."""
    info = ask(state, "CLIENT INFO", label=label)
    names = ("user", "name", "db", "resp", "lib-name", "lib-ver")
    return {name: info[name] for name in names if name in info}


def name_credentials(state: State, *credentials: str) -> None:
    """From now on the provider says these."""
    state.things["tokens"].token = credentials


def times_asked(state: State) -> int:
    return int(state.things["tokens"].times)


def drain(state: State) -> None:
    state.things["r"].connection_pool.drain(wait=20)


def ask(state: State, *command: Any, label: str = "r") -> Any:
    """One command on a lease of its own."""
    client = state.things[label]
    if isinstance(client, redis.asyncio.Redis):
        return tasks.run(state, _awaited(client, command))
    return client.execute_command(*command)


async def _awaited(client: Any, command: tuple[Any, ...]) -> Any:
    return await client.execute_command(*command)


def who(state: State, label: str = "r") -> int:
    """The number of the connection that a command goes over."""
    return int(ask(state, "CLIENT ID", label=label))


def stats(state: State, label: str = "r") -> Any:
    return state.things[label].connection_pool.shared_stats()


def hold(state: State, label: str = "r", name: str = "held") -> int:
    """Take a connection and keep it; gives its number."""
    state.things[name] = state.things[label].connection_pool.get_connection()
    return talk(state, "CLIENT", "ID", name=name)


def talk(state: State, *command: Any, name: str = "held") -> Any:
    """A command on a connection that is kept, as redis-py's own client would do it."""
    conn = state.things[name]
    conn.send_command(*command)
    return conn.read_response()


def let_go(state: State, label: str = "r", name: str = "held") -> None:
    state.things[label].connection_pool.release(state.things.pop(name))


def leave_off(state: State, *sent: Any, raw: bytes = b"", read: int = 0) -> None:
    """Send commands on a lease, read so many answers, and give the connection back."""
    pool = state.things["r"].connection_pool
    conn = pool.get_connection()
    for command in sent:
        conn.send_command(*command)
    if raw:
        conn.send_packed_command([raw])
    for _ in range(read):
        with contextlib.suppress(redis.ResponseError):
            conn.read_response(push_request=True)
    pool.release(conn)


def transaction(state: State, watch: bool) -> list[Any]:
    """MULTI and EXEC, with or without WATCH before."""
    with state.things["r"].pipeline() as pipe:
        if watch:
            pipe.watch("k")
            pipe.multi()
        pipe.set("k", "1").incr("k")
        return list(pipe.execute())


def subscribe(state: State, channel: str, label: str = "r") -> int:
    """Listen to a channel from now on; gives the connection's number, once the server has said yes."""
    listener = state.things["listener"] = state.things[label].pubsub()
    listener.subscribe(channel)
    assert listener.get_message(timeout=20)["type"] == "subscribe"
    return int(next(c["id"] for c in state.things["judge"].client_list() if c["sub"] == "1"))


def heard(state: State) -> Any:
    """What was said on the channel next, whatever the connection that it comes over."""
    while True:
        try:
            message = state.things["listener"].get_message(ignore_subscribe_messages=True, timeout=20)
        except redis.ConnectionError:
            continue
        if message is not None:
            return message["data"]


def stop_listening(state: State) -> None:
    state.things.pop("listener").close()


def work(state: State, seconds: float, evidence: str, label: str = "r") -> None:
    """Commands whose answers are known beforehand, for so long; a line for each, `.` or what was wrong.

    Killed at any moment: the file has it at once.
    """
    client = state.things[label]
    end, n = time.monotonic() + seconds, 0
    stop = commands.told_to_stop(state)
    with open(evidence, "a", buffering=1) as file:
        while time.monotonic() < end and not stop.is_set():
            n += 1
            token = f"{os.getpid()}-{n}".encode()
            try:
                found = _asked(client, token, n)
                wrong = "" if found == [token] * 3 else f"{token!r} was answered by {found!r}"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            file.write(f"{wrong}\n" if wrong else ".\n")


def _asked(client: Any, token: bytes, n: int) -> list[Any]:
    if n % 5 == 0:  # a transaction left open, an answer left unread
        conn = client.connection_pool.get_connection()
        conn.send_command("MULTI" if n % 2 else "ECHO", *(() if n % 2 else (token,)))
        client.connection_pool.release(conn)
    with client.pipeline(transaction=bool(n % 2)) as pipe:
        pipe.echo(token)
        pipe.echo(token)
        return [client.echo(token), *pipe.execute()]


def alone(state: State, label: str = "r") -> None:
    """A judge of the worker's own."""
    kwargs = state.things[label].connection_pool.connection_kwargs
    state.things["judge"] = redis.Redis(port=kwargs["port"], username="judge", password="judge")


def many_at_once(state: State, number: int, label: str = "a") -> list[Any]:
    """So many tasks at once, of which every third is cancelled; the answers of the others."""
    client = state.things[label]

    async def one(i: int) -> Any:
        return (await client.echo(f"t{i}")).decode()

    async def everything() -> list[Any]:
        begun = [asyncio.ensure_future(one(i)) for i in range(number)]
        await asyncio.sleep(0)
        for task in begun[::3]:
            task.cancel()
        found = await asyncio.gather(*begun, return_exceptions=True)
        return [found[i] for i in range(number) if i % 3]

    return list(tasks.run(state, everything()))


def listen_async(state: State, channel: str) -> Any:
    """Subscribe, publish, hear."""
    client = state.things["a"]

    async def both() -> Any:
        async with client.pubsub() as listener:
            await listener.subscribe(channel)
            await listener.get_message(timeout=20)
            await client.publish(channel, "hello")
            return (await listener.get_message(timeout=20))["data"]

    return tasks.run(state, both())


def close_pool(state: State, label: str = "r") -> None:
    state.things[label].connection_pool.close()
