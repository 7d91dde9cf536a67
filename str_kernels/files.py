"""Files that appear whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VARIABLE = "STR_KERNELS_INDEX_CACHE"  # names another cache folder; "off": none
_ABANDONED = 3600.0  # seconds without a write after which a new file has no writer any more


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the name of a new file beside ``path``, and move that file to ``path`` at the end.

    Several writers do not meet, since each gets a name of its own. After an error the new file is
    removed, and ``path`` is what it was. Files that a killed process left there are removed after
    an hour.
    """
    path = Path(path)
    _remove_abandoned(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    before = time.time() - _ABANDONED
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with suppress(FileNotFoundError):  # another writer may remove it first
            if left.stat().st_mtime < before:
                left.unlink()


def cache_folder() -> Path | None:
    """The folder of what is kept between runs, indices above all; None: nothing is kept."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.strip().lower() in ("", "0", "off") else Path(chosen).expanduser()
    try:
        return _user_cache() / "str_kernels" / "indices"
    except RuntimeError:  # a user without a home
        return None


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike, value: Any, *, indent: int = 1) -> None:
    """Write a value as JSON, with a newline at the end."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Return the value in a JSON file.

    Raises:
        ValueError: the file cannot be read or is not JSON; the error names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested a thousand deep
        raise ValueError(f"{path}: is not JSON ({error}).") from error
