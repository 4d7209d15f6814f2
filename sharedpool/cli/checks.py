"""What `sharedpool doctor` looks at. Every check answers in a sentence; none starts an arbiter or changes anything."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import psutil

from .. import inspection, launch, mutex, options, scope
from ..errors import SharedPoolError
from ..inspection import NoArbiter
from ..layout import LAYOUT, SERVED
from ..pool import mode

OK: Final = "ok"
WARNING: Final = "warning"
PROBLEM: Final = "PROBLEM"

#: What a process needs beside the connections: the interpreter's own, the channels, an application's files.
_SPARE: Final = 64
#: A worker holds two descriptors for each connection that it has: the user's, and the pool's own.
_EACH: Final = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it is, and what was found."""

    name: str
    level: str
    text: str

    def as_row(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def all_checks() -> list[Check]:
    """Everything, in the order in which things depend on each other."""
    found: list[Check] = []
    for name, look in _ALONE:
        found.extend(_guarded(name, look))
    where = inspection.directory()
    try:
        about = inspection.ask(where, "about")
    except NoArbiter:
        found.append(Check("arbiter", OK, "none runs; the first process that uses a pool starts it"))
        return found
    except (SharedPoolError, OSError) as error:
        found.append(Check("arbiter", PROBLEM, str(error)))
        return found
    found.append(Check("arbiter", OK, f"process {about['pid']}, Python {about['python']}"))
    found.append(version_check(about))
    pools = _pools(where)
    found.extend(_guarded("open files", lambda: _arbiter_files(about, pools)))
    found.extend(_guarded("open files", lambda: _worker_files(pools)))
    found.extend(_guarded("forks", lambda: _forks(pools)))
    return found


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(look())
    except (SharedPoolError, OSError, psutil.Error) as error:
        return [Check(name, PROBLEM, str(error))]


@dataclasses.dataclass(frozen=True, slots=True)
class PoolFacts:
    """A pool's name, its cap, and its attached processes as the registry told them at the time `asked`."""

    name: str
    maximum: int
    workers: list[dict[str, Any]]
    asked: float

    def attached_at(self, worker: dict[str, Any]) -> float:
        """When it attached, seconds since boot."""
        return self.asked - float(worker["age"])


def _pools(where: str) -> list[PoolFacts]:
    found = []
    for facts in inspection.overview():
        stats, asked = facts["stats"], time.clock_gettime(time.CLOCK_BOOTTIME)
        workers = inspection.ask(where, "workers", stats.name)
        found.append(PoolFacts(stats.name, stats.max_connections, workers, asked))
    return found


# --- without an arbiter -----------------------------------------------------------------------------------------------


def _interpreter() -> Iterator[Check]:
    what = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if mode() == "local":
        yield Check(
            "interpreter", WARNING, f"{what}; local mode: processes with this environment have a pool each, and no"
            " common cap",
        )  # fmt: skip
    else:
        yield Check("interpreter", OK, f"{what}; the arbiter is run by {launch.interpreter()}")


def _scope() -> Iterator[Check]:
    given = next((name for name in ("SHAREDPOOL_DIR", "SHAREDPOOL_APP") if os.environ.get(name)), None)
    reason = f"by {given}={os.environ[given]}" if given else "the default"
    path = inspection.directory()
    if not os.path.lexists(path):
        yield Check("scope", OK, f"{path} ({reason}) is not there yet; its first user makes it")
        return
    os.close(scope.open_directory(path))
    yield Check("scope", OK, f"{path} ({reason}), this user's and 0700")


def _mutex() -> Iterator[Check]:
    mutex.prove()
    yield Check("mutex", OK, "a death with a mutex held is told")


def _pidfd() -> Iterator[Check]:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        yield Check("pidfd", WARNING, f"forbidden here ({error}); deaths are noticed by polling, within 0.1 s")
    else:
        yield Check("pidfd", OK, "deaths of processes are told at once")


def _environment() -> Iterator[Check]:
    names = [name for name in os.environ if name.startswith("SHAREDPOOL_DEFAULT_")]
    options.given("default", {}, os.environ)
    yield Check("environment", OK, f"options of pool 'default' from {', '.join(sorted(names)) or 'nothing'}")


_ALONE: Final = (
    ("interpreter", _interpreter),
    ("scope", _scope),
    ("environment", _environment),
    ("mutex", _mutex),
    ("pidfd", _pidfd),
)


# --- with an arbiter --------------------------------------------------------------------------------------------------


def version_check(about: dict[str, Any]) -> Check:
    """The arbiter keeps the code that it was started with; an upgrade needs a restart of all."""
    ours = getattr(sys.modules["sharedpool"], "__version__", "unknown")
    if about["layout"] in SERVED[:-1]:
        return Check(
            "version", WARNING, f"the arbiter has layout {about['layout']} ({about['version']}), this package {LAYOUT}"
            f" ({ours}): what came with that is off before a new arbiter takes over and the last old process has gone",
        )  # fmt: skip
    if about["layout"] != LAYOUT:
        return Check(
            "version", PROBLEM, f"the arbiter has layout {about['layout']} ({about['version']}), this package {LAYOUT}"
            f" ({ours}): processes that start now are refused; restart all processes of the scope",
        )  # fmt: skip
    if about["version"] != ours:
        return Check("version", WARNING, f"the arbiter is {about['version']}, this package {ours}; they fit together")
    return Check("version", OK, f"{ours}, the arbiter's too")


def file_check(limit: int, needed: int, who: str) -> Check:
    """A limit of open files against what is needed when all caps are reached."""
    if limit < needed:
        return Check(
            "open files", PROBLEM, f"{who} may have {limit} (RLIMIT_NOFILE) and needs {needed} when all caps are"
            " reached",
        )  # fmt: skip
    return Check("open files", OK, f"{who} may have {limit} and needs {needed} at most")


def _arbiter_files(about: dict[str, Any], pools: list[PoolFacts]) -> Iterator[Check]:
    rows = sum(len(pool.workers) for pool in pools)
    needed = sum(pool.maximum for pool in pools) + 3 * rows + _SPARE  # two channels and a pidfd for each row
    yield file_check(about["files"], needed, f"the arbiter, process {about['pid']},")


def _worker_files(pools: list[PoolFacts]) -> Iterator[Check]:
    """The worker that comes nearest to its limit."""
    needed: dict[int, int] = {}
    for pool in pools:
        for worker in pool.workers:
            needed[worker["pid"]] = needed.get(worker["pid"], _SPARE) + _EACH * pool.maximum
    limits = {pid: _file_limit(pid) for pid in needed}
    known = {pid: limit for pid, limit in limits.items() if limit is not None}
    if known:
        pid = min(known, key=lambda pid: known[pid] - needed[pid])
        yield file_check(known[pid], needed[pid], f"process {pid}")


def _file_limit(pid: int) -> int | None:
    try:
        soft, _ = psutil.Process(pid).rlimit(resource.RLIMIT_NOFILE)
    except psutil.Error:
        return None
    return sys.maxsize if soft == resource.RLIM_INFINITY else int(soft)


def _forks(pools: list[PoolFacts]) -> Iterator[Check]:
    """A pool used in the master before the fork is right, but costs: the master holds a row and idle connections."""
    found = [each for pool in pools for each in _used_before_fork(pool)]
    yield from found or [Check("forks", OK, "no pool was used before a fork")]


def _used_before_fork(pool: PoolFacts) -> Iterator[Check]:
    born = {worker["pid"]: _born(worker["pid"]) for worker in pool.workers}
    for worker in pool.workers:
        pid, attached = worker["pid"], pool.attached_at(worker)
        younger = [child for child, when in born.items() if _parent(child) == pid and when > attached]
        if younger:
            yield Check(
                "forks", WARNING, f"process {pid} used pool {pool.name!r} before it forked {len(younger)} of its"
                " users; each has its own attachment, but the parent keeps idle connections for nothing: use pools in"
                " the workers only, or close() it before the fork",
            )  # fmt: skip


def _born(pid: int) -> float:
    """When a process was made, seconds since boot; 0 if it has gone. psutil's time of day is off by up to a second."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _parent(pid: int) -> int:
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.Error:
        return 0
