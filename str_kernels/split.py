"""A head whose weight is a ``DTensor``: this process's rows of it, and which they are.

Stage: `Head` of a ``DTensor`` that is split by rows → `Head` of plain tensors, `VocabularyShard`.
"""

from __future__ import annotations

from typing import Any

from str_kernels.engine.contract import Head, RowInputs, RowTerms
from str_kernels.engine.shards import VocabularyShard
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms


def own_part(
    head: Head, shard: VocabularyShard | None = None
) -> tuple[Head, VocabularyShard | None]:
    """Return the head's part on this process; gradients flow back to the ``DTensor``.

    Raises:
        ValueError: a ``DTensor`` is split in another way than the rows of W are here.
    """
    if not is_split(head.weight):
        return head, shard
    if shard is not None:
        raise ValueError("weight is a DTensor, which says its shard itself: leave shard=None.")
    shard = shard_of(head.weight)
    hidden, weight, bias = head
    if is_split(hidden):
        _require(hidden, "hidden_states", all(p.is_replicate() for p in hidden.placements))
        hidden = hidden.to_local()
    if bias is not None:
        alike = is_split(bias) and bias.placements == weight.placements
        _require(bias, "bias", alike)
        bias = bias.to_local()
    return Head(hidden, weight.to_local(), bias), shard


def split_terms(
    head: Head,
    inputs: RowInputs,
    options: LossOptions,
    *,
    shard: VocabularyShard | None,
    **settings: Any,
) -> RowTerms:
    """Compute ``row_terms`` of a ``DTensor``'s part, or of a shard that is given."""
    head, shard = own_part(head, shard)
    return row_terms(head, inputs, options, shard=shard, **settings)


def is_split(tensor: Any) -> bool:
    """Whether this is a ``DTensor``; its class is imported by nobody who has none."""
    return type(tensor).__name__ == "DTensor"


def shard_of(weight: Any) -> VocabularyShard | None:
    """Say which rows of a ``DTensor [V, D]`` this process has; None if it has them all.

    Raises:
        ValueError: it is split by columns, over two dimensions of its mesh, or a pending sum.
    """
    placements, mesh = weight.placements, weight.device_mesh
    split = [at for at, where in enumerate(placements) if not where.is_replicate()]
    if not split:
        return None
    by_rows = len(split) == 1 and placements[split[0]].is_shard(0)
    _require(weight, "weight", by_rows)
    # as ``Shard`` cuts: equal parts, of which the last are shorter or empty
    total, place = weight.shape[0], mesh.get_local_rank(split[0])
    size = -(-total // mesh.size(split[0]))
    return VocabularyShard(mesh.get_group(split[0]), min(total, place * size), total)


def _require(tensor: Any, name: str, holds: bool) -> None:
    if holds:
        return
    rules = {
        "weight": "split by rows over one dimension of its mesh (Shard(0)), or whole",
        "bias": "a DTensor that is split as the weight is",
        "hidden_states": "whole on every process (Replicate)",
    }
    placements = getattr(tensor, "placements", "a plain tensor")
    raise ValueError(
        f"{name} has placements={placements}: where the weight is a DTensor it must be "
        f"{rules[name]}; redistribute it."
    )
