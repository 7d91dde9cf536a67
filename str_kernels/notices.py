"""Log each choice and each fallback, with its reason, once, and by the first process alone."""

from __future__ import annotations

import logging

from str_kernels.ranks import is_first

_log = logging.getLogger("str_kernels")
_said: set[str] = set()


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log a message unless this process has logged it before."""
    if message not in _said:
        _said.add(message)
        _log.log(level if is_first() else logging.DEBUG, message)
