"""Which process a number means, and what is not known of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from sharedpool import processes, segment, succession
from sharedpool.layout import Geometry
from sharedpool.processes import Process
from sharedpool.roster import Attached

SCOPE = "test-processes"


def test_a_process_lives_until_it_has_ended_and_its_number_alone_does_not_make_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = processes.find(child.pid)
    assert found.start > 0
    assert found.lives()
    assert not Process(child.pid, found.start + 1).lives(), "another process with this number"
    assert Process(child.pid, 0).lives(), "when it started is not known"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not found.lives(), "a zombie has ended"
    child.communicate()
    assert not Process(child.pid, 0).lives()
    for number in (0, -1, 2**31, 2**70):
        assert not Process(number, 0).lives()


def test_a_process_whose_first_thread_alone_has_ended_lives() -> None:
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).syscall(60 if __import__('platform').machine() == 'x86_64' else 93, 0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        found = processes.find(child.pid)
        limit = time.monotonic() + 20
        while processes._stat(child.pid)[0] != "Z" and time.monotonic() < limit:
            time.sleep(0.001)
        assert found.lives()
        child.kill()


def test_one_that_started_after_a_time_is_younger_than_it_even_if_the_machine_slept() -> None:
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    process = Process(1, 100)  # 100 ticks after the boot
    now = 1000 * tick
    assert process.is_younger_than(99 * tick, now, now)
    assert not process.is_younger_than(100 * tick, now, now)
    assert not process.is_younger_than(99 * tick, now, now + 5 * tick), "it may have slept before the start"
    assert not Process(1, 0).is_younger_than(0, now, now), "nothing is known"


def test_who_stands_still_is_told_from_who_runs() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not processes.is_stopped(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert processes.is_stopped(child.pid)
    child.kill()
    child.communicate()
    assert not processes.is_stopped(child.pid)


def test_a_process_that_has_a_pool_is_told_from_one_that_has_not_and_from_one_that_has_ended() -> None:
    made = segment.create("default", Geometry(4, 4, 4), SCOPE)
    ours, memory = processes.find(os.getpid()), segment.memory_of(made.fd)
    try:
        assert succession.has(ours, SCOPE, "default") is True
        assert succession.has(ours, SCOPE, "default", memory) is True
        assert succession.has(ours, SCOPE, "default", "0:0") is False
        assert succession.has(ours, SCOPE, "other") is False
        assert succession.has(Process(ours.pid, ours.start + 1), SCOPE, "default") is False
    finally:
        made.let_go()


def test_of_several_segments_of_one_name_the_one_counts_that_was_given_out_last() -> None:
    old, new = (segment.create("default", Geometry(4, 4, 4), SCOPE) for _ in range(2))
    ours = processes.find(os.getpid())
    copies = [os.dup(old.fd) for _ in range(3)]
    noted = [Attached("default", segment.memory_of(each.fd), ours) for each in (old, new)]
    try:
        for order, expected in ((noted, new), (noted[::-1], old)):
            found, kept = succession.find(SCOPE, order)
            assert kept == {}
            assert segment.memory_of(found["default"].fd) == segment.memory_of(expected.fd)
            found["default"].let_go()
        gone = Attached("default", "0:0", Process(ours.pid, ours.start + 1))
        found, kept = succession.find(SCOPE, [*noted, gone])
        assert segment.memory_of(found["default"].fd) == segment.memory_of(new.fd)
        found["default"].let_go()
    finally:
        for copy in copies:
            os.close(copy)
        for made in (old, new):
            made.let_go()
