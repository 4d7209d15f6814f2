"""The scope: one directory, one arbiter. Which directory, how safe it is, and when everything in it is gone again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sharedpool import AttachRefused, SharedPoolError, StartFailed, control, launch
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker


def own_directory(worker: Worker, scope: Scope) -> Path:
    """Where sharedpool keeps its files in this scope, learned by letting it work there once."""
    worker.call(commands.library, "start")
    found = {Path(name).parent for name in scope.files()}
    worker.call(commands.library, "stop")
    wait_until(lambda: not scope.arbiters() and not scope.files())
    assert len(found) == 1
    return found.pop()


def test_the_directory_is_private_however_open_its_parent_is(worker: Worker, scope: Scope) -> None:
    scope.directory.chmod(0o1777)
    worker.call(commands.library, "start")
    (directory,) = {Path(name).parent for name in scope.files()}
    assert directory.parent == scope.directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
def test_what_is_made_on_the_way_is_private_whatever_the_umask_is(
    harness: Harness, scope: Scope, tcp: Target, mask: int
) -> None:
    above = scope.directory / "run" / "app"
    worker = harness.start(SHAREDPOOL_DIR=str(above))
    worker.call(set_umask, mask)
    assert worker.use(tcp) == 1
    for made in (above.parent, above, above / "sharedpool"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def set_umask(state: State, mask: int) -> None:
    os.umask(mask)


def others_may_write(above: Path) -> str:
    above.chmod(0o777)
    return "mode 0777"


def another_group_may_write(above: Path) -> str:
    os.chown(above, -1, 12345)
    above.chmod(0o770)
    return "gid 12345"


def another_owns_it(above: Path) -> str:
    os.chown(above, 12345, -1)
    return "uid 12345"


def another_owns_it_and_it_is_sticky(above: Path) -> str:
    above.chmod(0o1777)
    os.chown(above, 12345, -1)
    return "uid 12345"


def a_link_leads_through_such_a_place(above: Path) -> str:
    open_to_all = above.with_name("open")
    (open_to_all / "below").mkdir(parents=True)
    open_to_all.chmod(0o777)
    above.rmdir()
    above.symlink_to("open/below")
    return "mode 0777"


def another_has_made_a_link(above: Path) -> str:
    elsewhere = above.with_name("elsewhere")
    elsewhere.mkdir()
    above.rmdir()
    above.symlink_to(elsewhere)
    os.chown(above, 12345, -1, follow_symlinks=False)
    return "uid 12345"


OPEN = [others_may_write, a_link_leads_through_such_a_place]
if os.geteuid() == 0:  # giving away needs root
    OPEN += [
        another_group_may_write, another_owns_it, another_owns_it_and_it_is_sticky, another_has_made_a_link,
    ]  # fmt: skip


@pytest.mark.parametrize("spoil", OPEN)
def test_a_directory_that_others_could_exchange_is_refused_with_the_parent_and_why(
    harness: Harness, scope: Scope, tcp: Target, spoil: Callable[[Path], str]
) -> None:
    above = scope.directory / "above"
    above.mkdir()
    why = spoil(above)
    worker = harness.start(SHAREDPOOL_DIR=str(above / "run"))
    error = worker.fails(StartFailed, commands.use, tcp)
    assert "is not safe: its parent" in str(error)
    assert why in str(error)
    assert scope.arbiters() == set()


def test_links_and_parents_that_nobody_else_can_change_are_followed(
    harness: Harness, scope: Scope, tcp: Target
) -> None:
    real = scope.directory / "real"
    real.mkdir(mode=0o775)
    real.chmod(0o775)  # the group is our own
    (scope.directory / "link").symlink_to("./real/../real")
    sticky = scope.directory / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    one = harness.start(SHAREDPOOL_DIR=str(scope.directory / "link"))
    same = harness.start(SHAREDPOOL_DIR=str(real))
    assert [one.use(tcp), same.use(tcp)] == [1, 1]
    assert harness.start(SHAREDPOOL_DIR=str(sticky)).use(tcp) == 2
    loop = scope.directory / "loop"
    loop.symlink_to("loop")
    harness.start(SHAREDPOOL_DIR=str(loop)).fails(StartFailed, commands.use, tcp)
    loop.unlink()


def spoil_mode(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)


def spoil_by_link(directory: Path) -> None:
    target = directory.with_name("elsewhere")
    target.mkdir(0o700)
    directory.symlink_to(target)


def spoil_owner(directory: Path) -> None:
    directory.mkdir(0o700)
    os.chown(directory, 12345, -1)


# Giving a directory away needs root; other users have nobody's directory to offer here.
SPOILERS = [spoil_mode, spoil_by_link] + [spoil_owner] * (os.geteuid() == 0)


@pytest.mark.parametrize("spoil", SPOILERS)
def test_an_unsafe_directory_is_refused_with_its_path_and_no_arbiter(
    harness: Harness, scope: Scope, tcp: Target, spoil: object
) -> None:
    teacher, worker = harness.start_many(2)
    directory = own_directory(teacher, scope)
    shutil.rmtree(directory, ignore_errors=True)
    spoil(directory)  # type: ignore[operator]
    error = worker.fails(SharedPoolError, commands.use, tcp)
    assert str(directory) in str(error)
    worker.fails(SharedPoolError, commands.library, "start")
    assert scope.arbiters() == set()
    assert scope.files() == []


def test_a_directory_with_a_path_of_more_than_200_bytes_works(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    directory = scope.directory / ("x" * 120) / ("y" * 120)
    directory.mkdir(parents=True)
    workers = [harness.start(SHAREDPOOL_DIR=str(directory)) for _ in range(2)]
    assert [worker.use(tcp) for worker in workers] == [1, 1]
    assert workers[0].call(commands.library, "find_pool", "default").arbiter_pid == scope.arbiter()
    assert backend.accepted == 1


def test_many_processes_that_start_at_once_get_one_arbiter(harness: Harness, scope: Scope, tcp: Target) -> None:
    workers = harness.start_many(16)
    begun = [worker.begin(commands.library, "start_pool", "default", max_connections=3) for worker in workers]
    arbiters = {pending.result().arbiter_pid for pending in begun}
    assert arbiters == {scope.arbiter()}


def test_many_first_checkouts_at_once_get_one_arbiter_and_one_cap(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    workers = harness.start_many(12, SHAREDPOOL_DEFAULT_MAX_CONNECTIONS="2")
    begun = [worker.begin(commands.use, tcp, f"worker {i}", checkout_timeout=30) for i, worker in enumerate(workers)]
    assert {pending.result() for pending in begun} <= {1, 2}
    assert backend.peak <= 2
    assert scope.arbiter() in scope.arbiters()


def test_the_arbiter_goes_after_its_last_client_and_takes_its_files_with_it(
    harness: Harness, scope: Scope, tcp: Target
) -> None:
    first, second = harness.start_many(2, SHAREDPOOL_LINGER="0.2")
    assert first.use(tcp) == second.use(tcp)
    arbiter = scope.arbiter()
    first.kill()
    second.wait_stats(processes=1)
    assert second.use(tcp) == 1
    assert scope.arbiter() == arbiter
    second.kill()
    wait_until(lambda: not scope.arbiters())
    assert scope.files() == []


def test_stop_ends_the_arbiter_at_once_and_leaves_no_file(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    worker.call(commands.library, "stop")
    wait_until(lambda: not scope.arbiters())
    wait_until(lambda: not scope.files())


def test_the_next_one_after_a_stop_gets_a_new_arbiter(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].use(tcp)
    first = scope.arbiter()
    two[0].call(commands.library, "stop")
    wait_until(lambda: not scope.arbiters())
    assert two[1].use(tcp) == 2
    assert scope.arbiter() != first


def test_apps_of_different_names_do_not_meet(harness: Harness, scope: Scope, backend: Backend, tcp: Target) -> None:
    place = {"SHAREDPOOL_DIR": "", "XDG_RUNTIME_DIR": str(scope.directory)}
    shop, same, other = (harness.start(SHAREDPOOL_APP=app, **place) for app in ("shop", "shop", "mail"))
    for worker in (shop, same, other):
        worker.attach(max_connections=1)
    assert [shop.use(tcp), same.use(tcp), other.use(tcp)] == [1, 1, 2]
    assert len(scope.arbiters()) == 2
    assert (shop.stats().processes, other.stats().processes) == (2, 1)


def test_an_app_may_be_named_by_the_call(harness: Harness, scope: Scope, backend: Backend, tcp: Target) -> None:
    place = {"SHAREDPOOL_DIR": "", "XDG_RUNTIME_DIR": str(scope.directory)}
    by_call, by_environment = harness.start(**place), harness.start(SHAREDPOOL_APP="shop", **place)
    by_call.attach(max_connections=1, app="shop")
    assert (by_call.use(tcp), by_environment.use(tcp)) == (1, 1)
    assert any("shop" in name for name in scope.files())


def test_start_without_a_scope_makes_a_private_one_for_the_caller_and_its_children(
    harness: Harness, scope: Scope, backend: Backend, tcp: Target
) -> None:
    place = {"SHAREDPOOL_DIR": "", "XDG_RUNTIME_DIR": str(scope.directory)}
    master, stranger = harness.start_many(2, **place)
    master.call(commands.library, "start")
    directory = master.call(commands.environment, "SHAREDPOOL_DIR")
    assert directory.startswith(str(scope.directory))
    first, second = master.fork(), master.fork()
    assert (first.use(tcp), second.use(tcp)) == (1, 1)
    assert stranger.use(tcp) == 2
    assert len(scope.arbiters()) == 2
    master.call(commands.library, "stop")
    wait_until(lambda: len(scope.arbiters()) == 1)
    wait_until(lambda: not Path(directory).exists(), what="the private directory is gone")


def test_a_process_of_another_pid_namespace_is_refused_by_name_of_both(
    harness: Harness, scope: Scope, tcp: Target
) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("binary unshare is missing")
    outside = harness.start()
    outside.use(tcp)
    inside = harness.execute("unshare", "--pid", "--fork", "--kill-child")
    assert (inside.inner_pid, inside.pid) == (1, inside.pid)
    error = inside.fails(AttachRefused, commands.use, tcp)
    for worker in (inside, outside):
        (number,) = re.findall(r"\d+", os.readlink(f"/proc/{worker.pid}/ns/pid"))
        assert number in str(error)
    assert outside.use(tcp) == 1
    assert processes.alive(scope.arbiter())


def fork_while_it_starts(state: State) -> int:
    """Another thread of this process holds the launchers' lock when a child is forked, which lives on."""
    with launch._start_lock(control._directory(), time.monotonic() + 10):
        child = os.fork()
        if child == 0:
            while True:
                time.sleep(60)
    return child


def kill_child(state: State, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_child_forked_while_an_arbiter_is_started_does_not_keep_others_from_starting_one(two: list[Worker]) -> None:
    child = two[0].call(fork_while_it_starts)
    two[1].attach(max_connections=1)
    assert two[1].begin(commands.stats).result().max_connections == 1
    two[0].call(kill_child, child)
