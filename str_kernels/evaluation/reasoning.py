"""What a model thinks before it answers is no part of the answer.

Models mark it in the text: ``<think>…</think>`` and its relatives, ``[THINK]…[/THINK]``, or, once
their special tokens are left out, ``analysis…assistantfinal…``. A chat template may open the
thought at the end of the prompt, so that the text has its end alone.
"""

from __future__ import annotations

import re

_NAME = r"(?:think|thinking|thought|thoughts|reasoning|scratchpad)"
_OPEN = re.compile(rf"(?i)<{_NAME}>|\[{_NAME}\]")
_CLOSE = re.compile(rf"(?i)</{_NAME}>|\[/{_NAME}\]")
# channels without their special tokens; no word follows "analysis" so closely by chance
_CHANNELS = re.compile(r"analysis(?=[A-Z\"'])(?:(?P<thought>.*)assistantfinal)?", re.DOTALL)


def answer_of(text: str) -> str | None:
    """Return what follows the last thought, or None where a thought has no end."""
    channels = _CHANNELS.match(text)
    if channels:
        return None if channels["thought"] is None else text[channels.end() :]
    closed = [match.end() for match in _CLOSE.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    opened = _OPEN.match(rest.lstrip())
    return None if opened else rest


def open_thought(prompt: str) -> str:
    """Return the mark that opens a thought at the end of a prompt, or an empty text."""
    opened = list(_OPEN.finditer(prompt.rstrip()))
    return opened[-1][0] if opened and opened[-1].end() == len(prompt.rstrip()) else ""
