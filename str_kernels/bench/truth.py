"""Compute the right answer in fp64, blocked, and how far an outcome is from it.

The truth belongs to the operands that a contender was given, rounded to bf16 or not. Gradients are
compared on a sample: rows of the hidden states, some of them confident (a filter's hardest: their
own gradient is small), and rows of the weight, half of them labels' own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from str_kernels.accuracy import relative_error, rms
from str_kernels.bench.inputs import Case
from str_kernels.functional import linear_cross_entropy
from str_kernels.options import SafetyConstraint

CONFIDENT = 0.99  # probability of the label from which on a row counts as confident
_ROWS, _CONFIDENT_ROWS, _TOKENS = 256, 64, 256
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Truth:
    """The loss in fp64, and the gradients of sampled rows and tokens."""

    loss: float
    lse: Tensor  # [N]
    p_label: Tensor  # [N]
    rows: Tensor  # [S], the sample
    spread: int  # so many of the sample are evenly spread; the rest are confident ones
    d_hidden: Tensor  # [S, D]
    entropy: Tensor  # [S]
    tokens: Tensor  # [M], a sample too
    d_weight: Tensor  # [M, D]

    @property
    def confident(self) -> Tensor:
        """``[S]`` bool."""
        return self.p_label[self.rows] >= CONFIDENT

    def statistics(self) -> dict[str, float]:
        """Return how certain the rows are, by which inputs can be compared."""
        entropy, p_label = self.entropy[: self.spread].cpu(), self.p_label.cpu()
        quantiles = {
            f"{name}_q{percent}": values.quantile(percent / 100).item()
            for name, values in (("entropy", entropy), ("p_label", p_label))
            for percent in (10, 25, 50, 75, 90)
        }
        mean, confident = entropy.mean().item(), (p_label >= CONFIDENT).double().mean().item()
        return {"loss": self.loss, "entropy": mean, **quantiles, "confident": confident}


def truth_of(case: Case) -> Truth:
    """Compute the log-sum-exps in one fp64 product and the gradients in a small one."""
    hidden, count = case.hidden_states.double(), len(case.hidden_states)
    lse = torch.cat([_log_sum_exp(part, case.weight) for part in hidden.split(_BLOCK // 2)])
    target = case.weight[case.labels].double()
    p_label = torch.exp((hidden * target).sum(-1) - lse)
    rows, spread = _sampled_rows(p_label)
    expected, entropy = _expected(hidden[rows], case.weight, lse[rows])
    tokens = _sampled_tokens(case.labels, len(case.weight))
    dz = torch.exp(hidden @ case.weight[tokens].double().T - lse[:, None])
    dz -= (case.labels[:, None] == tokens).double()
    return Truth(
        loss=-p_label.log().mean().item(),
        lse=lse,
        p_label=p_label,
        rows=rows,
        spread=spread,
        d_hidden=(expected - target[rows]) / count,
        entropy=entropy,
        tokens=tokens,
        d_weight=dz.T @ hidden / count,
    )


def constraint_gradient(
    case: Case, safety: SafetyConstraint, reference: Tensor, rows: Tensor
) -> Tensor:
    """Return the constraint's own part of these rows' gradient, its mean over N: ``[S, D]``.

    Only the K columns enter, so the oracle gets a head of K rows; for ``kl`` and ``mse``.
    """
    ids = list(safety.token_ids)
    return _gradient(
        case.hidden_states[rows].double(),
        case.weight[ids].double(),
        reference[rows].double(),
        safety=replace(safety, token_ids=range(len(ids))),
        num_items_in_batch=len(case.hidden_states),
        backend="dense",
    )


def constraint_error(case: Case, truth: Truth) -> float:
    """Return the error of the constraint's own gradient: the same rows without their labels."""
    safety, reference = case.usual_constraint
    got = _gradient(
        case.hidden_states,
        case.weight,
        reference,
        safety=safety,
        num_items_in_batch=len(case.hidden_states),
        index=case.index,
    )
    want = constraint_gradient(case, safety, reference, truth.rows)
    return relative_error(got[truth.rows], want)


def _gradient(hidden: Tensor, weight: Tensor, reference: Tensor, **settings: Any) -> Tensor:
    """Return the gradient of rows without labels, ``[N, D]``: the constraint's part alone."""
    hidden = hidden.detach().requires_grad_()
    labels = torch.full((len(hidden),), -100, device=hidden.device)
    settings |= {"reference": reference, "position_weights": torch.ones_like(reference[:, 0])}
    loss = linear_cross_entropy(hidden, weight, labels, **settings)
    return torch.autograd.grad(loss, hidden)[0]


def errors(
    truth: Truth,
    loss: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor | None = None,
    lse: Tensor | None = None,
) -> dict[str, float | None]:
    """Return how far loss, gradients and log-sum-exp are off; None: nothing to compare."""

    def error_of(got: Tensor | None, want: Tensor) -> float | None:
        return None if got is None or len(want) == 0 else relative_error(got, want)

    d_tokens = None if d_weight is None else d_weight[truth.tokens]
    got, spread, confident = d_hidden[truth.rows], slice(truth.spread), truth.confident
    return {
        "loss_error": abs(loss.double().item() - truth.loss),
        "lse_error": None if lse is None else rms(lse.double() - truth.lse),
        "hidden_error": error_of(got[spread], truth.d_hidden[spread]),
        "confident_error": error_of(got[confident], truth.d_hidden[confident]),
        "weight_error": error_of(d_tokens, truth.d_weight),
    }


def _log_sum_exp(hidden: Tensor, weight: Tensor) -> Tensor:
    lse = hidden.new_full((len(hidden),), float("-inf"))
    for block in weight.split(_BLOCK):
        lse = torch.logaddexp(lse, torch.logsumexp(hidden @ block.double().T, -1))
    return lse


def _expected(hidden: Tensor, weight: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ p w`` and the entropy of every row."""
    expected, entropy = torch.zeros_like(hidden), lse.clone()
    for block in weight.split(_BLOCK):
        block = block.double()
        logits = hidden @ block.T
        p = torch.exp(logits - lse[:, None])
        expected += p @ block
        entropy -= (p * logits).sum(-1)
    return expected, entropy


def _sampled_rows(p_label: Tensor) -> tuple[Tensor, int]:
    """Choose evenly spread rows, then confident ones."""
    count = len(p_label)
    rows = torch.arange(0, count, max(1, count // _ROWS), device=p_label.device)[:_ROWS]
    sure = p_label >= CONFIDENT
    sure[rows] = False
    return torch.cat([rows, sure.nonzero()[:_CONFIDENT_ROWS, 0]]), len(rows)


def _sampled_tokens(labels: Tensor, vocab: int) -> Tensor:
    """Choose labels' own rows, and as many evenly spread ones."""
    spread = torch.linspace(0, vocab - 1, min(_TOKENS, vocab), device=labels.device).long()
    return torch.cat([labels.unique()[:_TOKENS], spread]).unique()
