"""Keys of the data that change nothing: they are counted, and named once.

A key of a message, or the tools of a row, is read if the chat template's text changes without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from str_kernels.inputs.rows import MARKS, Messages, Row, conversation
from str_kernels.inputs.template import Tools, render

_OF_MESSAGES = {"role", "content", *MARKS}


def unread_keys(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> dict[str, int]:
    """Return the keys that nothing reads in any row, each with the number of rows that have it."""
    found: Counter[str] = Counter()
    read: set[str] = set()
    for row in rows:
        form = ("messages",) if "messages" in row else ("prompt", "response")
        found.update(row.keys() - {*form, "tools", *MARKS})
        asked = _asked(row) - read
        if asked:
            read |= {key for key in asked if _is_read(tokenizer, row, key)}
            found.update(_shown(key) for key in asked)
    shown = {_shown(key) for key in read}
    return {key: count for key, count in found.items() if key not in shown}


def sentence(source: str, unread: dict[str, int]) -> str:
    """Name the keys of a file."""
    named = ", ".join(f"{key} ({count} rows)" for key, count in sorted(unread.items()))
    return f"{source}: nothing reads {named}; these keys change nothing."


def _asked(row: Row) -> set[tuple[str, str]]:
    """Return what the template may read or not: keys of the messages, and the tools."""
    keys = {key for message in row.get("messages", ()) for key in message}
    tools = {("row", "tools")} if row.get("tools") else set()
    return {("message", key) for key in keys - _OF_MESSAGES} | tools


def _shown(key: tuple[str, str]) -> str:
    return key[1] if key[0] == "row" else f"messages' {key[1]}"


def _is_read(tokenizer: PreTrainedTokenizerBase, row: Row, key: tuple[str, str]) -> bool:
    kind, name = key
    messages, tools = conversation(row), row.get("tools")
    whole = _text(tokenizer, messages, tools)
    if kind == "row":
        return _text(tokenizer, messages, None) != whole
    kept = [{k: v for k, v in message.items() if k != name} for message in messages]
    return _text(tokenizer, kept, tools) != whole


def _text(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools) -> str | None:
    """Return the text, or None where the template needs what was left out."""
    try:
        asks = messages[-1]["role"] != "assistant"
        return render(tokenizer, messages, answer_next=asks, tools=tools)
    except ValueError:
        return None
