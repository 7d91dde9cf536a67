"""The loss of a PEFT model with a constraint by hand: both logits materialised, plain autograd."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from str_kernels import SafetyConstraint
from str_kernels.huggingface.constraint.references import save_reference_cache
from str_kernels.huggingface.constraint.sequences import content_key, real_tokens


def dense_loss(
    model,
    inputs: dict[str, Tensor],
    safety: SafetyConstraint,
    positions: str | int | Tensor,
    *,
    num_items: int | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """``(Σ CE + λ Σ w C) / n`` of a model without the patch, per sequence and per position."""
    labels, mask = inputs["labels"], inputs["attention_mask"]
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    logits = model(**arguments).logits.float()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    values = safety_values(logits, safety)
    if reference is None:
        training = model.training
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            reference = safety_values(model(**arguments).logits.float(), safety)
        model.train(training)
    cross_entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), shifted.flatten(), reduction="sum"
    )
    penalty = (weights(shifted, mask, positions) * _constraint(values, reference, safety)).sum()
    total = cross_entropy + safety.strength * penalty
    return total / ((shifted != -100).sum() if num_items is None else num_items)


def weights(shifted: Tensor, mask: Tensor, positions: str | int | Tensor) -> Tensor:
    """Position weights, one sequence after another; or the given ones."""
    if isinstance(positions, Tensor):
        return positions
    table = torch.zeros(shifted.shape)
    for row, (labels, real) in enumerate(zip(shifted, mask, strict=True)):
        where = (labels != -100).nonzero()[:, 0]
        chosen = {"labels": where, "all": real.nonzero()[:, 0]}.get(positions)
        chosen = where[:positions] if chosen is None else chosen
        table[row, chosen] = len(where) / max(len(chosen), 1)
    return table


def safety_values(logits: Tensor, safety: SafetyConstraint) -> Tensor:
    """Safety logits; their log-probabilities for ``logprob``; with the rest's for ``kl_mass``."""
    values = logits[..., list(safety.token_ids)]
    if safety.kind not in ("logprob", "kl_mass"):
        return values
    values = values - logits.logsumexp(-1, keepdim=True)
    if safety.kind == "kl_mass":
        others = [v for v in range(logits.shape[-1]) if v not in safety.token_ids]
        rest = logits.log_softmax(-1)[..., others].logsumexp(-1, keepdim=True)
        values = torch.cat([values, rest], -1)
    return values


def _constraint(z: Tensor, r: Tensor, safety: SafetyConstraint) -> Tensor:
    r = r.expand_as(z)
    if safety.kind == "kl":
        return _divergence(z, r, safety.temperature)
    if safety.kind == "kl_mass":
        among = _divergence(z[..., :-1], r[..., :-1], safety.temperature)
        masses = (torch.stack([x[..., :-1].logsumexp(-1), x[..., -1]], -1) for x in (z, r))
        return among + _divergence(*masses)
    return (z - r).square().mean(-1)


def _divergence(z: Tensor, r: Tensor, tau: float = 1.0) -> Tensor:
    q, p = (r / tau).log_softmax(-1), (z / tau).log_softmax(-1)
    return tau**2 * (q.exp() * (q - p)).sum(-1)


def constant_cache(path, inputs, safety: SafetyConstraint, values: Tensor, *more) -> Path:
    """A reference cache of these batches that has ``values [K]`` at every position."""
    sequences = [
        ids
        for batch in (inputs, *more)
        for _, ids in real_tokens(batch["input_ids"], batch.get("attention_mask"))
    ]
    references = {content_key(ids): values.expand(len(ids), -1) for ids in sequences}
    save_reference_cache(path, references, safety)
    return path
