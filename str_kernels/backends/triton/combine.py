"""One pass combines what the stages summed with the label's own row to a row gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import ROWWISE
from str_kernels.backends.triton.operands import tuning
from str_kernels.engine.contract import Block, OpenRows, RowShares
from str_kernels.engine.logits import kept_dtype

# ``second`` has the dtype in which the dead pairs were multiplied, ``out`` that of ``kept_dtype``.
POINTERS = {
    "i64": ("token",),
    "fp32": ("first", "also", "opened", "label_share"),
    "i1": ("silent",),
}


@triton.jit
def combine_kernel(
    first_ptr,
    second_ptr,
    also_ptr,
    opened_ptr,
    label_share_ptr,
    silent_ptr,
    hidden_ptr,
    weight_ptr,
    token_ptr,
    out_ptr,
    rows,
    also_stride,
    dim: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program alone writes BLOCK_R rows × BLOCK_D columns of ``out [R, D]``.

    In: ``first [R, D]`` fp32, ``second [R, D]`` or None, ``also [R, D]`` or ``[D]`` (stride 0) or
    None, ``opened [R]`` and ``label_share [R]`` fp32, ``silent [R]`` bool or None, ``weight
    [V, D]``, ``token [R]`` int64, -1 where there is none, and ``hidden``, to whose dtype W is cast.
    Out: ``opened · (first + second) + label_share · W[token] + also``, 0 on ``silent`` rows.
    """
    wide = tl.cdiv(dim, BLOCK_D)
    row = tl.program_id(0) // wide * BLOCK_R + tl.arange(0, BLOCK_R)
    along = tl.program_id(0) % wide * BLOCK_D + tl.arange(0, BLOCK_D)
    live = row < rows
    inside = live[:, None] & (along < dim)[None, :]
    at = row.to(tl.int64)[:, None] * dim + along[None, :]
    total = tl.load(first_ptr + at, mask=inside, other=0.0)
    if second_ptr is not None:
        total += tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total *= tl.load(opened_ptr + row, mask=live, other=0.0)[:, None]
    token = tl.load(token_ptr + row, mask=live, other=-1)
    its = weight_ptr + tl.maximum(token, 0)[:, None] * dim + along[None, :]
    w = tl.load(its, mask=inside & (token >= 0)[:, None], other=0.0)
    w = w.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    total += tl.load(label_share_ptr + row, mask=live, other=0.0)[:, None] * w
    if also_ptr is not None:
        there = also_ptr + row.to(tl.int64)[:, None] * also_stride + along[None, :]
        total += tl.load(there, mask=inside, other=0.0)
    if silent_ptr is not None:
        silent = tl.load(silent_ptr + row, mask=live, other=1)
        total = tl.where((silent != 0)[:, None], 0.0, total)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine_rows(
    block: Block, opened: OpenRows, shares: RowShares, out: Tensor | None = None
) -> Tensor:
    """Return a row gradient ``[R, D]`` in ``kept_dtype``, in ``out`` if it is given."""
    head, rows, dim = block.head, *opened.live.shape
    weight, also = head.weight.contiguous(), shares.also
    if out is None:
        dtype = kept_dtype(head.hidden_states.dtype, block.shards)
        out = opened.live.new_empty(rows, dim, dtype=dtype)
    combine_kernel[(-(-rows // ROWWISE.block_r) * -(-dim // ROWWISE.block_d),)](
        opened.live,
        opened.dead,
        also,
        opened.scale if shares.opened is None else opened.scale * shares.opened,
        shares.label,
        shares.silent,
        head.hidden_states,
        weight,
        block.labels,
        out,
        rows,
        dim if also is not None and also.dim() == 2 else 0,
        dim,
        **tuning(ROWWISE, "RD"),
    )
    return out
