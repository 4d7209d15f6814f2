"""The real mutex in real shared memory: signals, other threads, killed, stopped and forking holders."""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import mmap
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sharedpool import invariants, native, segment
from sharedpool import mutex as mutexes
from sharedpool.held import Patience
from sharedpool.layout import (
    ARBITER_ROW,
    DIRTY,
    FIRST_ROW,
    GATE,
    IDLE,
    LEASED,
    ROW_LIVE,
    STATE,
    VER,
    Geometry,
    leased_word,
    opening_word,
    tag_of,
    with_state,
)
from sharedpool.segment import Segment
from sharedpool.table import BUSY, DONE, STALE, Table

from ..core.tables import A, BreakingLease, BreakingWords, Lease, must
from ..support.segments import fork_with
from ..support.waiting import wait_until

# pytest-xdist has a thread of its own, so every fork warns.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ME, OTHER = FIRST_ROW, FIRST_ROW + 1


@pytest.fixture
def made() -> Iterator[Segment]:
    """A segment of a small pool. It stays mapped, as segments do; only its descriptor is closed."""
    one = segment.create("test", Geometry(FIRST_ROW + 2, 4, 4))
    one.words[4] = 2
    for row in (ME, OTHER):
        must(one.table(ARBITER_ROW).set_row(row, 0, ROW_LIVE | os.getpid() << 4, row, 1))
    yield one
    os.close(one.fd)


def lock_word(made: Segment) -> Any:
    """The mutex's first 32 bits: 0 while nobody has it (glibc and musl keep the owner's thread id there or nearby)."""
    start = made.words_address - 4096 + 64
    words = (ctypes.c_uint * 3).from_address(start)
    must_differ = bytes(words)
    assert -made.mutex == 0
    held = [
        index for index in range(3) if words[index] != int.from_bytes(must_differ[4 * index : 4 * index + 4], "little")
    ]
    +made.mutex
    return ctypes.c_uint.from_address(start + 4 * held[0])


def leased(table: Table, key: int = A) -> int:
    """A connection leased to the table's row."""
    w = table.words
    at = w[9] or table.slot_at(w[10])
    seen, counter = w[at], table.counter(0)
    must(table.take_free(at, seen, opening_word(seen, table.row), w[GATE], Lease(), key, counter, 1))
    must(table.swap(at, w[at], with_state(w[at], LEASED), Lease(), 0, 0, 1))
    return at


def warm_pairs(table: Table, at: int, times: int) -> None:
    """Checkins and checkouts of one connection."""
    w, lease, tag, counter = table.words, Lease(), tag_of(A), table.counter(0)
    for _ in range(times):
        seen = w[at]
        must(table.put_idle(at, seen, seen - 1, w[GATE], tag, 1))
        must(table.take_idle(at, seen - 1, leased_word(seen - 1, table.row), w[GATE], lease, counter, 1))


def forked(act: Callable[[], object], made: Segment | None = None) -> int:
    """A child that does this and nothing else; its pid. Whatever it raises is its exit code 1.

    It shares the segment `made` with this process.
    """
    pid = fork_with(made)
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    except BaseException:
        os._exit(1)
    raise AssertionError


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- nothing comes between --------------------------------------------------------------------------------------------


def test_no_signal_handler_runs_inside_a_section(made: Segment) -> None:
    table, word = made.table(ME), lock_word(made)
    at = leased(table)
    seen = {"held": 0, "free": 0}

    def handler(number: int, frame: object) -> None:
        seen["held" if word.value else "free"] += 1

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        while seen["free"] < 1000 and not seen["held"]:
            warm_pairs(table, at, 200)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen["held"] == 0


