"""Loops that `torch.compile` fuses, where there is a compiler for it: never required.

What is compiled is an ordinary function that torch can run as it is; the caller keeps another way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("str_kernels")
_made: dict[Callable[..., Any], Callable[..., Any] | None] = {}


def compiled(function: Callable[..., Any], *trial: Tensor) -> Callable[..., Any] | None:
    """The function, compiled for any shape; None where that fails, which is said once.

    Args:
        function: of tensors; looked up by identity, so made once in a process.
        trial: small arguments to try it on.
    """
    if torch._dynamo.config.disable:  # it would run as it is, many times slower than blocked calls
        return None
    if function not in _made:
        # else the number of threads is that of the first call
        options = {"cpp.dynamic_threads": True}
        _made[function] = torch.compile(function, dynamic=True, options=options)
        with torch.no_grad():
            _call(function, trial)
    if _made[function] is None:
        return None
    return lambda *args: _call(function, args)


def _call(function: Callable[..., Any], args: tuple[Tensor, ...]) -> Any:
    """Compiled if it can be, as it is where that fails: here at first, or for another dtype."""
    made = _made[function]
    if made is not None:
        try:
            return made(*args)
        except Exception as error:  # whatever a missing or broken toolchain raises
            _made[function] = None
            first = (str(error).strip().splitlines() or [""])[0]
            _log.info("str_kernels: torch.compile failed, loops run as torch calls (%s)", first)
    return function(*args)
