"""Refine: the live pairs from the original operands, a chunk of one tile's live rows at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.tiles import (
    LOWEST,
    TILE,
    finish_logits,
    multiply,
    products,
    rounded,
    rows_at,
    softcap_slope,
)


@triton.jit
def refine_kernel(
    hidden_ptr,
    weight_ptr,
    order_ptr,
    bias_ptr,
    list_ptr,
    plan_ptr,
    shift_ptr,
    label_ptr,
    mass_ptr,
    maximum_ptr,
    expected_ptr,
    vocab,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Persistent: program i takes chunks i, i + programs, …, as many as the plan's head says.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``order [V]`` int64 or None, ``bias [V]`` in tile
    order or None, ``list [T·R]`` int32, ``plan [1 + C, 3]`` int32 (first row: how many chunks; then
    tile, first and end of the chunk's rows in the list), ``shift [R]`` fp32, ``label [R]`` int32.
    Out, label left out, fp32: Σ exp(z - shift) ``mass``, the largest logit ``maximum``, and
    ``expected`` = Σ exp(z - shift) · slope · w, or None. ATOMIC: ``[R]``, ``[R]``, ``[R, D]``,
    added to by every chunk that has the row. Otherwise ``[C·BLOCK_R]``, …: each chunk writes its
    own BLOCK_R slots, and nobody else does.

    Exponentials are taken relative to the row's maximum *in this tile* before they are rounded to
    the operands' dtype: a row that is nearly right keeps its precision, in fp16 as well.
    """
    lane, along = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    for chunk in range(tl.program_id(0), tl.load(plan_ptr), tl.num_programs(0)):
        tile = tl.load(plan_ptr + 3 * chunk + 3)
        place = tl.load(plan_ptr + 3 * chunk + 4) + lane
        live = place < tl.load(plan_ptr + 3 * chunk + 5)
        row = tl.load(list_ptr + place, mask=live, other=0)
        position = tile * TILE + tl.arange(0, TILE)
        weight_row = rows_at(order_ptr, position, vocab)
        total = products(hidden_ptr, row, weight_ptr, weight_row, dim, precision, BLOCK_D)
        z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
        label = tl.load(label_ptr + row, mask=live, other=-1)
        z = tl.where(label[:, None] == position[None, :], float("-inf"), z)
        top = tl.maximum(tl.max(z, 1), LOWEST)
        p = tl.exp(z - top[:, None])
        scale = tl.exp(top - tl.load(shift_ptr + row, mask=live, other=0.0))
        slot = row if ATOMIC else chunk * BLOCK_R + lane
        if ATOMIC:
            tl.atomic_add(mass_ptr + slot, scale * tl.sum(p, 1), mask=live, sem="relaxed")
            tl.atomic_max(maximum_ptr + slot, top, mask=live, sem="relaxed")
        else:
            tl.store(mass_ptr + slot, scale * tl.sum(p, 1), mask=live)
            tl.store(maximum_ptr + slot, top, mask=live)
        if expected_ptr is not None:
            if softcap is not None:
                p *= softcap_slope(z, softcap)
            p, keep = rounded(p, hidden_ptr.dtype.element_ty)
            scale *= keep
            weight = weight_ptr + weight_row[:, None] * dim + along[None, :]
            out = expected_ptr + slot.to(tl.int64)[:, None] * dim + along[None, :]
            for start in range(0, dim, BLOCK_E):
                inside = (start + along < dim)[None, :]
                w = tl.load(weight + start, mask=inside, other=0.0).to(p.dtype)
                e = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
                e = multiply(p, w, e, precision) * scale[:, None]
                if ATOMIC:
                    tl.atomic_add(out + start, e, mask=live[:, None] & inside, sem="relaxed")
                else:
                    tl.store(out + start, e, mask=live[:, None] & inside)
