"""JSON Lines as text: each line becomes one JSON value, or a fault that says how to mend the file.

Stage: a line → a JSON value. What a row must hold is checked in `rows`.
"""

from __future__ import annotations

import json
import os
import re
from reprlib import repr as shortened
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # no UTF-8 file has them but as an escape


class RowFault(ValueError):
    """What is wrong with one row; ``remedy`` mends every row like it, and is said once a file."""

    def __init__(self, fault: str, remedy: str = "") -> None:
        super().__init__(fault)
        self.remedy = remedy


def recipe(expression: str, rows: str = "map(json.loads, sys.stdin)") -> str:
    """Return a shell command that writes JSON Lines: ``expression`` of each ``r`` in ``rows``."""
    code = f"import json, sys; [print(json.dumps({expression})) for r in {rows}]"
    return f'convert: python -c "{code}" < OLD > NEW.jsonl'


def parse_line(line: str) -> Any:
    """Read one line.

    Raises:
        RowFault: the line is not JSON, is nested too deep, or holds half of a character.
    """
    try:
        value = json.loads(line, object_pairs_hook=_object)
        if _SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RowFault(f"not JSON ({error.msg} at column {error.colno}).") from error
    except RecursionError as error:
        raise RowFault("is nested too deep to be read; leave the row out.") from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RowFault(
            f"holds {half} alone, which is half of a character (a lone surrogate); write both "
            "halves, or remove it."
        ) from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; a key that stands twice would hide a value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"has the key {shortened(twice)} twice; keep one.")
    return made


def check_layout(path: str | os.PathLike, text: str) -> None:
    """Refuse JSON that is not one object a line: an array, or objects over several lines.

    Raises:
        ValueError: it names the layout and a command that converts it.
    """
    rule = "must have one JSON object on each line (JSON Lines)"
    if isinstance(_json(text.lstrip().partition("\n")[0]), dict):
        return
    if isinstance(_json(text), list):
        change = recipe("r", "json.load(sys.stdin)")
        raise ValueError(f"{path}: is one JSON array; {rule}; {change}")
    found = _json(f"[{text.replace('}' + chr(10) + '{', '},{')}]")
    if found and all(isinstance(value, dict) for value in found):
        joined = "json.loads('[' + sys.stdin.read().replace('}' + chr(10) + '{', '},{') + ']')"
        change = recipe("r", joined)
        raise ValueError(f"{path}: has JSON over several lines; {rule}; {change}")


def _json(text: str) -> Any:
    """Return the value of a JSON text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
