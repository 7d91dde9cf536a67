"""Screen: the log-mass of every (row, tile) pair, in the cheapest precision that serves.

Stage: ``Head`` → ``TileMasses``, one GEMM. The weight is gathered and converted block by block, and
a block's logits are reduced in pieces that stay in the cache. The reduction is ``log_softmax`` over
a tile: torch's only single-pass kernel for it, as fast as a compiled one and there without a
compiler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.backends.contract import Head, TileMasses, Tiles
from str_kernels.backends.logits import accumulator, finish_logits, softcap_slope
from str_kernels.backends.products import product_dtype
from str_kernels.backends.torch_blocked.blocks import head_rows, spans
from str_kernels.options import TILE, LossOptions

_PIECE = 1 << 19  # logits reduced at once: 2 MiB of fp32, a core's cache
_LEAST_LOG_P = -1024.0  # fp32 keeps 4 decimals here, and fewer below


def screen_tiles(
    head: Head, tiles: Tiles, options: LossOptions, screen: str, columns: int
) -> TileMasses:
    """Log-masses ``[R, T]``; ``screen`` is ``"exact"`` (the operands' own dtype) or ``"bf16"``."""
    shape = (len(head.hidden_states), len(tiles.mean_rows))
    log_mass = torch.empty(
        shape, dtype=accumulator(head.hidden_states.dtype), device=head.weight.device
    )
    slope = None if options.softcap is None else torch.empty_like(log_mass)
    rounded = torch.bfloat16 if screen == "bf16" else head.hidden_states.dtype
    dtype = product_dtype(rounded, head.weight.device)
    hidden = head.hidden_states.to(rounded).to(dtype)
    for block in spans(head.weight.shape[0], columns):
        weight, bias = head_rows(head, tiles.order, block, rounded)
        products = torch.mm(hidden, weight.to(dtype).T)
        where = slice(block.start // TILE, -(-block.stop // TILE))
        for rows in spans(len(products), max(1, _PIECE // products.shape[1])):
            logits = products[rows].to(log_mass.dtype)
            if bias is not None:
                logits = logits + bias.to(logits.dtype)
            _reduce(
                finish_logits(logits, options),
                options,
                log_mass[rows, where],
                None if slope is None else slope[rows, where],
            )
    return TileMasses(log_mass, slope)


def _reduce(logits: Tensor, options: LossOptions, log_mass: Tensor, slope: Tensor | None) -> None:
    """Logits ``[R, C]`` → the log-masses of their tiles, into ``log_mass [R, C / TILE]``."""
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
