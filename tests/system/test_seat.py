"""Files of the runtime directory are removed under a living arbiter: it stays the only one, and is found."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharedpool import scope as scopes
from tests.support import commands, processes
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.waiting import wait_until
from tests.support.workers import Harness, Worker


def remove(*names: str) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        for name in names:
            (directory / name).unlink(missing_ok=True)

    act.__name__ = " ".join(names)
    return act


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def remove_parents(directory: Path) -> None:
    shutil.rmtree(directory.parent)


def rename(directory: Path) -> None:
    directory.rename(directory.parent.parent / "elsewhere")


def replace(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir(mode=0o700)


def exchange_every_file(directory: Path) -> None:
    for path in list(directory.iterdir()):
        path.unlink()
        path.touch(mode=0o600)


LOSSES = [
    *map(remove, scopes.OUR_FILES[:5]), remove(scopes.LEADER_LOCK, scopes.START_LOCK),
    remove(scopes.ARBITER_SOCKET, scopes.LEADER_LOCK), remove(*scopes.OUR_FILES), remove_directory, remove_parents,
    rename, replace, exchange_every_file,
]  # fmt: skip


@pytest.fixture
def runtime(scope: Scope, directory: Path) -> Iterator[Path]:
    """The runtime directory, two levels below what the leak check looks at."""
    scope.settings["SHAREDPOOL_DIR"] = str(scope.directory / "run")
    yield scope.directory / "run" / "sharedpool"
    scope.stop()
    shutil.rmtree(directory / "elsewhere", ignore_errors=True)
    shutil.rmtree(scope.directory / "elsewhere", ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (scope.directory / "run").rmdir()


def is_found(worker: Worker, arbiter: int) -> bool:
    answer = worker.call(commands.library, "ping", timeout=10.0, thread="ping")
    return bool(answer) and answer["pid"] == arbiter


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
def test_whatever_is_removed_a_newcomer_gets_what_is_idle_from_the_one_arbiter(
    scope: Scope, runtime: Path, harness: Harness, backend: Backend, tcp: Target, lose: Callable[[Path], None]
) -> None:
    one, newcomer, latecomer = harness.start_many(3)
    one.attach(max_connections=2)
    held = one.checkout(tcp)
    one.use(tcp)
    arbiter = scope.arbiter()
    lose(runtime)
    assert newcomer.use(tcp) == 2
    wait_until(lambda: is_found(newcomer, arbiter))
    latecomer.attach(max_connections=2)
    assert latecomer.use(tcp) == 2
    assert one.exchange(held) == 1
    one.wait_stats(processes=3, in_use=1, idle=1)
    assert scope.arbiter() == arbiter
    assert backend.peak == 2


def test_removed_again_and_again_while_processes_come_there_is_one_arbiter_and_one_cap(
    scope: Scope, runtime: Path, harness: Harness, backend: Backend, tcp: Target
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    one, *others = harness.start_many(9)
    one.attach(max_connections=2)
    one.use(tcp)
    arbiter = scope.arbiter()
    losses = [remove(*chosen.sample(scopes.OUR_FILES, 3)), remove_directory, replace]
    for first, second in zip(others[::2], others[1::2], strict=True):
        coming = [each.begin(commands.use, tcp) for each in (first, second)]
        while not all(each.done for each in coming):
            with contextlib.suppress(OSError):
                chosen.choice(losses)(runtime)
            chosen.choice(coming).done
            with contextlib.suppress(AssertionError):
                wait_until(lambda asked=coming: all(each.done for each in asked), chosen.uniform(0.5, 3.0))
        assert all(each.result() in (1, 2) for each in coming)
    wait_until(lambda: is_found(one, arbiter))
    wait_until(lambda: scope.arbiters() == {arbiter})
    assert one.stats().processes == 9
    assert backend.peak <= 2


def test_who_comes_while_the_arbiter_stands_still_starts_no_second_one(
    scope: Scope, runtime: Path, harness: Harness, backend: Backend, tcp: Target
) -> None:
    one, newcomer = harness.start_many(2)
    one.attach(max_connections=1)
    one.use(tcp)
    arbiter = scope.arbiter()
    os.kill(arbiter, signal.SIGSTOP)
    remove_directory(runtime)
    coming = newcomer.begin(commands.use, tcp)
    wait_until(lambda: len(scope.arbiters()) == 2)  # one comes, sees that the first one lives, and waits
    assert not (runtime / scopes.ARBITER_SOCKET).exists()
    os.kill(arbiter, signal.SIGCONT)
    assert coming.result() == 1
    wait_until(lambda: scope.arbiters() == {arbiter})
    assert backend.peak == 1


def test_an_arbiter_without_pools_makes_room_for_the_one_that_was_started_instead(
    scope: Scope, runtime: Path, harness: Harness, backend: Backend, tcp: Target
) -> None:
    one, newcomer = harness.start_many(2)
    one.call(commands.library, "start")
    first = scope.arbiter()
    os.kill(first, signal.SIGSTOP)
    remove_directory(runtime)
    newcomer.attach(max_connections=1)
    assert newcomer.use(tcp) == 1
    os.kill(first, signal.SIGCONT)
    wait_until(lambda: not processes.alive(first))
    assert one.use(tcp) == 1
    assert newcomer.stats().processes == 2
    assert len(scope.arbiters()) == 1
    assert backend.peak == 1


def test_an_arbiter_that_nobody_needs_goes_and_makes_no_directory_anew(
    scope: Scope, runtime: Path, harness: Harness
) -> None:
    worker = harness.start(SHAREDPOOL_LINGER="3600")
    worker.call(commands.library, "start_pool", "api", max_connections=1)
    arbiter = scope.arbiter()
    remove_parents(runtime)
    wait_until(lambda: not processes.alive(arbiter))
    assert not runtime.parent.exists()


def test_directories_that_were_made_anew_go_with_the_arbiter(
    scope: Scope, runtime: Path, harness: Harness, tcp: Target
) -> None:
    worker = harness.start(SHAREDPOOL_LINGER="0")
    worker.use(tcp)
    arbiter = scope.arbiter()
    remove_parents(runtime)
    wait_until((runtime / scopes.ARBITER_SOCKET).exists)
    worker.kill()
    wait_until(lambda: not processes.alive(arbiter))
    assert not runtime.parent.exists()


def test_a_successor_of_one_whose_directory_was_removed_has_its_pools(
    scope: Scope, runtime: Path, harness: Harness, backend: Backend, tcp: Target
) -> None:
    one, newcomer = harness.start_many(2)
    one.attach(max_connections=1)
    held = one.checkout(tcp)
    arbiter = scope.arbiter()
    os.kill(arbiter, signal.SIGSTOP)
    remove_directory(runtime)
    os.kill(arbiter, signal.SIGKILL)
    wait_until(lambda: not processes.alive(arbiter))
    coming = newcomer.begin(commands.use, tcp)
    wait_until(lambda: one.stats().waiting == 1)
    one.checkin(held)
    assert coming.result() == 1
    assert backend.peak == 1


def test_the_directory_is_locked_so_that_systemd_tmpfiles_spares_it(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    directory = scope.directory / "sharedpool"
    with pytest.raises(BlockingIOError):
        lock(directory)
    remove_directory(directory)
    wait_until((directory / scopes.ARBITER_SOCKET).exists)
    with pytest.raises(BlockingIOError):
        lock(directory)


def lock(directory: Path) -> None:
    """As systemd-tmpfiles does before it removes what is old."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
