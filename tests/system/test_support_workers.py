"""The worker harness, tested by itself: commands, threads, forks, signals, and the leak check."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import commands, processes
from tests.support.leaks import check_nothing_left, take_census
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker

Start = Callable[[Harness], Worker]
STARTS: list[Start] = [Harness.start, Harness.execute]


def whoami(state: State) -> tuple[int, str]:
    return os.getpid(), threading.current_thread().name


def wait_event(state: State, name: str) -> str:
    state.things.setdefault(name, threading.Event()).wait()
    return name


def set_event(state: State, name: str) -> None:
    state.things.setdefault(name, threading.Event()).set()


def fail(state: State, text: str) -> None:
    raise ValueError(text)


def unpicklable(state: State) -> object:
    return threading.Lock()


def set_thing(state: State, name: str, value: object) -> None:
    state.things[name] = value


def get_thing(state: State, name: str) -> object:
    return state.things.get(name)


@pytest.mark.parametrize("start", STARTS)
def test_a_worker_is_a_process_of_its_own_that_carries_out_commands(harness: Harness, start: Start) -> None:
    worker = start(harness)
    pid, thread = worker.call(whoami)
    assert (pid, thread) == (worker.pid, "MainThread")
    assert pid != os.getpid()


@pytest.mark.parametrize("start", STARTS)
def test_a_worker_has_the_scope_of_the_test_and_no_other_setting(
    harness: Harness, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDPOOL_STRAY", "x")
    worker = start(harness)
    assert worker.call(commands.environment, "SHAREDPOOL_DIR") == harness.env["SHAREDPOOL_DIR"]
    assert worker.call(commands.environment, "SHAREDPOOL_STRAY") is None


def test_commands_of_different_threads_run_beside_each_other(worker: Worker) -> None:
    waiting = worker.begin(wait_event, "go", thread="t")
    assert worker.call(whoami) == (worker.pid, "MainThread")
    assert not waiting.done
    worker.call(set_event, "go", thread="u")
    assert waiting.result() == "go"


def test_an_exception_in_a_worker_is_raised_in_the_test_with_its_traceback(worker: Worker) -> None:
    with pytest.raises(ValueError, match="broken") as caught:
        worker.call(fail, "broken")
    assert "in fail" in "".join(caught.value.__notes__)
    assert worker.call(whoami)[0] == worker.pid


def test_a_value_that_cannot_be_pickled_is_an_error(worker: Worker) -> None:
    worker.fails(TypeError, unpicklable)


def test_a_forked_child_is_a_worker_with_its_parents_state(worker: Worker) -> None:
    worker.call(set_thing, "x", 1)
    child = worker.fork()
    worker.call(set_thing, "x", 2)
    assert child.pid != worker.pid
    assert child.call(get_thing, "x") == 1
    assert processes.parent(child.pid) == worker.pid


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_by_multiprocess_is_a_worker(harness: Harness, method: str) -> None:
    worker = harness.execute()
    worker.call(set_thing, "x", 1)
    child = worker.start_child(method)
    assert child.call(whoami)[0] == child.pid
    assert child.call(get_thing, "x") is None
    child.kill()


def test_a_stopped_worker_answers_after_it_was_resumed(worker: Worker) -> None:
    worker.stop()
    answer = worker.begin(whoami)
    assert processes.state(worker.pid) == "T"
    worker.resume()
    assert answer.result()[0] == worker.pid


def test_orphans_come_to_the_test_process(worker: Worker) -> None:
    child = worker.fork()
    worker.kill()
    wait_until(lambda: processes.parent(child.pid) == os.getpid())
    assert child.pid in processes.children()


def test_a_killed_worker_is_reported_with_what_it_wrote(worker: Worker) -> None:
    worker.kill()
    with pytest.raises(AssertionError, match="has ended"):
        worker.call(whoami)


def test_a_command_without_an_answer_shows_where_the_worker_stands(worker: Worker) -> None:
    worker.call(whoami)  # this module is imported there now
    pending = worker.begin(wait_event, "never")
    with pytest.raises(AssertionError, match=r"no answer within 0.2 s(.|\n)*wait_event"):
        pending.result(deadline=0.2)


@pytest.mark.parametrize("start", STARTS)
def test_a_worker_that_leaves_ends_by_itself(harness: Harness, start: Start) -> None:
    worker = start(harness)
    worker.begin(commands.leave)
    worker.wait_dead()
    assert worker.stderr() == ""


def test_the_census_finds_whatever_is_new(directory: Path) -> None:
    before = take_census(directory)
    reader, writer = os.pipe()
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(directory / "bound.sock"))
    (directory / "file").touch()
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="left over")
    thread.start()
    left = take_census(directory).left_behind(before)
    expected = [f"descriptor {reader} -> pipe", f"descriptor {writer} -> pipe", "descriptor", "thread left over"]
    expected += [f"bound Unix socket {directory}/bound.sock", f"file {directory}/bound.sock", f"file {directory}/file"]
    assert all(any(line.startswith(each) for line in left) for each in expected), left
    assert len(left) == 7
    event.set()
    thread.join()
    for number in (reader, writer):
        os.close(number)
    sock.close()
    for name in ("bound.sock", "file"):
        (directory / name).unlink()
    assert not take_census(directory).left_behind(before)


def test_the_leak_check_reports_and_ends_a_process_that_stays(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = take_census(directory)
    reader, writer = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-S", "-c", "input()"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)],
    )
    os.close(reader)
    monkeypatch.setattr("tests.support.leaks.DEADLINE", 0.1)
    with pytest.raises(AssertionError, match=f"process {pid}"):
        check_nothing_left(before, directory)
    assert not processes.alive(pid)
    os.close(writer)


def test_waiting_in_vain_says_what_for() -> None:
    with pytest.raises(AssertionError, match=r"not so within 0\.01 s: the moon"):
        wait_until(lambda: False, deadline=0.01, what="the moon")
