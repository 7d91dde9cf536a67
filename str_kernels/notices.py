"""What the user is told once: choices that were made, and fallbacks with their reason."""

from __future__ import annotations

import logging

_log = logging.getLogger("str_kernels")
_said: set[str] = set()


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log a message the first time that it is given in this process."""
    if message not in _said:
        _said.add(message)
        _log.log(level, message)
