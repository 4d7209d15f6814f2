"""What a connection string means to a pool: keys, what keeps sessions where they are, the password file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from sharedpool.postgres.conninfo import find_password, resolve, word_for

GOOD = {"host": "db", "user": "app", "dbname": "shop"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PG"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("more", "says", "word"),
    [
        ({}, "", ""),
        ({"sslmode": "disable"}, "", ""),
        ({"sslmode": "prefer"}, "", ""),
        ({"sslmode": "allow"}, "", ""),
        ({"host": "/run/postgresql"}, "", ""),
        ({"host": "@abstract"}, "", ""),
        ({"hostaddr": "10.0.0.5"}, "", ""),
        ({"target_session_attrs": "any"}, "", ""),
        ({"sslmode": "require"}, "sslmode=require", "tls"),
        ({"sslmode": "verify-full"}, "sslmode=verify-full", "tls"),
        ({"sslnegotiation": "direct"}, "sslnegotiation=direct", "tls"),
        ({"gssencmode": "prefer"}, "gssencmode=prefer", "gssapi"),
        ({"channel_binding": "require"}, "channel_binding=require", "tls"),
        ({"target_session_attrs": "read-write"}, "target_session_attrs=read-write", "hosts"),
        ({"load_balance_hosts": "random"}, "load_balance_hosts=random", "hosts"),
        ({"requirepeer": "postgres"}, "requirepeer=postgres", "other"),
        ({"krbsrvname": "pg"}, "krbsrvname=pg", "gssapi"),
        ({"replication": "database"}, "replication=database", "other"),
        ({"service": "shop"}, "service=shop", "service"),
        ({"host": "a,b"}, "several hosts", "hosts"),
        ({"host": ""}, "no host", "no_host"),
        ({"port": "five"}, "port=five", "other"),
    ],
)
def test_what_a_relay_cannot_carry_stays_and_says_why(more: dict[str, str], says: str, word: str) -> None:
    target = resolve({**GOOD, **more}, 170000)
    assert (says in target.stays) if says else not target.stays
    assert (target.server is None) == bool(says)
    assert not says or word_for(target.stays) == word


def test_the_environment_counts_where_the_string_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "require")
    monkeypatch.setenv("PGHOST", "elsewhere")
    assert "sslmode=require" in resolve(GOOD, 170000).stays
    target = resolve({"sslmode": "disable", "user": "app"}, 170000)
    assert not target.stays
    assert target.address.startswith("app@elsewhere:5432/app?")
    monkeypatch.setenv("PGSERVICE", "shop")
    assert "service=shop" in resolve(GOOD, 170000).stays


def test_an_old_libpq_and_a_switch_keep_sessions_too() -> None:
    assert "libpq 13" in resolve(GOOD, 130004).stays
    assert resolve(GOOD, 170000, move=False).stays == "move=False"


def test_a_key_has_what_makes_sessions_differ_and_no_secret() -> None:
    plain = resolve(GOOD, 170000).address
    assert plain == "app@db:5432/shop"
    same = {"password": "hunter2", "passfile": "/x", "connect_timeout": "3", "keepalives_idle": "9", "port": "5432"}
    assert resolve({**GOOD, **same}, 170000).address == plain
    others = [{"options": "-c x=y"}, {"application_name": "web"}, {"hostaddr": "10.0.0.5"}, {"client_encoding": "SJIS"}]
    keys = {resolve({**GOOD, **other}, 170000).address for other in others}
    assert len(keys | {plain}) == 5
    assert all(key.startswith(f"{plain}?") for key in keys)


def test_a_library_at_the_door_gets_what_is_not_the_servers() -> None:
    given = {**GOOD, "password": "secret", "options": "-c x=y", "sslmode": "prefer", "sslrootcert": "system",
             "connect_timeout": "3", "require_auth": "scram-sha-256", "tcp_user_timeout": "5"}  # fmt: skip
    target = resolve(given, 170000)
    door = {"host": "@door", "port": "5432", "sslmode": "disable", "gssencmode": "disable"}
    rest = {"user": "app", "dbname": "shop", "options": "-c x=y"}
    assert target.at("@door") == {**rest, **door, "password": "secret", "require_auth": "scram-sha-256"}
    assert target.again_at("@door") == {**rest, **door, "password": "secret", "require_auth": ""}


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_the_password_file_is_read_as_libpq_reads_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pass",
        "# db:5432:shop:app:no\n\nbad line\ndb:5433:*:*:other\ndb:*:shop:app:a\\:b\\\\c:d\n*:*:*:*:any\n",
    )
    assert find_password(path, "db", "5432", "shop", "app") == "a:b\\c:d"
    assert find_password(path, "db", "5433", "shop", "app") == "other"
    assert find_password(path, "x", "1", "y", "z") == "any"
    assert find_password(str(tmp_path / "none"), "db", "5432", "shop", "app") == ""


def test_a_password_file_that_others_may_read_is_void(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "pass", "*:*:*:*:any\n", 0o644)
    with caplog.at_level(logging.WARNING):
        assert find_password(path, "db", "5432", "shop", "app") == ""
    assert "group or world access" in caplog.text


def test_the_password_file_is_used_where_no_password_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "pass", "localhost:5432:shop:app:local\ndb:5432:shop:app:remote\n")
    assert resolve({**GOOD, "passfile": path}, 170000).at("@x")["password"] == "remote"
    assert resolve({**GOOD, "host": "/tmp", "passfile": path}, 170000).at("@x")["password"] == "local"
    assert resolve({**GOOD, "passfile": path, "password": "own"}, 170000).at("@x")["password"] == "own"
