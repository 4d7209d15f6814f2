"""Run urllib3's own tests, from its source distribution, against our classes: `python -m tests.suites.urllib3`.

A test may fail that is listed in urllib3.toml, or that fails with urllib3's own classes on this machine as well (some
need a network). Anything else that fails five times in a row is an error, and so is a listed test that passes, unless
the list says that it may, or that is not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KNOWN: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PYTHON = ROOT / ".venvs" / "suite-urllib3" / "bin" / "python"
TRIES = 5


def pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", "-qq", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def set_up(wanted: str) -> None:
    """A virtual environment with what the tests need."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PYTHON.parents[1])], check=True)
    pip("install", f"urllib3=={wanted}", "multiprocess", "psutil", *KNOWN["requirements"])


def sources(wanted: str, directory: Path) -> Path:
    """The source distribution, unpacked."""
    pip("download", "--no-binary", "urllib3", "--no-deps", "--dest", str(directory), f"urllib3=={wanted}")
    with tarfile.open(next(directory.glob("urllib3-*.tar.gz"))) as archive:
        archive.extractall(directory, filter="data")
    return directory / f"urllib3-{wanted}"


def run(where: Path, tests: list[str], *, ours: bool) -> dict[str, str]:
    """How each test ends; those for HTTP/2 are left out."""
    with tempfile.TemporaryDirectory(prefix="sp-suite-") as scope:
        outcomes = Path(scope) / "outcomes.json"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "SHAREDPOOL_DIR": scope, "SUITE_OUTCOMES": str(outcomes)}
        plugins = ["tests.suites.outcomes", *(["tests.suites.shared_urllib3"] if ours else [])]
        command = [str(PYTHON), "-m", "pytest", "-q", "--tb=short", "--timeout=60", "-o", "addopts=", "-k", "not h2"]
        command += ["-o", "filterwarnings=", *(f"-p{plugin}" for plugin in plugins), *tests]
        subprocess.run(command, cwd=where, env=env, check=False, stdin=subprocess.DEVNULL)
        stop = [str(PYTHON), "-c", "import sharedpool; sharedpool.stop()"]
        subprocess.run(stop, cwd=where, env=env, check=False)
        found: dict[str, str] = json.loads(outcomes.read_text(encoding="utf-8"))
        return found


def bare(test: str) -> str:
    """Its function's name."""
    return test.rpartition("::")[2].partition("[")[0]


def judge(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What is not as it is written."""
    wrong = []
    listed, allowed = KNOWN["deviations"], KNOWN["deviations"] | KNOWN["either"]
    for test, outcome in ours.items():
        if outcome == "failed" and bare(test) not in allowed and theirs.get(test) != "failed":
            wrong.append(f"failed, and is not listed: {test}")
        if outcome == "passed" and bare(test) in listed:
            wrong.append(f"passed, and is listed: {test}")
    wrong += [f"is listed, and was not run: {name}" for name in allowed if name not in {bare(test) for test in ours}]
    return wrong


def main() -> int:
    wanted = version("urllib3")
    set_up(wanted)
    with tempfile.TemporaryDirectory(prefix="sp-urllib3-") as directory:
        where = sources(wanted, Path(directory))
        print(f"== urllib3 {wanted} with its own classes", flush=True)
        theirs = run(where, KNOWN["files"], ours=False)
        print(f"== urllib3 {wanted} with ours", flush=True)
        ours = run(where, KNOWN["files"], ours=True)
        for _ in range(TRIES - 1):  # a time-out of a millisecond is not always kept on a busy machine
            again = [line.rpartition(": ")[2] for line in judge(theirs, ours) if line.startswith("failed")]
            if again:
                ours |= run(where, again, ours=True)
        wrong = judge(theirs, ours)
    count = {outcome: list(ours.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
    away = sorted(test for test in ours if ours[test] == theirs.get(test) == "failed")
    print(f"\nurllib3 {wanted}, our classes: {count}; of the failed ones {len(away)} fail with urllib3's own, too")
    print("\n".join(wrong) or "every other one is listed in urllib3.toml")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
