"""The gradient of a trainable weight on the device: live rows, their dz, and its product with H."""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.tiles import (
    TILE,
    finish_logits,
    grouped,
    multiply,
    products,
    rows_at,
    softcap_slope,
)


@triton.jit
def live_kernel(
    masses_ptr,
    list_ptr,
    count_ptr,
    rows,
    first_tile,
    row_stride,
    tile_stride,
    BLOCK: tl.constexpr,
):
    """One program: one of the C tiles from ``first_tile`` on; it alone writes its list and count.

    In: ``masses [R, T]`` fp32 with its strides, negative on live pairs. Out: ``list [C, R]`` int32,
    of which the first ``count [C]`` int32 entries are the tile's live rows, ascending.
    """
    slot, count = tl.program_id(0), 0
    column = (first_tile + slot).to(tl.int64) * tile_stride
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place = row.to(tl.int64) * row_stride + column
        live = tl.load(masses_ptr + place, mask=row < rows, other=0.0) < 0
        chosen = live.to(tl.int32)
        out = slot.to(tl.int64) * rows + count + tl.cumsum(chosen, 0) - 1
        tl.store(list_ptr + out, row, mask=live)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + slot, count)


@triton.jit
def logit_gradient_kernel(
    hidden_ptr,
    weight_ptr,
    order_ptr,
    bias_ptr,
    list_ptr,
    count_ptr,
    coefficient_ptr,
    label_ptr,
    dz_ptr,
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
    """One program: BLOCK_R listed rows × one of the C tiles from ``first_tile`` on.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``order [V]`` int64 or None, ``bias [V]`` in tile
    order or None, ``list [C, R]`` and ``count [C]`` int32 (None: every row), ``coefficient [4, R]``
    fp32 (lse, α, the label's dz, σ), ``label [R]`` int32. Out: ``dz [C, R, TILE]`` in the dtype of
    H, by ``H Wᵀ + b``, entry i for the tile's i-th listed row; each program writes its own entries.
    """
    tiles = tl.num_programs(0) // tl.cdiv(rows, BLOCK_R)
    block, slot = grouped(rows, tiles, BLOCK_R, GROUP)
    base = slot.to(tl.int64) * rows
    place = block * BLOCK_R + tl.arange(0, BLOCK_R)
    count = rows if count_ptr is None else tl.load(count_ptr + slot)
    if block * BLOCK_R < count:
        live = place < count
        row = place if list_ptr is None else tl.load(list_ptr + base + place, mask=live, other=0)
        row = tl.minimum(row, rows - 1)
        column = tl.arange(0, TILE)
        position = (first_tile + slot) * TILE + column
        weight_row = rows_at(order_ptr, position, vocab)
        total = products(hidden_ptr, row, weight_ptr, weight_row, dim, precision, BLOCK_D)
        z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
        lse = tl.load(coefficient_ptr + row)[:, None]
        alpha = tl.load(coefficient_ptr + rows + row)[:, None]
        at_label = tl.load(coefficient_ptr + 2 * rows + row)[:, None]
        # a silent row adds nothing, whatever its logits are
        z = tl.where((alpha == 0.0) & (at_label == 0.0), 0.0, z)
        dz = alpha * tl.exp(z - lse)
        label = tl.load(label_ptr + row)
        dz = tl.where(label[:, None] == position[None, :], at_label, dz)
        dz -= tl.load(coefficient_ptr + 3 * rows + row)[:, None]
        if softcap is not None:
            dz *= softcap_slope(z, softcap)
        dz = tl.where((position < vocab)[None, :], dz * logit_scale, 0.0)
        out = dz_ptr + (base + place)[:, None] * TILE + column[None, :]
        tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def weight_kernel(
    hidden_ptr,
    dz_ptr,
    list_ptr,
    count_ptr,
    order_ptr,
    scale_ptr,
    spread_ptr,
    safety_slot_ptr,
    safety_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    rows,
    vocab,
    first_tile,
    dim: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: one of the C tiles from ``first_tile`` on × BLOCK_E columns, its own to write.

    In: ``hidden [R, D]``, ``dz [C, R, TILE]``, ``list [C, R]`` and ``count [C]`` int32 or None,
    ``order [V]`` int64 or None, ``scale [1]`` fp32 what dz is multiplied by, ``spread [T, D]`` fp32
    or None, ``safety_slot [V]`` int32 in tile order (-1: none) or None, ``safety [K, D]`` fp32.
    Out: ``weight_grad [V, D]`` or None; ``bias_grad [V]`` fp32 in tile order, of dz alone, or None.
    """
    wide = tl.cdiv(dim, BLOCK_E)
    slot, block = tl.program_id(0) // wide, tl.program_id(0) % wide
    along, column = block * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, TILE)
    within = (along < dim)[None, :]
    base, tile = slot.to(tl.int64) * rows, first_tile + slot
    count = rows if count_ptr is None else tl.load(count_ptr + slot)
    total, bias = tl.zeros([TILE, BLOCK_E], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, count, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        live = place < count
        row = place if list_ptr is None else tl.load(list_ptr + base + place, mask=live, other=0)
        there = dz_ptr + (base + place)[None, :] * TILE + column[:, None]
        dz = tl.load(there, mask=live[None, :], other=0.0)
        if bias_grad_ptr is not None:
            bias += tl.sum(dz.to(tl.float32), 1)
        if weight_grad_ptr is not None:
            hidden = hidden_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
            h = tl.load(hidden, mask=live[:, None] & within, other=0.0)
            total = multiply(dz, h, total, precision)
    position, scale = tile * TILE + column, tl.load(scale_ptr)
    inside = position < vocab
    if bias_grad_ptr is not None:
        first = position < tl.where(block == 0, vocab, 0)  # one of the tile's programs writes it
        tl.store(bias_grad_ptr + position, bias * scale, mask=first)
    if weight_grad_ptr is not None:
        total *= scale
        if spread_ptr is not None:
            spread = spread_ptr + tile.to(tl.int64) * dim + along
            total += tl.load(spread, mask=along < dim, other=0.0)[None, :]
        if safety_slot_ptr is not None:
            token = tl.load(safety_slot_ptr + position, mask=inside, other=-1)
            mask = (token >= 0)[:, None] & within
            safety = safety_ptr + token.to(tl.int64)[:, None] * dim + along[None, :]
            total += tl.load(safety, mask=mask, other=0.0)
        out = weight_grad_ptr + rows_at(order_ptr, position, vocab)[:, None] * dim + along[None, :]
        tl.store(out, total.to(weight_grad_ptr.dtype.element_ty), mask=inside[:, None] & within)
