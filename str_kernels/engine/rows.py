"""Row arithmetic around the expensive stages; nothing here has the vocabulary's size.

With ε = label smoothing, ζ = z-loss, λ = strength, w the position weights and s the slope of a
logit (scale times the softcap's derivative)::

    CE       = -log p_y - ε/V Σ_v (z_v - z_y) + ζ lse²            on labelled rows
    penalty  = λ w C                                               on constrained rows
    ∂CE/∂h   = (1 + 2ζ lse) ∂lse/∂h - (1 - ε) s_y w_y - ε/V ∂(Σ_v z)/∂h
    ∂lse/∂h  = Σ_{v≠y} p_v s_v w_v + p_y s_y w_y

The label's share of ``∂CE/∂h`` uses ``1 - p_y`` as a sum over the other tokens: on a confident row
the subtraction would lose every digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from str_kernels import waits
from str_kernels.constraint import needs_lse
from str_kernels.engine.contract import (
    Backend,
    Block,
    Coefficients,
    Dense,
    OpenRows,
    Prepares,
    Resolved,
    RowInputs,
    RowPlan,
    RowShares,
    Saved,
    Tiles,
    brings,
)
from str_kernels.engine.logits import accumulator, kept_dtype, logit_slope, weight_rows
from str_kernels.engine.rest import rest_rows, safety_part
from str_kernels.options import LossOptions
from str_kernels.validation import labels_outside, validate_values, wrong_weights


def plan_for(
    resolved: Resolved, inputs: RowInputs, vocab_size: int, tiles: Tiles | None
) -> RowPlan:
    """Return the backend's plan where the host must not wait, and else `plan_rows`."""
    options = resolved.options
    if lists_rows(resolved, inputs.labels.device):
        return resolved.backend.prepare(inputs, options, vocab_size, tiles)
    return plan_rows(inputs, options, accumulator(resolved.dtype), vocab_size)


def lists_rows(resolved: Resolved, device: torch.device) -> bool:
    """Whether the backend lists the rows on the device, so that the host need not wait."""
    # rows that the host lists are fewer to exchange with other processes
    alone = resolved.shards.alone and not waits.allowed(device)
    return alone and brings(type(resolved.backend), Prepares)


def plan_rows(
    inputs: RowInputs, options: LossOptions, dtype: torch.dtype, vocab_size: int
) -> RowPlan:
    """Decide what each of N rows needs; a position without a label usually needs no vocabulary."""
    labels, _, position_weights = inputs
    labelled = labels != options.ignore_index
    bad, none = None, ~labelled
    if not waits.checks_at_once(labels.device):
        outside = labels_outside(labels, vocab_size, options)
        bad, none = outside.sum(dtype=torch.int32), none | outside
        if position_weights is not None:
            wrong = wrong_weights(position_weights)
            bad = bad + wrong.sum(dtype=torch.int32)
            position_weights = position_weights.to(dtype).masked_fill(wrong, math.nan)
    labels = labels.masked_fill(none, -1)
    if options.safety is None:
        return RowPlan(labels, labelled, labelled, None, None, bad)
    weights = labelled if position_weights is None else position_weights
    constrained = weights != 0
    dense = labelled | constrained if needs_lse(options.safety) else labelled
    scale = options.safety.strength * weights.to(dtype) if options.constrained else None
    return RowPlan(labels, labelled, dense, labelled | constrained, scale, bad)


def judge_values_later(
    plan: RowPlan, inputs: RowInputs, options: LossOptions, vocab_size: int
) -> None:
    """Have a later call raise ValueError if this one's labels or weights were out of range."""
    labels, _, position_weights = inputs

    def judge() -> None:
        try:
            validate_values(labels, position_weights, vocab_size, options)
        except ValueError as error:
            what = str(error)
        else:
            what = "labels or position_weights were out of range, and have been changed since."
        raise ValueError(
            f"an earlier call of the loss, which gave NaN: {what} Positions count all rows of the "
            f"call. On a GPU this is found late; {waits.VARIABLE}=1 finds it at once."
        )

    if plan.bad is not None:
        waits.judge_later(plan.bad, judge)


def cross_entropy(dense: Dense, options: LossOptions, vocab_size: int) -> Tensor:
    """``[R]``; NaN on rows without a label."""
    if dense.factors is not None:
        return dense.factors.loss
    loss = dense.surprise
    if options.z_loss:
        loss = loss + options.z_loss * dense.statistics.lse.square()
    if options.label_smoothing:
        loss = loss - options.label_smoothing / vocab_size * dense.logit_sum
    return loss.masked_fill(dense.label_logit.isnan(), float("nan"))


