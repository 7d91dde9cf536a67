"""What every backend knows of tiles: where a label stands, and the floor of the routing rule."""

from __future__ import annotations

import torch
from torch import Tensor

# The least probability outside the label's tile that routing compares with: below it a row is right
# to fp32's rounding already.
LEAST_OPEN = 2.0**-20


def positions_of(labels: Tensor, inverse: Tensor | None) -> Tensor:
    """Gather each label's position in the order of the vocabulary; -1 stays -1.

    ``inverse [V]`` is the inverse of the order, None in token order.
    """
    if inverse is None:
        return labels
    return torch.where(labels < 0, labels, inverse[labels.clamp(min=0)])
