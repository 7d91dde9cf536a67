"""Screen: the log-mass of every (row, tile) pair, in the cheapest precision that serves.

Stage: ``Head`` → ``TileMasses``, one GEMM. A block of logits lives in one buffer and is reduced
before the next is made; the weight is gathered and converted block by block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.backends.contract import Head, TileMasses, Tiles
from str_kernels.backends.logits import accumulator, block_logits, finish_logits, softcap_slope
from str_kernels.backends.torch_blocked.blocks import head_rows, spans
from str_kernels.options import TILE, LossOptions


def screen_tiles(
    head: Head, tiles: Tiles, options: LossOptions, screen: str, columns: int
) -> TileMasses:
    """Log-masses ``[R, T]``; ``screen`` is ``"exact"`` (the operands' own dtype) or ``"bf16"``."""
    shape = (len(head.hidden_states), len(tiles.mean_rows))
    log_mass = torch.empty(
        shape, dtype=accumulator(head.hidden_states.dtype), device=head.weight.device
    )
    slope = None if options.softcap is None else torch.empty_like(log_mass)
    dtype = _product_dtype(head.hidden_states.dtype, screen)
    hidden = head.hidden_states.to(dtype)
    for block in spans(head.weight.shape[0], columns):
        weight, bias = head_rows(head, tiles.order, block, dtype)
        logits = _screened_logits(hidden, weight, bias, options, log_mass.dtype)
        where = slice(block.start // TILE, -(-block.stop // TILE))
        _reduce(logits, options, log_mass[:, where], None if slope is None else slope[:, where])
    return TileMasses(log_mass, slope)


def _product_dtype(dtype: torch.dtype, screen: str) -> torch.dtype:
    if screen == "bf16":
        return torch.bfloat16
    # half-precision products on a CPU are slower than fp32 ones and overflow at 65504
    return torch.float32 if dtype == torch.float16 else dtype


def _screened_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions, dtype: torch.dtype
) -> Tensor:
    if hidden.dtype == dtype:
        return block_logits(hidden, weight, bias, options)
    products = torch.mm(hidden, weight.T).to(dtype)
    if bias is not None:
        products += bias.to(dtype)
    return finish_logits(products, options)


def _reduce(logits: Tensor, options: LossOptions, log_mass: Tensor, slope: Tensor | None) -> None:
    """Logits ``[R, C]`` → the log-masses of their tiles; the logits are used up."""
    ragged = -logits.shape[1] % TILE
    if ragged:
        logits = F.pad(logits, (0, ragged), value=float("-inf"))
    tiled = logits.view(len(logits), logits.shape[1] // TILE, TILE)
    slopes = None
    if slope is not None:
        # a padded column has no mass; its slope must only be finite
        slopes = softcap_slope(tiled.clamp(min=-options.softcap), options)
    # a tile of -inf alone has no maximum to shift by
    maximum = tiled.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
    exponentials = tiled.sub_(maximum[..., None]).exp_()
    mass = exponentials.sum(-1)
    if slope is not None:
        torch.div(slopes.mul_(exponentials).sum(-1), mass.clamp(min=1e-30), out=slope)
    torch.add(mass.log_(), maximum, out=log_mass)
