"""`python -m benchmarks [group ...] [--quick] [--json FILE] [--strict]`: runs the groups and prints one table."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback

from benchmarks.harness import Report, Row, say, table

GROUPS = (
    "pairs",
    "throughput",
    "https",
    "neighbours",
    "scale",
    "deaths",
    "rest",
    "start",
    "policies",
    "aio",
    "postgres",
    "distance",
    "http",
    "django",
    "redis",
)


def run(group: str, quick: bool) -> tuple[list[Row], bool]:
    """The rows of one group, and whether it came to its end."""
    module = importlib.import_module(f"benchmarks.{group}")
    try:
        rows: list[Row] = module.rows(quick)
        return rows, True
    except Exception as exc:  # noqa: BLE001 - one group's failure must not cost the figures of the others
        traceback.print_exc()
        return [Row(group, "(failed)", note=f"{type(exc).__name__}: see the traceback")], False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="group", help=f"any of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats; figures are rougher")
    parser.add_argument("--json", metavar="FILE", help="writes every sample to FILE")
    parser.add_argument("--strict", action="store_true", help="a missed limit is an error, too")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    report, complete = Report(options.quick), True
    for group in options.groups or GROUPS:
        say(f"{group} ...")
        start = time.monotonic()
        rows, whole = run(group, options.quick)
        report.rows += rows
        report.seconds[group] = time.monotonic() - start
        complete &= whole
        say(f"{group}: {report.seconds[group]:.1f} s")
    report.load_after = os.getloadavg()
    print(report.heading(), table(report.rows), sep="\n\n")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(report.to_json() + "\n")
    missed = options.strict and any(row.mark == "MISS" for row in report.rows)
    return 0 if complete and not missed else 1


if __name__ == "__main__":
    raise SystemExit(main())
