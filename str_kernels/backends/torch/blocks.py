"""Block sizes from a byte budget, and the blocks of a head in the order of its tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.contract import Head
from str_kernels.engine.logits import accumulator, weight_rows
from str_kernels.options import TILE

# Taller blocks of rows amortise a GEMM's packing of the weight; still taller ones gained nothing.
MAX_ROWS = 2048
# Every block costs some twenty calls, but a wider block leaves the cache before its exponentials
# are taken, unless it has so few rows that it is small.
_MAX_COLUMNS = 32 * TILE
_SMALL_BLOCK = 1 << 18  # numbers


def row_block(byte_budget: int, head: Head, rows: int, *, routed: bool) -> int:
    """Rows per block, so that four ``[R, D]`` arrays fit, or four ``[R, T]`` if these are wider."""
    vocab_size, widest = head.weight.shape
    if routed:
        widest = max(widest, -(-vocab_size // TILE))
    fit = byte_budget // (4 * _width(head) * widest)
    return min(MAX_ROWS, max(1, rows), max(16, fit))


def column_block(byte_budget: int, head: Head) -> int:
    """Columns per block, in whole tiles, so that two blocks of logits and of weight rows fit."""
    rows = min(MAX_ROWS, max(1, len(head.hidden_states)))
    columns = byte_budget // (2 * _width(head) * (rows + head.weight.shape[1])) // TILE * TILE
    most = max(_MAX_COLUMNS, _SMALL_BLOCK // rows // TILE * TILE)
    return min(most, max(TILE, columns))


def scratch(byte_budget: int, head: Head, rows: int) -> int:
    """Bytes of a block while it is computed exactly: its logits, and rows of H, W and gradient."""
    vocabulary, dim = head.weight.shape
    size = row_block(byte_budget, head, rows, routed=False)
    block = head._replace(hidden_states=head.hidden_states[:size])
    columns = min(vocabulary, column_block(byte_budget, block))
    converted = columns * dim if head.weight.dtype.itemsize < _width(head) else 0
    return _width(head) * (size * (columns + 2 * dim) + converted)


def _width(head: Head) -> int:
    return accumulator(head.hidden_states.dtype).itemsize  # bytes


def spans(total: int, size: int) -> list[slice]:
    """Cut ``range(total)`` into slices of at most ``size``."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def head_rows(
    head: Head, order: Tensor | None, columns: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gather weight rows ``[C, D]`` and bias ``[C]`` of one block of the order, in ``dtype``."""
    where = columns if order is None else order[columns]
    bias = None if head.bias is None else head.bias[where].to(dtype)
    return weight_rows(head, where, dtype), bias


def in_block(positions: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Find the rows whose labels lie in this block, and their columns in it: both ``[H]``."""
    here = ((positions >= columns.start) & (positions < columns.stop)).nonzero()[:, 0]
    return here, positions[here] - columns.start
