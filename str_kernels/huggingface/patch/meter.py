"""Sums of losses and drift between two logs, kept on the device and read only by `take`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.constraint import needs_lse
from str_kernels.engine.contract import RowTerms
from str_kernels.engine.logits import outcomes
from str_kernels.functional import LossParts
from str_kernels.huggingface.constraint.splits import Split
from str_kernels.huggingface.patch.notices import Notices
from str_kernels.options import SafetyConstraint

# Two roundings of bf16: two passes of one model, with and without gradients, differ by less.
_ABOUT_NOTHING = 2**-6
_SUMS = 7  # how many a `LossMeter` has of each loss, but for the drift


class Share(NamedTuple):
    """What the two terms of one loss count for among others, where it is not their labels.

    Attributes:
        scale: of the sums over the labels.
        weight: of this loss in the average.
    """

    scale: Tensor
    weight: float

    @staticmethod
    def of_rows(rows: int, labels: Tensor, split: Split | None) -> Share:
        """As a trainer's evaluation averages: a mean over labels counts as its sequences.

        Where these are split, each process has a part of the labels and of the sequences.
        """
        total, processes = (labels, 1) if split is None else (split.total(labels), split.size)
        return Share(rows / total.float().clamp(min=1), rows / processes)


class LossMeter:
    """Adds up losses; ``take`` averages them and starts anew."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._drift: Tensor | None = None
        self._latest: tuple[Tensor | None, Tensor | None] = (None, None)

    def add(self, terms: RowTerms, parts: LossParts, share: Share | None = None) -> None:
        """Add one loss, detached and without synchronising; it weighs as its labels by default."""
        found, labels = terms.statistics, parts.num_labels.float()
        sums = (terms.cross_entropy, terms.penalty, found.dead_mass, found.live_share.nan_to_num())
        sums = torch.stack([x.detach().sum().float() for x in sums])
        weight = labels
        if share is not None:
            sums[:2] *= share.scale
            weight = torch.full_like(labels, share.weight)
        added = torch.cat([sums, torch.stack([parts.num_correct.float(), labels, weight])])
        self._sums = _sum(self._sums, added)
        self._latest = added, None

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
        self._drift = _sum(self._drift, added)
        self._latest = self._latest[0], added

    def forget_earlier(self) -> None:
        """Keep the latest loss alone."""
        self._sums, self._drift = self._latest

    def take(self, device: torch.device | None = None) -> dict[str, float]:
        """Averages since the last call; empty if there was no loss.

        All are over the labelled tokens (the two terms over rows, if they were added so), but
        ``safety_drift``, which is there if there was a constraint: the root of the mean square over
        the weight of the constrained positions, in logits.

        Args:
            device: of this process; given, the averages are those of all processes, each of which
                has to call. None: of this process alone.
        """
        sums, drift = self._sums, self._drift
        self._sums = self._drift = None
        if device is not None and torch.distributed.is_available():
            sums, drift = _over_processes(sums, drift, device)
        if sums is None:
            return {}
        cross_entropy, penalty, dead_mass, live_share, correct, *counts = sums.tolist()
        labels, weight = (max(n, 1.0) for n in counts)
        averages = {
            "cross_entropy": cross_entropy / weight,
            "safety_penalty": penalty / weight,
            "token_accuracy": correct / labels,
            "dead_mass": dead_mass / labels,
            "live_share": live_share / labels,
        }
        if drift is not None:
            distance, weight = drift.tolist()
            averages["safety_drift"] = (distance / weight) ** 0.5 if weight else 0.0
        return averages

    def state_dict(self) -> dict[str, list[float] | None]:
        """The sums, as numbers; the host waits for the device."""
        sums = {"sums": self._sums, "drift": self._drift}
        return {name: None if x is None else x.tolist() for name, x in sums.items()}

    def load_state_dict(self, state: dict[str, list[float] | None]) -> None:
        """Go on with the sums of ``state_dict``."""
        self._sums, self._drift = (
            None if state[name] is None else torch.tensor(state[name]) for name in ("sums", "drift")
        )


def _sum(sums: Tensor | None, added: Tensor) -> Tensor:
    return added if sums is None else sums.to(added.device) + added


def _over_processes(
    sums: Tensor | None, drift: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if not torch.distributed.is_initialized():
        return sums, drift
    parts = [torch.zeros(n) if x is None else x for x, n in ((sums, _SUMS), (drift, 2))]
    there = torch.tensor([sums is not None, drift is not None])
    total = torch.cat([x.to(device, torch.float32) for x in (*parts, there)])
    torch.distributed.all_reduce(total)
    sums, drift, (measured, constrained) = total[:_SUMS], total[_SUMS:-2], total[-2:].tolist()
    return sums if measured else None, drift if constrained else None


class FirstPenalty:
    """Says once, by the first constrained loss, that training did not begin at the reference."""

    def __init__(self, notices: Notices, *, cached: bool) -> None:
        """Wait for the first loss; ``cached``: the references come from a file."""
        self._notices, self._cached, self.judged = notices, cached, False

    def after_loss(
        self, terms: RowTerms, safety: SafetyConstraint, reference: Tensor, weights: Tensor
    ) -> None:
        """Judge one loss, the first that has a constrained row; arguments as ``add_drift``."""
        if self.judged:
            return
        size = torch.where(weights > 0, weights * reference.square().mean(-1), 0.0).sum()
        found = torch.stack([*_drift(terms, safety, reference, weights), size])
        distance, weight, size = found.tolist()
        self.judged = weight > 0
        if distance > _ABOUT_NOTHING**2 * size:
            penalty = terms.penalty.detach().sum().item() / weight
            self._notices.warn_moved(penalty, (distance / weight) ** 0.5, cached=self._cached)


@torch.no_grad()
def _drift(terms: RowTerms, safety: SafetyConstraint, reference: Tensor, weights: Tensor) -> Tensor:
    """``[Σ w (1/K) Σ (z - r)², Σ w]`` fp32, in the unit of the reference; K counts its columns."""
    values = terms.statistics.safety_logits
    if needs_lse(safety):
        values = outcomes(terms.statistics)
    weights = weights.float()
    distance = (values.float() - reference).float().square().mean(-1)
    distance = torch.where(weights > 0, weights * distance, 0.0)  # the other rows may be NaN
    return torch.stack([distance.sum(), weights.sum()])
