"""Which positions are constrained, and how much each counts.

DESIGN: λ means the same whatever is chosen, because every sequence's weights sum to its number of
labelled positions L: 1 each for the labelled ones, ``L/k`` each for the first k of them, ``L/T``
each for all T positions that are not padding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Positions = Literal["labels", "all"] | int


def validate_positions(positions: Positions) -> None:
    """Refuse anything but ``"labels"``, ``"all"`` or a positive integer.

    Raises:
        ValueError: says what is allowed.
    """
    whole = isinstance(positions, int) and not isinstance(positions, bool)
    if positions not in ("labels", "all") and not (whole and positions > 0):
        raise ValueError(
            f"positions={positions!r}: must be 'labels', 'all' or a positive integer k, the first "
            "k labelled positions of each sequence."
        )


def position_weights(
    labels: Tensor,
    positions: Positions,
    *,
    ignore_index: int = -100,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    scored: Tensor | None = None,
) -> Tensor:
    """Weights ``[B, T]`` fp32 of the constraint for labels ``[B, T]``, already shifted.

    Args:
        labels: shifted labels; ``ignore_index`` where there is none.
        positions: what to constrain.
        ignore_index: the label that is none.
        attention_mask: ``[B, T]``, 0 on padding; None: no padding.
        position_ids: ``[B, T]`` or ``[1, T]``, to tell packed sequences apart: one ends where the
            next id is not the next number.
        scored: ``[B, T]`` bool, the positions that reach the loss at all (a model that slices its
            logits drops the last); None: all.

    Raises:
        ValueError: a mask of another shape with ``positions="all"``.
    """
    labelled = labels != ignore_index
    if positions == "labels":
        return labelled.float()
    segments = _segments(labels, position_ids)
    per_segment = _sum_by(segments, labelled)
    if positions == "all":
        real = _real_positions(labels, attention_mask)
        real = real if scored is None else real & scored
        return torch.where(real, per_segment / _sum_by(segments, real), 0.0)
    first = labelled & (_rank(segments, labelled) <= positions)
    return torch.where(first, per_segment / _sum_by(segments, first), 0.0)


def _real_positions(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(labels, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != labels.shape:
        shape = list(getattr(attention_mask, "shape", [])) or type(attention_mask).__name__
        raise ValueError(
            f"attention_mask={shape}: positions='all' needs one of the shape of the logits' rows, "
            f"{list(labels.shape)}, to tell padding; use positions='labels' otherwise."
        )
    return attention_mask.to(labels.device) != 0


def _segments(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Number of the packed sequence that a position belongs to, from 0 in each row."""
    rows = (labels.shape[0], 1)
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[0] not in rows:
        return torch.zeros_like(labels, dtype=torch.long)
    if position_ids.shape[1] != labels.shape[1]:
        return torch.zeros_like(labels, dtype=torch.long)
    position_ids = position_ids.to(labels.device).expand(labels.shape)
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    starts = torch.nn.functional.pad(~follows, (1, 0), value=False)
    return starts.long().cumsum(-1)


def _sum_by(segments: Tensor, values: Tensor) -> Tensor:
    """Sum of ``values`` over the segment of each position, at that position: ``[B, T]`` fp32."""
    sums = torch.zeros(segments.shape, dtype=torch.float32, device=segments.device)
    return sums.scatter_add(-1, segments, values.float()).gather(-1, segments)


def _rank(segments: Tensor, labelled: Tensor) -> Tensor:
    """1 for the first labelled position of its segment, 2 for the second, and so on."""
    running = labelled.long().cumsum(-1)
    before = torch.zeros_like(running).scatter_add(-1, segments, labelled.long())
    starts = before.cumsum(-1) - before
    return running - starts.gather(-1, segments)
