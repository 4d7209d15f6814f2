"""Run the demonstration: `python -m examples.demo`, or scripts/demo, which installs what it needs first.

It starts a back end and gunicorn, drives load, kills workers on the way, ends everything, looks whether anything was
left behind, and prints what was counted. Exit code 0 means: the cap held, no request failed, nothing was left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from . import interrupt, report
from .backend import Backend, running_backend
from .load import Load, drive
from .processes import DemoError, running, tail, wait_until

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """The whole demonstration."""
    options = parse()
    interrupt.catch()
    os.chdir(ROOT)
    directory = make_directory()
    try:
        return demonstrate(options, directory)
    except KeyboardInterrupt:
        print("\ninterrupted; everything has been ended")
        return 130
    except (DemoError, FileNotFoundError) as exc:
        print(f"\ndemo: {exc}", file=sys.stderr)
        return 1
    finally:
        interrupt.ignore()
        shutil.rmtree(directory)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="One cap over all workers, shown on real servers."
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of load (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="gunicorn's workers (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (default: %(default)s: sync workers)")
    parser.add_argument("--cap", type=int, default=4, help="max_connections (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="that ask at once (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=2, help="workers that get SIGKILL (default: %(default)s)")
    parser.add_argument(
        "--answer-ms", type=int, default=5, help="an answer of the back end takes (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=("auto", "nginx", "own"), default="auto", help="auto: nginx if installed")
    parser.add_argument(
        "--no-compare", dest="compare", action="store_false", help="skip the run with a pool per worker"
    )
    return parser.parse_args()


def make_directory() -> Path:
    """Everything that is written lies in here. Its path is short: a Unix socket's has 107 bytes at most."""
    short = len(tempfile.gettempdir()) < 50
    return Path(tempfile.mkdtemp(prefix="sharedpool-demo-", dir=None if short else "/tmp"))


def demonstrate(options: argparse.Namespace, directory: Path) -> int:
    """Run with one pool for all, then, to compare, with a pool for each worker; print both."""
    os.environ["SHAREDPOOL_DIR"] = str(directory / "scope")  # before sharedpool is used: a scope of our own
    (directory / "scope").mkdir()
    with running_backend(options.backend, directory / "backend", options.answer_ms) as backend:
        setting = make_setting(options, backend)
        print(f"{options.workers} gunicorn workers, one pool of {options.cap} connections to {backend.name}")
        with one_pool(options.cap) as totals:
            run = measure(options, backend, directory / "shared", options.seconds, options.kills)
            run = dataclasses.replace(run, totals=totals())
    compared = compare(options, directory) if options.compare else None
    left = left_behind(directory)
    wrong = report.not_adding_up(setting, run)
    print()
    print(report.summary(setting, run, compared))
    print()
    print(report.workers_table(setting, run))
    print()
    print("counters:   ", "; ".join(wrong) or "one lease for each request, in every worker")
    print("left behind:", ", ".join(left) or "no process, no file, no shared memory")
    good = run.seen.peak <= options.cap and not (run.load.errors(options.threads) or left or wrong)
    return 0 if good else 1


def make_setting(options: argparse.Namespace, backend: Backend) -> report.Setting:
    """What the report has to know."""
    return report.Setting(
        workers=options.workers,
        threads=options.threads,
        cap=options.cap,
        clients=options.clients,
        backend=backend.name,
        milliseconds=options.answer_ms,
    )


@contextlib.contextmanager
def one_pool(cap: int) -> Iterator[Any]:
    """The pool that all workers share, declared here; gives a function that reads its numbers. Stopped at the end.

    Nothing has to be started for a pool to be used. Here it is: what is measured is a pool that runs, not its start.
    """
    import sharedpool

    pid = 0
    try:
        with interrupt.held():
            sharedpool.start()
            pid = sharedpool.start_pool("default", max_connections=cap).arbiter_pid
        yield lambda: dataclasses.asdict(sharedpool.pool_stats("default"))
    finally:
        with interrupt.held():
            sharedpool.stop()
            if pid:
                wait_until(lambda: has_ended(pid), 10, "the arbiter has not ended")


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and only not yet collected by its parent."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def compare(options: argparse.Namespace, directory: Path) -> report.Run:
    """The same load for a moment, nobody killed, every worker with a pool of its own: sharedpool's local mode."""
    print("the same with a pool per worker")
    with running_backend(options.backend, directory / "backend-local", options.answer_ms) as backend:
        seconds = min(options.seconds, 2.0)
        return measure(options, backend, directory / "local", seconds, kills=0, SHAREDPOOL_MODE="local")


