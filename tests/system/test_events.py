"""What a process can ask to be told, and that a callback's error costs nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sharedpool import OptionError, PoolTimeout
from sharedpool.stats import REASONS
from sharedpool.wire import Kind, Message
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker
from tests.system.lineup import line_up

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(params=["shared", "local"])
def solo(harness: Harness, request: pytest.FixtureRequest) -> Worker:
    return harness.start(SHAREDPOOL_MODE=str(request.param))


def watch(state: State, events: list[str], pool: str = "default") -> None:
    """Write down what happens from now on."""
    handle = commands.pool_of(state, pool)
    state.things["events"] = []
    for event in events:

        def note(fact: Any, event: str = event) -> None:
            state.things["events"].append((event, type(fact).__name__ if event.startswith("check") else fact))

        state.things["end " + event] = getattr(handle, f"on_{event}")(note)


def events_of(state: State) -> list[tuple[str, Any]]:
    return list(state.things["events"])


def end(state: State, event: str) -> None:
    state.things["end " + event]()


def test_a_lease_from_opening_to_closing(solo: Worker, tcp: Target) -> None:
    solo.call(watch, ["open", "checkout", "checkin", "close"])
    solo.use(tcp)
    solo.use(tcp)
    solo.call(commands.discard, solo.checkout(tcp))
    wait_until(lambda: solo.call(events_of)[-1][0] == "close")  # an end may be told by the pool's own thread
    assert solo.call(events_of) == [
        ("open", tcp.url), ("checkout", "Lease"), ("checkin", "Lease"),
        ("checkout", "Lease"), ("checkin", "Lease"),
        ("checkout", "Lease"), ("checkin", "Lease"), ("close", "discarded"),
    ]  # fmt: skip


def test_whoever_unsubscribes_hears_no_more_and_others_go_on(solo: Worker, tcp: Target) -> None:
    solo.call(watch, ["open", "checkout"])
    solo.call(end, "checkout")
    solo.use(tcp)
    assert solo.call(events_of) == [("open", tcp.url)]


def test_who_asks_before_the_first_use_is_told_of_it(worker: Worker, tcp: Target) -> None:
    worker.attach(max_connections=1)
    worker.call(watch, ["open"])
    worker.use(tcp)
    assert worker.call(events_of) == [("open", tcp.url)]


def test_a_wait_is_told_once_it_is_over_also_when_it_was_in_vain(solo: Worker, tcp: Target) -> None:
    solo.attach(max_connections=1)
    solo.call(watch, ["wait"])
    label = solo.checkout(tcp)
    solo.fails(PoolTimeout, commands.checkout, tcp, checkout_timeout=0.05)
    (waiting,) = line_up(solo, [(solo, tcp)])
    solo.checkin(label)
    waiting.result()
    told = solo.call(events_of)
    assert [event for event, _ in told] == ["wait", "wait"]
    assert 0.05 <= told[0][1] < 20


def fail(state: State, events: list[str]) -> None:
    """Callbacks that fail."""
    commands.collect_log(state)

    def broken(fact: object) -> None:
        raise ZeroDivisionError(f"told of {fact!r}")

    for event in events:
        commands.pool_of(state, "default").on(event, broken)


def test_an_error_in_a_callback_is_logged_and_loses_nothing(solo: Worker, backend: Backend, tcp: Target) -> None:
    solo.attach(max_connections=2)
    solo.call(fail, ["open", "checkout", "checkin", "close", "wait"])
    assert [solo.use(tcp) for _ in range(3)] == [1, 1, 1]
    label = solo.checkout(tcp)
    solo.call(commands.discard, label)
    stats = solo.wait_stats(in_use=0, closing=0, idle=0)
    assert (stats.checkouts, stats.closed) == (4, 1)
    assert len(solo.call(commands.log, "ERROR")) == 1 + 4 + 4 + 1


def test_a_connection_that_others_closed_is_told_with_its_reason(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    """By another process for its permit, by the arbiter for its age, by its remote."""
    holder, other = two
    holder.attach(max_connections=1)
    holder.call(watch, ["close"])
    holder.use(tcp)
    other.use(unix)
    wait_until(lambda: holder.call(events_of) == [("close", "evicted")])
    holder.use(tcp)
    backend.close()
    wait_until(lambda: holder.call(events_of)[1:] == [("close", "remote_closed")])
    holder.use(tcp)
    holder.call(commands.library, "start_pool", idle_timeout=0.05)
    wait_until(lambda: holder.call(events_of)[2:] == [("close", "expired")])


def test_an_unknown_event_is_an_error_that_names_those_there_are(worker: Worker) -> None:
    error = worker.fails(OptionError, fail, ["full moon"])
    assert "'full moon'" in str(error)
    assert "checkout" in str(error)


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append((record.name, record.levelname, record.getMessage()))


def log_everything(state: State) -> None:
    state.things["records"] = records = Records()
    logger = logging.getLogger("sharedpool")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(records)


def records_of(state: State, name: str) -> list[tuple[str, str]]:
    return [(level, text) for logger, level, text in state.things["records"].texts if logger == name]


def test_every_close_is_one_line_in_the_log_with_its_reason(solo: Worker, tcp: Target) -> None:
    solo.call(log_everything)
    solo.call(commands.discard, solo.checkout(tcp))
    wait_until(lambda: solo.call(records_of, "sharedpool.pool.default"))
    assert solo.call(records_of, "sharedpool.pool.default") == [
        ("DEBUG", f"closed a connection to {tcp.url}: discarded")
    ]


def test_callbacks_hold_in_a_forked_child_too(worker: Worker, tcp: Target) -> None:
    worker.call(watch, ["checkin"])
    worker.use(tcp)
    child = worker.fork()
    child.use(tcp)
    assert child.call(events_of) == [("checkin", "Lease")] * 2
    assert worker.call(events_of) == [("checkin", "Lease")]


def discard_while_its_end_is_told(state: State) -> list[str]:
    """The event thread hears of the end while the thread that discards is on its way; gives what was told."""
    told: list[str] = []
    pool = state.pools["default"]
    pool.on_close(told.append)
    lease = next(iter(state.leases.values()))
    attached: Any = pool.attached
    tell = attached.returns._tell_close

    def both(slot: int, generation: int) -> None:
        tell(slot, generation)
        attached.on_event(Message(Kind.CLOSED, REASONS.index("discarded") + 1, slot, generation))

    attached.returns._tell_close = both
    lease.discard()
    wait_until(lambda: told)  # the pool's own event thread may be the one that tells it
    return told


def test_an_end_that_two_threads_find_is_told_once(worker: Worker, tcp: Target) -> None:
    worker.checkout(tcp)
    assert worker.call(discard_while_its_end_is_told) == ["discarded"]
