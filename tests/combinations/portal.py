"""A portal: Flask, which asks another server for each of its users and keeps what it found in Redis."""

from __future__ import annotations

import dataclasses
import os

import flask
import redis
import requests

import sharedpool
from sharedpool.integrations.redis import SharedConnectionPool
from sharedpool.integrations.requests import SharedPoolAdapter

THERE, CAP = os.environ["PORTAL_HTTP"], int(os.environ["PORTAL_CAP"])


def session_of(user: str = "") -> requests.Session:
    """A session for requests without a login, or for those of a user."""
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", SharedPoolAdapter("api", max_connections=CAP, checkout_timeout=60))
    if user:
        session.headers["Authorization"] = f"NTLM {user}"
    return session


app = flask.Flask("portal")
anybody = session_of()
cache = redis.Redis(
    connection_pool=SharedConnectionPool(
        "cache", max_connections=CAP, timeout=60, port=int(os.environ["PORTAL_REDIS"]), db=1, decode_responses=True
    )
)


@app.get("/page")
def page() -> str:
    return "the page\n"


@app.get("/<kind>/<user>/<text>")
def ask(kind: str, user: str, text: str) -> tuple[str, int]:
    """What the other server says, and what there is of it in Redis."""
    key = f"{user}:{text}"
    try:
        if kind == "mail":
            with session_of(user) as session:
                answer = session.get(f"{THERE}/{kind}/{user}/{text}", timeout=60)
        else:
            answer = anybody.get(f"{THERE}/{kind}/{user}/{text}", timeout=60)
        with cache.pipeline() as pipe:
            pipe.set(key, answer.text, ex=600)
            pipe.get(key)
            found = pipe.execute()[1]
        return f"{answer.status_code} {found} {cache.echo(key)}", 200
    except (requests.RequestException, redis.RedisError) as error:
        return f"{type(error).__name__}: {error}", 503


@app.get("/stats/<pool>")
def stats(pool: str) -> dict[str, object]:
    return {"pool": dataclasses.asdict(sharedpool.pool_stats(pool))}
