"""The oracle restates every formula with materialised logits and plain autograd.

It is written to be obviously right, not fast, and computes in fp64 for fp64 inputs. Tests and the
`doctor` command compare the fused backends with it. It imports nothing of ours but the options.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.options import LossOptions, SafetyConstraint


class DenseRows(NamedTuple):
    """The two loss terms of N positions, and the numbers that they were made from."""

    cross_entropy: Tensor
    penalty: Tensor
    lse: Tensor
    lse_rest: Tensor  # what rounding took from lse
    safety_logits: Tensor | None
    correct: Tensor
    entropy: Tensor
    log_rest: Tensor | None = None


def dense_logits(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions
) -> Tensor:
    """``z [N, V]`` in fp32 or fp64, by product, bias, scale and softcap in this order."""
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    logits = hidden_states.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits


def dense_penalty(safety: SafetyConstraint, logits: Tensor, reference: Tensor) -> Tensor:
    """``C [N]`` from logits ``[N, V]`` of the whole vocabulary."""
    ids = torch.tensor(safety.token_ids, device=logits.device)
    z = logits[:, ids]
    omega = z.new_tensor(safety.token_weights or [1.0] * len(ids))
    if safety.kind == "kl_mass":
        among = _dense_kl(safety.temperature, omega, z, reference[..., :-1])
        return among + _dense_kl_mass(_log_outcomes(logits, ids), reference)
    if safety.kind == "kl":
        return _dense_kl(safety.temperature, omega, z, reference)
    r = reference.to(z.dtype).expand_as(z)
    if safety.kind == "mse":
        return (omega * (z - r) ** 2).mean(-1)
    return (omega * (torch.log_softmax(logits, -1)[:, ids] - r) ** 2).mean(-1)


def _dense_kl(temperature: float, omega: Tensor, z: Tensor, reference: Tensor) -> Tensor:
    """``τ² KL(q ‖ p)`` among the safety tokens."""
    z, r, omega = (x[..., omega > 0] for x in (z, reference.to(z.dtype).expand_as(z), omega))
    # the maximum leaves first: a quotient of large logits would have few decimals
    z, r = (x - x.amax(-1, keepdim=True).detach() for x in (z, r))
    log_p, log_q = (torch.log_softmax(x / temperature + omega.log(), -1) for x in (z, r))
    return temperature**2 * _divergence(log_q, log_p)


def _log_outcomes(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities ``[N, K + 1]`` of the safety tokens and of all the rest together."""
    logits = logits - logits.detach().amax(-1, keepdim=True)
    inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    inside[ids] = True
    rest = logits.masked_fill(inside, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.log_softmax(torch.cat([logits[:, ids], rest], -1), -1)


def _dense_kl_mass(log_p: Tensor, reference: Tensor) -> Tensor:
    """KL of two outcomes, some safety token and any other; the reference is made to sum to 1."""
    log_p, log_q = (
        torch.log_softmax(torch.stack([x[..., :-1].logsumexp(-1), x[..., -1]], -1), -1)
        for x in (log_p, reference.to(log_p.dtype).expand_as(log_p))
    )
    return _divergence(log_q, log_p)


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q ‖ p)``; an outcome that q does not have costs nothing."""
    return torch.where(log_q == -torch.inf, 0.0, log_q.exp() * (log_q - log_p)).sum(-1)


def dense_rows(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None = None,
    reference: Tensor | None = None,
    position_weights: Tensor | None = None,
) -> DenseRows:
    """Compute N positions from ``[N, D]`` and ``[V, D]``; labels ``[N]`` are already shifted."""
    logits = dense_logits(hidden_states, weight, bias, options)
    labelled = labels != options.ignore_index
    target = torch.where(labelled, labels, 0)
    # the maximum leaves first: a large lse has few decimals, also in its derivative exp(z - lse)
    top = logits.detach().amax(-1)
    top = torch.where(top.isfinite(), top, 0.0)
    above = torch.logsumexp(logits - top[:, None], dim=-1)
    lse = top + above
    cross_entropy = F.cross_entropy(
        logits, target, reduction="none", label_smoothing=options.label_smoothing
    )
    cross_entropy = cross_entropy + options.z_loss * lse**2
    cross_entropy = torch.where(labelled, cross_entropy, 0.0)
    safety_logits, log_rest, penalty = None, None, torch.zeros_like(cross_entropy)
    if options.safety is not None:
        ids = torch.tensor(options.safety.token_ids, device=logits.device)
        safety_logits = logits[:, ids]
        if options.leaves_out:
            log_rest = _log_outcomes(logits.detach(), ids)[:, -1]
        weights = labelled if position_weights is None else position_weights
        weights = weights.to(logits.dtype)
        each = dense_penalty(options.safety, logits, reference)
        penalty = torch.where(weights > 0, options.safety.strength * weights * each, 0.0)
    label_logit = logits.gather(-1, target[:, None])[:, 0]
    p = torch.softmax(logits, -1)
    return DenseRows(
        cross_entropy,
        penalty,
        lse.detach(),
        torch.where(lse.isfinite(), (top - lse) + above, 0.0).detach(),
        None if safety_logits is None else safety_logits.detach(),
        labelled & (label_logit >= logits.amax(-1)),
        torch.special.entr(p).sum(-1).detach(),
        log_rest,
    )
