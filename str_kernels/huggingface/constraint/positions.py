"""Which positions are constrained, and how much each counts.

DESIGN: λ means the same whatever is chosen, because every sequence's weights sum to its number of
labelled positions L: 1 each for the labelled ones, ``L/k`` each for the first k of them, ``L/T``
each for all T positions that are not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from str_kernels.huggingface.constraint.packing import described, sequence_starts
from str_kernels.settings import Positions


def position_weights(
    labels: Tensor,
    positions: Positions,
    *,
    ignore_index: int = -100,
    attention_mask: Tensor | None = None,
    mask_name: str = "attention_mask",
    packing: Mapping[str, Any] | None = None,
    scored: Tensor | None = None,
) -> Tensor:
    """Weights ``[B, T]`` fp32 of the constraint for labels ``[B, T]``, already shifted.

    Args:
        labels: shifted labels; ``ignore_index`` where there is none.
        positions: what to constrain.
        ignore_index: the label that is none.
        attention_mask: ``[B, T]``, 0 on padding; None: no padding.
        mask_name: what the mask is called in an error.
        packing: the forward's arguments, of which those of ``sequence_starts`` tell packed
            sequences apart; without one a row is one sequence, as to the model's own attention.
        scored: ``[B, T]`` bool, the positions that reach the loss at all (a model that slices its
            logits drops the last); None: all.

    Raises:
        ValueError: an argument of ``packing`` that does not fit; a mask of another shape with
            ``positions="all"``, or with k and no ``packing``: a mask of blocks keeps sequences
            apart and does not say where one starts.
    """
    labelled = labels != ignore_index
    if positions == "labels":
        return labelled.float()
    starts = sequence_starts(labels.shape, packing or {}, labels.device)
    if starts is None and positions != "all":
        _refuse_blocks(attention_mask, mask_name)
    segments = torch.zeros_like(labels).long() if starts is None else starts.long().cumsum(-1)
    per_segment = _sum_by(segments, labelled)
    if positions == "all":
        real = _real_positions(labels, attention_mask, mask_name)
        real = real if scored is None else real & scored
        return torch.where(real, per_segment / _sum_by(segments, real), 0.0)
    first = labelled & (_rank(segments, labelled) <= positions)
    return torch.where(first, per_segment / _sum_by(segments, first), 0.0)


def _real_positions(labels: Tensor, attention_mask: Tensor | None, name: str) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(labels, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != labels.shape:
        raise ValueError(
            f"{name}={described(attention_mask)}: positions='all' needs one "
            f"of the shape of the logits' rows, {list(labels.shape)}, to tell padding; use "
            "positions='labels' otherwise."
        )
    return attention_mask.to(labels.device) != 0


def _refuse_blocks(attention_mask: Any, name: str) -> None:
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        return
    raise ValueError(
        f"{name}={described(attention_mask)}: may keep packed sequences apart and does not "
        "say where one starts; the first k positions of each need position_ids or cu_seq_lens_q."
    )


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
