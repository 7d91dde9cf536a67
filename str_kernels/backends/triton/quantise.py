"""Rows of H, or of W through the order, are quantised to 8 bits and a scale each.

The numbers are those of ``str_kernels.quantise``, computed in one pass over memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import ROWWISE
from str_kernels.backends.triton.operands import tuning
from str_kernels.backends.triton.tiles import rows_at
from str_kernels.quantise import LEAST, TOP

POINTERS = {"i64": ("order",), "fp32": ("column", "scale"), "i8": ("eight",)}


@triton.jit
def columns_of(row, column_ptr, column, start, dim: tl.constexpr):
    """Load the scaled columns from ``start`` on, ``[BLOCK_R, BLOCK_D]`` fp32, 0 past the end."""
    inside = column < dim
    x = tl.load(row + start, mask=inside[None, :], other=0.0).to(tl.float32)
    if column_ptr is not None:
        x *= tl.load(column_ptr + column, mask=inside, other=0.0)[None, :]
    return x


@triton.jit
def quantise_kernel(
    rows_ptr,
    order_ptr,
    column_ptr,
    eight_ptr,
    scale_ptr,
    first,
    stop,
    dim: tl.constexpr,
    width: tl.constexpr,
    top: tl.constexpr,
    least: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program alone writes BLOCK_R rows; it reads them twice, the second time from a cache.

    In: ``rows [*, D]``, ``order`` int64 or None, ``column [D]`` fp32, factors of the columns, or
    None; the places ``first`` to ``stop`` are taken. Out: ``eight [stop - first, width]`` int8 or
    fp8, 0 from column D on, and ``scale [stop - first]`` fp32, with which a row's largest
    magnitude, at least ``least``, becomes ``top``; NaN for a row that has NaN or inf.
    """
    place, along = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    inside = place < stop - first
    row = rows_ptr + rows_at(order_ptr, first + place, stop)[:, None] * dim + along[None, :]
    largest = tl.full([BLOCK_R], least, tl.float32)
    odd = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, dim, BLOCK_D):
        x = columns_of(row, column_ptr, start + along, start, dim)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        odd += tl.sum(x * 0.0, 1)  # NaN for NaN and inf, which a maximum may ignore
    scale = largest / top
    inverse = 1.0 / scale
    out = eight_ptr + place.to(tl.int64)[:, None] * width + along[None, :]
    for start in range(0, width, BLOCK_D):
        within = (start + along < width)[None, :]
        x = columns_of(row, column_ptr, start + along, start, dim) * inverse[:, None]
        if eight_ptr.dtype.element_ty == tl.int8:
            x = tl.floor(x + 0.5)
        tl.store(out + start, x.to(eight_ptr.dtype.element_ty), mask=inside[:, None] & within)
    tl.store(scale_ptr + place, scale + odd, mask=inside)


def quantised(
    rows: Tensor,
    dtype: torch.dtype,
    *,
    order: Tensor | None = None,
    places: range | None = None,
    columns: Tensor | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rows at these places of the order (default: all) in 8 bits, and their scales.

    They are multiplied by ``columns [D]`` first, and have ``width`` numbers, by default D, of which
    those from D on are 0.
    """
    width = rows.shape[1] if width is None else width
    places = range(len(rows)) if places is None else places
    eight = torch.empty(len(places), width, dtype=dtype, device=rows.device)
    scales = torch.empty(len(places), dtype=torch.float32, device=rows.device)
    quantise_kernel[(-(-len(places) // ROWWISE.block_r),)](
        rows,
        order,
        columns,
        eight,
        scales,
        places.start,
        places.stop,
        rows.shape[1],
        width,
        TOP[dtype],
        LEAST,
        **tuning(ROWWISE, "RD"),
    )
    return eight, scales
