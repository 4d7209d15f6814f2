"""sharedpool.aio: tasks wait as threads do, in the same queue and for the same connections, and block no loop."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import warnings
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from sharedpool import LeaseError, OptionError, PoolStopped, PoolTimeout, aio
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Pending, Worker
from tests.system import tasks

pytestmark = pytest.mark.usefixtures("patient")


def line_up(observer: Worker, entries: list[tuple[Worker, Target]]) -> list[tuple[Worker, str]]:
    """Tasks put into the queue one by one."""
    queue = []
    for worker, target in entries:
        label = f"waiter {len(queue)}"
        worker.call(tasks.begin, target, label, checkout_timeout=None)
        queue.append((worker, label))
        observer.wait_stats(waiting=len(queue))
    return queue


@pytest.fixture
def holder(worker: Worker, tcp: Target) -> Worker:
    """A worker that holds the only permit, as lease "held"."""
    worker.attach(max_connections=1)
    worker.checkout(tcp, label="held")
    return worker


# --- one pool for both ------------------------------------------------------------------------------------------------


def test_threads_and_tasks_of_one_process_share_connections(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.attach(max_connections=2)
    assert worker.use(tcp) == 1
    label = worker.call(tasks.checkout, tcp)
    assert worker.call(tasks.exchange, label) == 1
    worker.call(tasks.checkin, label)
    assert worker.use(tcp) == 1
    assert (backend.accepted, worker.stats().processes, worker.stats().reuses) == (1, 1, 2)


def test_tasks_of_another_process_take_over_what_threads_have_left(
    two: list[Worker], backend: Backend, tcp: Target
) -> None:
    one, other = two
    one.attach(max_connections=2)
    assert one.use(tcp) == 1
    assert other.call(tasks.use_many, tcp, 1)[0] == 1
    assert one.use(tcp) == 1
    assert one.stats().fetches == 1


def test_a_thousand_tasks_wait_on_a_cap_of_four_without_a_thread_each(
    worker: Worker, backend: Backend, tcp: Target
) -> None:
    worker.call(tasks.attach, max_connections=4)
    *numbers, threads = worker.call(tasks.use_many, tcp, 1000, checkout_timeout=30)
    assert numbers == [1, 2, 3, 4]
    assert backend.peak == 4
    assert threads < 12
    stats = worker.wait_stats(in_use=0, waiting=0)
    assert stats.waits >= 900
    assert stats.timeouts == stats.dropped == 0


def test_the_longest_waiter_of_all_processes_is_served_first_be_it_a_task_or_a_thread(
    holder: Worker, harness: Harness, backend: Backend, tcp: Target
) -> None:
    first, second = harness.start_many(2)
    queue: list[tuple[Worker, str, Pending | None]] = []
    for worker, by_task in (
        (first, True),
        (second, True),
        (first, False),
        (second, True),
        (holder, True),
        (first, True),
    ):
        label = f"waiter {len(queue)}"
        if by_task:
            worker.call(tasks.begin, tcp, label, checkout_timeout=None)
            queue.append((worker, label, None))
        else:
            pending = worker.begin_checkout(tcp, thread="sync", label=label, checkout_timeout=None)
            queue.append((worker, label, pending))
        holder.wait_stats(waiting=len(queue))
    last, held = holder, "held"
    for number, (worker, label, pending) in enumerate(queue):
        last.checkin(held)
        if pending is None:
            worker.call(tasks.finish, label)
        else:
            pending.result()
        assert holder.stats().waiting == len(queue) - number - 1
        last, held = worker, label
    last.checkin(held)
    stats = holder.wait_stats(in_use=0, waiting=0)
    assert (backend.accepted, stats.handoffs, stats.revoked) == (1, len(queue), 0)


def test_loops_in_several_threads_wait_in_one_queue(holder: Worker, harness: Harness, tcp: Target) -> None:
    (worker,) = harness.start_many(1)
    pending = []
    for number in range(3):
        pending.append(
            worker.begin(
                tasks.checkout, tcp, loop=f"loop {number}", label=f"{number}", checkout_timeout=None, thread=f"{number}"
            )
        )
        holder.wait_stats(waiting=number + 1)
    names = worker.call(commands.thread_names, thread="names")
    assert sum(name.endswith("-wait") for name in names) == 1
    holder.checkin("held")
    for number in range(3):
        pending[number].result()
        worker.call(commands.checkin, f"{number}", thread="names")
    holder.wait_stats(in_use=0, waiting=0)


def look_seldom(state: State) -> None:
    from sharedpool import watching

    watching._EVERY = 60_000_000_000  # type: ignore[misc]


def test_more_tasks_than_can_be_slept_on_are_handed_leases_between_processes_without_a_pause(
    holder: Worker, two: list[Worker], tcp: Target
) -> None:
    """300 handoffs, most between the processes; with a look every 60 s none can have waited for it."""
    for worker in two:
        worker.call(look_seldom)
        worker.call(tasks.attach)
    pending = [worker.begin(tasks.use_many, tcp, 150, checkout_timeout=60) for worker in two]
    holder.wait_stats(waiting=300)
    holder.checkin("held")
    for each in pending:
        each.result(55)
    assert holder.wait_stats(in_use=0, waiting=0).handoffs == 300


def without_waitv(state: State) -> None:
    from sharedpool import watching
    from sharedpool.errors import NotSupported

    def refuse() -> None:
        raise NotSupported("as an old kernel")

    watching.ManySleeper = refuse  # type: ignore[assignment, misc]


def test_on_a_kernel_without_futex_waitv_tasks_are_served_too(holder: Worker, two: list[Worker], tcp: Target) -> None:
    for worker in two:
        worker.call(without_waitv)
    queue = line_up(holder, [(two[0], tcp), (two[1], tcp), (two[0], tcp)])
    last, held = holder, "held"
    for worker, label in queue:
        last.checkin(held)
        worker.call(tasks.finish, label)
        last, held = worker, label
    last.checkin(held)
    holder.wait_stats(in_use=0, waiting=0, revoked=0)


def test_a_killed_holders_permit_goes_to_a_task(harness: Harness, holder: Worker, tcp: Target) -> None:
    (worker,) = harness.start_many(1)
    line_up(holder, [(worker, tcp)])
    holder.kill()
    worker.call(tasks.finish, "waiter 0")
    assert worker.call(tasks.exchange, "waiter 0") == 2


# --- time-outs and cancellation ---------------------------------------------------------------------------------------


def timeouts(state: State, target: Target) -> dict[str, Any]:
    """How checkouts end that get nothing in time."""
    pool = tasks.pool_of(state)
    found: dict[str, Any] = {}

    async def by_option(seconds: float) -> str:
        with pytest.raises(PoolTimeout) as caught:
            await pool.checkout(target.host, target.port, checkout_timeout=seconds)
        return str(caught.value)

    async def by_asyncio() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pool.checkout(target.host, target.port, checkout_timeout=None)

    async def all_of_them() -> None:
        found["at once"] = await by_option(0)
        begun = time.monotonic()
        found["text"] = await by_option(0.2)
        found["took"] = time.monotonic() - begun
        await by_asyncio()

    tasks.run(state, all_of_them())
    return found


def test_a_task_that_gets_nothing_in_time_leaves_the_queue(holder: Worker, harness: Harness, tcp: Target) -> None:
    (worker,) = harness.start_many(1)
    found = worker.call(timeouts, tcp)
    assert "max=1 leased=1" in found["text"]
    assert found["took"] >= 0.2
    assert holder.wait_stats(waiting=0).timeouts == 2
    holder.checkin("held")
    assert holder.wait_stats(in_use=0).idle == 1


def test_a_cancelled_waiter_is_passed_over(holder: Worker, two: list[Worker], backend: Backend, tcp: Target) -> None:
    one, other = two
    line_up(holder, [(one, tcp), (other, tcp)])
    assert one.call(tasks.cancel, "waiter 0")
    holder.wait_stats(waiting=1)
    holder.checkin("held")
    other.call(tasks.finish, "waiter 1")
    assert backend.accepted == 1


class Stepped:
    """Runs a coroutine and cancels its task at its k-th suspension.

    Args:
        work: The coroutine.
        at: k, from 1.
        late: Cancelled only once what it waits for is there: both come together.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, *, late: bool) -> None:
        self._work, self._at, self._late = work, at, late
        self.steps = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        resume: Callable[[], Any] = lambda: self._work.send(None)  # noqa: E731
        while True:
            try:
                waits_for = resume()
            except StopIteration as end:
                return end.value
            self.steps += 1
            if self.steps == self._at:
                if self._late and waits_for is not None:
                    waits_for.add_done_callback(lambda _: task.cancel())
                else:
                    asyncio.get_running_loop().call_soon(task.cancel)
            try:
                yield waits_for
                resume = lambda: self._work.send(None)  # noqa: E731
            except BaseException as error:
                resume = lambda error=error: self._work.throw(error)  # type: ignore[misc]  # noqa: E731


