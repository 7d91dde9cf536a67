"""The arithmetic of logits, in one place, so that forward and backward cannot drift apart.

``z = softcap · tanh(logit_scale · (H Wᵀ + b) / softcap)``; whole blocks for the stages that see the
vocabulary, and the few columns (labels, safety tokens) that every backend computes apart, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.contract import Head
from str_kernels.engine.products import product
from str_kernels.options import LossOptions

_SCRATCH = 4 << 20  # numbers in one block ``[rows, D]`` of the labels' own products


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What row gradients wait in from forward to backward, by the dtype of the hidden states.

    The upstream gradient (loss scale, 1/n) comes last; fp16 has not the exponents for what it is
    still to scale.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def take_rows(table: Tensor, where: Tensor | slice) -> Tensor:
    """``table[where]``; ``index_select`` copies whole rows two to three times as fast."""
    if isinstance(where, slice):
        return table[where]
    return table.index_select(0, where.reshape(-1)).view(*where.shape, *table.shape[1:])


def weight_rows(head: Head, where: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Rows of W as every product sees them: under autocast rounded to the dtype of H first."""
    return take_rows(head.weight, where).to(head.hidden_states.dtype).to(dtype)


def finish_logits(products: Tensor, options: LossOptions) -> Tensor:
    """Scale and softcap in place: ``H Wᵀ + b`` → z."""
    if options.logit_scale != 1.0:
        products.mul_(options.logit_scale)
    if options.softcap is not None:
        products.div_(options.softcap).tanh_().mul_(options.softcap)
    return products


def softcap_slope(logits: Tensor, options: LossOptions) -> Tensor:
    """``1 - (z/softcap)²``, the softcap's derivative; a new tensor."""
    return (logits / options.softcap).square_().neg_().add_(1.0)


def logit_slope(logits: Tensor, options: LossOptions) -> Tensor:
    """``∂z/∂(H Wᵀ + b)``: the scale times the softcap's derivative, shaped like ``logits``."""
    if options.softcap is None:
        return torch.full_like(logits, options.logit_scale)
    return softcap_slope(logits, options).mul_(options.logit_scale)


def block_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions
) -> Tensor:
    """Logits ``[R, C]`` of a block of C head rows, all operands in the accumulator's dtype."""
    products = product(hidden, weight.T)
    if bias is not None:
        products += bias
    return finish_logits(products, options)


def safety_logits(head: Head, ids: Tensor, options: LossOptions) -> Tensor:
    """Exact logits ``[R, K]`` of the tokens ``ids [K]``."""
    dtype = accumulator(head.hidden_states.dtype)
    bias = None if head.bias is None else head.bias[ids].to(dtype)
    return block_logits(head.hidden_states.to(dtype), weight_rows(head, ids, dtype), bias, options)


def label_logits(head: Head, labels: Tensor, options: LossOptions) -> Tensor:
    """Exact logit ``[R]`` of each row's label ``[R]``; NaN where the label is negative."""
    dtype = accumulator(head.hidden_states.dtype)
    target = labels.clamp(min=0)
    size = max(1, _SCRATCH // head.weight.shape[1])
    blocks = zip(head.hidden_states.split(size), target.split(size), strict=True)
    parts = [(hidden.to(dtype) * weight_rows(head, its, dtype)).sum(-1) for hidden, its in blocks]
    products = parts[0] if len(parts) == 1 else torch.cat(parts)
    if head.bias is not None:
        products = products + head.bias[target].to(dtype)
    return finish_logits(products, options).masked_fill(labels < 0, float("nan"))
