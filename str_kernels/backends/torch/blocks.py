"""Block sizes from a byte budget, and the blocks of a head in the order of its tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.contract import Head
from str_kernels.engine.logits import accumulator, weight_rows
from str_kernels.options import TILE

# Taller blocks of rows amortise a GEMM's packing of the weight; beyond this nothing was gained.
MAX_ROWS = 2048
# Wider blocks leave the cache before their exponentials are taken, unless they have few rows; and
# every block costs some twenty calls.
_MAX_COLUMNS = 32 * TILE
_SMALL_BLOCK = 1 << 18  # numbers


def row_block(byte_budget: int, head: Head, rows: int, *, routed: bool) -> int:
    """Rows per block: of the ``[R, D]`` and ``[R, T]`` arrays that a block keeps, four each fit."""
    vocab_size, widest = head.weight.shape
    if routed:
        widest = max(widest, -(-vocab_size // TILE))
    fit = byte_budget // (4 * _width(head) * widest)
    return min(MAX_ROWS, max(1, rows), max(16, fit))


def column_block(byte_budget: int, head: Head) -> int:
    """Columns per block, whole tiles: two blocks of logits and two of weight rows fit."""
    rows = min(MAX_ROWS, max(1, len(head.hidden_states)))
    columns = byte_budget // (2 * _width(head) * (rows + head.weight.shape[1])) // TILE * TILE
    most = max(_MAX_COLUMNS, _SMALL_BLOCK // rows // TILE * TILE)
    return min(most, max(TILE, columns))


def _width(head: Head) -> int:
    """Bytes of an accumulated number."""
    return accumulator(head.hidden_states.dtype).itemsize


def spans(total: int, size: int) -> list[slice]:
    """``range(total)`` cut into slices of at most ``size``."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def head_rows(
    head: Head, order: Tensor | None, columns: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Weight rows ``[C, D]`` and bias ``[C]`` of one block of the order, in ``dtype``."""
    where = columns if order is None else order[columns]
    bias = None if head.bias is None else head.bias[where].to(dtype)
    return weight_rows(head, where, dtype), bias


def in_block(positions: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which rows' labels lie in this block, and where in it: both ``[H]``."""
    here = ((positions >= columns.start) & (positions < columns.stop)).nonzero()[:, 0]
    return here, positions[here] - columns.start
