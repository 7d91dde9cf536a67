"""Loops that `torch.compile` fuses if a compiler is installed; torch can run them without one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from str_kernels.notices import say_once

_log = logging.getLogger("str_kernels")
_made: dict[Callable[..., Any], Callable[..., Any] | None] = {}


def compiled(function: Callable[..., Any], *trial: Tensor) -> Callable[..., Any] | None:
    """Return the function compiled for any shape; None where that fails, which is logged once.

    Args:
        function: a function of tensors, which a process compiles once.
        trial: small arguments for a first call.

    Raises:
        MemoryError: memory ran out, in this call or a later one; also ``torch.OutOfMemoryError``.
    """
    if torch._dynamo.config.disable:  # uncompiled it is many times slower than blocked calls
        return None
    if function not in _made:
        say_once("str_kernels: compiles its loops for this CPU, some seconds once in a process")
        _made[function] = torch.compile(function, dynamic=True, options=_options())
        with torch.no_grad():
            _call(function, trial)
    if _made[function] is None:
        return None
    return lambda *args: _call(function, args)


def _options() -> dict[str, Any]:
    # without this option every call uses the number of threads of the first one
    options: dict[str, Any] = {"cpp.dynamic_threads": True}
    # torch keeps compiled code on disk under a key without the width of vectors: a folder that CPUs
    # share gave one with AVX2 the loops of one with AVX-512, which step over half of the numbers
    width = {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability())
    return options if width is None else {**options, "cpp.simdlen": width}


def _call(function: Callable[..., Any], args: tuple[Tensor, ...]) -> Any:
    """Call the compiled function, or the plain one if compiling fails, perhaps for a new dtype."""
    made = _made[function]
    if made is not None:
        try:
            return made(*args)
        except torch._dynamo.exc.TorchDynamoException as error:  # it wraps the toolchain's error
            _raise_out_of_memory(error)
            _made[function] = None
            first = (str(error).strip().splitlines() or [""])[0]
            _log.info("str_kernels: torch.compile failed, loops run as torch calls (%s)", first)
    return function(*args)


def _raise_out_of_memory(error: BaseException | None) -> None:
    """Raise the out-of-memory error that the compiler wrapped, if there is one."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise error
        error = getattr(error, "inner_exception", None) or error.__context__