def measure(
    options: argparse.Namespace, backend: Backend, directory: Path, seconds: float, kills: int, **environ: str
) -> report.Run:
    """Serve under load for some seconds, and count."""
    directory.mkdir()
    address = str(directory / "gunicorn.sock")
    reports = directory / "workers"
    reports.mkdir()
    settings = {
        "BACKEND": backend.address,
        "MAX_CONNECTIONS": str(options.cap),
        "DEMO_REPORTS": str(reports),
        **environ,
    }
    load = Load()
    command = gunicorn(options, address, directory)

    wanted: int = options.workers

    def ready() -> bool:
        return len(list(reports.glob("*.ready"))) >= wanted

    with running(command, directory / "gunicorn.log", ready, {**os.environ, **settings}) as server:
        interrupt.run(drive_and_kill(options, backend, address, seconds, kills, server.pid, load))
    workers = sorted(
        (json.loads(path.read_text()) for path in reports.glob("*.json")), key=lambda worker: worker["pid"]
    )
    if not load.good:
        raise DemoError(f"no request was answered: {load.errors(options.threads)}\n{tail(directory / 'gunicorn.log')}")
    return report.Run(load=load, seen=backend.seen(), workers=workers, totals=None)


def gunicorn(options: argparse.Namespace, address: str, directory: Path) -> list[str]:
    """The command that serves examples/gunicorn_app.py. On a Unix socket: no port is used up by 1,000 clients/s.

    A worker with threads takes no more clients than it has threads: those in its own queue would die with it, too.
    """
    threads = str(options.threads)
    kind = ["--worker-class", "gthread", "--threads", threads, "--worker-connections", threads]
    return [
        *(sys.executable, "-m", "gunicorn", "--config", "python:examples.demo.gunicorn_conf"),
        *("--bind", f"unix:{address}", "--workers", str(options.workers)),
        *(kind if options.threads > 1 else []),
        *("--worker-tmp-dir", str(directory), "examples.gunicorn_app:app"),
    ]


async def drive_and_kill(
    options: argparse.Namespace, backend: Backend, address: str, seconds: float, kills: int, master: int, load: Load
) -> None:
    """Drive load; meanwhile kill workers at even distances, and say how it goes."""
    async with asyncio.TaskGroup() as group:
        others = [
            group.create_task(progress(backend, load, kills)),
            group.create_task(kill(master, seconds, kills, load)),
        ]
        await drive(address, options.clients, seconds, load)
        for task in others:
            task.cancel()


async def kill(master: int, seconds: float, kills: int, load: Load) -> None:
    """SIGKILL the master's oldest worker, several times."""
    for _ in range(kills):
        await asyncio.sleep(seconds / (kills + 1))
        worker = min(psutil.Process(master).children(), key=lambda child: (child.create_time(), child.pid))
        load.kills.append(asyncio.get_running_loop().time())  # before: a request that is cut ends after it
        worker.kill()


async def progress(backend: Backend, load: Load, kills: int) -> None:
    """One line that changes, or a line per second where nobody watches."""
    watched = sys.stdout.isatty()
    elapsed = 0.0
    try:
        while True:
            step = 0.2 if watched else 1.0
            await asyncio.sleep(step)
            elapsed += step
            killed = f", killed {len(load.kills)} of {kills} workers" if kills else ""
            text = f"{elapsed:5.1f} s: {len(load.good):,} requests, {backend.connections_now()} connections{killed}"
            print(f"\r{text}\033[K" if watched else text, end="" if watched else "\n", flush=True)
    finally:
        if watched:
            print()


def left_behind(directory: Path) -> list[str]:
    """Processes that still belong to the demonstration, and files in the pool's scope: there must be none.

    The pool's shared memory has no name in any file system: it goes with the last process that holds it.
    """
    found = [f"process {process.pid}" for process in psutil.process_iter() if belongs(process, str(directory))]
    return found + [f"file {path}" for path in (directory / "scope").rglob("*")]


def belongs(process: psutil.Process, directory: str) -> bool:
    """Whether a process other than this one was started by this demonstration."""
    if process.pid == os.getpid():
        return False
    try:
        texts = [*process.cmdline(), *process.environ().values()]
    except psutil.Error:
        return False  # gone, or somebody else's
    return any(directory in text for text in texts)


if __name__ == "__main__":
    sys.exit(main())
