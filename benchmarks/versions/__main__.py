"""Test the package with old and new versions of torch, transformers, PEFT, TRL, Python and Triton.

Each environment is made, tested and deleted; those of the file without a failure are kept. An
environment takes up to 7 GB of disk while it is tested. Pythons are looked for on PATH.

Example: python -m benchmarks.versions
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.versions.environment import build_wheel, examine
from benchmarks.versions.plan import TOO_OLD, Versions, plan
from benchmarks.versions.table import DOCS, FILE, SCHEMA, markdown, read
from str_kernels.bench.report import write_rows
from str_kernels.cli.console import say


def main() -> None:
    """Examine what the file does not hold yet, then write the table."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--only", type=int, nargs="+", help="numbers of the plan; default: all")
    made.add_argument("--again", action="store_true", help="test anew what is there")
    made.add_argument("--plan", action="store_true", help="print the plan, test nothing")
    args = made.parse_args()
    wanted = plan()
    if args.plan:
        for number, asked in enumerate(wanted):
            say(f"{number}: {asked}")
        return
    for number in args.only or range(len(wanted)):
        if args.again or wanted[number] not in _settled():
            say(f"{number}: {wanted[number]}")
            _examine(wanted[number])
    DOCS.write_text(markdown(), encoding="utf-8")
    say(f"saved {DOCS}")


def _settled() -> list[Versions]:
    return [Versions(**row["asked"]) for row in read() if not row["why"] and not row["failed"]]


def _examine(asked: Versions) -> None:
    """Test one environment, and write its row in place of an older one."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder), floors=asked not in TOO_OLD)
        row = examine(asked, wheel, Path(folder))
    say(f"   {row}")
    order = [vars(versions) for versions in plan()]
    rows = [row, *(other for other in read() if other["asked"] != row["asked"])]
    rows = [row for row in rows if row["asked"] in order]
    rows.sort(key=lambda row: order.index(row["asked"]))
    write_rows(FILE, {"schema": SCHEMA}, rows)


if __name__ == "__main__":
    main()
