"""The commands. They ask and change through the module's functions and `inspection`; what they print is `show`'s."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from typing import Annotated, Any, NoReturn

import typer

from .. import control, inspection, metrics, options, pool, scope
from ..errors import NotSupported, OptionError, PoolNotFound, SharedPoolError
from ..inspection import NoArbiter
from . import show
from .exits import Exit, exit_for

app = typer.Typer(
    name="sharedpool",
    help="The shared connection pools of this host: look at them, change them, serve them.",
    epilog="Exit codes: 0 done; 1 a mistake, nothing found, or a problem; 2 usage; 3 no arbiter runs in the scope;"
    " 4 it does not answer, or something was not done in time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PoolName = Annotated[str, typer.Argument(metavar="[POOL]", help="The pool's name.")]
GivenPool = Annotated[str, typer.Argument(metavar="POOL", help="The pool's name.")]
AnyPool = Annotated[str | None, typer.Argument(metavar="[POOL]", help="One pool's name; without it, all pools.")]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Key = Annotated[
    str | None, typer.Option(metavar="KEY", help="Only connections to it: tcp://host:port, unix:///path, host:port.")
]


def run() -> NoReturn:
    """Carry out the command line of this process and exit."""
    try:
        app()
    except (SharedPoolError, OSError) as error:
        show.complain(str(error) or type(error).__name__)
        raise SystemExit(exit_for(error)) from None
    raise SystemExit(Exit.OK)


def _print_version(wanted: bool) -> None:
    if wanted:
        show.say(getattr(sys.modules["sharedpool"], "__version__", "unknown"))
        raise typer.Exit


@app.callback()
def everywhere(
    context: typer.Context,
    directory: Annotated[
        str | None, typer.Option("--dir", metavar="DIRECTORY", help="The scope with this SHAREDPOOL_DIR.")
    ] = None,
    app_name: Annotated[str | None, typer.Option("--app", metavar="NAME", help="The scope of this app.")] = None,
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Which scope the command is about; without options, the one that the environment names."""
    if directory is not None and app_name is not None:
        raise typer.BadParameter("--dir and --app name two scopes; give one of them")
    if directory is not None:
        os.environ["SHAREDPOOL_DIR"] = os.path.abspath(directory)
    elif app_name is not None:
        os.environ["SHAREDPOOL_APP"] = options.check_app_name(app_name, "--app")
        os.environ.pop("SHAREDPOOL_DIR", None)
    if context.invoked_subcommand not in ("doctor", "ls") and pool.mode() == "local":
        raise NotSupported("in local mode (SHAREDPOOL_MODE) each process has its pools for itself: none is seen here")


# --- looking ----------------------------------------------------------------------------------------------------------

_STATUS = (
    show.of("POOL", "name"),
    show.of("MAX", "max_connections"),
    show.of("IN USE"),
    show.of("IDLE"),
    show.Column("OPENING", lambda row: row["opening"] + row["granted"]),
    show.of("CLOSING"),
    show.of("WAITING"),
    show.seconds("MAXWAIT", "longest_wait"),
    show.seconds("MAXLEASE", "longest_lease"),
    show.of("PROCS", "processes"),
    show.of("CHECKOUTS"),
    show.of("TIMEOUTS"),
    show.Column("", lambda row: "paused" if row["paused"] else ""),
)


@app.command()
def status(
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: so often, in seconds.")] = 1.0,
) -> None:
    """All pools of the scope: what is taken of each cap, who waits, and for how long."""
    if not watch:
        show.rows(_STATUS, _status_rows(), as_json=as_json)
        return
    with contextlib.suppress(KeyboardInterrupt):
        _watch(every, as_json=as_json)


def _status_rows() -> list[dict[str, Any]]:
    import dataclasses

    return [
        {**dataclasses.asdict(facts["stats"]), "checkouts": facts["stats"].checkouts,
         **{name: value for name, value in facts.items() if name != "stats"}}
        for facts in inspection.overview()
    ]  # fmt: skip


