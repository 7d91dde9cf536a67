"""Reduce turns the products of a block into the log-masses of its tiles, inside the cache.

There are two ways. The fused one scales, exponentiates and sums in one compiled loop; it needs a
C++ compiler, and enough work to pay for compiling. The eager one makes torch calls over pieces that
fit in the cache; `log_softmax` is torch's only single-pass kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.backends.torch.blocks import spans
from str_kernels.backends.torch.compiled import compiled
from str_kernels.engine.contract import TileMasses
from str_kernels.engine.logits import finish_logits, softcap_slope
from str_kernels.engine.rest import left_out
from str_kernels.options import TILE, LossOptions

_PIECE = 1 << 19  # logits reduced at once: 2 MiB of fp32, a core's cache
_LEAST_LOG_P = -64.0  # the log-mass has the rounding of a number as large as this


class Products(NamedTuple):
    """``H Wᵀ`` of a block ``[R, C]``, int32 for quantised operands, and its factors.

    The factors are ``column_scales [C]`` and ``row_scales [R, 1]``, fp32, if it was quantised.
    """

    numbers: Tensor
    column_scales: Tensor | None = None
    row_scales: Tensor | None = None


def reduce_eagerly(
    made: Products, bias: Tensor | None, options: LossOptions, out: TileMasses
) -> None:
    """Write the masses ``[R, C / TILE]``, relative to ``out.anchor``; overwrite the products."""
    out_of = left_out(bias, options)
    for rows in spans(len(made.numbers), max(1, _PIECE // max(1, made.numbers.shape[1]))):
        # cast first: a product of int32 and fp32 is several times slower
        logits = made.numbers[rows].to(out.log_mass.dtype)
        if made.column_scales is not None:
            logits.mul_(made.column_scales).mul_(made.row_scales[rows])
        if bias is not None:
            logits += bias
        logits = finish_logits(logits, options)
        if out_of is not None:
            logits.masked_fill_(out_of, float("-inf"))
        _reduce(logits, options, TileMasses(*(None if x is None else x[rows] for x in out)))


def _reduce(logits: Tensor, options: LossOptions, out: TileMasses) -> None:
    log_mass, slope, anchor = out
    ragged = -logits.shape[1] % TILE
    if ragged:
        logits = F.pad(logits, (0, ragged), value=float("-inf"))
    tiled = logits.view(len(logits), logits.shape[1] // TILE, TILE)
    log_p = torch.log_softmax(tiled, -1)
    # z - log p of any column is the log-mass, as exact as its log p; the first column is never
    # padding, but it may be a masked token with a logit of -1e9 or -inf
    torch.sub(tiled[..., 0] - anchor[:, None], log_p[..., 0], out=log_mass)
    coarse = ~(log_p[..., 0] > _LEAST_LOG_P)
    if coarse.any():
        relative = tiled[coarse] - anchor[:, None].expand_as(coarse)[coarse][:, None]
        log_mass[coarse] = torch.logsumexp(relative, -1)
    if slope is not None:
        # a padded column has no mass, so that any finite slope does
        slopes = softcap_slope(tiled.clamp(min=-options.softcap), options)
        torch.sum(log_p.exp_().mul_(slopes), -1, out=slope)
        # a tile without any probability
        slope.nan_to_num_(nan=0.0)


class FusedReduction:
    """Reduces block after block of the same rows, each in one compiled loop.

    Exponentials are relative to the largest log-mass that a row has had so far: a tile 87 nats
    below it underflows to no mass, and one as far above it overflows and is reduced eagerly.
    """

    def __init__(self, loop: Callable[..., Tensor], logit_scale: float) -> None:
        self.loop, self.logit_scale = loop, logit_scale
        self.shift: Tensor | None = None  # [R, 1], relative to the anchor

    def __call__(self, made: Products, out: TileMasses) -> bool:
        """Write the masses ``[R, C / TILE]``; False if the block must be reduced eagerly."""
        if self.shift is None or made.numbers.shape[1] % TILE:
            return False
        columns, rows = made.column_scales, made.row_scales
        columns = self.shift.new_ones(made.numbers.shape[1]) if columns is None else columns
        rows = torch.ones_like(self.shift) if rows is None else rows
        anchor = out.anchor[:, None]
        shift = anchor + self.shift
        # adding the anchor has rounded; subtracting it again is exact
        shifts = torch.stack([shift, shift - anchor])
        masses = self.loop(made.numbers, columns * self.logit_scale, rows, shifts)
        done = bool((masses < float("inf")).all())  # False for NaN too
        if done:
            out.log_mass.copy_(masses)
        return done

    def see(self, log_mass: Tensor) -> None:
        """Raise the shift to a block's largest log-masses."""
        highest = log_mass.amax(-1, keepdim=True)
        self.shift = highest if self.shift is None else torch.maximum(self.shift, highest)


def _log_masses(numbers: Tensor, columns: Tensor, rows: Tensor, shifts: Tensor) -> Tensor:
    """``log Σ exp(numbers · scales - anchor)`` over tiles, ``[R, C / TILE]`` fp32.

    It is written for the compiler. ``shifts [2, R, 1]`` are taken from the logits and added to the
    logarithm; their difference is the anchor.
    """
    tiled = numbers.view(len(numbers), -1, TILE).float()
    logits = tiled * columns.view(-1, TILE) * rows[..., None] - shifts[0, ..., None]
    return logits.exp().sum(-1).log() + shifts[1]


def fused_reduction(options: LossOptions) -> FusedReduction | None:
    """Compile the loop; None without a compiler, or with a softcap, which the loop cannot apply."""
    if options.softcap is not None:
        return None
    trial = torch.ones(2, 2 * TILE), torch.ones(2 * TILE), torch.ones(2, 1), torch.zeros(2, 2, 1)
    loop = compiled(_log_masses, *trial)
    return None if loop is None else FusedReduction(loop, options.logit_scale)
