"""The roster: what an arbiter writes down of its processes is what its successor reads, whatever happens in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharedpool import roster
from sharedpool.processes import Process
from sharedpool.roster import Attached, Roster
from sharedpool.scope import ROSTER

HERE = {"boot": "this one"}
ONE = Attached("default", "1:7", Process(11, 500))
TWO = Attached("other", "1:8", Process(12, 600))


class Scene:
    """A directory, and who is attached."""

    def __init__(self, path: Path) -> None:
        self.path = path / ROSTER
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.attached: list[Attached] = []
        self.roster = Roster(self.fd, HERE, lambda: self.attached)

    def attach(self, *more: Attached) -> bool:
        for each in more:
            self.attached.append(each)
            if not self.roster.note(each):
                return False
        return True

    def read(self, place: object = HERE) -> list[Attached]:
        return roster.read(self.fd, place)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    os.close(made.fd)


def test_who_was_written_down_is_read_in_the_order_of_attaching(scene: Scene) -> None:
    assert scene.read() == []
    assert scene.attach(TWO, ONE)
    assert scene.read() == [TWO, ONE]
    assert scene.path.stat().st_mode & 0o777 == 0o600


def test_what_was_written_in_another_namespace_or_before_a_reboot_says_nothing(scene: Scene) -> None:
    scene.attach(ONE)
    assert scene.read({"boot": "another one"}) == []


@pytest.mark.parametrize("harm", ["removed", "cut", "replaced"])
def test_a_file_that_was_taken_away_or_changed_is_written_anew(scene: Scene, harm: str) -> None:
    scene.attach(ONE)
    if harm == "removed":
        scene.path.unlink()
    elif harm == "cut":
        os.truncate(scene.path, 3)
    else:
        scene.path.unlink()
        scene.path.write_text("something else")
    scene.roster.keep()
    assert scene.read() == [ONE]
    scene.path.unlink()
    assert scene.attach(TWO)
    assert scene.read() == [ONE, TWO]


def test_a_line_that_was_broken_off_and_lines_that_are_none_are_left_out(scene: Scene) -> None:
    scene.attach(ONE, TWO)
    whole = scene.path.read_bytes()
    for length in range(len(whole)):
        scene.path.write_bytes(whole[:length])
        assert scene.read() == [ONE, TWO][: max(0, whole[:length].count(b"\n") - 1)]
    scene.path.write_bytes(whole + b'["x"]\n[1, 2, 3, 4]\n\xff\n' + b"[" * 100_000 + b"\n")
    assert scene.read() == [ONE, TWO]


def test_the_file_does_not_grow_with_those_who_have_gone(scene: Scene) -> None:
    for number in range(1000):
        scene.attached = [Attached("default", "1:7", Process(number, number))]
        assert scene.roster.note(scene.attached[0])
        scene.roster.keep()
    assert len(scene.path.read_bytes().splitlines()) < 100
    assert scene.read()[-1] == scene.attached[0]


def test_that_it_cannot_be_written_is_told(scene: Scene, tmp_path: Path) -> None:
    scene.attach(ONE)
    scene.path.unlink()
    tmp_path.rmdir()
    assert not scene.attach(TWO)
    scene.roster.keep()
    assert scene.read() == []
    tmp_path.mkdir()
