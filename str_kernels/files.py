"""Files that appear whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the name of a new file beside ``path``, and move that file to ``path`` at the end.

    Several writers do not meet, since each gets a name of its own. After an error the new file is
    removed, and ``path`` is what it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: Any, *, indent: int = 1) -> None:
    """Write a value as JSON, with a newline at the end."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