async def scenario(pool: aio.Pool[Any], permit: aio.Permit, target: Target, beside: Target) -> None:
    """Every kind of waiting: attaching, opening, queueing, eviction, streams, a permit, renewing."""
    where = target.host, target.port
    async with pool.connection(*where, checkout_timeout=None) as conn:
        await tasks.talk(conn, "first")
    lease = await pool.checkout(*where, checkout_timeout=None)
    lease.discard()
    with await pool.checkout(*where, checkout_timeout=None) as first, first:
        async with permit:
            await tasks.talk(first.conn, "second")
    async with pool.connection(beside.host, beside.port, checkout_timeout=None) as conn:
        await tasks.talk(conn, "third")
    async with pool.stream(*where, checkout_timeout=None) as (reader, writer):
        writer.write(b"fourth\n")
        await writer.drain()
        await reader.readline()
    async with asyncio.timeout(20), pool.connection(*where, checkout_timeout=None) as conn:
        await tasks.talk(conn, "fifth")


def cancelled_at(state: State, target: Target, beside: Target, at: int, late: bool) -> bool:
    """Play the scenario and cancel it at its k-th suspension; whether it came to its end before."""
    pool = aio.attach("default")
    permit = aio.permit("permits", max_connections=1, checkout_timeout=None)

    async def play() -> bool:
        stepped = Stepped(scenario(pool, permit, target, beside), at, late=late)

        async def driven() -> None:
            await stepped

        task = asyncio.ensure_future(driven())
        done, _ = await asyncio.wait([task], timeout=30)
        assert done, "nobody served it"
        if not task.cancelled():
            await task
        return stepped.steps < at

    ended = asyncio.run(play())
    permit.pool.close()
    pool.close()
    return ended


