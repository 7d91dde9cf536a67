"""Terminal output of every command: progress and remarks on stderr, the result on stdout."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_LINES = 5.0  # between lines of progress where stderr is no terminal


def say(text: str) -> None:
    """Write a remark for people to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    """Write the result for programs to stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


_NAME = 16  # columns of a narrow terminal that names may take


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Write the result for people to stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        names = max((len(row[0]) for row in rows), default=0) if i == 0 else 0
        table.add_column(column, overflow="fold", min_width=min(names, _NAME))  # names stay whole
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def quiet_libraries() -> None:
    """Keep progress bars and notices of the libraries off stderr; their errors stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("peft").setLevel(logging.ERROR)
    # Transformers warns of names that PEFT still uses, which a user cannot change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Announce slow work, with a spinner on a terminal and with a line elsewhere."""
    if not sys.stderr.isatty():
        say(f"{text} …")
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{text} …"):
        yield


@contextmanager
def counting(text: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress over ``total`` items; yields the function to call after each item."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.advance(task)
        return
    yield _line_counter(text, total)


def _line_counter(text: str, total: int) -> Callable[[], None]:
    done, last = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if done == total or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{text}: {done} of {total}")

    return advance


def check_output(name: str, path: str | os.PathLike) -> Path:
    """Check before the slow work that a file can be written after it.

    Raises:
        ValueError: the path is a folder, or its folder is missing or not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name}={str(path)!r}: is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(
            f"{name}={str(path)!r}: there is no folder {str(path.parent)!r}; create it first."
        )
    try:
        if path.exists():
            path.open("a").close()
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r}: cannot be written ({error.strerror}).") from error
    return path
