"""Anchor rows: requests from which nothing is learned, whose safety tokens are held all the same.

Stage: a collated batch, rows to hold → both below each other, with the batch's own
``position_weights [B, T]``. A step beyond the paper: the constraint sees the contexts that it is
there for. With refused requests go benign ones that resemble them, so that what is held is the
difference, and not refusing as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.huggingface.positions import Positions, position_weights, validate_positions
from str_kernels.inputs.chat import IGNORED, collate

Batch = dict[str, Tensor]
Feature = dict[str, Any]

_JOINED = ("input_ids", "attention_mask", "labels")


class AnchoredCollator:
    """A data collator that joins one row of each pool to every batch: held, not learned.

    For a patched model with a constraint: other models read no ``position_weights``.

    Args:
        collator: makes ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]`` of features,
            and nothing else.
        pools: rows as ``{"input_ids": [...]}``, whole conversations with the answers of the aligned
            model: one pool of requests that it refuses, and one of benign look-alikes.
        pad_token_id: fills up what is shorter.
        positions: of the other rows, as in ``patch_model``, whose own they replace.
        seed: of the draw. Which rows join a batch depends on nothing but it and the batch, so a
            resumed run and every worker draws alike.

    Raises:
        ValueError: no pool, an empty one, a row without ids, or positions that there are not.
    """

    def __init__(
        self,
        collator: Callable[[list[Feature]], Batch],
        *pools: Sequence[Feature],
        pad_token_id: int,
        positions: Positions = "all",
        seed: int = 0,
    ) -> None:
        """Check the pools."""
        if not pools:
            raise ValueError("pools is empty: give rows to hold, refused and benign ones apart.")
        for at, pool in enumerate(pools):
            if not len(pool) or any(not len(row["input_ids"]) for row in pool):
                raise ValueError(f"pools[{at}]: must have rows, each with input_ids.")
        validate_positions(positions)
        self._collator, self._pools = collator, pools
        self._pad, self._positions, self._seed = pad_token_id, positions, seed

    def __call__(self, features: list[Feature]) -> Batch:
        """``[B + pools, T]``, with ``position_weights``."""
        draw = Random(f"{self._seed} {[list(row['input_ids']) for row in features]}")
        drawn = [draw.choice(pool) for pool in self._pools]
        held = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in drawn]
        anchors = collate(held, pad_token_id=self._pad)
        return join_anchors(self._collator(features), anchors, self._positions, self._pad)


def join_anchors(batch: Batch, anchors: Batch, positions: Positions, pad_token_id: int) -> Batch:
    """The batch with anchor rows below it, and the ``position_weights`` of both.

    The batch's rows weigh what they weigh without anchors; an anchor row's weights sum to the mean
    of theirs, spread over all its tokens.

    Raises:
        ValueError: the batch has another entry, which would not fit the rows below.
    """
    if set(batch) != set(_JOINED):
        raise ValueError(
            f"a batch of {sorted(batch)}: anchor rows join {', '.join(_JOINED)}, and nothing else."
        )
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    own = position_weights(shifted, positions, attention_mask=batch["attention_mask"])
    mask = anchors["attention_mask"].float()
    held = mask / mask.sum(-1, keepdim=True) * own.sum() / len(own)
    nothing = torch.full_like(anchors["input_ids"], IGNORED)
    return {
        "input_ids": _stacked(batch["input_ids"], anchors["input_ids"], pad_token_id),
        "attention_mask": _stacked(batch["attention_mask"], anchors["attention_mask"], 0),
        "labels": _stacked(batch["labels"], nothing, IGNORED),
        "position_weights": _stacked(own, held, 0.0),
    }


def _stacked(above: Tensor, below: Tensor, filler: float) -> Tensor:
    width = max(above.shape[1], below.shape[1])
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filler) for x in (above, below)])
