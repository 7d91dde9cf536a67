"""The arithmetic of logits, shared by forward and backward so that the two agree.

``z = softcap · tanh(logit_scale · (H Wᵀ + b) / softcap)``, for whole blocks of the vocabulary and
for the few columns (labels, safety tokens) that are computed exactly whatever the backend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from str_kernels import waits
from str_kernels.engine.contract import Head, Kept, Statistics
from str_kernels.engine.products import product
from str_kernels.options import LossOptions, SafetyConstraint

_SCRATCH = 4 << 20  # numbers in one block ``[rows, D]`` of the labels' own products
_ANCHORS = 8  # tokens, evenly spaced, that are looked at for the offset of a row's logits


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of row gradients between forward and backward, by that of hidden states.

    It is fp32 for fp16: before the upstream gradient (loss scale, 1/n) scales them, row gradients
    may leave fp16's range.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def take_rows(table: Tensor, where: Tensor | slice) -> Tensor:
    """Gather ``table[where]``; ``index_select`` copies whole rows two to three times as fast."""
    if isinstance(where, slice):
        return table[where]
    return table.index_select(0, where.reshape(-1)).view(*where.shape, *table.shape[1:])


def weight_rows(head: Head, where: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Gather rows of W for a product: rounded to the dtype of H (autocast), then cast."""
    return take_rows(head.weight, where).to(head.hidden_states.dtype).to(dtype)


def finish_logits(products: Tensor, options: LossOptions) -> Tensor:
    """Apply scale and softcap in place: ``H Wᵀ + b`` → z."""
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


def log_probabilities(logits: Tensor, statistics: Statistics | Kept) -> Tensor:
    """``z - lse [N, K]``, exact relative to itself however large the logits ``[N, K]`` are."""
    return (logits - statistics.lse[:, None]) - statistics.lse_rest[:, None]


def block_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions
) -> Tensor:
    """Logits ``[R, C]`` of C head rows, all operands in the accumulator's dtype."""
    products = product(hidden, weight.T)
    if bias is not None:
        products += bias
    return finish_logits(products, options)


def safety_ids(safety: SafetyConstraint, device: torch.device) -> Tensor:
    """Return the safety tokens' ids ``[K]`` int64, which a device gets once."""
    return waits.constant(tuple(safety.token_ids), torch.int64, device)


def safety_logits(head: Head, ids: Tensor, options: LossOptions) -> Tensor:
    """Exact logits ``[R, K]`` of the tokens ``ids [K]``."""
    dtype = accumulator(head.hidden_states.dtype)
    bias = None if head.bias is None else head.bias[ids].to(dtype)
    return block_logits(head.hidden_states.to(dtype), weight_rows(head, ids, dtype), bias, options)


def label_logits(head: Head, labels: Tensor, options: LossOptions) -> Tensor:
    """Exact logit ``[R]`` of each row's label ``[R]``; NaN where the label is negative."""
    target = labels.clamp(min=0)
    products = _row_products(head, target, lambda rows: rows)
    if head.bias is not None:
        products = products + head.bias[target].to(products.dtype)
    return finish_logits(products, options).masked_fill(labels < 0, float("nan"))


def mean_differences(head: Head, labels: Tensor, mean_row: Tensor, options: LossOptions) -> Tensor:
    """``mean_v z_v - z_y [R]`` without a softcap; ``mean_row [D]`` is that of W.

    The rows are subtracted before they are multiplied, so that what they share cancels exactly.
    """
    target = labels.clamp(min=0)
    products = _row_products(head, target, lambda rows: mean_row - rows)
    if head.bias is not None:
        bias = head.bias.to(products.dtype)
        products = products + (bias.mean() - bias[target])
    return products.mul_(options.logit_scale)


def anchor_logits(head: Head, labels: Tensor, options: LossOptions) -> Tensor:
    """Return an offset ``[R]`` of each row's logits, relative to which their masses are kept.

    The logarithm of a mass is then as small as logits differ, and has as many decimals. The offset
    is the largest logit of the label and a few other tokens, since one may be masked by -1e9.
    """
    some = tuple(i * len(head.weight) // _ANCHORS for i in range(_ANCHORS))
    if options.safety is not None:
        some += tuple(options.safety.token_ids[:1])
    ids = waits.constant(some, torch.int64, labels.device)
    size = max(1, _SCRATCH // head.weight.shape[1])
    parts = [
        safety_logits(head._replace(hidden_states=hidden), ids, options).amax(-1)
        for hidden in head.hidden_states.split(size)
    ]
    # fmax ignores the NaN of a row without a label
    anchor = torch.fmax(torch.cat(parts), label_logits(head, labels, options))
    return torch.where(anchor.isfinite(), anchor, 0.0)


def _row_products(head: Head, target: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply each row of H by the changed row of W at ``target [R]``: ``[R]``."""
    dtype = accumulator(head.hidden_states.dtype)
    size = max(1, _SCRATCH // head.weight.shape[1])
    blocks = zip(head.hidden_states.split(size), target.split(size), strict=True)
    parts = [
        (hidden.to(dtype) * change(weight_rows(head, its, dtype))).sum(-1) for hidden, its in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
