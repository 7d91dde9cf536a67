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
    ``kl_mass`` the latter is the derivative by the log-sum-exp of all tokens but the safety tokens.
    """

    value: Tensor
    d_logits: Tensor
    d_lse: Tensor | None


def needs_lse(safety: SafetyConstraint) -> bool:
    """Whether the constraint reads the log-sum-exp, which needs the whole vocabulary."""
    return safety.kind in ("logprob", "kl_mass")


def constraint_terms(
    safety: SafetyConstraint, values: Tensor, reference: Tensor
) -> ConstraintTerms:
    """Compute a constraint and its derivatives from ``values [N, K]``, fp32 or fp64.

    They are the safety tokens' logits, or log-probabilities where ``needs_lse``, for ``kl_mass``
    ``[N, K + 1]`` with that of the rest; ``reference``, of as many columns, has the same unit.
    """
    reference = reference.to(values.dtype).expand_as(values)
    count = len(safety.token_ids)
    given = safety.token_weights or (1.0,) * count
    weights = waits.constant(given, values.dtype, values.device)
    if safety.kind == "kl":
        return _kl(safety.temperature, values, reference, weights)
    if safety.kind == "kl_mass":
        return _kl_mass(safety.temperature, values, reference, weights)
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
    # an impossible token costs nothing, and 0 · inf is no number
    divergence = torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(-1)
    return ConstraintTerms(temperature**2 * divergence, temperature * (p - q), None)


def _kl_mass(
    temperature: float, log_p: Tensor, reference: Tensor, weights: Tensor
) -> ConstraintTerms:
    """The subset KL, and beside it the KL of two outcomes: some safety token, and any other."""
    value, d_logits, _ = _kl(temperature, log_p[..., :-1], reference[..., :-1], weights)
    log_masses, log_q = (
        torch.stack([x[..., :-1].logsumexp(-1), x[..., -1]], -1) for x in (log_p, reference)
    )
    # a reference that was rounded, as a cache rounds it, does not sum to 1
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    p, q, distance = log_masses.exp(), log_q.exp(), log_masses - log_q
    # both sum to 1, so that q log(q/p) may be q log(q/p) - q + p, and no term is negative
    near = torch.where(q == 0, p, q * (torch.expm1(distance) - distance))
    far = torch.where(q == 0, p, (p - q) - q * distance)
    value = value + torch.where(distance.abs() < 1.0, near, far).sum(-1)
    # the difference of the smaller of two masses that sum to 1 has more decimals
    more, less = (p - q).unbind(-1)
    more = torch.where(p[..., -1] < 0.5, -less, more)
    d_logits = d_logits + torch.softmax(log_p[..., :-1], -1) * more[..., None]
    return ConstraintTerms(value, d_logits, -more)
