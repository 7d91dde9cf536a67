"""Parts of the data that change nothing: they are counted, and named once.

A key of a message, a role, or the tools of a row are read if the chat template's text changes
without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.rows import MARKS, Messages, Row, conversation
from str_kernels.inputs.template import Tools, render

_OF_MESSAGES = {"role", "content", *MARKS}
_TOOLS, _KEY, _ROLE = "{}", "messages' {}", "messages of the role {}"


def unread_keys(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> dict[str, int]:
    """Return what nothing reads in any row, each with the number of rows that have it."""
    found: Counter[str] = Counter()
    read: set[tuple[str, str]] = set()
    for row in rows:
        form = ("messages",) if "messages" in row else ("prompt", "response")
        found.update(_filled(row) - {*form, "tools", *MARKS})
        asked = _asked(row) - read
        if asked:
            read |= {part for part in asked if _is_read(tokenizer, row, part)}
            found.update(map(_shown, asked))
    shown = set(map(_shown, read))
    return {key: count for key, count in found.items() if key not in shown}


def sentence(source: str, unread: dict[str, int]) -> str:
    """Name the keys of a file."""
    named = ", ".join(f"{key} ({count} rows)" for key, count in sorted(unread.items()))
    return f"{source}: nothing reads {named}; they change nothing."


def _filled(values: dict[str, Any]) -> set[str]:
    """Return the keys that say something; tables write null where a row has nothing."""
    return {key for key, value in values.items() if value is not None}


def _asked(row: Row) -> set[tuple[str, str]]:
    """Return what the template may read or not, as (a pattern for its name, the name)."""
    messages = row.get("messages", ())
    keys = {key for message in messages for key in _filled(message)} - _OF_MESSAGES
    roles = {message["role"] for message in messages} - {"user", "assistant"}
    tools = {(_TOOLS, "tools")} if row.get("tools") else set()
    return {(_KEY, key) for key in keys} | {(_ROLE, role) for role in roles} | tools


def _shown(asked: tuple[str, str]) -> str:
    pattern, name = asked
    return pattern.format(name)


def _is_read(tokenizer: PreTrainedTokenizerBase, row: Row, asked: tuple[str, str]) -> bool:
    """Tell whether the text changes where this is left out."""
    pattern, name = asked
    messages, tools = conversation(row), row.get("tools")
    kept, kept_tools = messages, None if pattern == _TOOLS else tools
    if pattern == _KEY:
        kept = [{k: v for k, v in message.items() if k != name} for message in messages]
    elif pattern == _ROLE:
        kept = [message for message in messages if message["role"] != name]
    return _text(tokenizer, kept, kept_tools) != _text(tokenizer, messages, tools)


def _text(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools) -> str | None:
    """Return the text, or None where the template needs what was left out."""
    try:
        asks = not messages or messages[-1]["role"] != "assistant"
        return render(tokenizer, messages, answer_next=asks, tools=tools)
    except ValueError:
        return None
