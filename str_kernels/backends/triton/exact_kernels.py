"""The exact pass on the device: probabilities of some tiles, and their product with W."""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.tiles import (
    LOWEST,
    TILE,
    finish_logits,
    grouped,
    multiply,
    products,
    rounded,
    rows_at,
    softcap_slope,
)


@triton.jit
def softmax_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    label_ptr,
    share_ptr,
    slope_ptr,
    sums_ptr,
    rows,
    vocab,
    first_tile,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: BLOCK_R rows × one of the C tiles from ``first_tile`` on; it alone writes there.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``bias [V]`` or None, ``label [R]`` int32. Out:
    ``share [C, R, TILE]`` in the dtype of H, exp(z - maximum) · slope without the label, or None;
    ``slope [C, R, TILE]`` in the dtype of H, or None; ``sums [5, C, R]`` fp32: without the label
    the maximum, Σ exp(z - maximum), Σ exp(z - maximum) · z and what ``share`` must be multiplied by
    for its rounding, with the label Σ z.
    """
    tiles = tl.num_programs(0) // tl.cdiv(rows, BLOCK_R)
    block, slot = grouped(rows, tiles, BLOCK_R, GROUP)
    row, column = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, TILE)
    position = (first_tile + slot) * TILE + column
    inside, past = row < rows, (position >= vocab)[None, :]
    weight_row = rows_at(None, position, vocab)
    row_in = tl.minimum(row, rows - 1)
    total = products(hidden_ptr, row_in, weight_ptr, weight_row, dim, precision, BLOCK_D)
    z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
    out = slot.to(tl.int64) * rows + row
    wide = out[:, None] * TILE + column[None, :]
    sums, plane = sums_ptr + out, tiles.to(tl.int64) * rows
    tl.store(sums + 4 * plane, tl.sum(tl.where(past, 0.0, z), 1), mask=inside)
    if slope_ptr is not None:
        slope = tl.where(past, 0.0, softcap_slope(z, softcap))
        tl.store(slope_ptr + wide, slope.to(slope_ptr.dtype.element_ty), mask=inside[:, None])
    label = tl.load(label_ptr + row, mask=inside, other=-1)
    z = tl.where(label[:, None] == position[None, :], float("-inf"), z)
    top = tl.maximum(tl.max(z, 1), LOWEST)
    p = tl.exp(z - top[:, None])
    tl.store(sums, top, mask=inside)
    tl.store(sums + plane, tl.sum(p, 1), mask=inside)
    tl.store(sums + 2 * plane, tl.sum(p * tl.maximum(z, LOWEST), 1), mask=inside)
    if share_ptr is not None:
        if softcap is not None:
            p *= softcap_slope(z, softcap)
        p, keep = rounded(p, share_ptr.dtype.element_ty)
        tl.store(sums + 3 * plane, keep, mask=inside)
        tl.store(share_ptr + wide, p, mask=inside[:, None])


@triton.jit
def expected_kernel(
    share_ptr,
    scale_ptr,
    weight_ptr,
    rescale_ptr,
    expected_ptr,
    rows,
    vocab,
    first_tile,
    tiles,
    dim: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """``expected · rescale + Σ_tiles scale · share @ W``; a program has BLOCK_R × BLOCK_E.

    In: ``share [C, R, TILE]``, ``scale [C, R]`` fp32 or None for 1, ``weight [V, D]``, ``rescale
    [R]`` fp32. In and out, its own block alone: ``expected [R, D]`` fp32.
    """
    wide = tl.cdiv(dim, BLOCK_E)
    row = tl.program_id(0) // wide * BLOCK_R + tl.arange(0, BLOCK_R)
    along = tl.program_id(0) % wide * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, TILE)
    inside, within = row < rows, (along < dim)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for slot in range(0, tiles):
        weight_row = rows_at(None, (first_tile + slot) * TILE + column, vocab)
        here = row + rows * tl.full([1], slot, tl.int64)
        share = tl.load(
            share_ptr + here[:, None] * TILE + column[None, :], mask=inside[:, None], other=0.0
        )
        w = tl.load(weight_ptr + weight_row[:, None] * dim + along[None, :], mask=within, other=0.0)
        part = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        part = multiply(share, w.to(share.dtype), part, precision)
        if scale_ptr is not None:
            part *= tl.load(scale_ptr + here, mask=inside, other=0.0)[:, None]
        total += part
    out = expected_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
    mask = inside[:, None] & within
    total += (
        tl.load(out, mask=mask, other=0.0)
        * tl.load(rescale_ptr + row, mask=inside, other=0.0)[:, None]
    )
    tl.store(out, total, mask=mask)
