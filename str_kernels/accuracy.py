"""How accurate the filtered loss is on the rows at hand, beside the ordinary bf16 head.

Stage: a sample of rows → the exact pass, the filtered pass, a bf16 head → `AccuracyReport`. The
filter's error is that of dead tiles, which no formula bounds for every model: measure it where it
is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from str_kernels.engine.contract import Backend, Head, RowInputs
from str_kernels.engine.products import product_dtype
from str_kernels.engine.shards import Shards, VocabularyShard, shards_of
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms
from str_kernels.vocabulary import VocabularyIndex

_BLOCK = 8192  # vocabulary rows of the bf16 head at a time


@dataclass(frozen=True)
class AccuracyReport:
    """Errors over ``rows`` labelled rows, against the exact pass.

    Attributes:
        rows: how many were compared.
        lse_error: rms error of the log-sum-exp, in nats.
        gradient_error: ``‖ΔdH‖ / ‖dH‖`` of the cross-entropy.
        bf16_lse_error: the same of a head whose logits and probabilities are bf16.
        bf16_gradient_error: the same, of that head.
        dead_mass: mean probability that was screened but not refined.
    """

    rows: int
    lse_error: float
    gradient_error: float
    bf16_lse_error: float
    bf16_gradient_error: float
    dead_mass: float

    @property
    def acceptable(self) -> bool:
        """Whether both errors stay within those of the bf16 head."""
        return (
            self.lse_error <= self.bf16_lse_error
            and self.gradient_error <= self.bf16_gradient_error
        )

    def __str__(self) -> str:
        return (
            f"lse error {self.lse_error:.2g} (bf16 head {self.bf16_lse_error:.2g}), gradient error "
            f"{self.gradient_error:.2%} (bf16 head {self.bf16_gradient_error:.2%}), dead mass "
            f"{self.dead_mass:.2%}, over {self.rows} rows"
        )


def check_accuracy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions | None = None,
    *,
    bias: Tensor | None = None,
    index: VocabularyIndex | None = None,
    backend: str | Backend = "auto",
    shard: VocabularyShard | None = None,
    rows: int = 64,
) -> AccuracyReport | None:
    """Compare the filtered cross-entropy with the exact one on a sample of labelled rows.

    Args:
        hidden_states: ``[..., D]``.
        weight: ``[V, D]``.
        labels: ``[...]``, already shifted.
        options: settings of the loss; None for the defaults. The constraint, label smoothing and
            z-loss take no part here: what they add is exact.
        bias: ``[V]``.
        index: the vocabulary index in use.
        backend: as in ``linear_cross_entropy``.
        shard: as in ``linear_cross_entropy``; every process of its group has to call this.
        rows: at most so many rows, evenly spaced.

    Returns:
        The report, or None if no position has a label.
    """
    options = replace(
        options or LossOptions(), safety=None, reduction="none", label_smoothing=0.0, z_loss=0.0
    )
    labels = labels.reshape(-1)
    where = (labels != options.ignore_index).nonzero()[:, 0]
    if len(where) == 0:
        return None
    where = where[torch.linspace(0, len(where) - 1, min(rows, len(where))).long()]
    states = hidden_states.detach().reshape(-1, hidden_states.shape[-1])[where]
    labels = labels[where]
    weight, bias = weight.detach(), None if bias is None else bias.detach()

    def gradient_of(chosen: LossOptions, index: VocabularyIndex | None) -> tuple:
        leaf, inputs = states.clone().requires_grad_(), RowInputs(labels)
        with torch.enable_grad():
            head = Head(leaf, weight, bias)
            where = {"backend": backend, "shard": shard}
            terms = row_terms(head, inputs, chosen, index=index, **where)
            gradient = torch.autograd.grad(terms.cross_entropy.sum(), leaf)[0]
        return terms.statistics.lse, gradient.double(), terms.statistics.dead_mass

    exact = replace(options, filter_eps=0.0, screen="auto")
    lse, gradient, _ = gradient_of(exact, None)
    got_lse, got_gradient, dead_mass = gradient_of(options, index)
    shards, head = shards_of(shard, len(weight)), Head(states, weight, bias)
    bf16_lse, bf16_gradient = _bf16_head(head, labels, options, shards)
    return AccuracyReport(
        rows=len(labels),
        lse_error=rms(got_lse - lse),
        gradient_error=relative_error(got_gradient, gradient),
        bf16_lse_error=rms(bf16_lse - lse),
        bf16_gradient_error=relative_error(bf16_gradient, gradient),
        dead_mass=dead_mass.mean().item(),
    )


def rms(difference: Tensor) -> float:
    """Return the root mean square, computed in fp64."""
    return difference.double().square().mean().sqrt().item()


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got - want‖ / ‖want‖``, in the precision of ``want``, which should be fp64."""
    size = want.norm().clamp_min(torch.finfo(want.dtype).tiny)
    return ((got.to(want.dtype) - want).norm() / size).item()


def _bf16_head(
    head: Head, labels: Tensor, options: LossOptions, shards: Shards
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and gradient of a head with bf16 logits and bf16 probabilities."""
    states, weight, bias = head
    half, labels = states.bfloat16(), shards.own(labels)

    def blocks():
        for start in range(0, len(weight), _BLOCK):
            rows = weight[start : start + _BLOCK].bfloat16()
            logits = _bf16_product(half, rows.T)
            if bias is not None:
                logits = logits + bias[start : start + _BLOCK].bfloat16()
            logits = logits * options.logit_scale
            slope = torch.ones((), dtype=torch.bfloat16, device=logits.device)
            if options.softcap is not None:
                squashed = torch.tanh(logits / options.softcap)
                logits, slope = options.softcap * squashed, 1 - squashed.square()
            yield start, rows, logits, slope * options.logit_scale

    lowest = torch.full_like(states[:, 0], -torch.inf, dtype=torch.float32)
    parts = [lowest, *(torch.logsumexp(logits.float(), -1) for _, _, logits, _ in blocks())]
    lse = torch.logsumexp(shards.gather(torch.logsumexp(torch.stack(parts), 0)), 0)
    gradient = torch.zeros_like(states, dtype=torch.float64)
    for start, rows, logits, slope in blocks():
        p = torch.exp(logits.float() - lse[:, None])
        here = ((labels >= start) & (labels < start + len(rows))).nonzero()[:, 0]
        p[here, labels[here] - start] -= 1.0
        gradient += _bf16_product(p.bfloat16() * slope, rows)
    return lse, shards.sum(gradient)


def _bf16_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply bf16 operands in what this device multiplies fastest; round to bf16."""
    dtype = product_dtype(torch.bfloat16, left.device)
    return (left.to(dtype) @ right.to(dtype)).bfloat16()
