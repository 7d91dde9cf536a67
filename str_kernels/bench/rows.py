"""A file of results: one JSON object a line; the first is the head, which all rows share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from str_kernels.files import replacing

Row = dict[str, Any]


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
