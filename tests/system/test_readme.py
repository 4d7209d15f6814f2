"""The README's programs run as they stand, and its promises about length and public names hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sharedpool

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=[f"block {number}" for number in range(1, len(PROGRAMS) + 1)])
def test_a_program_of_the_readme_runs_as_it_stands(program: str, tmp_path: Path) -> None:
    environment = {**os.environ, "SHAREDPOOL_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program + "\nsharedpool.stop()\n"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert os.listdir(tmp_path) == []


def test_the_readme_has_programs_and_at_most_200_lines() -> None:
    assert len(PROGRAMS) >= 4
    assert README.count("\n") <= 200


def test_the_readme_names_every_option_and_error() -> None:
    options = set(sharedpool.PoolOptions.__dataclass_fields__)
    public = {name: getattr(sharedpool, name) for name in sharedpool.__all__}
    errors = {name for name, thing in public.items() if isinstance(thing, type) and issubclass(thing, Exception)}
    missing = {name for name in options | errors if f"`{name}`" not in README}
    assert not missing


def test_every_public_name_is_there_and_described() -> None:
    bare = [name for name in sharedpool.__all__ if not getattr(getattr(sharedpool, name), "__doc__", None)]
    assert not bare
