"""The three constraints: their value at a position and its derivative.

Stage: safety logits ``z [N, K]`` (and the row's log-sum-exp) → ``C [N]``, ``∂C/∂z [N, K]``,
``∂C/∂lse [N]``. Formulas: the table of ``SafetyConstraint``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.options import SafetyConstraint


class ConstraintTerms(NamedTuple):
    """A constraint at N positions.

    ``value [N]``; ``d_logits [N, K]`` its derivative by the safety logits; ``d_lse [N]`` its
    derivative by the log-sum-exp, or None where the kind does not read it.
    """

    value: Tensor
    d_logits: Tensor
    d_lse: Tensor | None


def needs_lse(safety: SafetyConstraint) -> bool:
    """Whether the constraint reads the log-sum-exp, and so the whole vocabulary of its rows."""
    return safety.kind == "logprob"


def constraint_terms(
    safety: SafetyConstraint, logits: Tensor, reference: Tensor, lse: Tensor | None = None
) -> ConstraintTerms:
    """Value and derivatives of the constraint.

    Args:
        safety: which constraint.
        logits: ``[N, K]`` safety logits, fp32 or fp64.
        reference: ``[N, K]`` or ``[K]``, logits (log-probabilities for ``logprob``).
        lse: ``[N]`` log-sum-exp over the vocabulary; only ``logprob`` reads it.
    """
    reference = reference.to(logits.dtype).expand_as(logits)
    weights = _weights_like(safety, logits)
    if safety.kind == "kl":
        return _kl(safety.temperature, logits, reference, weights)
    weights = weights / len(safety.token_ids)
    values = logits - lse[:, None] if needs_lse(safety) else logits
    distance = values - reference
    value = (weights * distance.square()).sum(-1)
    d_logits = 2.0 * weights * distance
    return ConstraintTerms(value, d_logits, -d_logits.sum(-1) if needs_lse(safety) else None)


def _weights_like(safety: SafetyConstraint, logits: Tensor) -> Tensor:
    if safety.token_weights is None:
        return logits.new_ones(len(safety.token_ids))
    return logits.new_tensor(safety.token_weights)


def _kl(temperature: float, logits: Tensor, reference: Tensor, weights: Tensor) -> ConstraintTerms:
    """PACT's subset KL, ``τ² KL(q ‖ p)``; its derivative is ``τ (p - q)``."""
    scaled = logits / temperature, reference / temperature
    # ω stands in p and in q: log(q/p) is without it, and a weight of zero is no logarithm of it
    log_p, log_q = (x - torch.logsumexp(x + weights.log(), -1, keepdim=True) for x in scaled)
    p, q = weights * log_p.exp(), weights * log_q.exp()
    divergence = (q * (log_q - log_p)).sum(-1)
    return ConstraintTerms(temperature**2 * divergence, temperature * (p - q), None)
