"""Keep results through an interruption, and make tables of them.

A file of results has one JSON object a line; the first is the head, which all rows share.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from str_kernels.engine.cpu import processor_field
from str_kernels.files import replacing
from str_kernels.version import versions

Row = dict[str, Any]

SCHEMA = "str_kernels.bench/1"
_PACKAGES = ("torch", "transformers", "cut-cross-entropy", "liger-kernel", "trl")


def percent(x: float) -> str:
    """Write a share with two significant digits."""
    return f"{100 * x:.2g}%" if x >= 1e-5 else "<0.001%"


def milliseconds(seconds: list[float]) -> str:
    """Write the median of some seconds in milliseconds, with three significant digits."""
    ms = 1e3 * statistics.median(seconds)
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:#.3g}"


Columns = tuple[tuple[str, str, Callable[[Any], str]], ...]

# heading, key and form of each column of a table
COSTS: Columns = (
    ("ms", "seconds", milliseconds),
    ("queued ms", "queued_seconds", milliseconds),
    ("MiB", "peak_bytes", lambda x: f"{x / 2**20:.{0 if x >= 100 << 20 else 1}f}"),
)
ERRORS: Columns = (
    ("loss", "loss_error", lambda x: f"{x:.0e}"),
    ("lse", "lse_error", lambda x: f"{x:.0e}"),
    ("dH", "hidden_error", percent),
    ("dH sure", "confident_error", percent),
    ("dW", "weight_error", percent),
    ("dC", "constraint_error", percent),
)
LEGEND = (
    "ms: time of forward and backward, median, each call on an idle device; queued: calls that "
    "follow each other without a wait; MiB: peak extra memory; then errors against fp64: loss and "
    "log-sum-exp (rms) in nats, gradients of the hidden states, of confident rows alone, of the "
    "weight, of the constraint"
)


def read_rows(path: Path, schema: str) -> tuple[Row, list[Row]]:
    """Return the head and the rows.

    Raises:
        ValueError: the file is not one of this schema.
    """
    try:
        with path.open(encoding="utf-8") as file:
            head, *rows = map(json.loads, file)
    except ValueError:  # a broken line, or none at all
        head = None
    if not isinstance(head, dict) or head.get("schema") != schema:
        raise ValueError(f"out={str(path)!r}: is no result of a benchmark; move it away.")
    return head, rows


def write_rows(path: Path, head: Row, rows: Iterable[Row]) -> None:
    """Write the head and the rows in place of what the file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *rows))
    with replacing(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


class Results:
    """Rows in a file, found again by their keys; each new row is written at once.

    Args:
        path: the file; what it holds already is kept.
        keys: names of the entries that tell rows apart.
        again: measure anew what an earlier run has left.

    Raises:
        ValueError: a file of another kind, from another machine or with other versions.
    """

    def __init__(self, path: Path, keys: tuple[str, ...], *, again: bool = False) -> None:
        self.path, self.keys, self.rows = path, keys, []
        self.head = {"schema": SCHEMA, "circumstances": circumstances()}
        if path.exists():
            head, self.rows = read_rows(path, SCHEMA)
            for name, here in self.head["circumstances"].items():
                there = head["circumstances"].get(name)
                if there != here:
                    raise ValueError(
                        f"out={str(path)!r}: was measured with {name} {there}, here it is {here}; "
                        "choose another folder, or move the file away to measure anew."
                    )
        self._done = [] if again else list(self.rows)

    def has(self, **wanted: Any) -> bool:
        """Return whether a row with these entries is there and need not be measured again."""
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in self._done)

    def add(self, row: Row) -> None:
        """Keep a row, in place of one with the same keys, and write the file."""
        words = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
        row = row | {"commit": commit(), "command": " ".join(words)}  # published: no paths
        others = [old for old in self.rows if any(row.get(k) != old.get(k) for k in self.keys)]
        self.rows = [*others, row]
        self._done.append(row)
        self.write()

    def write(self) -> None:
        """Write the file, machine and versions included."""
        write_rows(self.path, self.head, self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {**self.head, "rows": self.rows}


def circumstances() -> dict[str, Any]:
    """Return machine and versions: rows that differ in these do not belong into one table."""
    import torch

    cuda = torch.cuda.is_available()
    found = versions(*_PACKAGES)
    return {
        "processor": processor_field("model name") or platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": found.pop("python"),
        "versions": found,
    }


def cells(
    rows: list[Row], label: str = "contender", columns: Columns = COSTS + ERRORS
) -> tuple[list[str], list[list[str]]]:
    """Return headings and a line of text for each row; what has no entry is left out."""
    rows = [row for row in rows if any(row.get(column[1]) is not None for column in columns)]
    shown = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [
        [str(row[label])]
        + ["" if row.get(key) is None else form(row[key]) for _, key, form in shown]
        for row in rows
    ]
    return [label, *(column[0] for column in shown)], lines


def in_products(rows: list[Row], label: str = "contender") -> str:
    """Tell the times in units of the bare product, which is timed in turns with each of them."""
    told = []
    for key, how in (("gemms", ""), ("queued_gemms", ", queued")):
        found = [f"{row[label]} {row[key]:.2f}" for row in rows if row.get(key) is not None]
        if found:
            told.append(f"× the bare product of hidden states and head{how}: {', '.join(found)}")
    return "; ".join(told)


def unmeasured(rows: list[Row]) -> list[str]:
    """Say who did not run, and why."""
    return [f"{row['contender']}: {row['reason']}" for row in rows if "reason" in row]


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """Write a Markdown table."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


@functools.cache
def commit() -> str | None:
    """Return the commit of the checkout this file lies in; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