def test_no_other_thread_runs_inside_a_section(made: Segment) -> None:
    table, word = made.table(ME), lock_word(made)
    at = leased(table)
    seen = {"held": 0, "free": 0}
    stop: list[bool] = []

    def spin() -> None:
        while not stop:
            seen["held" if word.value else "free"] += 1

    interval = sys.getswitchinterval()
    spinner = threading.Thread(target=spin)
    sys.setswitchinterval(1e-6)
    try:
        spinner.start()
        warm_pairs(table, at, 5000)
    finally:
        sys.setswitchinterval(interval)
        stop.append(True)
        spinner.join()
    assert seen["free"] > 100
    assert seen["held"] == 0


def test_the_two_tests_above_would_see_a_section_that_something_can_come_into(made: Segment) -> None:
    word, seen = lock_word(made), []
    mutex = made.mutex

    def handler(number: int, frame: object) -> None:
        seen.append(word.value != 0)

    def section_with_a_call() -> None:
        if -mutex == 0:
            try:
                signal.raise_signal(signal.SIGALRM)
            finally:
                +mutex

    before = signal.signal(signal.SIGALRM, handler)
    try:
        section_with_a_call()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [True]


def test_no_collection_of_garbage_runs_inside_a_section(made: Segment) -> None:
    table, word = made.table(ME), lock_word(made)
    at = leased(table)
    seen = {"held": 0, "free": 0}

    def looked(phase: str, info: object) -> None:
        seen["held" if word.value else "free"] += 1

    threshold = gc.get_threshold()
    gc.callbacks.append(looked)
    rows: list[Any] = []
    try:
        gc.set_threshold(20, 1000, 1000)
        for number in range(3000):
            rows.append((number, number, number, number))  # what eats the free list of 4-tuples
            warm_pairs(table, at, 1)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(looked)
    assert seen["free"] > 20
    assert seen["held"] == 0


class RaisingTrylock:
    """A trylock with which a signal arrives, as if by chance; all in C, so that nothing is looked for before it."""

    def __init__(self, made: Segment) -> None:
        libc = ctypes.PyDLL(None)
        both: list[Any] = [functools.partial(libc["raise"], signal.SIGALRM), made.mutex.__neg__]
        self.call = native.Call(
            functools.partial(sum, map(operator.call, both)), made.mutex.__pos__, made.mutex.__invert__
        )


class Interrupted(Exception):
    """What the signal's handler raises."""


def interrupted(table: Table, at: int, new: int) -> Lease:
    """A checkin or checkout in whose trylock a signal arrives whose handler raises; gives the lease."""

    def handler(number: int, frame: object) -> None:
        raise Interrupted

    lease, seen, gate, counter, tag = Lease(), table.words[at], table.words[GATE], table.counter(0), tag_of(A)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        if seen & STATE == IDLE:
            table.take_idle(at, seen, new, gate, lease, counter, 1)
        else:
            table.put_idle(at, seen, new, gate, tag, 1)
        time.sleep(0)  # a call: the handler runs here at the latest
    except Interrupted:
        return lease
    finally:
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("no signal came")


def test_a_signal_whose_handler_raises_waits_until_the_section_is_over(made: Segment) -> None:
    table = made.table(ME)
    at = leased(table)
    warm_pairs(table, at, 1)
    seen = table.words[at]
    must(table.put_idle(at, seen, seen - 1, table.words[GATE], tag_of(A), 1))
    new = leased_word(seen - 1, ME)
    table.mutex = RaisingTrylock(made).call
    lease = interrupted(table, at, new)
    assert (lease.word, made.words[at], made.words[DIRTY]) == (new, new, 0)
    assert -made.mutex == 0, "the mutex was left locked"
    +made.mutex


def test_a_signal_that_comes_with_the_news_of_a_death_does_not_leave_the_mutex_locked(made: Segment) -> None:
    table = made.table(ME)
    at = leased(table)
    assert ended(forked(lambda: die_holding(made), made)) == -signal.SIGKILL
    table.mutex = RaisingTrylock(made).call
    interrupted(table, at, with_state(table.words[at], IDLE))
    code = -made.mutex
    if code in (0, errno.EOWNERDEAD):
        ~made.mutex
        +made.mutex
    assert code in (0, errno.EOWNERDEAD), f"the mutex was left locked: {errno.errorcode[code]}"


