"""Conversations in JSON Lines: one ``{"prompt", "response"}`` or ``{"messages": [...]}`` a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MAX_FAULTS_SHOWN = 5

Row = dict[str, Any]
Messages = list[dict[str, str]]


def read_jsonl(path: str | os.PathLike, *, response_required: bool = True) -> list[Row]:
    """Read every row of a file and check it; all faults are reported together.

    Args:
        path: UTF-8 text, a JSON object a line; blank lines are skipped.
        response_required: whether a row without an answer is a fault.

    Returns:
        The rows as they stand: each with ``prompt`` and ``response`` (None where there is none) or
        with ``messages``.

    Raises:
        ValueError: no such file, nothing in it, or broken rows, each named ``file:line``.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    rows, faults = [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_checked(json.loads(line), response_required))
        except json.JSONDecodeError as error:
            faults.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}).")
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    if faults:
        more = len(faults) - MAX_FAULTS_SHOWN
        rest = [f"… and {more} more such lines."] if more > 0 else []
        raise ValueError("\n".join(faults[:MAX_FAULTS_SHOWN] + rest))
    if not rows:
        raise ValueError(f"{path}: holds no rows; must have one JSON object a line.")
    return rows


def prompt_messages(row: Row) -> Messages:
    """The conversation up to the answer, as chat messages."""
    if "messages" not in row:
        return [{"role": "user", "content": row["prompt"]}]
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def response_of(row: Row) -> str | None:
    """The answer of a row: its response, or the last message if the assistant speaks there."""
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
        raise ValueError('must have "messages", or "prompt" with some text in it.')
    elif not isinstance(row.get("response"), str | None):
        raise ValueError(f"response={row['response']!r}: must be text.")
    if response_required and not response_of(row):
        raise ValueError('has no answer: needs "response", or an assistant\'s message at the end.')
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
        raise ValueError("messages must hold something that is not the assistant's.")
