"""Options by call, environment and default: who wins, and what a wrong one says before anything happens."""

from __future__ import annotations

import pytest

from sharedpool import OptionError
from tests.support import commands
from tests.support.backend import Backend, Target
from tests.support.scope import Scope
from tests.support.workers import Harness


def test_the_environment_sets_any_option_of_a_pool(harness: Harness, tcp: Target) -> None:
    worker = harness.start(
        SHAREDPOOL_MY_POOL_MAX_CONNECTIONS="7",
        SHAREDPOOL_MY_POOL_IDLE_TIMEOUT="none",
        SHAREDPOOL_MY_POOL_CLOSE_TIMEOUT="0.5",
        SHAREDPOOL_MY_POOL_MOVE="no",
    )
    worker.use(tcp, pool="my-pool")
    options = worker.call(commands.library, "find_pool", "my-pool").options
    assert (options.max_connections, options.idle_timeout, options.close_timeout, options.move) == (7, None, 0.5, False)


def test_the_call_wins_over_the_environment_and_the_environment_over_the_default(harness: Harness, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_API_MAX_CONNECTIONS="7", SHAREDPOOL_API_IDLE_TIMEOUT="20")
    worker.attach("api", max_connections=3)
    worker.use(tcp, pool="api")
    options = worker.call(commands.library, "find_pool", "api").options
    assert (options.max_connections, options.idle_timeout, options.connect_timeout) == (3, 20.0, 8.0)


def test_the_cap_of_the_environment_is_the_cap(harness: Harness, backend: Backend, tcp: Target) -> None:
    workers = harness.start_many(3, SHAREDPOOL_DEFAULT_MAX_CONNECTIONS="1")
    begun = [worker.begin(commands.requests, [tcp], 50, checkout_timeout=30) for worker in workers]
    assert [pending.result() for pending in begun] == [commands.Load(done=50)] * 3
    assert backend.peak == 1


def test_a_timeout_of_the_environment_is_in_force(harness: Harness, tcp: Target) -> None:
    worker = harness.start(SHAREDPOOL_DEFAULT_CHECKOUT_TIMEOUT="0.1", SHAREDPOOL_DEFAULT_POOL_SIZE="1")
    worker.checkout(tcp)
    worker.fails(TimeoutError, commands.checkout, tcp)
    assert worker.stats().max_connections == 1


WRONG = [
    ({"max_connections": 0}, "max_connections", "0"),
    ({"max_connections": -1}, "max_connections", "-1"),
    ({"max_connections": "20"}, "max_connections", "'20'"),
    ({"max_connections": float("inf")}, "max_connections", "inf"),
    ({"max_connections": True}, "max_connections", "True"),
    ({"idle_timeout": 0}, "idle_timeout", "0"),
    ({"idle_timeout": float("nan")}, "idle_timeout", "nan"),
    ({"connect_timeout": None}, "connect_timeout", "None"),
    ({"checkout_timeout": "soon"}, "checkout_timeout", "'soon'"),
    ({"order": "random"}, "order", "'random'"),
    ({"move": 1}, "move", "1"),
    ({"max_conections": 3}, "max_conections", "3"),
]


@pytest.mark.parametrize(("options", "name", "value"), WRONG, ids=[f"{name}={value}" for _, name, value in WRONG])
def test_a_wrong_option_is_refused_at_once_by_its_name_value_source_and_what_is_allowed(
    harness: Harness, scope: Scope, options: dict[str, object], name: str, value: str
) -> None:
    """hackney: nothing was validated; some of it crashed later."""
    worker = harness.start()
    for function in (commands.attach, start_pool, permit):
        error = worker.fails(OptionError, function, "api", **options)
        assert isinstance(error, ValueError)
        assert all(
            part in str(error)
            for part in (repr(name), value, "call", "allowed" if name != "max_conections" else "known")
        )
    assert scope.arbiters() == set()


def start_pool(state: object, name: str, **options: object) -> None:
    commands.library(state, "start_pool", name, **options)  # type: ignore[arg-type]


def permit(state: object, name: str, **options: object) -> None:
    commands.library(state, "permit", name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MAX_CONNECTIONS", "many"),
        ("MAX_CONNECTIONS", "0"),
        ("IDLE_TIMEOUT", "-5"),
        ("MOVE", "perhaps"),
        ("ORDER", "x"),
    ],
)
def test_a_wrong_option_of_the_environment_is_refused_by_its_variable(
    harness: Harness, scope: Scope, tcp: Target, variable: str, value: str
) -> None:
    worker = harness.start(**{f"SHAREDPOOL_API_{variable}": value})
    error = worker.fails(OptionError, commands.use, tcp, pool="api")
    assert all(part in str(error) for part in (f"SHAREDPOOL_API_{variable}", value, "allowed"))
    assert scope.arbiters() == set()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 101])
def test_a_wrong_name_of_a_pool_is_refused(harness: Harness, name: str) -> None:
    harness.start().fails(OptionError, commands.attach, name)


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 61])
def test_a_wrong_name_of_an_app_is_refused(harness: Harness, name: str) -> None:
    harness.start().fails(OptionError, attach_and_use, name)


def attach_and_use(state: object, app: str) -> None:
    commands.attach(state, "default", app=app)  # type: ignore[arg-type]
    commands.stats(state, "default")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["checkout_timeout", "connect_timeout"])
def test_a_wrong_timeout_of_a_single_checkout_takes_no_permit(harness: Harness, tcp: Target, option: str) -> None:
    worker = harness.start()
    worker.use(tcp)
    worker.fails(OptionError, commands.checkout, tcp, **{option: -1})
    assert worker.stats().in_use == 0
