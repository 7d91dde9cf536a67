"""Tiles, for every backend: the position of a label, and the floor of the routing rule."""

from __future__ import annotations

import torch
from torch import Tensor

# Routing clamps the open probability to at least this: a row with less is right to fp32's rounding.
LEAST_OPEN = 2.0**-20


def positions_of(labels: Tensor, inverse: Tensor | None) -> Tensor:
    """Gather each label's position from the order's ``inverse [V]``; -1 stays -1."""
    if inverse is None:
        return labels
    return torch.where(labels < 0, labels, inverse[labels.clamp(min=0)])
