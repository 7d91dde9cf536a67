"""The dead pairs' part of a trainable weight's gradient, which needs no logits.

Only the mass of a dead pair is known, so ``α · mass · h`` is spread evenly over its tile's rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.contract import Block, Coefficients, Saved
from str_kernels.engine.logits import accumulator
from str_kernels.engine.products import dead_product
from str_kernels.engine.rows import silence
from str_kernels.options import TILE

_ROWS = 2048  # rows in one block of scratch


def silent_rows(coefficients: Coefficients) -> Tensor:
    """``[R]`` bool: rows without an upstream gradient add nothing, even if logits overflowed."""
    return (coefficients.alpha == 0) & (coefficients.gamma == 0)


def dead_share(block: Block, saved: Saved, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Return what each tile's dead pairs add to each of its rows ``[T, D]`` and biases ``[T]``."""
    head, options = block.head, block.options
    tiles, dtype = saved.masses.shape[1], accumulator(head.hidden_states.dtype)
    weight = saved.masses.new_zeros(tiles, head.weight.shape[1])
    bias = saved.masses.new_zeros(tiles)
    sizes = torch.full_like(bias, TILE)
    sizes[-1] = head.weight.shape[0] - TILE * (tiles - 1)
    silent = silent_rows(coefficients)
    for start in range(0, len(silent), _ROWS):
        rows = slice(start, start + _ROWS)
        masses = saved.masses[rows]
        dz = masses.clamp(min=0.0).mul_((coefficients.alpha[rows] * options.logit_scale)[:, None])
        if saved.slope is not None:
            dz.mul_(saved.slope[rows])
        dz.div_(sizes)
        if coefficients.sigma is not None:
            # label smoothing subtracts σ for every token; live pairs do so with their own logits
            pull = (coefficients.sigma[rows] * options.logit_scale)[:, None]
            dz.sub_(torch.where(masses < 0, 0.0, pull))
        silence(dz, silent[rows])
        # σ is exact, not an approximation: with it the product keeps its precision
        operands = head.hidden_states.dtype if coefficients.sigma is None else dtype
        weight += dead_product(dz.T, head.hidden_states[rows], operands)
        bias += dz.sum(0)
    return weight, bias