def _watch(every: float, *, as_json: bool) -> None:
    if as_json:
        while True:
            show.json_text(_status_rows(), indent=None)
            time.sleep(every)
    from rich.live import Live

    with Live(show.table(_STATUS, _status_rows()), console=show.console(fitting=True), auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(show.table(_STATUS, _status_rows()), refresh=True)


_COUNTED = ("reuses", "takeovers", "handoffs", "opens", "waits", "timeouts")


def _of_pools(name: str | None, method: str) -> list[dict[str, Any]]:
    """The rows of one pool, or of all; each says whose it is."""
    where = inspection.directory()
    names = [name] if name is not None else inspection.ask(where, "names")
    return [{"pool": each, **row} for each in names for row in inspection.ask(where, method, each)]


@app.command()
def keys(pool_name: AnyPool = None, as_json: Json = False) -> None:
    """Where connections lead: for each address, how many are in which state, how many wait, and what was counted."""
    states = ("POOL", "KEY", "IN USE", "IDLE", "OPENING", "GRANTED", "CLOSING", "WAITING")
    columns = [show.of(each) for each in (*states, "CHECKOUTS", "OPENED", "CLOSED", "TIMEOUTS")]
    show.rows(columns, _of_pools(pool_name, "keys"), as_json=as_json)


@app.command()
def workers(pool_name: AnyPool = None, as_json: Json = False) -> None:
    """The attached processes: since when, what they run, how many leases they hold, what they have counted."""
    rows = _of_pools(pool_name, "workers")
    for row in rows:
        row.update(row.pop("counters"))
        row["command"] = _command_line(row["pid"])
        row["checkouts"] = sum(row[name] for name in _COUNTED[:4])
    columns = [
        *(show.of(each) for each in ("POOL", "PID", "ROW")), show.seconds("ATTACHED", "age"), show.of("LEASES"),
        show.of("CHECKOUTS"),
        *(show.of(name.upper(), name) for name in _COUNTED), show.of("COMMAND"),
    ]  # fmt: skip
    show.rows(columns, rows, as_json=as_json)


def _command_line(pid: int) -> str:
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return "(gone)"


@app.command()
def leases(pool_name: AnyPool = None, as_json: Json = False) -> None:
    """The leases in force, the longest first."""
    columns = [*(show.of(each) for each in ("POOL", "SLOT", "PID")), show.seconds("AGE", "age"), show.of("KEY")]
    rows = sorted(_of_pools(pool_name, "leases"), key=lambda row: -row["age"])
    show.rows(columns, rows, as_json=as_json)


@app.command()
def ls(as_json: Json = False) -> None:
    """All scopes of this user: their directories, arbiters and pools."""
    from .scopes import describe

    rows = [describe(path) for path in scope.known(os.environ)]
    if not rows:
        show.complain(f"no scope of uid {os.geteuid()} was found; one made by SHAREDPOOL_DIR is found with --dir only")
        raise typer.Exit(Exit.FAILED)
    columns = [show.of(each) for each in ("DIRECTORY", "ARBITER", "VERSION", "POOLS", "STATE")]
    show.rows(columns, rows, as_json=as_json)


@app.command(name="metrics")
def print_metrics() -> None:
    """The pools' metrics in the Prometheus text format."""
    try:
        facts = inspection.overview()
    except NoArbiter:
        print(metrics.text([metrics.up(False)]), end="")
        raise
    print(metrics.text([metrics.up(True), *metrics.families(each["stats"] for each in facts)]), end="")


# --- changing ---------------------------------------------------------------------------------------------------------


@app.command(name="set")
def set_options(
    pool_name: GivenPool,
    given: Annotated[list[str], typer.Argument(metavar="OPTION=VALUE...", help="Such as max_connections=20.")],
) -> None:
    """Change options of a running pool, for all its processes, at once."""
    _require(pool_name)
    values = dict(_parsed(each) for each in given)
    logging.getLogger("sharedpool").setLevel(logging.ERROR)  # what changed is said below, once
    before = control.find_pool(pool_name)
    after = control.start_pool(pool_name, **values)
    old = {} if before is None else before.options.as_dict()
    changed = {name: value for name, value in after.options.as_dict().items() if old.get(name) != value}
    for name, value in changed.items():
        show.say(f"{pool_name}: {name} {old.get(name)} -> {value}")
    if not changed:
        show.say(f"{pool_name}: nothing to change")


def _parsed(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not of the form option=value")
    return name.strip(), options.from_text(name.strip(), value, "the command line")


@app.command()
def pause(pool_name: PoolName = "default") -> None:
    """Give out nothing new: leases go on, checkouts wait within their time-outs."""
    _change("pause", pool_name)
    show.say(f"{pool_name}: paused")


@app.command()
def resume(pool_name: PoolName = "default") -> None:
    """End a pause: who waits is served, in order."""
    _change("resume", pool_name)
    show.say(f"{pool_name}: resumed")


@app.command()
def drain(
    pool_name: PoolName = "default",
    key: Key = None,
    wait: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Until the back end has seen the end of all.")
    ] = None,
) -> None:
    """Close idle connections now, and leased ones when they are given back; new checkouts open new ones."""
    number = _change("drain", pool_name, key=parse_key(key), wait=wait)
    show.say(f"{pool_name}: drained, {number} connections")


@app.command()
def kill(pool_name: GivenPool, key: Key = None) -> None:
    """Shut down all connections at once, leased ones too: their users get errors."""
    number = _change("kill", pool_name, key=parse_key(key))
    show.say(f"{pool_name}: killed, {number} connections")


@app.command()
def stop(
    pool_name: Annotated[
        str | None, typer.Argument(metavar="[POOL]", help="The pool; without it, all of them, and the arbiter.")
    ] = None,
) -> None:
    """Stop a pool, or all pools and the arbiter: who waits gets PoolStopped, leases end with their checkin."""
    if pool_name is not None:
        _require(pool_name)
        control.stop_pool(pool_name)
        show.say(f"{pool_name}: stopped")
        return
    where = inspection.directory()
    inspection.greet(where)
    control.stop()
    show.say(f"stopped all pools of {where}, and their arbiter")


def _require(name: str) -> None:
    """The pool is there.

    Raises:
        NoArbiter, ArbiterLost, PoolNotFound, OptionError.
    """
    names = inspection.ask(inspection.directory(), "names")
    if options.check_pool_name(name) not in names:
        raise PoolNotFound(f"there is no pool {name!r}; pools here: {', '.join(names) or 'none'}")


def _change(function: str, name: str, **given: Any) -> Any:
    _require(name)
    with inspection.of_another_version(inspection.directory(), function):
        return getattr(control, function)(name, **given)


def parse_key(text: str | None) -> tuple[str, int, str] | None:
    """A key as it is written by people, or as `keys` shows it: (host, port, transport).

    Raises:
        OptionError: It is none.
    """
    if text is None:
        return None
    scheme, colon, rest = text.partition(":")
    if scheme == "permit" and colon:
        return rest.removeprefix("//"), 0, "permit"
    if scheme == "unix" and colon and not rest.startswith("//"):
        return rest, 0, "unix"
    url = text if "://" in text else f"tcp://{text}"
    try:
        transport, host, port = pool.parse_url(url, 0, None)
    except OptionError as error:
        raise OptionError(f"--key {text!r}: allowed is tcp://host:port, unix:///path or permit:name") from error
    return host, port, transport


# --- serving ----------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Be the scope's arbiter in the foreground, for systemd and containers; logs go to standard error.

    SIGTERM drains: it goes when its last client has gone, after 90 s at the latest. A second one ends it at once.
    """
    from .serving import serve_here

    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(f"{log_level!r} is no level; allowed is DEBUG, INFO, WARNING or ERROR")
    serve_here(level)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check what the pools of this scope need, and what they often suffer from. Exit code 1 if there is a problem."""
    from . import checks

    found = checks.all_checks()
    columns = [show.of("CHECK", "name"), show.of("RESULT", "level"), show.of("FOUND", "text")]
    show.rows(columns, [check.as_row() for check in found], as_json=as_json)
    if any(check.level == checks.PROBLEM for check in found):
        raise typer.Exit(Exit.FAILED)
