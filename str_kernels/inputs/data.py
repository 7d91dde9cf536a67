"""Conversations in JSON Lines: ``{"prompt", "response"}`` or ``{"messages"}`` on each line.

Stage: a file → checked rows with their line numbers → tokenised sequences.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.chat import Encoded, LongPrompt, encode_conversation, why_not_learnable
from str_kernels.inputs.jsonl import check_layout, parse_line
from str_kernels.inputs.rows import Row, checked, conversation, prompt_messages, response_of
from str_kernels.inputs.template import render
from str_kernels.inputs.unread import sentence, unread_keys

MAX_FAULTS_SHOWN = 5


def read_jsonl(path: str | os.PathLike, *, response_required: bool = True) -> list[Row]:
    """Read and check every row of a file; all faults are reported together.

    Each row of the UTF-8 text has ``prompt`` and ``response`` (None where there is none) or
    ``messages``; blank lines are skipped. ``response_required``: no answer is a fault.

    Raises:
        ValueError: the file is missing or empty, or has faulty rows, each named ``file:line``.
    """
    return [row for _, row in read_numbered(path, response_required=response_required)]


def read_numbered(
    path: str | os.PathLike, *, response_required: bool = True
) -> list[tuple[int, Row]]:
    """Read as `read_jsonl` does, each row with the number of its line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    text = _text(path)
    check_layout(path, text)
    rows, faults = [], Faulty(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        with faults.collected(number):
            rows.append((number, checked(parse_line(line), response_required=response_required)))
    faults.raise_all()
    if not rows:
        raise ValueError(f"{path}: holds no rows; write one JSON object on each line.")
    return rows


class Faulty:
    """Collects the faults of a file's rows; the first few are named, each remedy once."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        self._faults: list[str] = []
        self._remedies: dict[str, None] = {}  # in the order in which they came

    @contextmanager
    def collected(self, number: int) -> Iterator[None]:
        """Collect the ValueError of one row; other rows go on."""
        try:
            yield
        except ValueError as error:
            self._faults.append(f"{self.path}:{number}: {error}")
            if remedy := getattr(error, "remedy", ""):
                self._remedies[remedy] = None

    def raise_all(self, advice: str = "") -> None:
        """Raise the faults as one error."""
        if self._faults:
            more = len(self._faults) - MAX_FAULTS_SHOWN
            rest = [f"… and {more} more such lines."] if more > 0 else []
            rest += [*self._remedies, *([advice] if advice else [])]
            raise ValueError("\n".join(self._faults[:MAX_FAULTS_SHOWN] + rest))


@dataclass(frozen=True)
class TrainingData:
    """A file of conversations, tokenised."""

    sequences: list[Encoded]  # one a row of the file that is not skipped
    lines: list[int]  # where each of these rows stands in the file
    sha256: str  # of the file's bytes
    source: str  # its path
    skipped: int = 0  # rows without room for an answer, left out
    unread: dict[str, int] = field(default_factory=dict)  # keys that nothing reads, and their rows

    def features(self) -> list[dict[str, list[int]]]:
        """Return what the trainer's collator takes."""
        return [{"input_ids": s.input_ids, "labels": s.labels} for s in self.sequences]

    def facts(self) -> dict[str, Any]:
        """Return counts and origin, as plain JSON types."""
        return {
            "path": self.source,
            "sha256": self.sha256,
            "rows": len(self.sequences),
            "tokens": sum(len(s.input_ids) for s in self.sequences),
            "targets": sum(s.targets for s in self.sequences),
            "longest": max(len(s.input_ids) for s in self.sequences),
            "cut_responses": sum(s.cut > 0 for s in self.sequences),
            "unlearned_turns": sum(s.skipped_turns for s in self.sequences),
            "skipped_rows": self.skipped,
            "truncated_prompts": sum(s.left_out > 0 for s in self.sequences),
            "unread_keys": self.unread,
        }


def encode_file(
    path: str | os.PathLike,
    rows: list[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    long: str = "refuse",
) -> TrainingData:
    """Tokenise the rows that `read_numbered` read, with the tokenizer's chat template.

    Args:
        path: the file.
        rows: what it holds.
        tokenizer: writes and tokenises the conversations.
        max_length: most tokens of a sequence.
        long: what becomes of a prompt that leaves no room for an answer: ``"refuse"``, ``"skip"``
            the row, or ``"truncate"`` the prompt's middle.

    Raises:
        ValueError: rows that cannot be learned; each is named ``file:line``.
    """
    sequences, lines, faults, lengths = [], [], Faulty(path), []
    for number, row in rows:
        with faults.collected(number):
            try:
                sequences.append(_encoded(row, tokenizer, max_length, long))
                lines.append(number)
            except LongPrompt as error:
                lengths.append(error.tokens)
                if long != "skip":
                    raise
    longest = max(lengths, default=0)
    faults.raise_all(
        f"{path}: {len(lengths)} of {len(rows)} prompts leave no room for an answer, and the "
        f"longest has {longest} tokens: raise --max-length ({max_length}), or give --long skip "
        "(leave the rows out) or --long truncate (leave out the prompt's middle)."
        if lengths
        else ""
    )
    if not sequences:
        raise ValueError(
            f"{path}: all {len(rows)} prompts leave no room for an answer, so that no row is left: "
            f"raise --max-length ({max_length}); the longest prompt has {longest} tokens."
        )
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    unread = unread_keys(tokenizer, (row for _, row in rows))
    return TrainingData(sequences, lines, digest, os.fspath(path), len(lengths), unread)


def check_prompts(
    path: str | os.PathLike,
    rows: list[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    compared: bool = False,
) -> list[str]:
    """Check that the chat template writes every prompt; return what a user should know.

    Args:
        path: the file.
        rows: what `read_numbered` read from it.
        tokenizer: writes the conversations.
        compared: the model's answers are compared with the rows', which must be text.

    Raises:
        ValueError: rows that cannot be asked; each is named ``file:line``.
    """
    faults = Faulty(path)
    for number, row in rows:
        with faults.collected(number):
            render(tokenizer, prompt_messages(row), answer_next=True, tools=row.get("tools"))
            if compared and not response_of(row):
                raise ValueError("has no text as its answer, with which to compare; add it.")
    faults.raise_all()
    answered = next((row for _, row in rows if response_of(row)), None)
    why = answered and why_not_learnable(tokenizer, conversation(answered), answered.get("tools"))
    unread = unread_keys(tokenizer, (row for _, row in rows))
    notices = [f"{path}: str-kernels train refuses such rows: {why}"] if why else []
    return [*notices, *([sentence(os.fspath(path), unread)] if unread else [])]


def _encoded(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, long: str) -> Encoded:
    return encode_conversation(
        tokenizer,
        conversation(row),
        max_length=max_length,
        tools=row.get("tools"),
        truncate=long == "truncate",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte {error.start}); must be JSON Lines in UTF-8."
        ) from error