# --- the operators ----------------------------------------------------------------------------------------------------


def test_held_by_another_process_it_is_busy_and_by_this_thread_a_deadlock(made: Segment) -> None:
    assert -made.mutex == 0
    assert -made.mutex == errno.EDEADLK
    assert ended(forked(lambda: os._exit(-made.mutex), made)) == errno.EBUSY
    assert ended(forked(lambda: os._exit(+made.mutex), made)) == errno.EPERM
    assert +made.mutex == 0
    assert +made.mutex == errno.EPERM


def test_a_platform_with_robust_mutexes_is_not_refused() -> None:
    mutexes.prove()


def test_a_mutex_whose_holder_died_and_that_was_not_made_consistent_is_lost_for_ever() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mutexes.initialize(address)
    mutex = mutexes.attach(address)
    assert ended(forked(lambda: os._exit(-mutex))) == 0
    assert -mutex == errno.EOWNERDEAD
    +mutex
    assert -mutex == errno.ENOTRECOVERABLE  # never unlock now


# --- holders that die, stop, fail, fork -------------------------------------------------------------------------------


def die_holding(made: Segment) -> None:
    -made.mutex
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_store(made: Segment, k: int, act: Callable[[Table, Any], object]) -> int:
    """A child that acts and is killed instead of its k-th store; its exit code."""
    stores = [0]

    def store() -> None:
        stores[0] += 1
        if stores[0] == k:
            os.kill(os.getpid(), signal.SIGKILL)

    words: Any = BreakingWords(made.words, store)
    marks: Any = BreakingWords(made.marks, store)
    under = made.table(OTHER)
    table = Table(words, marks, made.mutex, made.geometry, OTHER, under.find)
    return ended(forked(lambda: act(table, BreakingLease(store)), made))


def test_whoever_comes_after_a_holder_that_was_killed_repairs_and_goes_on(made: Segment) -> None:
    table = made.table(ME)
    mine = leased(table)
    at = leased(made.table(OTHER))
    must(table.put_idle(at, made.words[at], with_state(made.words[at], IDLE), made.words[GATE], tag_of(A), 1))
    gate = made.words[GATE]
    assert ended(forked(lambda: die_holding(made), made)) == -signal.SIGKILL
    seen = made.words[mine]
    assert table.put_idle(mine, seen, seen - 1, gate, tag_of(A), 2) == STALE
    assert made.words[DIRTY] == 0
    invariants.check(table)
    assert table.put_idle(mine, seen, seen - 1, made.words[GATE], tag_of(A), 2) == DONE


# Slow: a fork per store.
def test_a_holder_may_be_killed_at_every_store_of_a_checkout(made: Segment) -> None:
    table, w = made.table(ME), made.words

    def open_one(child: Table, lease: Any) -> int:
        at = w[9] or child.slot_at(w[10])
        return child.take_free(at, w[at], opening_word(w[at], OTHER), w[GATE], lease, A, child.counter(0), 1)

    for k in range(1, 30):
        before = w[VER]
        code = killed_at_store(made, k, open_one)
        assert table.leave(table.cell_at(0), 99, 0) == STALE  # whoever comes next
        invariants.check(table)
        taken = [at for _, at, word in invariants.slots(table) if word & STATE]
        for at in taken:
            arbiter = made.table(ARBITER_ROW)
            must(arbiter.close(at, w[at], w[at + 2], 0, arbiter.counter(0), 2))
            must(arbiter.free(at, w[at], w[GATE], 0))
        if code == 0:
            assert k > 10
            return
        assert code == -signal.SIGKILL
        assert w[VER] > before or k == 1
    raise AssertionError("the section does not end")