@pytest.mark.parametrize("late", [False, True], ids=["before", "together"])
def test_cancelled_at_every_await_nothing_is_lost(harness: Harness, backend: Backend, tcp: Target, late: bool) -> None:
    """Beside another process that uses the same pool of two, so that the queue and takeovers are part of it."""
    player, other = harness.start_many(2)
    beside = backend.listen("beside")
    other.attach(max_connections=2)
    other.use(tcp)
    loads = [
        other.begin(commands.requests_until_told, [tcp], checkout_timeout=30, thread=thread)
        for thread in ("one", "two")
    ]
    for k in range(1, 200):
        if player.call(cancelled_at, tcp, beside, k, late):
            break
    else:
        pytest.fail("the scenario never came to its end")
    assert k > 8
    other.call(commands.tell_to_stop)
    assert [load.result().errors for load in loads] == [[], []]
    stats = other.wait_stats(in_use=0, waiting=0, opening=0, granted=0, closing=0)
    told = f"{stats}, then {other.stats()}; {backend.counts()}, {backend.do('connections')}, k={k}"
    wait_until(lambda: backend.open == stats.connections, what=told)
    assert backend.peak <= 2
    assert stats.timeouts == stats.dropped == 0
    other.attach("permits", max_connections=1)
    other.wait_stats("permits", in_use=0, waiting=0, granted=0)


def test_a_cancelled_opening_is_broken_off(worker: Worker, backend: Backend, tcp: Target) -> None:
    worker.call(tasks.attach, max_connections=1)
    slow = backend.listen("slow")
    backend.do("hang", name="slow")
    worker.call(tasks.begin, slow, "opening", checkout_timeout=None, connect_timeout=600)
    worker.wait_stats(opening=1)
    worker.call(tasks.cancel, "opening")
    worker.wait_stats(opening=0, in_use=0)
    assert worker.use(tcp) == 1


def tick_while_opening(state: State, target: Target, ticks: int) -> None:
    """Another task runs so often while one opens a connection to what does not answer, which is then given up."""
    pool = tasks.pool_of(state)

    async def both() -> None:
        opening = asyncio.ensure_future(pool.checkout(target.host, target.port, connect_timeout=600))
        while not pool.stats().opening:
            await asyncio.sleep(0.005)
        for _ in range(ticks):
            await asyncio.sleep(0.005)
            assert not opening.done()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    tasks.run(state, both())


def test_the_loop_goes_on_while_a_connection_is_opened(worker: Worker, backend: Backend) -> None:
    worker.call(tasks.attach, max_connections=1)
    slow = backend.listen("slow")
    backend.do("hang", name="slow")
    worker.call(tick_while_opening, slow, 20)
    worker.wait_stats(opening=0, in_use=0)


# --- loops, forks, ends -----------------------------------------------------------------------------------------------


