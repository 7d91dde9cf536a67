"""The four constraints: their value at a position and its derivatives.

Stage: safety logits ``z [N, K]``, or ``z - lse`` → ``C [N]``, ``∂C/∂z [N, K]``, ``∂C/∂lse [N]``.
The formulas stand in the table of ``SafetyConstraint``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels import waits
from str_kernels.options import SafetyConstraint


class ConstraintTerms(NamedTuple):
    """``value [N]`` at N positions, and its derivatives by the safety logits and the log-sum-exp.

    ``d_logits [N, K]``; ``d_lse [N]``, or None for a kind that does not read the log-sum-exp. For
    ``kl_rest`` the latter is the derivative by the log-sum-exp of all tokens but the safety tokens.
    """

    value: Tensor
    d_logits: Tensor
    d_lse: Tensor | None


def needs_lse(safety: SafetyConstraint) -> bool:
    """Whether the constraint reads the log-sum-exp, which needs the whole vocabulary."""
    return safety.kind in ("logprob", "kl_rest")


def constraint_terms(
    safety: SafetyConstraint, values: Tensor, reference: Tensor
) -> ConstraintTerms:
    """Compute a constraint and its derivatives from ``values [N, K]``, fp32 or fp64.

    They are the safety tokens' logits, or log-probabilities where ``needs_lse``, for ``kl_rest``
    ``[N, K + 1]`` with that of the rest; ``reference``, of as many columns, has the same unit.
    """
    reference = reference.to(values.dtype).expand_as(values)
    if safety.kind == "kl_rest":
        return _kl_rest(values, reference)
    count = len(safety.token_ids)
    given = safety.token_weights or (1.0,) * count
    weights = waits.constant(given, values.dtype, values.device)
    if safety.kind == "kl":
        return _kl(safety.temperature, values, reference, weights)
    weights = weights / count
    distance = values - reference
    value = (weights * distance.square()).sum(-1)
    d_logits = 2.0 * weights * distance
    return ConstraintTerms(value, d_logits, -d_logits.sum(-1) if needs_lse(safety) else None)


def _kl(temperature: float, logits: Tensor, reference: Tensor, weights: Tensor) -> ConstraintTerms:
    """PACT's subset KL, ``τ² KL(q ‖ p)``; its derivative is ``τ (p - q)``."""
    # a common offset of large logits leaves before they are divided and summed, with its rounding
    tops = (
        x.masked_fill(weights == 0, -torch.inf).amax(-1, keepdim=True) for x in (logits, reference)
    )
    scaled = ((x - top) / temperature for x, top in zip((logits, reference), tops, strict=True))
    # ω is a factor of both p and q and cancels in log(q/p), which stays finite where ω is 0
    log_p, log_q = (x - torch.logsumexp(x + weights.log(), -1, keepdim=True) for x in scaled)
    # exp may overflow where ω is 0
    p, q = (torch.where(weights == 0, 0.0, weights * x.exp()) for x in (log_p, log_q))
    divergence = (q * (log_q - log_p)).sum(-1)
    return ConstraintTerms(temperature**2 * divergence, temperature * (p - q), None)


def _kl_rest(log_p: Tensor, reference: Tensor) -> ConstraintTerms:
    """``KL(q ‖ p)`` of K + 1 outcomes; its derivatives by their log-masses are ``p - q``."""
    # a reference that was rounded, as a cache rounds it, does not sum to 1
    log_q = reference - torch.logsumexp(reference, -1, keepdim=True)
    p, q, distance = log_p.exp(), log_q.exp(), log_p - log_q
    # both sum to 1, so that q log(q/p) may be q log(q/p) - q + p, and no term is negative
    near = torch.where(q > 0, q * (torch.expm1(distance) - distance), p)
    far = torch.where(q > 0, (p - q) - q * distance, p)
    value = torch.where(distance.abs() < 1.0, near, far).sum(-1)
    apart = p - q
    d_logits, of_rest = apart[..., :-1], apart[..., -1]
    # where the rest has nearly everything, the difference is that of the others
    d_rest = torch.where(p[..., -1] < 0.5, of_rest, -d_logits.sum(-1))
    return ConstraintTerms(value, d_logits, d_rest)
