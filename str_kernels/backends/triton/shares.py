"""The kernel of the exact pass by BLAS turns logits into probabilities and sums of each row.

bf16 and fp32 have one range of exponents, so that p may be large: a row keeps as its shift what was
its largest logit at first, until another is ``HEADROOM`` nats above it. The program that finds it
rescales what the row has summed, so that nobody waits for the decision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.backends.triton.tiles import LOWEST, all_absent, finish_logits, softcap_slope

# Sums over a vocabulary of terms below e^60, times entries of W, stay below fp32's e^88.
HEADROOM = tl.constexpr(60.0)
POINTERS = {"i32": ("label",), "fp32": ("logits", "label_logit", "sums", "expected")}


@triton.jit
def shares_kernel(
    logits_ptr,
    bias_ptr,
    label_ptr,
    label_logit_ptr,
    share_ptr,
    sums_ptr,
    expected_ptr,
    rows,
    plane,
    first,
    words,
    stride,
    share_stride,
    held,
    filled,
    logit_scale,
    softcap: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program passes over BLOCK_R rows' logits of the words ``[first, first + words)``.

    In: ``logits [R, words]`` fp32 without bias, scale and softcap; ``bias [V]`` or None; ``label
    [R]`` int32; ``label_logit [R]`` fp32 or None. Out: ``share [R, held + words]`` in the dtype of
    H or None, from column ``held`` on: exp(z - shift) · slope without the label. In and out:
    ``sums`` fp32, 7 rows of R that are ``plane`` apart, as ``exact_blas`` names them, not read for
    the first word. Where a row's shift rises, the columns of ``share`` before ``held`` and the row
    of ``expected [R, D]`` fp32 or None are rescaled; ``filled`` is D, or 0 while it is not written.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if all_absent(label_ptr, row, rows):
        return
    inside, row = row < rows, tl.minimum(row, rows - 1)
    old, stop, place = row * 0 + first > 0, first + words, row.to(tl.int64)[:, None]
    logits, sums, its, share = logits_ptr + place * stride, sums_ptr + row, 0.0, share_ptr
    label = tl.load(label_ptr + row)[:, None]
    if label_logit_ptr is not None:
        its = tl.load(label_logit_ptr + row)[:, None]
    if share_ptr is not None:
        share += place * share_stride
    shift = tl.load(sums, mask=old, other=LOWEST)
    if first == 0:  # the largest of a few, which most rows will keep
        position = tl.arange(0, BLOCK_D)
        z = _logits(logits, bias_ptr, position, first, stop, logit_scale, softcap)
        z = tl.where(position[None, :] == label, float("-inf"), z)
        shift = tl.maximum(tl.max(z, 1), LOWEST)
    top, mass, weighted, exact, kept, total = _pass(
        logits, bias_ptr, label, its, share, held, shift, inside, first, stop, logit_scale, softcap,
        BLOCK_D,
    )  # fmt: skip
    risen = inside & (top - shift > HEADROOM)
    fall = tl.where(risen, shift - top, 0.0)
    shift, rescale = tl.where(risen, top, shift), tl.exp(fall)
    if tl.max(risen.to(tl.int32), 0) > 0:
        top, mass, weighted, exact, kept, total = _pass(
            logits, bias_ptr, label, its, share, held, shift, inside, first, stop, logit_scale,
            softcap, BLOCK_D,
        )  # fmt: skip
        if share_ptr is not None:
            _rescale(share, held, rescale, risen, BLOCK_D)
            _rescale(expected_ptr + place * filled, filled, rescale, risen, BLOCK_D)
    before = tl.load(sums + 2 * plane, mask=old, other=0.0)
    weighted += (tl.load(sums + 3 * plane, mask=old, other=0.0) + before * fall) * rescale
    exact += tl.load(sums + 4 * plane, mask=old, other=0.0) * rescale
    kept += tl.load(sums + 5 * plane, mask=old, other=0.0) * rescale
    total += tl.load(sums + 6 * plane, mask=old, other=0.0)
    top = tl.maximum(top, tl.load(sums + plane, mask=old, other=LOWEST))
    tl.store(sums, shift, mask=inside)
    tl.store(sums + plane, top, mask=inside)
    tl.store(sums + 2 * plane, mass + before * rescale, mask=inside)
    tl.store(sums + 3 * plane, weighted, mask=inside)
    tl.store(sums + 4 * plane, exact, mask=inside)
    tl.store(sums + 5 * plane, kept, mask=inside)
    tl.store(sums + 6 * plane, total, mask=inside)


@triton.jit
def _logits(logits, bias_ptr, position, first, stop, logit_scale, softcap: tl.constexpr):
    """Return z [BLOCK_R, BLOCK_D] at these words; -inf from ``stop`` on."""
    within = (position < stop)[None, :]
    products = tl.load(logits + (position - first)[None, :], mask=within, other=0.0)
    return finish_logits(products, bias_ptr, position, stop, logit_scale, softcap)


@triton.jit
def _pass(
    logits,
    bias_ptr,
    label,
    its,
    share,
    held,
    shift,
    inside,
    first,
    stop,
    logit_scale,
    softcap: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the shares of these words; return the rows' maxima and their five sums over them."""
    zeros = tl.zeros([shift.shape[0], BLOCK_D], tl.float32)
    top, mass, weighted, exact, kept, total = zeros + LOWEST, zeros, zeros, zeros, zeros, zeros
    for start in range(first, stop, BLOCK_D):
        position = start + tl.arange(0, BLOCK_D)
        within = (position < stop)[None, :]
        z = _logits(logits, bias_ptr, position, first, stop, logit_scale, softcap)
        total += tl.where(within, z - its, 0.0)
        z = tl.where(position[None, :] == label, float("-inf"), z)
        top = tl.maximum(top, z)
        below = z - shift[:, None]
        p = tl.exp(below)
        mass += p
        weighted += p * tl.maximum(below, LOWEST)
        if share is not None:
            if softcap is not None:
                p *= softcap_slope(z, softcap)
            q = p.to(share.dtype.element_ty)
            tl.store(share + held + (position - first)[None, :], q, mask=within & inside[:, None])
            exact += p
            kept += q.to(tl.float32)
    top, mass, weighted = tl.max(top, 1), tl.sum(mass, 1), tl.sum(weighted, 1)
    return top, mass, weighted, tl.sum(exact, 1), tl.sum(kept, 1), tl.sum(total, 1)


@triton.jit
def _rescale(start, size, factor, inside, BLOCK_D: tl.constexpr):
    """Multiply ``size`` numbers of these rows, which begin at ``start [BLOCK_R, 1]``."""
    for first in range(0, size, BLOCK_D):
        column = (first + tl.arange(0, BLOCK_D))[None, :]
        mask = inside[:, None] & (column < size)
        value = tl.load(start + column, mask=mask, other=0.0) * factor[:, None]
        tl.store(start + column, value.to(start.dtype.element_ty), mask=mask)
