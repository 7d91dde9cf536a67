"""Sums of the two loss terms between two logs: on the device, read by nobody until asked."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.functional import LossParts
from str_kernels.terms import RowTerms


class LossMeter:
    """Adds up losses; ``take`` averages them and starts anew."""

    def __init__(self) -> None:
        """Start at nothing."""
        self._sums: Tensor | None = None

    def add(self, terms: RowTerms, parts: LossParts) -> None:
        """Add one loss, detached and without synchronising."""
        sums = (terms.cross_entropy, terms.penalty, terms.dead_mass, terms.live_share.nan_to_num())
        counts = (parts.num_correct, parts.num_labels)
        added = torch.stack(
            [*(x.detach().sum().float() for x in sums), *(n.float() for n in counts)]
        )
        self._sums = added if self._sums is None else self._sums + added

    def take(self) -> dict[str, float]:
        """Averages over the labelled tokens since the last call; empty if there was no loss."""
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        cross_entropy, penalty, dead_mass, live_share, correct, labels = sums.tolist()
        labels = max(labels, 1.0)
        return {
            "cross_entropy": cross_entropy / labels,
            "safety_penalty": penalty / labels,
            "token_accuracy": correct / labels,
            "dead_mass": dead_mass / labels,
            "live_share": live_share / labels,
        }
