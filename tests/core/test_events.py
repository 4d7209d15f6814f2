"""Where a lease was taken, and that what the application adds to logging and hooks ends nothing of ours."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sharedpool import events


def test_a_place_is_the_line_that_was_running_and_not_where_its_function_begins() -> None:
    frame = sys._getframe()
    place, line = events.where_taken(frame), frame.f_lineno
    assert place is not None
    assert events.line_of(place) == f"{__file__}:{line} in {frame.f_code.co_qualname}"


def test_frames_of_the_library_are_passed_over() -> None:
    scope: dict[str, Any] = {}
    file = os.path.join(os.path.dirname(events.__file__), "drivers", "any.py")
    exec(compile("def inside(look):\n    return look()", file, "exec"), scope)  # noqa: S102 - code of ours, by its name
    place = scope["inside"](lambda: events.where_taken(sys._getframe(1)))
    assert events.line_of(place).endswith("in test_frames_of_the_library_are_passed_over")


def test_a_thread_that_has_ended_has_no_line() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert thread.ident is not None
    assert events.where_now(thread.ident) == "a thread that has ended"


@pytest.fixture
def broken_filter() -> Iterator[None]:
    log = logging.getLogger("sharedpool.pool.x")
    log.addFilter(wrong := lambda record: 1 // 0)  # type: ignore[arg-type]
    yield
    log.removeFilter(wrong)  # type: ignore[arg-type]


def test_a_filter_that_raises_keeps_no_hook_from_being_called(
    broken_filter: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = events.abandoned("x", threading.get_ident(), None, {"seconds": 2.5, "reclaimed": True})
    called: list[events.Abandoned] = []
    events.report(found, [lambda found: 1 // 0, called.append])
    assert called == [found]
    assert (found.thread_name, found.seconds, found.noted, found.reclaimed) == ("MainThread", 2.5, False, True)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_record_that_is_not_the_librarys_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    events.log_again({"logger": "root", "level": 50, "text": "forged"})
    events.log_again({"logger": "sharedpool.arbiter", "level": "50", "text": "forged"})
    events.log_again({"logger": "sharedpool.arbiter", "level": 40, "text": "100 % true"})
    assert [record.getMessage() for record in caplog.records] == ["100 % true"]
