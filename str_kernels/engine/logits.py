"""The arithmetic of logits, shared by forward and backward so that the two agree.

``z = softcap · tanh(logit_scale · (H Wᵀ + b) / softcap)``, for whole blocks of the vocabulary and
for the few columns (labels, safety tokens) that are computed exactly whatever the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels import waits
from str_kernels.engine.contract import Block, Columns, Head, Kept, Statistics
from str_kernels.engine.products import product
from str_kernels.engine.shards import ALONE, Shards
from str_kernels.options import TILE, LossOptions, SafetyConstraint

_SCRATCH = 4 << 20  # numbers in one block ``[rows, D]`` of the labels' own products
ANCHORS = 8  # tokens, evenly spaced, that are looked at for the offset of a row's logits


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype, shards: Shards = ALONE) -> torch.dtype:
    """Return the dtype of row gradients between forward and backward, by that of hidden states.

    It is fp32 for fp16: before the upstream gradient (loss scale, 1/n) scales them, row gradients
    may leave fp16's range. It is fp32 too where those of several processes are yet to be added up.
    """
    return (
        torch.float32 if dtype == torch.float16 else dtype if shards.alone else accumulator(dtype)
    )


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


def outcomes(statistics: Statistics | Kept) -> Tensor:
    """``log p [N, K]`` of the safety tokens, ``[N, K + 1]`` where that of the rest is known."""
    log_p = log_probabilities(statistics.safety_logits, statistics)
    if statistics.log_rest is None:
        return log_p
    return torch.cat([log_p, statistics.log_rest[:, None]], -1)


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


def anchor_ids(safety: SafetyConstraint | None, vocab: int, device: torch.device) -> Tensor:
    """Return ``ANCHORS`` evenly spaced tokens, and the safety tokens after them; int64."""
    spaced = tuple(place * vocab // ANCHORS for place in range(ANCHORS))
    return waits.constant(spaced + (safety.token_ids if safety else ()), torch.int64, device)


def label_logits(head: Head, labels: Tensor, options: LossOptions) -> Tensor:
    """Exact logit ``[R]`` of each row's label ``[R]``; NaN where the label is negative."""
    target = labels.clamp(min=0)
    products = _row_products(head, target, lambda rows: rows)
    if head.bias is not None:
        products = products + head.bias[target].to(products.dtype)
    return finish_logits(products, options).masked_fill(labels < 0, float("nan"))


class Mean(NamedTuple):
    """The mean row ``[D]`` of W over all tokens, and the mean ``[]`` of the bias or None."""

    row: Tensor
    bias: Tensor | None


def mean_of(block: Block) -> Mean:
    """Compute the means over the whole vocabulary, of all processes."""
    row, bias = column_sum(block), block.head.bias
    sums = row if bias is None else torch.cat([row, bias.sum(0, dtype=row.dtype)[None]])
    means = block.shards.sum(sums) / block.vocab
    return Mean(means, None) if bias is None else Mean(means[:-1], means[-1])


def mean_differences(head: Head, labels: Tensor, mean: Mean, options: LossOptions) -> Tensor:
    """``mean_v z_v - z_y [R]`` without a softcap.

    The rows are subtracted before they are multiplied, so that what they share cancels exactly.
    """
    target = labels.clamp(min=0)
    products = _row_products(head, target, lambda rows: mean.row - rows)
    if head.bias is not None:
        products = products + (mean.bias - head.bias[target].to(products.dtype))
    return products.mul_(options.logit_scale).masked_fill(labels < 0, float("nan"))


def column_sum(block: Block) -> Tensor:
    """``Σ_v w_v [D]`` in fp32, from the tiles' mean rows."""
    means, vocab = block.tiles.mean_rows, len(block.head.weight)
    sizes = torch.full_like(means[:, :1], TILE)
    sizes[-1:] = vocab - TILE * (len(sizes) - 1)  # a process may have no tile
    return (means * sizes).sum(0)


def columns_of(block: Block) -> Columns:
    """Those of a block; a block that was made without them has them computed."""
    return exact_columns(block, None) if block.columns is None else block.columns


def exact_columns(block: Block, needed: Tensor | None, rows: Tensor | None = None) -> Columns:
    """Implement `RowStages.columns` in torch calls, on the needed rows alone."""
    count, dim = block.head.hidden_states.shape
    computed = None if needed is None or bool(needed.all()) else needed.nonzero()[:, 0]
    size = max(1, _SCRATCH // dim)
    mean = None
    if block.tiles is not None and block.options.label_smoothing:
        mean = mean_of(block)
    places = range(0, max(1, count if computed is None else len(computed)), size)
    parts = [slice(at, at + size) for at in places]
    parts = parts if computed is None else [computed[part] for part in parts]
    found = [_columns_of(block, part, mean) for part in parts]
    found = [None if xs[0] is None else torch.cat(xs) for xs in zip(*found, strict=True)]
    if computed is not None:
        fills = (float("nan"), 0.0, float("nan"), float("nan"))
        found = [
            None if x is None else _scattered(x, computed, count, fill)
            for x, fill in zip(found, fills, strict=True)
        ]
    return Columns(*found).listed(rows)


def _scattered(values: Tensor, rows: Tensor, count: int, fill: float) -> Tensor:
    """Put ``values [R, ...]`` in their rows among ``count``."""
    return values.new_full((count, *values.shape[1:]), fill).index_copy_(0, rows, values)


def _columns_of(block: Block, part: Tensor | slice, mean: Mean | None) -> Columns:
    """`Columns` of a few rows."""
    options, routed = block.options, block.tiles is not None
    head = block.head._replace(hidden_states=block.head.hidden_states[part])
    labels, device = block.labels[part], head.weight.device
    label, anchor, safety = label_logits(head, labels, options), None, None
    skipped = ANCHORS if routed else 0
    if routed or options.safety is not None:
        ids = anchor_ids(options.safety, len(head.weight), device)[ANCHORS - skipped :]
        dtype = label.dtype
        bias = None if head.bias is None else head.bias[ids].to(dtype)
        rows = weight_rows(head, ids, dtype)
        logits = block_logits(head.hidden_states.to(dtype), rows, bias, options)
        safety = logits[:, skipped:] if options.safety is not None else None
    if routed:
        # fmax ignores the NaN of a row without a label
        anchor = torch.fmax(logits[:, : ANCHORS + 1].amax(-1), label)
        anchor = torch.where(anchor.isfinite(), anchor, 0.0)
    apart = None if mean is None else mean_differences(head, labels, mean, options)
    return Columns(label, anchor, safety, apart)


def _row_products(head: Head, target: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply each row of H by the changed row of W at ``target [R]``: ``[R]``."""
    dtype = accumulator(head.hidden_states.dtype)
    size = max(1, _SCRATCH // head.weight.shape[1])
    blocks = zip(head.hidden_states.split(size), target.split(size), strict=True)
    parts = [
        (hidden.to(dtype) * change(weight_rows(head, its, dtype))).sum(-1) for hidden, its in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