def leave_waiters_in_a_closed_loop(state: State, target: Target) -> list[Any]:
    """A loop that is closed over its tasks, which stay there as nobody's."""
    pool = tasks.pool_of(state)
    loop = asyncio.new_event_loop()
    left: list[Any] = [loop.create_task(pool.checkout(target.host, target.port, checkout_timeout=None)) for _ in "ab"]

    async def both_wait() -> None:
        while pool.stats().waiting < 2:
            await asyncio.sleep(0.001)

    loop.run_until_complete(both_wait())
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del left[1]
        gc.collect()  # one task ends by being collected, the other one is kept
    state.things["left"] = left
    return []


def test_waiters_of_a_loop_that_was_closed_do_not_stay_in_the_queue(
    holder: Worker, two: list[Worker], tcp: Target
) -> None:
    one, other = two
    one.call(leave_waiters_in_a_closed_loop, tcp)
    holder.wait_stats(waiting=0)
    other.call(tasks.begin, tcp, "next", checkout_timeout=None)
    holder.wait_stats(waiting=1)
    holder.checkin("held")
    other.call(tasks.finish, "next")
    other.checkin("next")
    holder.wait_stats(in_use=0, waiting=0)


def run_again_and_again(state: State, target: Target, times: int) -> list[int]:
    pool = tasks.pool_of(state)
    found = []

    async def main() -> None:
        found.append(await tasks.use(pool, target, "again", checkout_timeout=20))

    for _ in range(times):
        asyncio.run(main())
    return found


def test_one_handle_serves_one_loop_after_the_other(worker: Worker, tcp: Target) -> None:
    worker.call(tasks.attach, max_connections=1)
    assert worker.call(run_again_and_again, tcp, 3) == [1, 1, 1]


def test_a_forked_child_goes_on_with_a_pool_of_its_own(harness: Harness, backend: Backend, tcp: Target) -> None:
    parent = harness.execute()
    parent.call(tasks.attach, max_connections=1)
    assert parent.call(run_again_and_again, tcp, 1) == [1]
    waiting = parent.begin(tasks.use_many, tcp, 3, thread="tasks")  # so that there is a thread that watches
    waiting.result()
    child = parent.fork()
    assert child.call(run_again_and_again, tcp, 2) == [1, 1]
    assert parent.call(run_again_and_again, tcp, 1) == [1]
    assert child.stats().processes == 2
    child.kill()


def close_over_waiters(state: State, target: Target) -> list[str]:
    """Close the pool while tasks wait in it; what they are told."""
    pool = tasks.pool_of(state)

    async def main() -> list[str]:
        waiting = [asyncio.ensure_future(pool.checkout(target.host, target.port, checkout_timeout=20)) for _ in "abc"]
        while pool.stats().waiting < 3:
            await asyncio.sleep(0.001)
        pool.close()
        return [type(error).__name__ for error in await asyncio.gather(*waiting, return_exceptions=True)]

    return list(tasks.run(state, main()))


def test_closing_a_pool_sends_its_tasks_away_and_its_thread_home(holder: Worker, harness: Harness, tcp: Target) -> None:
    (worker,) = harness.start_many(1)
    worker.call(tasks.attach)
    assert worker.call(close_over_waiters, tcp) == ["PoolStopped"] * 3
    holder.wait_stats(waiting=0, processes=1)
    wait_until(lambda: not [name for name in worker.call(commands.thread_names) if name.startswith("sharedpool")])
    holder.checkin("held")
    assert holder.use(tcp) == 1


def test_stopping_a_pool_sends_its_tasks_away(holder: Worker, harness: Harness, tcp: Target) -> None:
    (worker,) = harness.start_many(1)
    worker.call(tasks.begin, tcp, "waiting", checkout_timeout=None)
    holder.wait_stats(waiting=1)
    holder.call(commands.library, "stop_pool", "default")
    assert isinstance(worker.fails(PoolStopped, tasks.finish, "waiting"), PoolStopped)
    holder.discard("held")


# --- streams ----------------------------------------------------------------------------------------------------------


def by_stream(state: State, target: Target, texts: list[str]) -> list[str]:
    """Each text over streams of its own; what came back. Afterwards the loop watches as many descriptors as before."""
    pool = tasks.pool_of(state)

    async def main() -> list[str]:
        answers = []
        await pool.open()
        loop: Any = asyncio.get_running_loop()
        before = len(loop._selector.get_map()), len(os.listdir("/proc/self/fd"))
        for text in texts:
            async with pool.stream(target.host, target.port, target.transport, checkout_timeout=20) as (reader, writer):
                writer.write(text.encode() + b"\n")
                answers.append((await reader.readline()).decode().strip())
            assert len(loop._selector.get_map()) == before[0]
        await asyncio.sleep(0)
        return answers

    return list(tasks.run(state, main()))


