"""Stand in for another CPU than the one that runs the tests."""

from __future__ import annotations

from typing import Any

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
    monkeypatch.setattr(cpu, "_ask", lambda: cpu.Cpu(**fast))


def _exact_int_mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return out.copy_(left.double() @ right.double())
