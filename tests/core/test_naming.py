"""A pool's name for a library's arguments: one for each server, none for a label, and no secret in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sharedpool.drivers.naming import NotClear, name_of
from sharedpool.options import check_pool_name
from sharedpool.postgres.conninfo import resolve

CLEAR = {"user": "app", "password": "s3cret", "host": "db1", "port": 3306, "database": "shop"}
ODBC = "DRIVER={ODBC Driver 18};Server=db1,1433;Database=shop;UID=app;PWD={s3;cr}}et}"
ORACLE = "(DESCRIPTION=(ADDRESS=(PROTOCOL=TCP)(HOST=db1)(PORT=1521))(CONNECT_DATA=(SERVICE_NAME=shop)))"


def name(*arguments: Any, **keywords: Any) -> str:
    found = name_of("library", arguments, keywords)
    assert check_pool_name(found) == found
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((), CLEAR), ((), {**CLEAR, "host": "db2"})),
        (((), CLEAR), ((), {**CLEAR, "port": 3307})),
        (((), CLEAR), ((), {**CLEAR, "user": "somebody"})),
        (((), CLEAR), ((), {**CLEAR, "database": "books"})),
        (((), CLEAR), ((), {**CLEAR, "unix_socket": "/run/other"})),
        (((ODBC,), {}), ((ODBC.replace("db1", "db2"),), {})),
        (((ODBC,), {}), ((ODBC.replace("UID=app", "UID=somebody"),), {})),
        ((("DSN=one;UID=app",), {}), (("DSN=two;UID=app",), {})),
        (((), {"user": "app", "dsn": ORACLE}), ((), {"user": "app", "dsn": ORACLE.replace("db1", "db2")})),
        (((), {"user": "app", "dsn": "db1:1521/shop"}), ((), {"user": "app", "dsn": "db1:1521/books"})),
        (((), {"user": "app", "dsn": "x", "config_dir": "/a"}), ((), {"user": "app", "dsn": "x", "config_dir": "/b"})),
        ((("/data/one.db",), {}), (("/data/two.db",), {})),
        (((Path("/data/one.db"),), {}), ((Path("/data/two.db"),), {})),
        (((), {"user": "app", "host": "db1"}), ((), {"user": "app", "host": "db2"})),
        (((), {"read_default_file": "/a", **CLEAR}), ((), {"read_default_file": "/b", **CLEAR})),
        (((), {**CLEAR, "host": ["db1", "db2"]}), ((), {**CLEAR, "host": ["db1", "db3"]})),
    ],
)
def test_two_servers_are_never_one_name(one: Any, other: Any) -> None:
    assert name(*one[0], **one[1]) == name(*one[0], **one[1])
    assert name(*one[0], **one[1]) != name(*other[0], **other[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((), CLEAR), ((), {**CLEAR, "password": "other", "connect_timeout": 3, "program_name": "web-17"})),
        (((ODBC,), {}), ((ODBC.replace("s3;cr}}et", "other") + ";APP=web-17;WSID=web",), {"timeout": 3})),
        ((("DSN=one;UID=app;PWD=a",), {"autocommit": True}), (("DSN=one;UID=app;PWD=b",), {})),
        (((), {"dsn": "app/s3cret@db1:1521/shop"}), ((), {"dsn": "app/other@db1:1521/shop"})),
        (((), {"dsn": "x://app:s3@db1/shop"}), ((), {"dsn": "x://app:o@db1/shop?password=b&application_name=y"})),
        (((), {"dsn": ORACLE, "password": "a", "wallet_password": "b"}), ((), {"dsn": ORACLE, "access_token": "c"})),
    ],
)
def test_neither_a_secret_nor_a_label_is_in_a_name(one: Any, other: Any) -> None:
    assert name(*one[0], **one[1]) == name(*other[0], **other[1])


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [((), {}), ((object(),), {}), ((), {"dsn": object()}), ((), {"dsn": "host=db1 password=x"}), ((), {"timeout": 3})],
)
def test_what_nobody_can_tell_is_refused(arguments: Any, keywords: Any) -> None:
    with pytest.raises(NotClear):
        name(*arguments, **keywords)


POSTGRES = {"host": "db1", "dbname": "shop", "user": "app"}


@pytest.mark.parametrize(
    "label",
    [
        {"application_name": "web-4711"}, {"options": "-c statement_timeout=5s"}, {"sslmode": "disable"},
        {"client_encoding": "UTF8"}, {"password": "s3cret"}, {"port": "5432"}, {"connect_timeout": "3"},
        {"keepalives_idle": "5"}, {"fallback_application_name": "x"}, {"host": "DB1"},
    ],
)  # fmt: skip
def test_a_label_makes_another_key_and_no_other_cap(label: dict[str, str]) -> None:
    assert resolve({**POSTGRES, **label}, 160000).name == resolve(POSTGRES, 160000).name


@pytest.mark.parametrize(
    "place",
    [
        {"host": "db2"}, {"hostaddr": "10.0.0.1"}, {"port": "5433"}, {"dbname": "books"}, {"user": "somebody"},
        {"host": "/run/db1"}, {"service": "other"}, {"host": "db1,db2"}, {"host": "@db1"},
    ],
)  # fmt: skip
def test_another_place_or_user_is_another_cap(place: dict[str, str]) -> None:
    other = resolve({**POSTGRES, **place}, 160000).name
    assert check_pool_name(other) == other
    assert other != resolve(POSTGRES, 160000).name
