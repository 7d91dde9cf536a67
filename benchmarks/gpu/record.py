"""One file holds all that a run found: a head, then a row a line, appended as soon as it is known.

Rows with the same step, name and shape replace each other; the last one counts.
"""

from __future__ import annotations

import json
from pathlib import Path

from str_kernels.bench.report import SCHEMA, Row, circumstances, commit, read_rows

FILE = "gpu.jsonl"
STATE = "state"  # the name of the row that says how a step ended
_KEYS = ("step", "name", "N", "V", "D")


def begin(folder: Path) -> None:
    """Start a file, or go on with one.

    Raises:
        ValueError: the file is of another machine or of other versions.
    """
    here = circumstances()
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        append(folder, {"schema": SCHEMA, "circumstances": here})
        return
    there = circumstances_of(folder)
    differ = sorted(name for name in here if here[name] != there.get(name))
    if differ:
        raise ValueError(
            f"out={str(folder)!r}: was measured elsewhere ({', '.join(differ)} differ); choose "
            "another folder."
        )


def append(folder: Path, row: Row) -> None:
    """Write a row."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def end(folder: Path, step: str, state: str, seconds: float, reason: str | None = None) -> None:
    """Write how a step ended: "done", "cut" by its limit, or "failed"."""
    row = {"step": step, "name": STATE, "state": state, "seconds": round(seconds, 1)}
    append(folder, row | {"commit": commit(), "reason": reason})


def circumstances_of(folder: Path) -> Row:
    """Return machine and versions."""
    return read_rows(folder / FILE, SCHEMA)[0]["circumstances"]


def rows_of(folder: Path) -> list[Row]:
    """Return the rows that count, in the order in which they came first."""
    found: dict[tuple, Row] = {}
    for row in read_rows(folder / FILE, SCHEMA)[1]:
        found[tuple(row.get(key) for key in _KEYS)] = row
    return list(found.values())


def states(folder: Path) -> dict[str, Row]:
    """Return the last state of each step."""
    if not (folder / FILE).exists():
        return {}
    return {row["step"]: row for row in rows_of(folder) if row["name"] == STATE}
