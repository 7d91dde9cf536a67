"""The backward of the hidden states in one pass: row gradients, and the constraint's K columns.

Stage: ``Kept``, upstream gradients, ``β [N, K]`` → ``dH [N, D]``. A program takes BLOCK_R rows ×
BLOCK_E columns of D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.operands import precision_of, tuning
from str_kernels.backends.triton.penalty import penalty_gradients
from str_kernels.backends.triton.tiles import multiply
from str_kernels.engine.contract import Kept, Resolved, RowGradients, Upstream

POINTERS = {
    "i64": ("list",),
    "i1": ("dense",),
    "fp32": ("ce_upstream", "penalty_upstream", "beta", "d_lse"),
}
TOKENS = 64  # safety tokens that are multiplied at once


@triton.jit
def multiply_split(beta, w, total, precision: tl.constexpr):
    """Return ``total + β @ w`` with the digits of β in fp32, though w may have 16 bits.

    Rows of W are alike, and β's sum is small: its rounding to 16 bits would exceed the result. Two
    products, of what is rounded and of the rest, keep it. fp16 has few exponents, so each row is
    divided by its largest β first.
    """
    if w.dtype == tl.float32:
        total = multiply(beta, w, total, precision)
    else:
        scale = tl.full([beta.shape[0]], 1.0, tl.float32)
        if w.dtype == tl.float16:
            largest = tl.max(tl.abs(beta), 1)
            scale = tl.where(largest > 0.0, largest, 1.0)
            beta = beta / scale[:, None]
        high = beta.to(w.dtype)
        low = (beta - high.to(tl.float32)).to(w.dtype)
        part = tl.zeros(total.shape, tl.float32)
        part = multiply(high, w, part, precision)
        total += multiply(low, w, part, precision) * scale[:, None]
    return total


@triton.jit
def scaled_rows(gradient_ptr, place, upstream, there, along, dim: tl.constexpr):
    """Return ``upstream · gradient[place]``; rows that are not ``there`` are not read and add 0."""
    there = there & (upstream != 0.0)
    at = gradient_ptr + place.to(tl.int64)[:, None] * dim + along[None, :]
    part = tl.load(at, mask=there[:, None] & (along < dim)[None, :], other=0.0).to(tl.float32)
    return tl.where(there, upstream, 0.0)[:, None] * part


@triton.jit
def gradient_kernel(
    ce_gradient_ptr,
    lse_gradient_ptr,
    ce_upstream_ptr,
    penalty_upstream_ptr,
    beta_ptr,
    d_lse_ptr,
    safety_ptr,
    list_ptr,
    dense_ptr,
    out_ptr,
    rows,
    dense_rows,
    count,
    ce_stride,
    dim: tl.constexpr,
    precision: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program alone writes BLOCK_R rows × BLOCK_E columns of ``out [N, D]``.

    In: ``ce_gradient [R, D]``; ``ce_upstream [N]`` with a stride; with a constraint ``beta
    [N, K]``, ``penalty_upstream [N]``, zero on rows without one, and ``safety [K, D]``, the rows
    of W, and if it reads the lse ``lse_gradient [R, D]`` and ``d_lse [N]``, or else None;
    ``list [rows]`` int64, the rows that are written, R = ``dense_rows`` first, or None for all in
    order; ``dense [N]`` bool, which of those R have gradients, or None for all. Out: ``out`` in the
    dtype of H.
    """
    wide = tl.cdiv(dim, BLOCK_E)
    place = tl.program_id(0) // wide * BLOCK_R + tl.arange(0, BLOCK_R)
    along = tl.program_id(0) % wide * BLOCK_E + tl.arange(0, BLOCK_E)
    inside, within = place < rows, along < dim
    row = place.to(tl.int64)
    if list_ptr is not None:
        row = tl.load(list_ptr + place, mask=inside, other=0)
    dense = inside & (place < dense_rows)
    if dense_ptr is not None:
        dense = dense & (tl.load(dense_ptr + row, mask=inside, other=0) != 0)
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    if beta_ptr is not None:
        on = tl.load(penalty_upstream_ptr + row, mask=inside, other=0.0) != 0.0
        for start in range(0, count, TOKENS):
            token = start + tl.arange(0, TOKENS)
            known = token < count
            at = beta_ptr + row[:, None] * count + token[None, :]
            beta = tl.load(at, mask=on[:, None] & known[None, :], other=0.0)
            w = tl.load(
                safety_ptr + token[:, None] * dim + along[None, :],
                mask=known[:, None] & within[None, :],
                other=0.0,
            )
            total = multiply_split(beta, w, total, precision)
        total = tl.where(on[:, None], total, 0.0)  # 0 · inf
    if d_lse_ptr is not None:
        upstream = tl.load(d_lse_ptr + row, mask=dense, other=0.0)
        total += scaled_rows(lse_gradient_ptr, place, upstream, dense, along, dim)
    upstream = tl.load(ce_upstream_ptr + row * ce_stride, mask=dense, other=0.0)
    total += scaled_rows(ce_gradient_ptr, place, upstream, dense, along, dim)
    out = out_ptr + row[:, None] * dim + along[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])


def gradient_rows(
    kept: Kept, upstream: Upstream, resolved: Resolved, launch: Launch
) -> RowGradients:
    """Return the gradient of hidden states, and what a trainable head's needs."""
    found = RowGradients()
    if upstream.penalty is not None:
        found = penalty_gradients(resolved.options, kept, upstream.penalty)
    if not resolved.needs[0]:
        return found
    (count, dim), rows, listed = (len(kept.lse), kept.ce_gradient.shape[1]), kept.rows, None
    whole = len(rows) == count
    if upstream.dense is not None or not whole:
        alone = kept.safety_alone
        listed = rows = rows if alone is None or not len(alone) else torch.cat([rows, alone])
    make = torch.empty if whole else torch.zeros  # a row may be in no list
    hidden = make((count, dim), dtype=resolved.dtype, device=kept.lse.device)
    gradient_kernel[(-(-len(rows) // launch.block_r) * -(-dim // launch.block_e),)](
        kept.ce_gradient,
        kept.lse_gradient,
        upstream.cross_entropy,
        upstream.penalty,
        found.beta,
        found.d_lse,
        kept.safety_rows,
        listed,
        upstream.dense,
        hidden,
        len(rows),
        len(kept.rows),
        0 if found.beta is None else found.beta.shape[1],
        upstream.cross_entropy.stride(0),
        dim=dim,
        precision=precision_of(),
        TOKENS=TOKENS,
        **tuning(launch, "RE"),
    )
    return found._replace(hidden=hidden)
