"""Between the two expensive stages: rows in, rows out, nothing of the vocabulary's size.

Stage: ``RowStatistics`` → loss terms ``[N]``; upstream gradients ``[N]`` → ``RowCoefficients``.
With ε = label smoothing, ζ = z-loss, λ = strength and w the position weights::

    CE  = lse - (1 - ε) z_y - ε/V Σ_v z + ζ lse²      on labelled rows
    pen = λ w C                                        on constrained rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.contract import RowCoefficients, RowPlan, RowStatistics
from str_kernels.constraint import ConstraintTerms, constraint_terms, needs_lse
from str_kernels.options import LossOptions


def plan_rows(labels: Tensor, position_weights: Tensor | None, options: LossOptions) -> RowPlan:
    """Decide what each of N rows needs; a prompt position never pays for the vocabulary."""
    labelled = labels != options.ignore_index
    if options.safety is None:
        return RowPlan(labels, labelled, labelled, torch.zeros_like(labelled))
    constrained = labelled if position_weights is None else position_weights > 0
    dense = labelled | constrained if needs_lse(options.safety) else labelled
    return RowPlan(labels, labelled, dense, labelled | constrained)


def row_losses(
    plan: RowPlan,
    statistics: RowStatistics,
    options: LossOptions,
    *,
    vocab_size: int,
    reference: Tensor | None = None,
    position_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy ``[N]`` and weighted penalty ``λ w C [N]``; zero where a row has none."""
    lse, epsilon = statistics.lse, options.label_smoothing
    cross_entropy = lse - (1.0 - epsilon) * statistics.label_logit + options.z_loss * lse.square()
    if statistics.logit_sum is not None:
        cross_entropy = cross_entropy - epsilon / vocab_size * statistics.logit_sum
    cross_entropy = torch.where(plan.labelled, cross_entropy, 0.0)
    if not options.constrained:
        return cross_entropy, torch.zeros_like(cross_entropy)
    scale = _penalty_scale(plan, options, position_weights, lse.dtype)
    terms = _terms(statistics.safety_logits, lse, reference, options)
    return cross_entropy, torch.where(scale > 0, scale * terms.value, 0.0)


def row_coefficients(
    plan: RowPlan,
    statistics: RowStatistics,
    options: LossOptions,
    *,
    vocab_size: int,
    grad_cross_entropy: Tensor,
    grad_penalty: Tensor,
    reference: Tensor | None = None,
    position_weights: Tensor | None = None,
) -> RowCoefficients:
    """The four coefficients of ``dz`` from the upstream gradient of each row's two terms."""
    lse, epsilon = statistics.lse, options.label_smoothing
    upstream = torch.where(plan.labelled, grad_cross_entropy, 0.0)
    gamma = upstream * (1.0 - epsilon)
    sigma = upstream * (epsilon / vocab_size) if epsilon else None
    z_loss = torch.where(plan.labelled, 2.0 * options.z_loss * lse, 0.0)
    alpha, beta = upstream * (1.0 + z_loss), None
    if options.constrained:
        scale = grad_penalty * _penalty_scale(plan, options, position_weights, lse.dtype)
        terms = _terms(statistics.safety_logits, lse, reference, options)
        beta = torch.where((scale != 0)[:, None], scale[:, None] * terms.d_logits, 0.0)
        if terms.d_lse is not None:
            alpha = alpha + torch.where(scale != 0, scale * terms.d_lse, 0.0)
    return RowCoefficients(alpha, beta, gamma, sigma)


def _penalty_scale(
    plan: RowPlan, options: LossOptions, position_weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weights = plan.labelled if position_weights is None else position_weights
    return options.safety.strength * weights.to(dtype)


def _terms(
    safety_logits: Tensor, lse: Tensor, reference: Tensor | None, options: LossOptions
) -> ConstraintTerms:
    return constraint_terms(options.safety, safety_logits, reference, lse)