def test_streams_are_made_per_lease_and_leave_the_connection_behind(
    two: list[Worker], backend: Backend, tcp: Target, unix: Target
) -> None:
    one, other = two
    one.call(tasks.attach, max_connections=2)
    assert one.call(by_stream, tcp, ["a", "b"]) == ["1 a", "1 b"]
    assert other.call(by_stream, tcp, ["c"]) == ["1 c"]
    assert other.use(tcp) == one.use(tcp) == 1
    assert one.call(by_stream, unix, ["d"]) == ["2 d"]
    assert backend.accepted == 2


def leave_it_dirty(state: State, target: Target, how: str) -> None:
    pool = tasks.pool_of(state)

    async def main() -> None:
        async with pool.stream(target.host, target.port, checkout_timeout=20) as (reader, writer):
            if how == "unread":
                writer.write(b"one\ntwo\n")
                await reader.readuntil(b"two")  # the end of the line stays in the reader
            elif how == "unsent":
                writer.write(b"x" * 50_000_000)
            elif how == "closed":
                writer.close()
            else:
                writer.write(b"one\n")
                await reader.readline()
                raise KeyError("in the block")

    with pytest.raises(KeyError) if how == "failed" else pytest.MonkeyPatch().context():
        tasks.run(state, main())


@pytest.mark.parametrize("how", ["unread", "unsent", "closed", "failed"])
def test_streams_that_are_left_unclean_end_their_connection(
    worker: Worker, backend: Backend, tcp: Target, how: str
) -> None:
    worker.call(tasks.attach, max_connections=1)
    worker.call(leave_it_dirty, tcp, how)
    assert worker.wait_stats(in_use=0, closing=0).discards == 1
    assert worker.use(tcp) == 2


# --- leases and permits -----------------------------------------------------------------------------------------------


def misuse(state: State, target: Target) -> bool:
    """A second checkin, and what a stale reference finds."""
    pool = tasks.pool_of(state)

    async def main() -> bool:
        lease = await pool.checkout(target.host, target.port)
        assert lease.conn.gettimeout() == 0.0
        conn = lease.conn
        lease.checkin()
        with pytest.raises(LeaseError):
            pool.checkin(lease)
        async with pool.connection(target.host, target.port) as again:
            assert again is conn
        return (await asyncio.get_running_loop().sock_recv(conn, 10)) == b""

    return bool(tasks.run(state, main()))


def test_a_lease_ends_once_and_its_socket_is_harmless_afterwards(worker: Worker, tcp: Target) -> None:
    worker.call(tasks.attach, max_connections=1)
    assert worker.call(misuse, tcp)
    assert worker.use(tcp) == 1  # and blocks again, as a thread's does


def most_at_once(state: State, calls: int) -> tuple[int, int, int]:
    """The most calls of a decorated coroutine function that ran at once; what is in use within a nested one; after."""
    permit = aio.permit("work", max_connections=3, checkout_timeout=20)
    running = most = 0

    @permit
    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    async def main() -> tuple[int, int, int]:
        await asyncio.gather(*[work() for _ in range(calls)])
        async with permit, permit:
            inside = permit.pool.stats().in_use
        return most, inside, permit.pool.stats().in_use

    found: tuple[int, int, int] = tasks.run(state, main())
    return found


def test_a_permit_caps_a_coroutine_function(worker: Worker) -> None:
    assert worker.call(most_at_once, 50) == (3, 2, 0)


def test_a_permit_decorates_coroutine_functions_only() -> None:
    with pytest.raises(OptionError, match="coroutine function"):
        aio.permit("work", max_connections=1)(lambda: None)  # type: ignore[arg-type, return-value]


# --- local mode -------------------------------------------------------------------------------------------------------


def wait_for_waiters(state: State, number: int) -> None:
    wait_until(lambda: tasks.pool_of(state).stats().waiting == number)


def test_local_mode_serves_tasks_too(harness: Harness, backend: Backend, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_MODE="local")
    worker.call(tasks.attach, max_connections=2)
    *numbers, _ = worker.call(tasks.use_many, tcp, 20, checkout_timeout=30)
    assert numbers == [1, 2]
    assert worker.call(by_stream, tcp, ["a"]) == ["2 a"] or backend.accepted == 2
    assert worker.call(most_at_once, 10) == (3, 2, 0)
    for label in ("one", "two"):
        worker.call(tasks.checkout, tcp, label=label)
    worker.call(tasks.begin, tcp, "waiting", checkout_timeout=None)
    worker.call(wait_for_waiters, 1)
    worker.call(tasks.cancel, "waiting")
    worker.call(wait_for_waiters, 0)
