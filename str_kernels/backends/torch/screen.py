"""Screen computes the log-mass of every (row, tile) pair in a cheap precision.

Stage: ``Head`` → ``TileMasses``, one GEMM. The weight is gathered and converted block by block, and
each block of products is reduced at once (``reduce``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.torch.blocks import spans
from str_kernels.backends.torch.compiled import compiled
from str_kernels.backends.torch.reduce import Products, fused_reduction, reduce_eagerly
from str_kernels.engine.contract import Block, Head, TileMasses, Tiles
from str_kernels.engine.logits import accumulator, columns_of, weight_rows
from str_kernels.engine.products import integer_product, product, product_dtype
from str_kernels.options import TILE
from str_kernels.quantise import quantise_rows

_INTEGERS = 1 << 20  # int8 products of a block: the quantised rows of more would leave the cache
COMPILED_FROM = 1 << 27  # logits: the loops gain 25 ms a screen, but compiling takes seconds


def screen_tiles(given: Block, screen: str, columns: int) -> TileMasses:
    """Log-masses ``[R, T]``; ``screen``: ``"exact"`` (operands' dtype), ``"bf16"``, ``"int8"``."""
    head, _, tiles, options = given[:4]
    (rows, dtype), device = (len(head.hidden_states), head.hidden_states.dtype), head.weight.device
    log_mass = torch.empty(rows, len(tiles.mean_rows), dtype=accumulator(dtype), device=device)
    slope = None if options.softcap is None else torch.empty_like(log_mass)
    anchor = columns_of(given).anchor
    columns = min(columns, len(head.weight))
    large = rows * len(head.weight) >= COMPILED_FROM
    compiling = large and device.type == "cpu" and log_mass.dtype == torch.float32
    fused = fused_reduction(options) if compiling and head.bias is None else None
    if screen == "int8":
        columns = min(columns, max(TILE, _INTEGERS // max(1, rows) // TILE * TILE))
        products: _Quantised | _Rounded = _Quantised(head, tiles, columns, compiling)
    else:
        rounded = torch.bfloat16 if screen == "bf16" else dtype
        products = _Rounded(head, tiles, columns, rounded)
    for block in spans(len(head.weight), columns):
        made = products.of(block)
        where = slice(block.start // TILE, -(-block.stop // TILE))
        slopes = None if slope is None else slope[:, where]
        found = TileMasses(log_mass[:, where], slopes, anchor)
        if fused is None or not fused(made, found):
            bias = head.bias
            bias = None if bias is None else bias[_tokens(tiles, block)].to(log_mass.dtype)
            reduce_eagerly(made, bias, options, found)
        if fused is not None:
            fused.see(log_mass[:, where])
    return TileMasses(log_mass, slope, anchor)


class _Rounded:
    """Products of operands that are rounded to one floating-point dtype."""

    def __init__(self, head: Head, tiles: Tiles, columns: int, rounded: torch.dtype) -> None:
        self.head, self.tiles, self.rounded = head, tiles, rounded
        self.dtype = product_dtype(rounded, head.weight.device)
        self.hidden = head.hidden_states.to(rounded).to(self.dtype)
        self.buffer = self.hidden.new_empty(len(self.hidden) * columns)

    def of(self, block: slice) -> Products:
        """Multiply by the block's weight rows; the next block overwrites the result."""
        weight = weight_rows(self.head, _tokens(self.tiles, block), self.rounded).to(self.dtype)
        out = _shaped(self.buffer, self.hidden, weight)
        return Products(product(self.hidden, weight.T, out))


class _Quantised:
    """Products of int8 operands: the index's rows if it has any, else quantised block by block."""

    def __init__(self, head: Head, tiles: Tiles, columns: int, compiling: bool) -> None:
        self.head, self.tiles = head, tiles
        loop = compiled(_eight_bits, torch.ones(2, 16), torch.ones(16)) if compiling else None
        self.quantise = loop or _eight_bits
        self.indexed = tiles.quantised is not None and tiles.quantised.dtype == torch.int8
        self.columns = tiles.columns
        inverse = None if self.columns is None else self.columns.reciprocal()
        self.hidden, scales = quantise_rows(head.hidden_states, torch.int8, inverse)
        self.row_scales = scales[:, None]
        self.buffer = self.hidden.new_empty(len(self.hidden) * columns, dtype=torch.int32)

    def of(self, block: slice) -> Products:
        """Multiply by the block's weight rows; the next block overwrites the result."""
        if self.indexed:
            weight, scales = self.tiles.quantised[block], self.tiles.row_scales[block]
        else:
            rows = weight_rows(self.head, _tokens(self.tiles, block), self.head.hidden_states.dtype)
            weight, scales = self.quantise(rows, self.columns)
        out = _shaped(self.buffer, self.hidden, weight)
        return Products(integer_product(self.hidden, weight, out), scales, self.row_scales)


def _eight_bits(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return quantise_rows(rows, torch.int8, columns)


def _tokens(tiles: Tiles, block: slice) -> Tensor | slice:
    """Return the vocabulary's rows at the columns of a block."""
    return block if tiles.order is None else tiles.order[block]


def _shaped(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """View a buffer as ``[R, C]``; blocks share it: fresh pages cost as much as the products."""
    return buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