def test_a_holder_that_is_stopped_keeps_others_busy_until_their_deadline_and_no_longer(made: Segment) -> None:
    table = made.table(ME)
    at = leased(table)
    seen = made.words[at]

    def hold_while_stopped() -> None:
        -made.mutex
        os.kill(os.getpid(), signal.SIGSTOP)
        +made.mutex

    pid = forked(hold_while_stopped, made)
    try:
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        patience = Patience(time.monotonic_ns() + 1_000_000_000)
        tries = 1
        while (
            answer := table.put_idle(at, seen, seen - 1, made.words[GATE], tag_of(A), 1)
        ) == BUSY and patience.wait():
            tries += 1
        assert (answer, made.words[at]) == (BUSY, seen)
        assert tries > 4
        assert time.monotonic_ns() >= patience.limit
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    assert table.put_idle(at, seen, seen - 1, made.words[GATE], tag_of(A), 1) == DONE


class Failing:
    """A lease that cannot be stored to."""

    @property
    def word(self) -> int:
        return 0

    @word.setter
    def word(self, value: int) -> None:
        raise MemoryError


def test_an_exception_inside_leaves_the_mutex_free_and_the_table_to_be_repaired(made: Segment) -> None:
    table, w = made.table(ME), made.words
    at = table.slot_at(0)
    with pytest.raises(MemoryError):
        table.take_free(at, 0, opening_word(0, ME), w[GATE], Failing(), A, table.counter(0), 1)
    assert w[DIRTY] == ME
    assert ended(forked(lambda: os._exit(-made.mutex), made)) == 0  # free: another process got it, and died with it
    assert made.table(OTHER).claim_cell(table.cell_at(0)) == STALE
    assert (w[DIRTY], w[at]) == (0, 0)
    invariants.check(table)
    assert leased(table) == at


def test_a_child_forked_while_another_thread_holds_the_mutex_neither_has_nor_frees_it(made: Segment) -> None:
    table = made.table(ME)
    at = leased(table)
    seen = made.words[at]
    holds, done = threading.Event(), threading.Event()

    def hold() -> None:
        -made.mutex
        holds.set()
        done.wait(10)
        +made.mutex

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert holds.wait(10)

        def child() -> None:
            assert table.put_idle(at, seen, seen - 1, made.words[GATE], tag_of(A), 1) == BUSY
            assert +made.mutex == errno.EPERM

        assert ended(forked(child, made)) == 0
        assert -made.mutex == errno.EBUSY  # the thread still has it
    finally:
        done.set()
        holder.join()
    assert table.put_idle(at, seen, seen - 1, made.words[GATE], tag_of(A), 1) == DONE


def test_a_thread_that_ended_with_the_mutex_is_a_dead_holder_too(made: Segment) -> None:
    holder = threading.Thread(target=lambda: -made.mutex)
    holder.start()
    holder.join()
    table = made.table(ME)
    answers: list[int] = []

    def answered() -> bool:
        answers.append(table.claim_cell(table.cell_at(0)))
        return answers[-1] != BUSY

    wait_until(answered)  # join returns a moment before the kernel's thread has ended
    assert answers[-1] == STALE
    assert table.claim_cell(table.cell_at(0)) == DONE


def test_a_tracer_may_run_inside_and_does_no_harm(made: Segment) -> None:
    table = made.table(ME)
    at = leased(table)
    lines = [0]

    def trace(frame: object, event: str, argument: object) -> Any:
        lines[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        warm_pairs(table, at, 20)
    finally:
        sys.settrace(before)
    assert lines[0] > 100
    invariants.check(table)


def test_marks_are_found_by_their_tag_within_the_range_asked_for(made: Segment) -> None:
    find = made.table(ME).find
    for index, tag in enumerate((7, 9, 7, 0xFFFF_FFFF)):
        made.marks[index] = tag
    assert [find(7, 0, 4), find(7, 1, 4), find(7, 3, 4), find(9, 0, 1), find(9, 2, 2)] == [0, 2, -1, -1, -1]
    assert find(0xFFFF_FFFF, 0, 4) == 3
    assert find(7, 3, 1) == -1
