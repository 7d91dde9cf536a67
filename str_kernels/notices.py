"""Log each choice and each fallback, with its reason, once in a process."""

from __future__ import annotations

import logging

_log = logging.getLogger("str_kernels")
_said: set[str] = set()


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log a message unless this process has logged it before."""
    if message not in _said:
        _said.add(message)
        _log.log(level, message)
