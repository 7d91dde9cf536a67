"""Answers that survive an interruption: each is written down as soon as it is there.

The file is JSON Lines, ``{"key", "prompt", "answer"}``. The key is a hash of the prompt's tokens
and of everything else that decides the answer, so an answer is taken up again only where it would
come out the same, and files of several runs may be one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class AnswerFile:
    """Answers known from an earlier run, and the place for new ones.

    Args:
        path: the file; made if it is not there.
        settings: JSON values that, beside the prompt, decide an answer: model, adapter, dtype, …

    Raises:
        ValueError: the file cannot be written, or a line other than an unfinished last one is
            broken.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any]) -> None:
        """Read what is there and keep the file open for more."""
        self.path = Path(path)
        self._settings = json.dumps(settings, sort_keys=True)
        try:
            self._file = self.path.open("a+", encoding="utf-8", newline="\n")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror}).") from error
        self._answers = self._read()

    def __len__(self) -> int:
        """How many answers there are, of whatever run."""
        return len(self._answers)

    def get(self, prompt: Sequence[int]) -> str | None:
        """The answer to a prompt's token ids under these settings, if it is known."""
        return self._answers.get(self._key(prompt))

    def add(self, prompt: Sequence[int], text: str, answer: str) -> None:
        """Write an answer down; ``text`` shows a reader of the file what was asked."""
        key = self._key(prompt)
        row = {"key": key, "prompt": text, "answer": answer}
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
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the run was cut off while it wrote
            self._file.truncate(len(whole.encode()))
        answers = {}
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            try:
                row = json.loads(line)
                answers[row["key"]] = row["answer"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                self._file.close()
                raise ValueError(
                    f"{self.path}:{number}: is not an answer of an earlier run; move the file away."
                ) from error
        return answers


def file_state(path: str | os.PathLike | None) -> list[list[Any]] | None:
    """Names, sizes and times of a folder's files (or of one file), to notice that they changed.

    None where there is no such path, as for a Hub id.
    """
    if path is None or not Path(path).exists():
        return None
    files = [Path(path)] if Path(path).is_file() else sorted(Path(path).iterdir())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
