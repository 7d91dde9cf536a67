"""Make docs/compatibility.md from the rows that were saved."""

from __future__ import annotations

from pathlib import Path

from benchmarks.versions.plan import TOO_OLD, Versions
from str_kernels.bench.report import Row, read_rows

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks" / "results" / "versions" / "versions.jsonl"
DOCS = ROOT / "docs" / "compatibility.md"
SCHEMA = "str_kernels.versions/1"
COLUMNS = ("python", "torch", "triton", "transformers", "peft", "trl", "accelerate")


def read() -> list[Row]:
    """Return the rows; none without a file."""
    return read_rows(FILE, SCHEMA)[1] if FILE.exists() else []


def markdown() -> str:
    """Write a row for each environment, then what failed in it."""
    rows = read()
    old = [row for row in rows if Versions(**row["asked"]) in TOO_OLD]
    promised = [row for row in rows if row not in old]
    lines = [
        "# Versions that were tested together",
        "",
        "Each row is a new environment on a CPU with the wheel and the versions it lists, in which "
        "the tests of the operator, the products, the patch, PEFT, the Trainer, TRL and the "
        "callback ran, and a file of interpreted Triton kernels. The plan lets every two "
        "versions meet that go together; a row that is missing has not been run. TRL 1.15 and "
        "transformers 5.21 need Python 3.11, and PEFT 0.17 cannot be imported with transformers 5. "
        "TRL 1.15's own head is a Triton kernel on every device; here it was interpreted. "
        "Made by `python -m benchmarks.versions`.",
        "",
        *_table(promised),
    ]
    if old:
        lines += ["", "Below what the metadata promise:", "", *_table(old)]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    head = " | ".join(COLUMNS)
    lines = [f"| {head} | passed | skipped | failed |", "|---" * (len(COLUMNS) + 3) + "|"]
    notes = []
    for row in rows:
        found = row["installed"] or row["asked"]
        cells = " | ".join(found.get(name) or "–" for name in COLUMNS)
        if row["why"]:
            lines.append(f"| {cells} | not installed: {row['why']} | | |")
            continue
        lines.append(f"| {cells} | {row['passed']} | {row['skipped']} | {row['failed']} |")
        if row["failures"]:
            where = f"torch {found['torch']}, transformers {found['transformers']}"
            names = ", ".join(f"`{name}`" for name in row["failures"])
            notes += ["", f"Failed with {where}, Python {found['python']}: {names}."]
    return lines + notes
