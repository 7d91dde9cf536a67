"""A file of results: one JSON object a line, the first of which is the head: what all rows share.

A file is whole at any time: it is written beside its place and then moved there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    partial = path.with_name(path.name + ".partial")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *rows))
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
