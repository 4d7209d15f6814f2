"""Options: what is allowed, where each value came from, and what a refusal says."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from sharedpool.errors import OptionError
from sharedpool.options import (
    ALIASES,
    LONGEST,
    MOST_CONNECTIONS,
    NOT_GIVEN,
    RULES,
    NotGiven,
    PoolInfo,
    PoolOptions,
    check,
    check_app_name,
    check_pool_name,
    check_seconds,
    differing,
    from_text,
    given,
    make,
)


@pytest.mark.parametrize(
    ("option", "value", "stored"),
    [
        ("max_connections", 1, 1),
        ("max_connections", MOST_CONNECTIONS, MOST_CONNECTIONS),
        ("pool_size", 7, 7),
        ("max_waiting", 1, 1),
        ("max_waiting", None, None),
        ("idle_timeout", 3, 3.0),
        ("idle_timeout", None, None),
        ("timeout", 0.5, 0.5),
        ("checkout_timeout", 0, 0.0),
        ("checkout_timeout", None, None),
        ("connect_timeout", LONGEST, LONGEST),
        ("close_timeout", 0.001, 0.001),
        ("steal_after", 0, 0.0),
        ("move", False, False),
        ("order", "sticky", "sticky"),
        ("order", "fifo", "fifo"),
        ("max_idle", 0, 0),
        ("max_idle", None, None),
        ("max_foreign", 0, 0),
        ("max_foreign", None, None),
        ("max_lifetime", 3600, 3600.0),
        ("max_lifetime", None, None),
        ("lease_timeout", 0.5, 0.5),
        ("lease_timeout", None, None),
        ("reclaim", True, True),
    ],
)
def test_what_is_allowed_is_stored_durations_as_float(option: str, value: Any, stored: Any) -> None:
    found = check(option, value)
    assert (found, type(found)) == (stored, type(stored))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_connections", 0),
        ("max_connections", -1),
        ("max_connections", MOST_CONNECTIONS + 1),
        ("max_connections", 4.0),
        ("max_connections", True),
        ("max_connections", "4"),
        ("max_connections", None),
        ("max_waiting", 0),
        ("max_waiting", 16_385),
        ("max_waiting", "3"),
        ("idle_timeout", 0),
        ("idle_timeout", -1),
        ("idle_timeout", float("nan")),
        ("idle_timeout", float("inf")),
        ("idle_timeout", LONGEST + 1),
        ("idle_timeout", 10**400),
        ("idle_timeout", "150"),
        ("checkout_timeout", -0.1),
        ("checkout_timeout", True),
        ("connect_timeout", None),
        ("connect_timeout", 0),
        ("close_timeout", None),
        ("steal_after", None),
        ("max_idle", -1),
        ("max_foreign", -1),
        ("max_foreign", 1.0),
        ("max_idle", 2.0),
        ("max_idle", MOST_CONNECTIONS + 1),
        ("max_lifetime", 0),
        ("lease_timeout", 0),
        ("reclaim", 1),
        ("move", 1),
        ("move", "yes"),
        ("order", "lifo"),
        ("order", None),
        ("order", ["fifo"]),
    ],
)
def test_what_is_not_allowed_is_refused_with_all_that_there_is_to_know(option: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        check(option, value, "the call for pool 'x'")
    error: Any = caught.value
    assert (error.option, error.source) == (option, "the call for pool 'x'")
    assert error.value is value
    assert error.allowed == RULES[ALIASES.get(option, option)].allowed
    text = str(error)
    assert repr(option) in text
    assert "the call for pool 'x'" in text
    assert error.allowed in text


def test_an_unknown_option_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(OptionError, match="unknown option 'max_conections'.*max_connections.*pool_size"):
        check("max_conections", 3)


def test_the_call_overrules_the_environment_and_that_the_default() -> None:
    environ = {"SHAREDPOOL_API_MAX_CONNECTIONS": "5", "SHAREDPOOL_API_CLOSE_TIMEOUT": "2", "OTHER": "x"}
    found = given("api", {"max_connections": 7, "move": NOT_GIVEN}, environ)
    assert found == {"max_connections": 7, "close_timeout": 2.0}
    options = make(found)
    assert (options.max_connections, options.close_timeout, options.idle_timeout) == (7, 2.0, 150.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), (" 12 ", 12)],
)
def test_numbers_are_read_from_the_environment(text: str, value: int) -> None:
    assert given("p", {}, {"SHAREDPOOL_P_MAX_CONNECTIONS": text}) == {"max_connections": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("YES", True), ("on", True), ("true", True), ("0", False), ("No", False), ("off", False)],
)
def test_flags_are_read_from_the_environment(text: str, value: bool) -> None:
    assert given("p", {}, {"SHAREDPOOL_P_MOVE": text}) == {"move": value}


def test_no_limit_is_read_from_the_environment_where_there_may_be_none() -> None:
    assert given("p", {}, {"SHAREDPOOL_P_CHECKOUT_TIMEOUT": "None"}) == {"checkout_timeout": None}
    with pytest.raises(OptionError, match="SHAREDPOOL_P_CONNECT_TIMEOUT"):
        given("p", {}, {"SHAREDPOOL_P_CONNECT_TIMEOUT": "none"})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MAX_CONNECTIONS", "many"),
        ("MAX_CONNECTIONS", "0"),
        ("MAX_CONNECTIONS", ""),
        ("IDLE_TIMEOUT", "nan"),
        ("MOVE", "perhaps"),
        ("ORDER", "random"),
    ],
)
def test_a_wrong_value_in_the_environment_is_refused_with_the_variables_name(variable: str, text: str) -> None:
    name = f"SHAREDPOOL_MY_POOL_{variable}"
    with pytest.raises(OptionError, match=f"the environment's {name}"):
        given("my-pool", {}, {name: text})


def test_a_pools_variables_have_its_name_in_capitals_and_underscores() -> None:
    assert given("a.b:c@d-1", {}, {"SHAREDPOOL_A_B_C_D_1_POOL_SIZE": "3"}) == {"max_connections": 3}


def test_an_option_given_under_both_of_its_names_must_be_the_same() -> None:
    assert given("p", {"max_connections": 3, "pool_size": 3}, {}) == {"max_connections": 3}
    with pytest.raises(OptionError, match="given twice.*3.*4"):
        given("p", {"max_connections": 3, "pool_size": 4}, {})


def test_a_checkout_waits_as_long_as_a_connect_may_take_unless_told_otherwise() -> None:
    assert PoolOptions(connect_timeout=3.0).patience == 3.0
    assert PoolOptions(checkout_timeout=1.0).patience == 1.0
    assert PoolOptions(checkout_timeout=None).patience is None


def test_options_are_frozen_and_pickle() -> None:
    options = PoolOptions(max_connections=3, checkout_timeout=None)
    info = PoolInfo(name="x", options=options, arbiter_pid=1)
    assert pickle.loads(pickle.dumps(info)) == info
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_connections = 4  # type: ignore[misc]


def test_what_was_not_given_stays_one_thing_through_pickle() -> None:
    assert pickle.loads(pickle.dumps(NOT_GIVEN)) is NOT_GIVEN is NotGiven()
    assert "checkout_timeout" not in PoolOptions().as_dict()
    assert PoolOptions(checkout_timeout=None).as_dict()["checkout_timeout"] is None


def test_every_option_has_a_rule_and_every_default_is_allowed() -> None:
    options = PoolOptions()
    assert {field.name for field in dataclasses.fields(options)} == set(RULES)
    for name, value in options.as_dict().items():
        assert check(name, value) == value


@pytest.mark.parametrize("name", ["default", "a.b:c@d-1_X", "x" * 100])
def test_names_of_pools_that_are_allowed(name: str) -> None:
    assert check_pool_name(name) == name


@pytest.mark.parametrize("name", ["", "x" * 101, "a b", "a/b", "ä", None, 3, "a\n"])
def test_names_of_pools_that_are_refused(name: object) -> None:
    with pytest.raises(OptionError, match="name"):
        check_pool_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a:b", "x" * 61, None, "a\n"])
def test_names_of_apps_that_are_refused(name: object) -> None:
    with pytest.raises(OptionError, match="app"):
        check_app_name(name)


def test_what_differs_is_what_is_the_pools_and_not_known_already() -> None:
    old = make({"max_connections": 5}).as_dict()
    values = {"max_connections": 5, "max_idle": None, "idle_timeout": 3.0, "steal_after": 0.1, "connect_timeout": 1.0}
    assert differing(old, values) == {"idle_timeout": 3.0, "steal_after": 0.1}


def test_no_limit_can_be_said_in_the_environment() -> None:
    environ = {"SHAREDPOOL_API_MAX_IDLE": "none", "SHAREDPOOL_API_MAX_LIFETIME": "60", "SHAREDPOOL_API_RECLAIM": "yes"}
    assert given("api", {}, environ) == {"max_idle": None, "max_lifetime": 60.0, "reclaim": True}


@pytest.mark.parametrize("value", [-1, "1", None, float("nan"), True])
def test_a_wrong_duration_in_a_call_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(OptionError, match="'wait' has the value"):
        check_seconds("wait", value)
    assert check_seconds("wait", 0) == 0.0


def test_an_option_is_read_from_text_as_from_the_environment() -> None:
    assert from_text("max_connections", "7", "the command line") == 7
    assert from_text("timeout", "none", "the command line") is None
    with pytest.raises(OptionError, match=r"'max_connections' has the value 'many' \(from the command line\)"):
        from_text("max_connections", "many", "the command line")
    with pytest.raises(OptionError, match=r"unknown option 'colour'"):
        from_text("colour", "red", "the command line")
