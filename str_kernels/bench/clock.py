"""Measure time in GEMMs: a call beside the bare product of hidden states and head.

One GEMM is ``2·N·V·D`` operations in the operands' own dtype, blocked so that it needs no memory to
speak of. Both are timed in turns in one process, and a call is compared with the products right
before and after it: what slows a machine down for a while slows both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_ROWS, _COLUMNS = 2048, 8192  # of a block of the bare product


@dataclass(frozen=True)
class Timing:
    """Paired measurements: seconds of the call, and its ratio to the unit, repeat by repeat."""

    seconds: list[float]
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)


def bare_product(hidden_states: Tensor, weight: Tensor) -> Callable[[], None]:
    """Return a call that multiplies ``H Wᵀ`` block by block into one buffer."""
    rows, columns = min(_ROWS, len(hidden_states)), min(_COLUMNS, len(weight))
    buffer = hidden_states.new_empty(rows, columns)

    def run() -> None:
        with torch.no_grad():
            for block in weight.split(columns):
                for part in hidden_states.split(rows):
                    out = buffer.view(-1)[: len(part) * len(block)].view(len(part), len(block))
                    torch.mm(part, block.T, out=out)

    return run


def paired(
    call: Callable[[], object],
    unit: Callable[[], object],
    *,
    device: torch.device,
    repeats: int = 7,
    budget_s: float = 30.0,
) -> Timing:
    """Time a call in units of another, both warmed up; at least once, at most ``budget_s`` long."""
    call()
    unit()
    seconds, units = [], [_timed(unit, device)]
    started = time.perf_counter()
    while not seconds or (len(seconds) < repeats and time.perf_counter() - started < budget_s):
        seconds.append(_timed(call, device))
        units.append(_timed(unit, device))
    ratios = [
        2 * second / (before + after)
        for second, before, after in zip(seconds, units, units[1:], strict=False)
    ]
    return Timing(seconds, ratios)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    settle = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        settle()
        started = time.perf_counter()
        call()
        settle()
        return time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()
