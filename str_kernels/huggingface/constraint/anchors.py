"""Anchor rows: requests that only the constraint sees, and from which nothing is learned.

Stage: a collated batch, anchor rows → one batch, with ``position_weights [B, T]`` of its own. This
goes beyond the paper: the constraint acts on the contexts that it is there for. Benign requests
that resemble the refused ones join too, so that the difference between them is preserved, and not
refusing as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from str_kernels.huggingface.constraint.positions import position_weights
from str_kernels.inputs.chat import IGNORED, collate
from str_kernels.settings import Positions, validate_positions

Batch = dict[str, Tensor]
Feature = dict[str, Any]

_JOINED = ("input_ids", "attention_mask", "labels")
# The anchors' weight in the constraint, relative to that of a batch's own rows, so that cutting a
# step into more forwards changes nothing; two anchors to eight rows were measured, equal in weight.
SHARE = 0.25


class AnchoredCollator:
    """A data collator that joins one row of each pool to every batch: constrained, not learned.

    For training a patched model with a constraint and without an encoder: other models may leave
    ``position_weights`` unread, and an evaluation would count the rows in. All rows are padded to
    the longest, so keep anchors as short as the data.

    Args:
        collator: makes ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]`` from features,
            and nothing else.
        pools: rows as ``{"input_ids": [...]}``, whole conversations with the answers of the aligned
            model: one pool of requests that it refuses, and one of benign look-alikes.
        pad_token_id: fills up what is shorter.
        positions: as in ``patch_model``, for the other rows; they replace the patch's.
        share: the anchors' weight in the constraint, relative to the other rows' own; above 0.
            None: 0.25, and 1 where they are alone.
        alone: the other rows are not constrained, so that nothing holds back what they teach. With
            ``reference="adapter_off"`` the reference pass then runs on the anchors alone.
        every: anchors join one batch in so many, drawn by the batch, and weigh ``every`` times as
            much there; 1 or more.
        seed: determines, together with the batch, which rows join it, so that a resumed run and
            every worker draw alike.

    Raises:
        ValueError: no pool, an empty one, a row without ids, no share, no number of batches, or
            positions that there are not.
    """

    def __init__(
        self,
        collator: Callable[[list[Feature]], Batch],
        *pools: Sequence[Feature],
        pad_token_id: int,
        positions: Positions = "all",
        share: float | None = None,
        alone: bool = False,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        if not pools:
            raise ValueError("pools is empty: give anchor rows, refused and benign ones apart.")
        for at, pool in enumerate(pools):
            rows = all(isinstance(row, Mapping) and len(row.get("input_ids", ())) for row in pool)
            if not len(pool) or not rows:
                raise ValueError(f"pools[{at}]: must have rows, each with input_ids.")
        validate_positions(positions)
        if not isinstance(alone, bool):
            raise ValueError(f"alone={alone!r}: must be True or False.")
        if share is None:
            share = 1.0 if alone else SHARE
        if not share > 0:
            raise ValueError(f"share={share!r}: must be above 0.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: must be an integer, 1 or more.")
        self._collator, self._pools = collator, pools
        self._share, self._alone, self._every = share * every, alone, every
        self._pad, self._positions, self._seed = pad_token_id, positions, seed

    def __call__(self, features: list[Feature]) -> Batch:
        """The three entries ``[B + pools, T]``, int64, and their ``position_weights``, fp32."""
        batch = self._collator(features)
        draw = Random(f"{self._seed} {batch['input_ids'].tolist()}")
        # the batch draws, not a count: a resumed run and every worker draw alike
        if self._every > 1 and draw.randrange(self._every):
            own = _own_weights(batch, self._positions)
            return {**batch, "position_weights": torch.zeros_like(own) if self._alone else own}
        drawn = [draw.choice(pool) for pool in self._pools]
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in drawn]
        anchors = collate(rows, pad_token_id=self._pad)
        return join_anchors(
            batch, anchors, self._positions, self._pad, share=self._share, alone=self._alone
        )


def join_anchors(
    batch: Batch,
    anchors: Batch,
    positions: Positions,
    pad_token_id: int,
    *,
    share: float = SHARE,
    alone: bool = False,
) -> Batch:
    """The batch with anchor rows below it, and the ``position_weights`` of both.

    The batch's rows keep the weight that they have without anchors, or with ``alone`` have none.
    The anchors together get ``share`` times that weight, each row an equal part, spread over all
    its tokens.

    Raises:
        ValueError: the batch has another entry, which would not fit the rows below.
    """
    own = _own_weights(batch, positions)
    mask = anchors["attention_mask"].float()
    added = mask / mask.sum(-1, keepdim=True) * own.sum() * share / len(mask)
    nothing = torch.full_like(anchors["input_ids"], IGNORED)
    return {
        "input_ids": _stacked(batch["input_ids"], anchors["input_ids"], pad_token_id),
        "attention_mask": _stacked(batch["attention_mask"], anchors["attention_mask"], 0),
        "labels": _stacked(batch["labels"], nothing, IGNORED),
        "position_weights": _stacked(torch.zeros_like(own) if alone else own, added, 0.0),
    }


def _own_weights(batch: Batch, positions: Positions) -> Tensor:
    """``[B, T]`` of the batch's own rows."""
    if set(batch) != set(_JOINED):
        raise ValueError(
            f"a batch of {sorted(batch)}: anchor rows join {', '.join(_JOINED)}, and nothing else."
        )
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return position_weights(shifted, positions, attention_mask=batch["attention_mask"])


def _stacked(above: Tensor, below: Tensor, filler: float) -> Tensor:
    width = max(above.shape[1], below.shape[1])
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filler) for x in (above, below)])
