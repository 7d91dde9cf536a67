"""Anchor rows: requests that nothing is learned from, whose safety tokens are held all the same.

A step beyond the paper: the constraint sees the very contexts that it is there for. Half of the
rows are benign look-alikes, so that what is held is the difference and not refusing as such.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.huggingface.positions import position_weights

IGNORED = -100
Batch = dict[str, Tensor]


def without_labels(features: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The same sequences with nothing to learn."""
    return [{**f, "labels": [IGNORED] * len(f["labels"])} for f in features]


def joined(
    batches: Iterator[Batch], anchors: Iterator[Batch], positions: str | int, pad: int
) -> Iterator[Batch]:
    """Each batch with anchor rows below it, and the ``position_weights [B, T]`` of both.

    The task's rows weigh what they weigh without anchors; an anchor row's weights sum to the mean
    of theirs, spread over all its tokens.
    """
    for batch, anchor in zip(batches, anchors, strict=False):
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        own = position_weights(shifted, positions, attention_mask=batch["attention_mask"])
        mask = anchor["attention_mask"].float()
        held = mask / mask.sum(-1, keepdim=True) * own.sum() / len(own)
        fillers = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
        yield {
            **{n: _stacked(batch[n], anchor[n], filler) for n, filler in fillers.items()},
            "position_weights": _stacked(own, held, 0.0),
        }


def _stacked(above: Tensor, below: Tensor, filler: float) -> Tensor:
    width = max(above.shape[1], below.shape[1])
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filler) for x in (above, below)])
