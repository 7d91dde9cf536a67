"""Device functions that kernels share, so that screen, refinement and gradients compute alike.

These names are used in all kernels, beside the symbols of ``options``::

    R           rows of this block of positions (``rows``); T tiles, L live pairs
    row         [BLOCK_R] int32, rows of the hidden states, clamped to the range
    position    [TILE] int32, places in the order of the vocabulary; a tile's are neighbours
    weight_row  [TILE] int64, the rows of W at these places (V·D can pass 2³¹)
    label       [BLOCK_R] int32, the place of each row's label, -1 where there is none, ``ABSENT``
                on a row that needs no vocabulary, of which results are undefined
    z           [BLOCK_R, TILE] fp32, logits; -inf past the end of the vocabulary
    top         [BLOCK_R] fp32, a row's largest logit in a tile, at least ``LOWEST``

``*_ptr`` points to a tensor's first element; None turns the option off. Block sizes are upper case.
``dim``, ``softcap`` and ``precision`` are fixed when a kernel is compiled. H and W are contiguous.
``POINTERS`` beside a file's kernels states the pointers' types as Triton names them, which
``ahead.py`` compiles with; a pointer that is not named has the operands' type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from str_kernels.engine.contract import ABSENT as _ABSENT
from str_kernels.engine.contract import LEFT_OUT as _LEFT_OUT
from str_kernels.options import TILE as _TILE

TILE = tl.constexpr(_TILE)
ABSENT = tl.constexpr(_ABSENT)
LEFT_OUT = tl.constexpr(_LEFT_OUT)
# This replaces the maximum of nothing: -inf minus it is -inf, where -inf minus -inf is NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def all_absent(label_ptr, row, rows):
    """Whether none of these rows needs the vocabulary; never without labels."""
    if label_ptr is None:
        return False
    else:
        return tl.max(tl.load(label_ptr + row, mask=row < rows, other=ABSENT), 0) == ABSENT


@triton.jit
def grouped(rows, tiles, BLOCK_R: tl.constexpr, GROUP: tl.constexpr):
    """Return which block of rows and which tile this program computes.

    GROUP blocks of rows pass over the tiles together, so that a tile of W is read from memory once
    for all of them, while their hidden states stay in L2.
    """
    program, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK_R)
    group = program // (GROUP * tiles)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program % (GROUP * tiles)
    return group * GROUP + inside % size, inside // size


@triton.jit
def rows_at(order_ptr, position, vocab):
    """Return the rows of W, int64, at these places, clamped to the last, so loads need no mask."""
    clamped = tl.minimum(position, vocab - 1)
    return clamped.to(tl.int64) if order_ptr is None else tl.load(order_ptr + clamped).to(tl.int64)


@triton.jit
def multiply(a, b, accumulator, precision: tl.constexpr):
    """Return ``accumulator + a @ b``; fp32 operands are multiplied in "ieee" or "tf32".

    fp8 sums are promoted to fp32 once per call, since Hopper's own accumulator is short. More
    frequent promotion would not use its fast instruction.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, accumulator, input_precision=precision)
    elif a.dtype == tl.float8e4nv:
        return tl.dot(a, b, accumulator, max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b, accumulator, out_dtype=accumulator.dtype)


@triton.jit
def products(
    hidden_ptr,
    row,
    weight_ptr,
    weight_row,
    dim: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return ``H[row] @ W[weight_row]ᵀ`` [BLOCK_R, TILE] in fp32, or int32 for int8.

    W is cast to the dtype of H.
    """
    along = tl.arange(0, BLOCK_D)
    hidden = hidden_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
    weight = weight_ptr + weight_row[None, :] * dim + along[:, None]
    kind: tl.constexpr = tl.int32 if hidden_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([row.shape[0], weight_row.shape[0]], kind)
    for start in range(0, dim, BLOCK_D):
        if dim % BLOCK_D == 0:
            a, b = tl.load(hidden), tl.load(weight)
        else:
            a = tl.load(hidden, mask=(start + along < dim)[None, :], other=0.0)
            b = tl.load(weight, mask=(start + along < dim)[:, None], other=0.0)
        total = multiply(a, b.to(a.dtype), total, precision)
        hidden += BLOCK_D
        weight += BLOCK_D
    return total


@triton.jit
def tanh(x):
    """Return tanh, exact relative to itself: near 0 the digits of the quotient cancel."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap: tl.constexpr):
    """Return ``softcap · tanh(scale · (H Wᵀ + b) / softcap)``; the bias is in tile order.

    Logits are -inf past the end of the vocabulary, and where ``LEFT_OUT`` is the bias.
    """
    inside = position < vocab
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + position, mask=inside, other=0.0).to(tl.float32)
        total += bias[None, :]
        inside = inside & (bias != LEFT_OUT)
    z = total * logit_scale
    if softcap is not None:
        if softcap > 64.0:
            z = softcap * tanh(z * (1.0 / softcap))
        else:  # off by a rounding of the softcap at most, with fewer registers
            z = softcap - 2.0 * softcap / (tl.exp(z * (2.0 / softcap)) + 1.0)
    return tl.where(inside[None, :], z, float("-inf"))


@triton.jit
def rounded(p, dtype: tl.constexpr):
    """Round ``p`` to the operands' dtype; also return the factor of each row that keeps its sum.

    The rows of W with much probability are alike, and the label's row, which is subtracted from
    their mean, is like them. An error in the sum would exceed the difference.
    """
    q = p.to(dtype)
    kept = tl.sum(q.to(tl.float32), 1)
    return q, tl.where(kept > 0.0, tl.sum(p, 1) / kept, 1.0)


@triton.jit
def softcap_slope(z, softcap: tl.constexpr):
    """Return ``1 - (z/softcap)²``, which is finite past the end of the vocabulary too."""
    share = tl.maximum(z, -softcap) * (1.0 / softcap)
    return 1.0 - share * share
