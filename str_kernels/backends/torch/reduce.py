"""Reduce: the products of a block to the log-masses of its tiles, before they leave the cache.

In one of two ways, chosen once. Fused: one compiled loop scales, exponentiates and sums; it needs a
C++ compiler, and work enough to pay for its start. Otherwise torch calls, over pieces that stay in
the cache; `log_softmax` is torch's only single-pass kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.backends.torch.blocks import spans
from str_kernels.backends.torch.compiled import compiled
from str_kernels.engine.logits import finish_logits, softcap_slope
from str_kernels.options import TILE, LossOptions

_PIECE = 1 << 19  # logits reduced at once: 2 MiB of fp32, a core's cache
_LEAST_LOG_P = -1024.0  # fp32 keeps 4 decimals here, and fewer below


class Products(NamedTuple):
    """``H Wᵀ`` of a block ``[R, C]`` in the dtype it was made in, and what it is multiplied by.

    ``column_scales [C]`` and ``row_scales [R, 1]``, fp32: of quantised operands, else None.
    """

    numbers: Tensor
    column_scales: Tensor | None = None
    row_scales: Tensor | None = None


def reduce_eagerly(
    made: Products,
    bias: Tensor | None,
    options: LossOptions,
    log_mass: Tensor,
    slope: Tensor | None,
) -> None:
    """Into ``log_mass [R, C / TILE]`` and, with a softcap, ``slope``; the products are used up."""
    for rows in spans(len(made.numbers), max(1, _PIECE // max(1, made.numbers.shape[1]))):
        # cast first: a product of int32 and fp32 is several times slower
        logits = made.numbers[rows].to(log_mass.dtype)
        if made.column_scales is not None:
            logits.mul_(made.column_scales).mul_(made.row_scales[rows])
        if bias is not None:
            logits += bias
        logits = finish_logits(logits, options)
        _reduce(logits, options, log_mass[rows], None if slope is None else slope[rows])


def _reduce(logits: Tensor, options: LossOptions, log_mass: Tensor, slope: Tensor | None) -> None:
    ragged = -logits.shape[1] % TILE
    if ragged:
        logits = F.pad(logits, (0, ragged), value=float("-inf"))
    tiled = logits.view(len(logits), logits.shape[1] // TILE, TILE)
    log_p = torch.log_softmax(tiled, -1)
    # any column gives the log-mass, z - log p, as exactly as it holds its log p; the first is never
    # padding, but a masked token's logit may be -1e9 or -inf
    torch.sub(tiled[..., 0], log_p[..., 0], out=log_mass)
    coarse = ~(log_p[..., 0] > _LEAST_LOG_P)
    if coarse.any():
        log_mass[coarse] = torch.logsumexp(tiled[coarse], -1)
    if slope is not None:
        # a padded column has no mass; its slope must only be finite
        slopes = softcap_slope(tiled.clamp(min=-options.softcap), options)
        torch.sum(log_p.exp_().mul_(slopes), -1, out=slope)


class FusedReduction:
    """Block after block of the same rows, each in one compiled loop.

    Exponentials are taken relative to the largest log-mass that a row has had so far: a tile 87
    nats below it has none, and one as far above it overflows, which is seen and done eagerly.
    """

    def __init__(self, loop: Callable[..., Tensor], logit_scale: float) -> None:
        self.loop, self.logit_scale = loop, logit_scale
        self.shift: Tensor | None = None  # [R, 1]

    def __call__(self, made: Products, log_mass: Tensor) -> bool:
        """Into ``log_mass [R, C / TILE]``; False where the block is left to the other way."""
        done = False
        if self.shift is not None and made.numbers.shape[1] % TILE == 0:
            columns, rows = made.column_scales, made.row_scales
            columns = self.shift.new_ones(made.numbers.shape[1]) if columns is None else columns
            rows = torch.ones_like(self.shift) if rows is None else rows
            masses = self.loop(made.numbers, columns * self.logit_scale, rows, self.shift)
            done = bool((masses < float("inf")).all())  # nor NaN
            if done:
                log_mass.copy_(masses)
        return done

    def see(self, log_mass: Tensor) -> None:
        """Take notice of a block's log-masses."""
        highest = log_mass.amax(-1, keepdim=True)
        self.shift = highest if self.shift is None else torch.maximum(self.shift, highest)


def _log_masses(numbers: Tensor, columns: Tensor, rows: Tensor, shift: Tensor) -> Tensor:
    """``log Σ exp(numbers · scales)`` over tiles: ``[R, C / TILE]`` fp32; to be compiled."""
    tiled = numbers.view(len(numbers), -1, TILE).float()
    logits = tiled * columns.view(-1, TILE) * rows[..., None] - shift[..., None]
    return logits.exp().sum(-1).log() + shift


def fused_reduction(options: LossOptions) -> FusedReduction | None:
    """None where there is no compiler, or the logits are more than a product."""
    if options.softcap is not None:
        return None
    trial = torch.ones(2, 2 * TILE), torch.ones(2 * TILE), torch.ones(2, 1), torch.zeros(2, 1)
    loop = compiled(_log_masses, *trial)
    return None if loop is None else FusedReduction(loop, options.logit_scale)
