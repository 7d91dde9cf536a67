"""Screen: ``H``, ``W`` → the log-mass of every (row, tile) pair; logits live in registers only."""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.tiles import (
    LOWEST,
    TILE,
    finish_logits,
    grouped,
    products,
    rows_at,
    softcap_slope,
)


@triton.jit
def screen_kernel(
    hidden_ptr,
    hidden_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    order_ptr,
    bias_ptr,
    log_mass_ptr,
    slope_ptr,
    rows,
    vocab,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: BLOCK_R rows × one tile. It alone writes ``log_mass[tile, its rows]`` and slope.

    In: ``hidden [R, D]`` fp or int8, ``hidden_scale [R]`` fp32 or None, ``weight [V, D]`` (through
    the order, or already in tile order), ``weight_scale [V]`` fp32 in tile order or None, ``order
    [V]`` int64 or None, ``bias [V]`` in tile order or None. Out: ``log_mass [T, R]`` fp32; ``slope
    [T, R]`` fp32, the tile's softmax mean of the softcap's derivative, or None.
    """
    block, tile = grouped(rows, tl.cdiv(vocab, TILE), BLOCK_R, GROUP)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    position = tile * TILE + tl.arange(0, TILE)
    total = products(
        hidden_ptr,
        tl.minimum(row, rows - 1),
        weight_ptr,
        rows_at(order_ptr, position, vocab),
        dim,
        precision,
        BLOCK_D,
    ).to(tl.float32)
    if hidden_scale_ptr is not None:
        total *= tl.load(hidden_scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        total *= tl.load(weight_scale_ptr + position, mask=position < vocab, other=0.0)[None, :]
    z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
    top = tl.maximum(tl.max(z, 1), LOWEST)
    p = tl.exp(z - top[:, None])
    mass = tl.sum(p, 1)
    out = tile.to(tl.int64) * rows + row
    tl.store(log_mass_ptr + out, top + tl.log(mass), mask=row < rows)
    if slope_ptr is not None:
        slope = tl.sum(p * softcap_slope(z, softcap), 1) / tl.maximum(mass, 1e-30)
        tl.store(slope_ptr + out, slope, mask=row < rows)
