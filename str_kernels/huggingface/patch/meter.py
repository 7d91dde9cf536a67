"""Sums of losses and drift between two logs, kept on the device and read only by `take`."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.contract import RowTerms
from str_kernels.functional import LossParts
from str_kernels.huggingface.constraint.references import reference_unit
from str_kernels.options import SafetyConstraint


class LossMeter:
    """Adds up losses; ``take`` averages them and starts anew."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._drift: Tensor | None = None

    def add(self, terms: RowTerms, parts: LossParts) -> None:
        """Add one loss, detached and without synchronising."""
        found = terms.statistics
        sums = (terms.cross_entropy, terms.penalty, found.dead_mass, found.live_share.nan_to_num())
        counts = (parts.num_correct, parts.num_labels)
        added = torch.stack(
            [*(x.detach().sum().float() for x in sums), *(n.float() for n in counts)]
        )
        self._sums = added if self._sums is None else self._sums + added

    def add_drift(
        self, terms: RowTerms, safety: SafetyConstraint, reference: Tensor, weights: Tensor
    ) -> None:
        """Add the distance of one loss's safety logits from its reference, as `add` does.

        Args:
            terms: of the loss, ``[n]`` rows.
            safety: its constraint.
            reference: ``[n, K]``, NaN on rows of weight zero or not.
            weights: ``[n]``, of the rows in the constraint.
        """
        added = _drift(terms, safety, reference, weights)
        self._drift = added if self._drift is None else self._drift + added

    def take(self) -> dict[str, float]:
        """Averages since the last call; empty if there was no loss.

        All are over the labelled tokens, but ``safety_drift``, which is there if there was a
        constraint: over the weight of the constrained positions.
        """
        sums, self._sums = self._sums, None
        drift, self._drift = self._drift, None
        if sums is None:
            return {}
        cross_entropy, penalty, dead_mass, live_share, correct, labels = sums.tolist()
        labels = max(labels, 1.0)
        averages = {
            "cross_entropy": cross_entropy / labels,
            "safety_penalty": penalty / labels,
            "token_accuracy": correct / labels,
            "dead_mass": dead_mass / labels,
            "live_share": live_share / labels,
        }
        if drift is not None:
            distance, weight = drift.tolist()
            averages["safety_drift"] = distance / weight if weight else 0.0
        return averages


@torch.no_grad()
def _drift(terms: RowTerms, safety: SafetyConstraint, reference: Tensor, weights: Tensor) -> Tensor:
    """``[Σ w (1/K) Σ (z - r)², Σ w]`` fp32, in the unit of the reference."""
    values = terms.statistics.safety_logits.float()
    if reference_unit(safety) == "logprobs":
        values = values - terms.statistics.lse.float()[:, None]
    weights = weights.float()
    distance = (values - reference).float().square().mean(-1)
    distance = torch.where(weights > 0, weights * distance, 0.0)  # the other rows may be NaN
    return torch.stack([distance.sum(), weights.sum()])
