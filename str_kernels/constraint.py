"""The three constraints: their value at a position and its derivatives.

Stage: safety logits ``z [N, K]`` (and the row's log-sum-exp) → ``C [N]``, ``∂C/∂z [N, K]``,
``∂C/∂lse [N]``. The formulas stand in the table of ``SafetyConstraint``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.options import SafetyConstraint


class ConstraintTerms(NamedTuple):
    """``value [N]`` at N positions, and its derivatives by the safety logits and the log-sum-exp.

    ``d_logits [N, K]``; ``d_lse [N]``, or None for a kind that does not read the log-sum-exp.
    """

    value: Tensor
    d_logits: Tensor
    d_lse: Tensor | None


def needs_lse(safety: SafetyConstraint) -> bool:
    """Whether the constraint reads the log-sum-exp, which needs the whole vocabulary."""
    return safety.kind == "logprob"


def constraint_terms(
    safety: SafetyConstraint, logits: Tensor, reference: Tensor, lse: Tensor | None = None
) -> ConstraintTerms:
    """Compute a constraint and its derivatives from safety logits ``[N, K]``, fp32 or fp64.

    ``reference [N, K]`` or ``[K]`` are logits, or log-probabilities for ``logprob``, which alone
    reads ``lse [N]``, the log-sum-exp over the vocabulary.
    """
    reference = reference.to(logits.dtype).expand_as(logits)
    count, given = len(safety.token_ids), safety.token_weights
    weights = logits.new_ones(count) if given is None else logits.new_tensor(given)
    if safety.kind == "kl":
        return _kl(safety.temperature, logits, reference, weights)
    weights = weights / count
    values = logits - lse[:, None] if needs_lse(safety) else logits
    distance = values - reference
    value = (weights * distance.square()).sum(-1)
    d_logits = 2.0 * weights * distance
    return ConstraintTerms(value, d_logits, -d_logits.sum(-1) if needs_lse(safety) else None)


def _kl(temperature: float, logits: Tensor, reference: Tensor, weights: Tensor) -> ConstraintTerms:
    """PACT's subset KL, ``τ² KL(q ‖ p)``; its derivative is ``τ (p - q)``."""
    scaled = logits / temperature, reference / temperature
    # ω is a factor of both p and q and cancels in log(q/p), which stays finite where ω is 0
    log_p, log_q = (x - torch.logsumexp(x + weights.log(), -1, keepdim=True) for x in scaled)
    p, q = weights * log_p.exp(), weights * log_q.exp()
    divergence = (q * (log_q - log_p)).sum(-1)
    return ConstraintTerms(temperature**2 * divergence, temperature * (p - q), None)
