"""Hot tiles are live for so many rows that all rows are multiplied with them, by torch's product.

Stage: ``Block`` → the sums to which the refinement adds the other live pairs. The index says which
tiles are hot, so that nothing is decided on the device; they come first in its order. A row's dead
pairs in a hot tile are computed exactly too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import SCAN
from str_kernels.backends.triton.operands import Operands, common
from str_kernels.backends.triton.tiles import LOWEST, TILE, finish_logits, softcap_slope
from str_kernels.engine.contract import Refined

POINTERS = {"i32": ("label",), "fp32": ("product", "shift", "mass", "maximum", "scale")}


@triton.jit
def hot_logits(product_ptr, bias_ptr, label, position, words, logit_scale, softcap: tl.constexpr):
    """Return the logits ``[BLOCK]`` of one row; -inf at its label and past the hot words."""
    total = tl.load(product_ptr + position, mask=position < words, other=0.0)
    z = finish_logits(total[None, :], bias_ptr, position, words, logit_scale, softcap)
    return tl.where((position == label)[None, :], float("-inf"), z)


@triton.jit
def hot_kernel(
    product_ptr,
    bias_ptr,
    label_ptr,
    shift_ptr,
    p_ptr,
    mass_ptr,
    maximum_ptr,
    scale_ptr,
    words,
    logit_scale,
    softcap: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program passes twice over the hot words of one row and alone writes the row's outputs.

    In: ``product [R, C]`` fp32, ``H Wᵀ`` at the first C places of the order; ``bias [V]`` in tile
    order or None; ``label [R]`` int32, ``shift [R]`` fp32. Out, without the label: ``p [R, C]`` in
    the operands' dtype, exp(z - maximum) · slope, or None; fp32 ``mass [R]``, Σ exp(z - shift),
    ``maximum [R]``, the largest logit, and ``scale [R]``, which times p is exp(z - shift) · slope.

    As in the refinement, p is relative to the row's maximum, and the scale keeps the sum of what is
    rounded.
    """
    row = tl.program_id(0)
    product_ptr += row.to(tl.int64) * words
    label = tl.load(label_ptr + row)
    top, mass, spread, kept = LOWEST, 0.0, 0.0, 0.0
    for start in range(0, words, BLOCK):
        position = start + tl.arange(0, BLOCK)
        z = hot_logits(product_ptr, bias_ptr, label, position, words, logit_scale, softcap)
        top = tl.maximum(top, tl.max(z))
    for start in range(0, words, BLOCK):
        position = start + tl.arange(0, BLOCK)
        z = hot_logits(product_ptr, bias_ptr, label, position, words, logit_scale, softcap)
        p = tl.exp(z - top)
        mass += tl.sum(p)
        if p_ptr is not None:
            if softcap is not None:
                p *= softcap_slope(z, softcap)
            q = p.to(p_ptr.dtype.element_ty)
            spread += tl.sum(p)
            kept += tl.sum(q.to(tl.float32))
            out = p_ptr + row.to(tl.int64) * words + position[None, :]
            tl.store(out, q, mask=(position < words)[None, :])
    scale = tl.exp(top - tl.load(shift_ptr + row))
    tl.store(mass_ptr + row, mass * scale)
    tl.store(maximum_ptr + row, top)
    if p_ptr is not None:
        tl.store(scale_ptr + row, scale * tl.where(kept > 0.0, spread / kept, 1.0))


def hot_sums(
    given: Operands, label: Tensor, shift: Tensor, tiles: int, *, hidden: bool, byte_budget: int
) -> Refined:
    """Sum all rows' pairs with the first ``tiles`` tiles; ``hidden``: the expected rows too."""
    words = tiles * TILE.value
    rows = slice(0, words) if given.order is None else given.order[:words]
    weight = given.weight[rows].to(given.hidden.dtype)
    mass, maximum, scale = (torch.empty_like(shift) for _ in range(3))
    expected = shift.new_empty(given.rows, given.dim) if hidden else None
    step = max(1, byte_budget // (words * (4 + weight.element_size())))
    for start in range(0, given.rows, step):
        part = slice(start, start + step)
        product = wide_product(given.hidden[part], weight.T)
        p = torch.empty_like(product, dtype=weight.dtype) if hidden else None
        of_kernels = {name: common(given)[name] for name in ("logit_scale", "softcap")}
        hot_kernel[(len(product),)](
            product,
            given.bias,
            label[part],
            shift[part],
            p,
            mass[part],
            maximum[part],
            scale[part],
            words,
            **of_kernels,
            **SCAN,
        )
        if expected is not None:
            torch.mul(wide_product(p, weight), scale[part, None], out=expected[part])
    return Refined(mass, expected, maximum)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in fp32, of operands of 16 bits or fp32, which are not copied on CUDA."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
