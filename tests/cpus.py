"""Stand in for another CPU than the one that runs the tests.

``STR_KERNELS_TEST_CPU=bf16,int8,amx`` does so for a whole session.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from str_kernels.engine import cpu


def set_cpu(monkeypatch, **fast: Any) -> None:
    """Let the engine believe in a CPU on which just these products are fast.

    Where oneDNN has no int8 instructions, or must not use them, its int8 product saturates and is
    wrong; a pretended CPU multiplies exactly.
    """
    if fast.get("int8") and not cpu.this_cpu().int8:
        monkeypatch.setattr(torch, "_int_mm", _exact_int_mm)
    # wrapped, so that test_cpu.py still finds the question itself
    answer = functools.wraps(cpu._ask.__wrapped__)(lambda: cpu.Cpu(**fast))
    monkeypatch.setattr(cpu, "_ask", answer)


def pretend(names: str | None) -> None:
    """Let the engine believe in a CPU on which these products are fast, for the session."""
    if names is not None:
        set_cpu(pytest.MonkeyPatch(), **dict.fromkeys(names.split(","), True))


def _exact_int_mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return out.copy_(left.double() @ right.double())
