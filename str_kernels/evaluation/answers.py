"""A file of answers that survives an interruption: each answer is written when it is generated.

The file is JSON Lines, ``{"key", "prompt", "answer"}``, with ``"verdict"`` once a run has come to
its end. The key is a hash of the prompt's tokens and of everything else that decides the answer. An
answer is therefore reused only where generating it again would give the same text, and several runs
may share one file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from str_kernels.files import replacing
from str_kernels.ranks import sharing


class AnswerFile:
    """The answers of earlier runs; new ones are appended.

    Args:
        path: the file; it is created if it is missing.
        settings: the JSON values that decide an answer beside the prompt: model, adapter, dtype, …

    Raises:
        ValueError: the file cannot be written, or a line other than an unfinished last one is
            broken.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._settings = json.dumps(settings, sort_keys=True)
        try:
            self._file = self.path.open("a+", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}).") from error
        self._rows = self._read()
        self._judged = False

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, prompt: Sequence[int]) -> str | None:
        """Return the answer to a prompt's token ids under these settings, or None."""
        row = self._rows.get(self.key(prompt))
        return None if row is None else row["answer"]

    def add(self, prompt: Sequence[int], text: str, answer: str) -> None:
        """Write an answer, in the first process; ``text`` is the request, for people."""
        key = self.key(prompt)
        self._rows[key] = {"key": key, "prompt": text, "answer": answer}
        if sharing().first:
            self._file.write(_line(self._rows[key]))
            self._file.flush()

    def judge(self, prompt: Sequence[int], verdict: str) -> None:
        """Note what an answer of the file does; `close` writes it."""
        row = self._rows[self.key(prompt)]
        self._judged |= row.get("verdict") != verdict
        row["verdict"] = verdict

    def close(self) -> None:
        """Close the file, with its new verdicts."""
        self._file.close()
        if self._judged and sharing().first:
            with replacing(self.path) as partial:
                text = "".join(map(_line, self._rows.values()))
                partial.write_text(text, encoding="utf-8", newline="\n")

    def key(self, prompt: Sequence[int]) -> str:
        """Return what the answer to a prompt's token ids is found by."""
        text = self._settings + json.dumps(list(prompt))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        try:
            text = self._file.read()
        except UnicodeDecodeError as error:
            self._file.close()
            raise ValueError(
                f"{self.path}: is not UTF-8 text (byte {error.start}); move the file away."
            ) from error
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the run was interrupted while it wrote
            self._file.truncate(len(whole.encode()))
        try:
            return {row["key"]: row for row in parsed_answers(self.path, whole)}
        except ValueError:
            self._file.close()
            raise


def parsed_answers(path: Path, text: str) -> list[dict[str, Any]]:
    """Read the whole lines of a file of answers.

    Raises:
        ValueError: a line is none.
    """
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            whole = isinstance(row["key"], str) and isinstance(row["answer"], str)
        except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: too many digits
            whole = False
        if not whole:
            raise ValueError(
                f"{path}:{number}: is no answer of an earlier run; move the file away."
            )
        rows.append(row)
    return rows


def answers_beside(result: Path) -> Path:
    """Return the name of the file of answers that belongs to a result."""
    return result.with_name(result.name + ".answers.jsonl")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def file_state(path: str | os.PathLike | None) -> list[list[Any]] | None:
    """List names, sizes and times of a folder's files, or of one file, to notice a change.

    It is None where the path does not exist, as for a Hub id.
    """
    if path is None or not Path(path).exists():
        return None
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).iterdir())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
