"""A segment is whole, sealed and anonymous; whatever differs from what it must be is refused in a sentence."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sharedpool import invariants, layout, segment
from sharedpool.errors import AttachRefused, StartFailed
from sharedpool.layout import GATE, TICKET, VER, Geometry
from sharedpool.segment import Segment

from ..support.descriptors import open_descriptors

HEAD = struct.Struct("<8sIIQ")
FACTS_AT = 256
SIZES = Geometry(4, 8, 8)


@pytest.fixture
def made() -> Iterator[Segment]:
    one = segment.create("test", SIZES)
    yield one
    os.close(one.fd)


def refused(fd: int, reason: str) -> AttachRefused:
    """What attach says to this descriptor, which it must have closed."""
    with pytest.raises(AttachRefused, match=reason) as caught:
        segment.attach(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    return caught.value


def facts_of(made: Segment) -> dict[str, Any]:
    _, _, length, _ = HEAD.unpack(os.pread(made.fd, HEAD.size, 0))
    found: dict[str, Any] = json.loads(os.pread(made.fd, length, FACTS_AT))
    return found


def write_facts(made: Segment, text: bytes) -> None:
    magic, version, _, size = HEAD.unpack(os.pread(made.fd, HEAD.size, 0))
    os.pwrite(made.fd, text, FACTS_AT)
    os.pwrite(made.fd, HEAD.pack(magic, version, len(text), size), 0)


def test_two_who_attach_see_the_same_words_and_marks(made: Segment) -> None:
    other = segment.attach(os.dup(made.fd))
    try:
        made.words[100] = 2**64 - 1
        made.marks[made.geometry.marks - 1] = 77
        assert other.words[100] == 2**64 - 1
        assert other.marks[made.geometry.marks - 1] == 77
        assert (other.pool, other.secret, other.geometry) == (made.pool, made.secret, made.geometry)
        assert -made.mutex == 0
        assert -other.mutex == errno.EDEADLK  # the same mutex
        +made.mutex
    finally:
        os.close(other.fd)


def test_a_new_segment_is_a_sound_empty_table(made: Segment) -> None:
    table = made.table(1)
    invariants.check(table)
    assert (made.words[VER], made.words[TICKET], made.words[GATE]) == (1, 1, layout.EPOCH)


def test_a_segment_has_all_of_its_memory_and_can_neither_shrink_nor_grow(made: Segment) -> None:
    status = os.fstat(made.fd)
    assert status.st_blocks * 512 >= status.st_size >= SIZES.size
    for size in (4096, status.st_size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(made.fd, size)
    assert fcntl.fcntl(made.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
    assert not os.get_inheritable(made.fd)


def test_two_segments_have_different_secrets(made: Segment) -> None:
    other = segment.create("test", SIZES)
    os.close(other.fd)
    assert other.secret != made.secret
    assert len(made.secret) == 16


def test_every_word_and_mark_lies_within_the_memory_and_none_twice() -> None:
    sizes = Geometry(3, 5, 7)
    assert sizes.slot_base == layout.HEADER + layout.ROW * 3
    assert sizes.cell_base == sizes.slot_base + layout.SLOT * 5
    assert sizes.words == sizes.cell_base + layout.CELL * 7
    assert sizes.size % 8 == 0
    assert sizes.size >= 8 * sizes.words + 4 * sizes.marks
    assert layout.ROW_COUNTERS + 25 <= layout.ROW


def test_memory_that_is_not_to_be_had_is_told_and_nothing_is_left_open() -> None:
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a size that the machine lacks would really be tried
    try:
        with pytest.raises(StartFailed, match="no shared memory for pool 'big'"):
            segment.create("big", SIZES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not open_descriptors() - before


def test_what_is_no_memfd_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    refused(os.open(path, os.O_RDWR), "no memfd|no segment")
    reading, writing = os.pipe()
    os.close(writing)
    refused(reading, "no memfd")


def test_what_is_not_sealed_is_refused(made: Segment) -> None:
    size = os.fstat(made.fd).st_size
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, os.pread(made.fd, size, 0), 0)
    refused(fd, "seals")


def test_what_is_too_short_is_refused() -> None:
    fd = os.memfd_create("x", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 100)
    refused(fd, "100 bytes")


def magic(made: Segment) -> str:
    os.pwrite(made.fd, b"NOTAPOOL", 0)
    return "begins with b'NOTAPOOL'"


def another_layout(made: Segment) -> str:
    os.pwrite(made.fd, struct.pack("<I", layout.LAYOUT + 1), 8)
    return f"layout {layout.LAYOUT + 1}.* serves .*{layout.LAYOUT}.*restart"


def another_size(made: Segment) -> str:
    os.pwrite(made.fd, struct.pack("<Q", 12345), 16)
    return "damaged.*12345"


def facts_too_long(made: Segment) -> str:
    os.pwrite(made.fd, struct.pack("<I", 5000), 12)
    return "damaged: 5000"


def cut_json(made: Segment) -> str:
    write_facts(made, json.dumps(facts_of(made)).encode()[:-5])
    return "damaged"


def no_object(made: Segment) -> str:
    write_facts(made, b"[1, 2]")
    return "damaged"


def deep_json(made: Segment) -> str:
    write_facts(made, b"[" * 3800)
    return "damaged"


def no_rows(made: Segment) -> str:
    facts = facts_of(made)
    del facts["rows"]
    write_facts(made, json.dumps(facts).encode())
    return "damaged.*rows"


def no_name(made: Segment) -> str:
    facts = facts_of(made)
    del facts["pool"]
    write_facts(made, json.dumps(facts).encode())
    return "damaged.*pool"


def text_for_rows(made: Segment) -> str:
    write_facts(made, json.dumps({**facts_of(made), "rows": "4"}).encode())
    return "damaged"


def fraction_for_rows(made: Segment) -> str:
    write_facts(made, json.dumps({**facts_of(made), "rows": 4.0}).encode())
    return "damaged"


def other_numbers(made: Segment) -> str:
    write_facts(made, json.dumps({**facts_of(made), "slots": 9}).encode())
    return "numbers do not fit"


def short_secret(made: Segment) -> str:
    write_facts(made, json.dumps({**facts_of(made), "secret": "00"}).encode())
    return "damaged"


@pytest.mark.parametrize(
    "damage",
    [
        magic, another_layout, another_size, facts_too_long, cut_json, no_object, deep_json, no_rows, no_name,
        text_for_rows, fraction_for_rows, other_numbers, short_secret,
    ],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_a_damaged_header_is_refused_and_the_descriptor_closed(made: Segment, damage: Callable[[Segment], str]) -> None:
    reason = damage(made)
    refused(os.dup(made.fd), reason)


@pytest.mark.parametrize(
    ("fact", "value", "why"),
    [
        ("pid_namespace", "4:1", "share the PID namespace"),
        ("time_namespace", "4:2", "clocks"),
        ("boot", "yesterday", "reboot"),
        ("libc", "musl 1.2", "libc"),
        ("machine", "pdp11", "layout"),
        ("pointer", 4, "layout"),
    ],
)
def test_a_fact_that_differs_is_refused_with_both_values_and_the_reason(
    made: Segment, fact: str, value: object, why: str
) -> None:
    ours = segment.identity()[fact]
    write_facts(made, json.dumps({**facts_of(made), fact: value}).encode())
    error: Any = refused(os.dup(made.fd), f"{fact} {value!r}.*{why}")
    assert repr(ours) in str(error)
    assert (error.fact, error.theirs, error.ours) == (fact, value, ours)


def test_a_fact_that_is_missing_is_refused(made: Segment) -> None:
    facts = facts_of(made)
    del facts["boot"]
    write_facts(made, json.dumps(facts).encode())
    refused(os.dup(made.fd), "boot None")


def test_every_fact_has_a_reason() -> None:
    assert set(segment.identity()) == set(segment._REASONS)


def test_a_cells_kick_has_a_place_of_its_own_among_the_marks(made: Segment) -> None:
    table = made.table(1)
    for index in range(SIZES.cells):
        cell = table.cell_at(index)
        assert made.kick_address(cell) == made.marks_address + 4 * table.kick_index(cell)
        made.marks[table.kick_index(cell)] = index + 1
    assert made.marks[SIZES.slots : SIZES.marks].tolist() == list(range(1, SIZES.cells + 1))
