"""Conversations in JSON Lines: ``{"prompt", "response"}`` or ``{"messages"}`` on each line.

Stage: a file → checked rows with their line numbers → tokenised sequences.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.chat import Encoded, Messages, encode_conversation

MAX_FAULTS_SHOWN = 5

Row = dict[str, Any]


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
    rows, faults = [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, _checked(json.loads(line), response_required)))
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}).")
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    _raise(faults)
    if not rows:
        raise ValueError(f"{path}: holds no rows; write one JSON object on each line.")
    return rows


@dataclass(frozen=True)
class TrainingData:
    """A file of conversations, tokenised."""

    sequences: list[Encoded]  # one a row of the file
    sha256: str  # of the file's bytes
    source: str  # its path

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
        }


def encode_file(
    path: str | os.PathLike,
    rows: list[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> TrainingData:
    """Tokenise the rows that `read_numbered` read, with the tokenizer's chat template.

    Raises:
        ValueError: prompts leave no room for an answer; each is named ``file:line``.
    """
    sequences, faults = [], []
    for number, row in rows:
        try:
            answer = {"role": "assistant", "content": row.get("response")}
            messages = row.get("messages") or [*prompt_messages(row), answer]
            sequences.append(encode_conversation(tokenizer, messages, max_length=max_length))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    _raise(faults)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return TrainingData(sequences, digest, os.fspath(path))


def _raise(faults: list[str]) -> None:
    if faults:
        more = len(faults) - MAX_FAULTS_SHOWN
        rest = [f"… and {more} more such lines."] if more > 0 else []
        raise ValueError("\n".join(faults[:MAX_FAULTS_SHOWN] + rest))


def prompt_messages(row: Row) -> Messages:
    """Return the conversation up to the answer, as chat messages."""
    if "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}]
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def response_of(row: Row) -> str | None:
    """Return a row's answer: its response, or the last message if the assistant speaks there."""
    if "messages" not in row:
        return row.get("response")
    last = row["messages"][-1]
    return last["content"] if last["role"] == "assistant" else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def _checked(row: Any, response_required: bool) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"is a {type(row).__name__}; must be a JSON object.")
    if "messages" in row:
        _check_messages(row["messages"])
    elif not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError('must have "messages", or "prompt" with some text.')
    elif not isinstance(row.get("response"), str | None):
        raise ValueError(f"response={row['response']!r}: must be text.")
    if response_required and not response_of(row):
        raise ValueError('has no answer: add "response", or an assistant\'s message at the end.')
    return row


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list with at least one message.")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f'messages[{position}] must have "role" and "content", both text.')
    if all(message["role"] == "assistant" for message in messages):
        raise ValueError("messages must contain a message that is not the assistant's.")