def row_gradients(
    backend: Backend,
    block: Block,
    dense: Dense,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """``∂CE/∂h [R, D]`` and, if the constraint reads the lse, ``∂lse/∂h [R, D]``; ``kept_dtype``.

    They are written into ``out`` where it is given. Where the safety tokens are left out, the
    latter is that of the other tokens' log-sum-exp. ``∂CE/∂h`` is zero on rows without a label.
    ``opened`` and ``smooth_gradient`` are overwritten: ``[R, D]`` is large.
    """
    options, lse = block.options, dense.statistics.lse
    epsilon, unlabelled = options.label_smoothing, block.unlabelled
    smooth, by_lse = None, None
    if epsilon:
        smooth = dense.smooth_gradient.mul_(-epsilon / block.vocab)
    reads_lse = options.safety is not None and needs_lse(options.safety)
    if dense.rest is not None:
        by_lse = _rest_gradient(backend, block, dense, out[1])
        factors = (1.0 + 2.0 * options.z_loss * lse)[:, None] * dense.rest.safety
        part = safety_part(block, factors, lse.dtype)
        smooth, reads_lse = part if smooth is None else part + smooth, False
    if dense.factors is not None:
        _, opened, label, lse_label = dense.factors
        of_lse, whole = RowShares(None, lse_label), RowShares(None, label, smooth, unlabelled)
        scaled = dense.opened._replace(scale=opened)
    else:
        slope = logit_slope(dense.label_logit, options).masked_fill_(block.labels < 0, 0.0)
        of_lse = RowShares(None, slope * (1.0 - dense.open_mass))
        alpha = 1.0 + 2.0 * options.z_loss * lse
        # α p_y - (1 - ε), where p_y = 1 - open mass
        share = slope * ((alpha - (1.0 - epsilon)) - alpha * dense.open_mass)
        whole, scaled = RowShares(alpha, share, smooth, unlabelled), dense.opened
    if reads_lse:
        by_lse = backend.combine(block, dense.opened, of_lse, spare=False, out=out[1])
    return backend.combine(block, scaled, whole, spare=True, out=out[0]), by_lse


def _rest_gradient(backend: Backend, block: Block, dense: Dense, out: Tensor | None) -> Tensor:
    """``∂L/∂h [R, D]``, where L is the log-sum-exp of all tokens but the safety tokens."""
    slope = logit_slope(dense.label_logit, block.options).masked_fill_(block.labels < 0, 0.0)
    opened = rest_rows(dense.opened, dense.rest, block.options)
    shares = RowShares(None, slope * dense.rest.label)
    return backend.combine(block, opened, shares, spare=False, out=out)


def combine_rows(
    block: Block,
    opened: OpenRows,
    shares: RowShares,
    *,
    spare: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Implement `Backend.combine` in torch calls."""
    total = opened.live if spare else opened.live.clone()
    if opened.dead is not None:
        total.add_(opened.dead.to(total.dtype))
    scale = opened.scale if shares.opened is None else opened.scale * shares.opened
    total.mul_(scale[:, None])
    rows = weight_rows(block.head, block.labels.clamp(min=0), total.dtype)
    total.addcmul_(shares.label[:, None], rows)
    if shares.also is not None:
        total.add_(shares.also)
    if shares.silent is not None:
        silence(total, shares.silent)
    if out is not None:
        return out.copy_(total)
    return total.to(kept_dtype(block.head.hidden_states.dtype, block.shards))


def silence(values: Tensor, silent: Tensor) -> Tensor:
    """Zero the rows ``silent [R]`` of ``values [R, C]`` in place, even NaN ones.

    A CPU first checks whether there are any, which is cheaper than a pass over all values.
    """
    device = values.device
    if device.type == "cpu" and waits.allowed(device) and not silent.any():
        return values
    return values.masked_fill_(silent[:, None], 0.0)


def row_blocks(rows: Tensor, size: int, *, every: bool) -> Iterator[tuple[slice, Tensor | slice]]:
    """Yield each block's slice of ``rows [R]``, and its rows; even R = 0 gives one block.

    If the rows are ``every`` row in order both are the same slice: indexing with it copies nothing.
    """
    for start in range(0, max(1, len(rows)), size):
        block = slice(start, min(start + size, len(rows)))
        yield block, block if every else rows[block]


def factor_of_logits(saved: Saved, coefficients: Coefficients) -> Tensor:
    """``α / exp(lse_rest)`` ``[R]``, the factor of ``exp(z - lse)`` in the gradient of logits."""
    return coefficients.alpha * torch.exp(-saved.lse_rest)


def weight_coefficients(
    plan: RowPlan,
    lse: Tensor,
    grad_cross_entropy: Tensor,
    by_lse: Tensor | None,
    *,
    options: LossOptions,
    vocab_size: int,
) -> Coefficients:
    """`Coefficients` of N rows; the penalty adds ``by_lse [N]`` to α."""
    upstream = torch.where(plan.labels >= 0, grad_cross_entropy, 0.0)
    alpha = upstream
    if options.z_loss:
        # where the upstream gradient is zero, an lse that overflowed would make 0 · inf = NaN
        alpha = torch.where(upstream == 0, 0.0, upstream * (1.0 + 2.0 * options.z_loss * lse))
    if by_lse is not None:
        alpha = alpha + by_lse
    epsilon = options.label_smoothing
    sigma = upstream * (epsilon / vocab_size) if epsilon else None
    return Coefficients(alpha, upstream * (1.0 - epsilon), sigma)
