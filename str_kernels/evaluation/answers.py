"""A file of answers that survives an interruption: each answer is written when it is generated.

The file is JSON Lines, ``{"key", "prompt", "answer"}``. The key is a hash of the prompt's tokens
and of everything else that decides the answer. An answer is therefore reused only where generating
it again would give the same text, and several runs may share one file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self._answers = self._read()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, prompt: Sequence[int]) -> str | None:
        """Return the answer to a prompt's token ids under these settings, or None."""
        return self._answers.get(self._key(prompt))

    def add(self, prompt: Sequence[int], text: str, answer: str) -> None:
        """Write an answer, in the first process; ``text`` is the request, for people."""
        key = self._key(prompt)
        row = {"key": key, "prompt": text, "answer": answer}
        if sharing().first:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()
        self._answers[key] = answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _key(self, prompt: Sequence[int]) -> str:
        text = self._settings + json.dumps(list(prompt))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _read(self) -> dict[str, str]:
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
        answers = {}
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            try:
                row = json.loads(line)
                answers[row["key"]] = row["answer"]
            except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
                self._file.close()
                raise ValueError(
                    f"{self.path}:{number}: is no answer of an earlier run; move the file away."
                ) from error
        return answers


def file_state(path: str | os.PathLike | None) -> list[list[Any]] | None:
    """List names, sizes and times of a folder's files, or of one file, to notice a change.

    It is None where the path does not exist, as for a Hub id.
    """
    if path is None or not Path(path).exists():
        return None
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).iterdir())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
