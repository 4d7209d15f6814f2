"""What tests/system/test_gevent.py runs, in an interpreter of its own: `greenlets.py WHEN PORT SCENE`.

WHEN: "early", patched before anything is imported; "late", after sharedpool was, as under gunicorn --preload.
"""

from __future__ import annotations

import json
import sys

WHEN, PORT, SCENE = sys.argv[1], int(sys.argv[2]), sys.argv[3]

if WHEN == "late":
    import sharedpool.attachment
from gevent import monkey

monkey.patch_all()

import gevent
import greenlet

import sharedpool

HOST = "127.0.0.1"
pool = sharedpool.attach(max_connections=2)


def talk(conn, text: str) -> int:
    conn.sendall(text.encode() + b"\n")
    data = b""
    while not data.endswith(b"\n"):
        data += conn.recv(100)
    number, _, answer = data.decode().strip().partition(" ")
    assert answer == text, (answer, text)
    return int(number)


def fifty() -> dict[str, object]:
    """Fifty greenlets for two connections, and one that only counts."""
    state = {"now": 0, "most": 0, "ticks": 0}

    def tick() -> None:
        while True:
            gevent.sleep(0.001)
            state["ticks"] += 1

    def use(number: int) -> int:
        with pool.connection(HOST, PORT, checkout_timeout=30) as conn:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
            found = talk(conn, f"greenlet {number}")
            gevent.sleep(0.002)
            state["now"] -= 1
            return found

    ticking = gevent.spawn(tick)
    greenlets = [gevent.spawn(use, number) for number in range(50)]
    gevent.joinall(greenlets, raise_error=True)
    ticking.kill()
    stats = pool.stats()
    return {
        "most": state["most"], "ticked": state["ticks"] > 20, "numbers": sorted({one.value for one in greenlets}),
        "in_use": stats.in_use, "waiting": stats.waiting, "handed": stats.handoffs,
    }  # fmt: skip


def encrypted() -> dict[str, object]:
    """Ten greenlets for two connections under TLS, with more to say than goes out at once."""

    def use(number: int) -> int:
        with pool.connection(HOST, PORT, "ssl", checkout_timeout=30) as conn:
            return talk(conn, f"{number}," * 60_000)

    greenlets = [gevent.spawn(use, number) for number in range(10)]
    gevent.joinall(greenlets, raise_error=True)
    with pool.connection(HOST, PORT, "ssl") as conn:
        conn.settimeout(0.01)
        try:
            conn.recv(1)
        except TimeoutError:
            return {"numbers": sorted({one.value for one in greenlets})}
    return {}


def switches() -> dict[str, object]:
    """Greenlet switches in a hundred warm checkouts and checkins."""
    with pool.connection(HOST, PORT):
        pass
    seen: list[object] = []
    greenlet.settrace(lambda event, args: seen.append(event))
    for _ in range(100):
        with pool.connection(HOST, PORT):
            pass
    greenlet.settrace(None)
    return {"switches": len(seen)}


def given_up() -> dict[str, object]:
    """Waiters that are timed out, killed, or interrupted leave the queue."""
    held = [pool.checkout(HOST, PORT) for _ in range(2)]
    ended = []
    try:
        pool.checkout(HOST, PORT, checkout_timeout=0.05)
    except sharedpool.PoolTimeout:
        ended.append("PoolTimeout")
    try:
        with gevent.Timeout(0.05):
            pool.checkout(HOST, PORT, checkout_timeout=None)
    except gevent.Timeout:
        ended.append("gevent.Timeout")
    waiting = gevent.spawn(pool.checkout, HOST, PORT, checkout_timeout=None)
    while not pool.stats().waiting:
        gevent.sleep(0.001)
    waiting.kill()
    after = pool.stats().waiting
    for lease in held:
        lease.checkin()
    with pool.connection(HOST, PORT) as conn:
        number = talk(conn, "after all")
    return {"ended": ended, "waiting": after, "number": number}


def wait() -> dict[str, object]:
    """Wait in the queue of other processes' pool."""
    with pool.connection(HOST, PORT, checkout_timeout=30) as conn:
        return {"number": talk(conn, "from outside")}


answer = {"fifty": fifty, "encrypted": encrypted, "switches": switches, "given_up": given_up, "wait": wait}[SCENE]()
pool.close()
print(json.dumps(answer))
