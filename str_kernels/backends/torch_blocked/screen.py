"""Screen: the log-mass of every (row, tile) pair, in the cheapest precision that serves.

Stage: ``Head`` → ``TileMasses``, one GEMM. The weight is gathered and converted block by block, and
a block's logits are reduced in pieces that stay in the cache. The reduction is ``log_softmax`` over
a tile: torch's only single-pass kernel for it, as fast as a compiled one and there without a
compiler.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.backends.contract import Head, TileMasses, Tiles
from str_kernels.backends.logits import accumulator, finish_logits, softcap_slope, weight_rows
from str_kernels.backends.products import integer_product, product_dtype
from str_kernels.backends.torch_blocked.blocks import spans
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import quantise_rows

_PIECE = 1 << 19  # logits reduced at once: 2 MiB of fp32, a core's cache
_INTEGERS = 1 << 21  # products of a block of int8: 8 MiB, else they leave the shared cache
_LEAST_LOG_P = -1024.0  # fp32 keeps 4 decimals here, and fewer below


class _Products(Protocol):
    """``H Wᵀ`` of one block after another, in the precision of a screen."""

    def multiply(self, block: slice) -> Tensor:
        """Of the block's columns ``[R, C]``, in a buffer that the next block takes."""
        ...

    def logits(self, products: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows of the block's as ``dtype``, to be used up; the bias is not in them."""
        ...


def screen_tiles(
    head: Head, tiles: Tiles, options: LossOptions, screen: str, columns: int
) -> TileMasses:
    """Log-masses ``[R, T]``; ``screen``: a screen of the torch backend."""
    shape = (len(head.hidden_states), len(tiles.mean_rows))
    log_mass = torch.empty(
        shape, dtype=accumulator(head.hidden_states.dtype), device=head.weight.device
    )
    slope = None if options.softcap is None else torch.empty_like(log_mass)
    columns = min(columns, head.weight.shape[0])
    if screen == "int8":
        most = _INTEGERS // max(1, shape[0]) // TILE * TILE
        columns = min(columns, max(TILE, most))
        made: _Products = _Quantised(head, tiles, columns)
    else:
        rounded = torch.bfloat16 if screen == "bf16" else head.hidden_states.dtype
        made = _Rounded(head, tiles, columns, rounded)
    for block in spans(head.weight.shape[0], columns):
        products = made.multiply(block)
        bias = None if head.bias is None else head.bias[_tokens(tiles, block)].to(log_mass.dtype)
        where = slice(block.start // TILE, -(-block.stop // TILE))
        for rows in spans(len(products), max(1, _PIECE // products.shape[1])):
            logits = made.logits(products, rows, log_mass.dtype)
            if bias is not None:
                logits += bias
            _reduce(
                finish_logits(logits, options),
                options,
                log_mass[rows, where],
                None if slope is None else slope[rows, where],
            )
    return TileMasses(log_mass, slope)


class _Rounded:
    """Operands rounded to one floating-point dtype, and products of it."""

    def __init__(self, head: Head, tiles: Tiles, columns: int, rounded: torch.dtype) -> None:
        self.head, self.tiles, self.rounded = head, tiles, rounded
        self.dtype = product_dtype(rounded, head.weight.device)
        self.hidden = head.hidden_states.to(rounded).to(self.dtype)
        self.buffer = self.hidden.new_empty(len(self.hidden) * columns)

    def multiply(self, block: slice) -> Tensor:
        """See ``_Products.multiply``."""
        weight = weight_rows(self.head, _tokens(self.tiles, block), self.rounded).to(self.dtype)
        return torch.mm(self.hidden, weight.T, out=_shaped(self.buffer, self.hidden, weight))

    def logits(self, products: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """See ``_Products.logits``."""
        return products[rows].to(dtype)


class _Quantised:
    """int8 operands: the index's rows if it keeps any, else made block by block."""

    def __init__(self, head: Head, tiles: Tiles, columns: int) -> None:
        self.head, self.tiles = head, tiles
        self.hidden, scales = quantise_rows(head.hidden_states, torch.int8)
        self.row_scales, self.column_scales = scales[:, None], scales  # of columns: block by block
        shape = (len(self.hidden) * columns,)
        self.buffer = torch.empty(shape, dtype=torch.int32, device=head.weight.device)

    def multiply(self, block: slice) -> Tensor:
        """See ``_Products.multiply``."""
        kept = self.tiles.quantised
        if kept is not None and kept.dtype == torch.int8:
            weight, self.column_scales = kept[block], self.tiles.row_scales[block]
        else:
            rows = weight_rows(self.head, _tokens(self.tiles, block), self.head.hidden_states.dtype)
            weight, self.column_scales = quantise_rows(rows, torch.int8)
        return integer_product(self.hidden, weight, _shaped(self.buffer, self.hidden, weight))

    def logits(self, products: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """See ``_Products.logits``."""
        # cast first: a product of int32 and fp32 is several times slower
        return products[rows].to(dtype).mul_(self.column_scales).mul_(self.row_scales[rows])


def _tokens(tiles: Tiles, block: slice) -> Tensor | slice:
    """The vocabulary's rows behind the columns of a block."""
    return block if tiles.order is None else tiles.order[block]


def _shaped(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``[R, C]`` of a buffer; one for all blocks, for fresh pages cost as much as the products."""
    return buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))


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
