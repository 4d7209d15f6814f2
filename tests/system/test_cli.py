"""The command `sharedpool`: what it shows, what it changes, and how it ends when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sharedpool
from sharedpool.errors import PoolStopped
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.processes import Watched
from tests.support.scope import Scope
from tests.support.state import State
from tests.support.waiting import wait_until
from tests.support.workers import ROOT, Worker, clean_environment
from tests.system.cli import command, good, run
from tests.system.lineup import line_up

pytest.importorskip("typer", reason="the command line needs the package typer (extra cli)")


# --- looking ----------------------------------------------------------------------------------------------------------


def test_status_is_one_table_over_all_pools(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].attach("api", max_connections=2)
    for _ in range(2):
        two[0].checkout(tcp, pool="api")
    two[1].use(tcp)
    shown = good(scope, "status")
    assert shown.out.split()[:4] == ["POOL", "MAX", "IN", "USE"]
    rows = {row[0]: row for row in shown.lines}
    assert rows["api"][1:7] == ["2", "2", "0", "0", "0", "0"]
    assert rows["default"][1:7] == ["50", "0", "1", "0", "0", "0"]


def test_status_as_json_has_every_number_and_the_options(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].attach(max_connections=1)
    label = two[0].checkout(tcp)
    (waiting,) = line_up(two[0], [(two[1], tcp)])
    (row,) = good(scope, "status", "--json").json
    assert (row["name"], row["in_use"], row["waiting"], row["checkouts"], row["paused"]) == ("default", 1, 1, 1, False)
    assert row["options"]["max_connections"] == 1
    assert row["longest_wait"] > 0
    two[0].checkin(label)
    two[1].checkin(waiting.result())


def test_a_watched_status_goes_on_until_it_is_interrupted_which_is_no_error(
    worker: Worker, scope: Scope, tcp: Target
) -> None:
    worker.use(tcp)
    with subprocess.Popen(
        command("status", "--watch", "--every", "0.1", "--json"), env=clean_environment(scope.env), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert '"idle": 1' in process.stdout.readline()
        worker.checkout(tcp)
        wait_until(lambda: '"in_use": 1' in process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_status_takes_less_than_half_a_second_with_the_interpreters_start(
    worker: Worker, scope: Scope, tcp: Target
) -> None:
    """Measured as processor time, as it sleeps nowhere and other tests run beside it; the best of five."""
    worker.use(tcp)

    def measured() -> float:
        process = subprocess.Popen(
            command("status"), env=clean_environment(scope.env), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert min(measured() for _ in range(5)) < 0.5


def test_keys_workers_and_leases_show_where_who_and_for_how_long(two: list[Worker], scope: Scope, tcp: Target) -> None:
    two[0].attach(max_connections=3)
    two[0].checkout(tcp)
    two[1].use(tcp)
    key = f"tcp://{tcp.host}:{tcp.port}"
    assert good(scope, "keys").lines == [["default", key, "1", "1", "0", "0", "0", "0", "2", "2", "0", "0"]]
    rows = {int(row[1]): row for row in good(scope, "workers", "default").lines}
    assert set(rows) == {worker.pid for worker in two}
    assert rows[two[0].pid][4:6] == ["1", "1"]
    assert "tests.support.worker_main" in " ".join(rows[two[0].pid])
    ((pool, slot, pid, age, where),) = good(scope, "leases", "default").lines
    assert (pool, slot, pid, where) == ("default", "0", str(two[0].pid), key)
    assert re.fullmatch(r"\d+(\.\d+)?s", age)


def test_what_a_pool_is_called_by_others_is_printed_as_text(worker: Worker, scope: Scope) -> None:
    """A key's name comes from a worker: nothing in it is obeyed, by the terminal or by the table's markup."""
    worker.call(hold_named, "[red]\x1b[2Jx")
    ((_, key, *_),) = good(scope, "keys").lines
    assert key == "permit:[red]\\x1b[2Jx"


def hold_named(state: State, name: str) -> None:
    state.leases["named"] = commands.pool_of(state, "default").checkout(name, 0, "permit")


def test_ls_finds_the_scopes_of_the_usual_places_and_says_which_run(
    worker: Worker, scope: Scope, tcp: Target, directory: Path
) -> None:
    worker.use(tcp)
    runtime, temporary = directory / "run", directory / "tmp"
    for path in (runtime / "sharedpool" / "idle-app", temporary / f"sharedpool-{os.geteuid()}" / "open-app"):
        path.mkdir(parents=True)
        path.chmod(0o700)
    (temporary / f"sharedpool-{os.geteuid()}" / "open-app").chmod(0o755)
    shown = good(scope, "ls", XDG_RUNTIME_DIR=str(runtime), TMPDIR=str(temporary))
    rows = {row[0]: row[1:] for row in shown.lines}
    assert rows[str(scope.directory / "sharedpool")] == [
        str(scope.arbiter()), sharedpool.__version__, "default", "running",
    ]  # fmt: skip
    assert rows[str(runtime / "sharedpool" / "idle-app")] == ["no", "arbiter"]
    assert "0700" in rows[str(temporary / f"sharedpool-{os.geteuid()}" / "open-app")]


def test_metrics_are_the_text_format_with_the_pools_numbers(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    text = good(scope, "metrics").out.splitlines()
    assert "sharedpool_up 1" in text
    assert 'sharedpool_connections{pool="default",state="idle"} 1' in text
    assert 'sharedpool_opens_total{pool="default"} 1' in text


def test_metrics_of_a_scope_without_an_arbiter_say_that_it_is_down(scope: Scope) -> None:
    shown = run(scope, "metrics")
    assert (shown.code, shown.out.splitlines()[-1]) == (3, "sharedpool_up 0")


# --- changing ---------------------------------------------------------------------------------------------------------


def test_set_changes_options_for_everybody_and_says_what_was_there_before(
    worker: Worker, scope: Scope, tcp: Target
) -> None:
    worker.attach(max_connections=3)
    worker.use(tcp)
    shown = good(scope, "set", "default", "max_connections=5", "timeout=none")
    assert shown.out.splitlines() == ["default: max_connections 3 -> 5", "default: idle_timeout 150.0 -> None"]
    assert shown.err == ""
    assert worker.stats().max_connections == 5
    assert good(scope, "set", "default", "pool_size=5").out == "default: nothing to change\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["default", "max_connections=0"], 1, "'max_connections' has the value 0"),
        (["default", "max_connections=x"], 1, "'max_connections' has the value 'x' (from the command line)"),
        (["default", "colour=red"], 1, "unknown option 'colour'"),
        (["default", "order=sticky"], 1, "order cannot change while it runs"),
        (["nobody", "max_connections=1"], 1, "there is no pool 'nobody'; pools here: default"),
        (["a b", "max_connections=1"], 1, "'name' has the value 'a b'"),
        (["default", "max_connections"], 2, "not of the form option=value"),
        (["default"], 2, "Missing argument"),
    ],
)
def test_a_mistake_in_set_is_told_in_a_sentence_and_changes_nothing(
    worker: Worker, scope: Scope, tcp: Target, words: list[str], code: int, says: str
) -> None:
    worker.use(tcp)
    shown = run(scope, "set", *words, COLUMNS="200")
    assert (shown.code, shown.out) == (code, "")
    assert says in shown.err
    assert worker.call(commands.library, "find_pool", "default").options == sharedpool.PoolOptions()
    assert worker.call(commands.library, "find_pool", "nobody") is None


def test_stop_of_a_pool_leaves_the_others(two: list[Worker], scope: Scope, backend: Backend, tcp: Target) -> None:
    two[0].attach("api", max_connections=1)
    label = two[0].checkout(tcp, pool="api")
    two[1].use(tcp)
    two[1].attach("api", max_connections=1)
    pending = two[1].begin_checkout(tcp, pool="api", thread="t", checkout_timeout=None)
    two[0].wait_stats("api", waiting=1)
    assert good(scope, "stop", "api").out == "api: stopped\n"
    pending.error(PoolStopped)
    two[0].checkin(label)
    assert [row[0] for row in good(scope, "status").lines] == ["default"]


def test_stop_without_a_pool_ends_the_arbiter(worker: Worker, scope: Scope, tcp: Target, backend: Backend) -> None:
    worker.use(tcp)
    assert "stopped all pools" in good(scope, "stop").out
    backend.wait_open(0)
    assert run(scope, "status").code == 3


without_operations = pytest.mark.skipif(
    not hasattr(sharedpool, "pause"), reason="this version of the library has no pause, resume, drain, kill"
)


@without_operations
def test_pause_lets_checkouts_wait_and_resume_serves_them(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    assert good(scope, "pause").out == "default: paused\n"
    assert good(scope, "status").lines[0][-1] == "paused"
    pending = worker.begin_checkout(tcp, thread="t", checkout_timeout=None)
    worker.wait_stats(waiting=1)
    assert good(scope, "resume").out == "default: resumed\n"
    worker.call(commands.checkin, pending.result(), thread="t")


@without_operations
def test_drain_of_a_key_closes_its_idle_connections_only(
    worker: Worker, scope: Scope, backend: Backend, tcp: Target, unix: Target
) -> None:
    worker.use(tcp)
    worker.use(unix)
    shown = good(scope, "drain", "--key", f"{tcp.host}:{tcp.port}", "--wait", "10")
    assert shown.out == "default: drained, 1 connections\n"
    assert backend.open == 1
    assert good(scope, "drain", "--key", f"unix:{unix.host}", "--wait", "10").out == "default: drained, 1 connections\n"
    assert backend.open == 0


@without_operations
def test_a_drain_that_is_not_done_in_time_ends_with_4(worker: Worker, scope: Scope, tcp: Target) -> None:
    label = worker.checkout(tcp)
    shown = run(scope, "drain", "--wait", "0.1")
    assert (shown.code, shown.out) == (4, "")
    assert str(worker.pid) in shown.err
    worker.checkin(label)


@without_operations
def test_kill_shuts_leased_connections_down(worker: Worker, scope: Scope, backend: Backend, tcp: Target) -> None:
    worker.checkout(tcp)
    assert good(scope, "kill", "default").out == "default: killed, 1 connections\n"
    backend.wait_open(0)


@without_operations
def test_a_key_that_is_none_is_a_mistake(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    shown = run(scope, "drain", "--key", "ftp://x")
    assert shown.code == 1
    assert "--key 'ftp://x'" in shown.err


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["status"], ["keys"], ["leases", "api"], ["set", "api", "timeout=1"], ["stop"], ["stop", "api"]]
)
def test_without_an_arbiter_every_command_ends_with_3_and_starts_none(scope: Scope, words: list[str]) -> None:
    shown = run(scope, *words)
    assert (shown.code, shown.out) == (3, "")
    assert f"no arbiter runs in {scope.directory}" in shown.err
    assert not scope.arbiters()


def test_an_arbiter_that_does_not_answer_ends_a_command_with_4(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    arbiter = Watched(scope.arbiter())
    arbiter.stop()
    try:
        shown = run(scope, "status")
    finally:
        arbiter.resume()
        arbiter.close()
    assert shown.code == 4
    assert "does not answer" in shown.err


@pytest.mark.parametrize(
    "words",
    [[], ["frobnicate"], ["status", "--frobnicate"], ["--dir", "a", "--app", "b", "ls"], ["serve", "--log-level", "x"]],
)
def test_usage_that_is_not_understood_ends_with_2(scope: Scope, words: list[str]) -> None:
    assert run(scope, *words).code == 2


def test_a_directory_that_is_not_safe_is_refused_in_a_sentence(scope: Scope) -> None:
    path = scope.directory / "sharedpool"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    shown = run(scope, "status")
    assert shown.code == 1
    assert "has mode 0755, only 0700 is safe" in shown.err


def test_local_mode_has_nothing_to_show(scope: Scope) -> None:
    shown = run(scope, "status", SHAREDPOOL_MODE="local")
    assert shown.code == 1
    assert "local mode" in shown.err


def test_the_scope_may_be_named_by_directory_or_app(worker: Worker, scope: Scope, tcp: Target, directory: Path) -> None:
    worker.use(tcp)
    assert good(None, "--dir", str(scope.directory), "status").lines[0][0] == "default"
    shown = run(scope, "--app", "other", "status", XDG_RUNTIME_DIR=str(directory))
    assert shown.code == 3
    assert f"{directory}/sharedpool/other" in shown.err
    assert run(None, "--app", "a/b", "status").code == 1


def test_the_version_is_the_packages() -> None:
    assert good(None, "--version").out == f"{sharedpool.__version__}\n"


def test_without_typer_there_is_one_sentence(directory: Path) -> None:
    """In an interpreter that has the library and what it needs, and nothing else."""
    import importlib.util

    for name in ("sharedpool", "multiprocess", "dill", "psutil"):
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        os.symlink(os.path.dirname(found.origin), directory / name)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "sharedpool", "status"], env={"PYTHONPATH": str(directory)}, cwd="/",
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "sharedpool: the command line needs the packages typer and rich, and typer is missing:"
        " pip install 'sharedpool[cli]'\n"
    )


def test_the_command_is_installed_with_the_package() -> None:
    found = shutil.which("sharedpool", path=os.path.dirname(sys.executable))
    if found is None:
        pytest.skip("the package is not installed here, only importable")
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{sharedpool.__version__}\n"


# --- doctor -----------------------------------------------------------------------------------------------------------


def checks(scope: Scope, code: int = 0, **env: str) -> dict[str, tuple[str, str]]:
    shown = run(scope, "doctor", "--json", **env)
    assert shown.code == code, shown
    return {row["name"]: (row["level"], row["text"]) for row in shown.json if row["level"] != "ok" or code == 0}


def test_doctor_finds_nothing_wrong_where_nothing_is(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    found = checks(scope)
    assert set(found) == {
        "interpreter", "scope", "environment", "mutex", "pidfd", "arbiter", "version", "open files", "forks",
    }  # fmt: skip
    assert {level for level, _ in found.values()} == {"ok"}
    assert str(scope.arbiter()) in found["arbiter"][1]


def test_doctor_without_an_arbiter_looks_at_what_there_is(scope: Scope) -> None:
    found = checks(scope)
    assert found["arbiter"] == ("ok", "none runs; the first process that uses a pool starts it")
    assert "not there yet" in found["scope"][1]
    assert not scope.arbiters()


def test_doctor_names_a_directory_that_is_not_safe(scope: Scope) -> None:
    path = scope.directory / "sharedpool"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    assert "0700" in checks(scope, code=1)["scope"][1]


def test_doctor_names_an_option_in_the_environment_that_is_wrong(scope: Scope) -> None:
    found = checks(scope, code=1, SHAREDPOOL_DEFAULT_MAX_CONNECTIONS="many")
    assert "SHAREDPOOL_DEFAULT_MAX_CONNECTIONS" in found["environment"][1]


def test_doctor_warns_of_local_mode(scope: Scope) -> None:
    assert "local mode" in checks(scope, SHAREDPOOL_MODE="local")["interpreter"][1]


def test_doctor_compares_limits_of_open_files_with_the_caps(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.call(commands.limit_descriptors, 200)
    worker.attach(max_connections=100)
    worker.use(tcp)
    level, text = checks(scope, code=1)["open files"]
    assert level == "PROBLEM"
    assert f"process {worker.pid} may have 200" in text
    assert "needs 264" in text


def test_doctor_warns_of_a_pool_that_was_used_before_the_fork(worker: Worker, scope: Scope, tcp: Target) -> None:
    worker.use(tcp)
    until = time.monotonic() + 0.05  # the kernel tells when a process was born in steps of 10 ms
    wait_until(lambda: time.monotonic() > until)
    child = worker.fork()
    child.use(tcp)
    level, text = checks(scope)["forks"]
    assert level == "warning"
    assert f"process {worker.pid} used pool 'default' before it forked 1 " in text


def test_doctor_tells_versions_and_layouts_apart() -> None:
    from sharedpool.cli.checks import version_check
    from sharedpool.layout import LAYOUT

    about = {"layout": LAYOUT, "version": sharedpool.__version__}
    assert version_check(about).level == "ok"
    assert version_check({**about, "version": "0.0.1"}).level == "warning"
    assert version_check({"layout": LAYOUT - 1, "version": "0.0.1"}).level == "warning"
    other = version_check({"layout": LAYOUT + 1, "version": "9"})
    assert other.level == "PROBLEM"
    assert "restart all processes" in other.text
