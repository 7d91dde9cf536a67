"""What processes with a part of the vocabulary each exchange at the borders of the stages.

Stage: sums over this process's tokens → the same over all tokens. Alone nothing changes. A number
is exchanged for every row of a block:

======== ================================================ ======
columns  the label's logit, and those of K safety tokens    SUM
route    log-sum-exp of the screened masses                 MAX
route    their sum, and the part outside the label's tile   SUM
join     the largest logit                                  MAX
join     mass of computed and of dead pairs, live pairs     SUM
======== ================================================ ======

An exact pass has no route, and joins the mass alone. Label smoothing adds one number, and entropy
another. Sums are relative to one shift, which all have, so that they simply add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import Block, Columns, Joined, RowStages, RowSums, live_pairs
from str_kernels.engine.shards import Shards

Join = Callable[[Block, Tensor, RowSums], Joined]


class Shared(NamedTuple):
    """`Joined` over all processes, ``logit_sum [R]`` likewise, and ``factor [R]`` or None.

    The last is what this process's opened gradient is multiplied by to be relative to the common
    shift.
    """

    joined: Joined
    logit_sum: Tensor | None
    factor: Tensor | None


def columns_over_shards(
    stages: RowStages, block: Block, needed: Tensor | None, listed: Tensor | None = None
) -> Columns:
    """Implement `RowStages.columns` over all processes; each computes those of its own tokens."""
    shards, safety = block.shards, block.options.safety
    if shards.alone:
        return stages.columns(block, needed, listed)
    own = replace(block.options, safety=shards.part(safety))
    found = stages.columns(block._replace(options=own), needed)
    mine = block.labels >= 0
    parts = [found.label] if found.difference is None else [found.label, found.difference]
    few = torch.stack([torch.where(mine, x, 0.0) for x in parts], 1)
    wide = few
    if safety is not None:
        values = few.new_zeros(len(few), len(safety.token_ids))
        if found.safety is not None:
            values[:, shards.tokens(safety, values.device)[0]] = found.safety
        wide = torch.cat([few, values], 1)
    rows = slice(None) if needed is None else needed.nonzero()[:, 0]
    whole = torch.full_like(wide, float("nan"))
    whole[rows] = shards.sum(wide[rows])
    few = whole[:, : len(parts)].masked_fill(block.unlabelled[:, None], float("nan"))
    found = found._replace(
        label=few[:, 0].contiguous(),
        difference=None if found.difference is None else few[:, 1].contiguous(),
        safety=None if safety is None else whole[:, len(parts) :].contiguous(),
    )
    return found.listed(listed)


def route_over_shards(shards: Shards, shift: Tensor, total: Tensor, opened: Tensor) -> Tensor:
    """Return ``[3, R]``: log-sum-exp and open share over all processes, and a factor.

    ``shift [R]`` is this process's screened log-sum-exp, ``total [R]`` and ``opened [R]`` its mass
    and that outside the label's tile, relative to ``exp(shift)``. Times the factor, masses that
    were relative to this shift are relative to the common one.
    """
    top = shards.max(shift.clone())
    top = torch.where(top.isinf(), 0.0, top)  # inf - inf
    factor = torch.exp(shift - top)
    whole, opened = shards.sum(torch.stack([total, opened]) * factor)
    common = top + whole.log()
    # the addition has rounded; subtracting again is exact
    rescale = torch.exp(top - common)
    return torch.stack([common, opened / whole, factor * rescale])


def join_shards(block: Block, label_logit: Tensor, sums: RowSums, join: Join) -> Shared:
    """Apply ``join`` to the sums over all processes."""
    shards = block.shards
    if shards.alone:
        return Shared(join(block, label_logit, sums), sums.logit_sum, None)
    # a join reads no row of the head
    everywhere = block._replace(labels=block.everywhere)
    highest = shards.max(sums.maximum.clone())
    if sums.dead is None:
        whole, factor = _exact_sums(shards, sums, highest)
        return Shared(join(everywhere, label_logit, whole), whole.logit_sum, factor)
    live = live_pairs(sums.dead).sum(-1)
    parts = torch.stack([sums.mass, sums.dead.sum(-1), live.to(sums.mass.dtype)])
    mass, dead, live = shards.sum(parts)
    whole = sums._replace(mass=mass, maximum=highest, dead=dead[:, None])
    joined = join(everywhere, label_logit, whole)
    statistics = joined.statistics._replace(live_share=live / shards.tiles)
    return Shared(joined._replace(statistics=statistics), sums.logit_sum, None)


def _exact_sums(shards: Shards, sums: RowSums, highest: Tensor) -> tuple[RowSums, Tensor]:
    """Sums of an exact pass, each process's relative to a shift of its own, over all of them."""
    shift = highest.masked_fill(highest.isinf(), 0.0)
    apart = sums.shift - shift
    factor = torch.where(sums.mass == 0, 1.0, torch.exp(apart))  # 0 · inf
    parts = {"mass": sums.mass * factor}
    if sums.weighted is not None:
        apart = torch.where(sums.mass == 0, 0.0, apart)
        parts["weighted"] = (sums.weighted + sums.mass * apart) * factor
    if sums.logit_sum is not None:
        parts["logit_sum"] = sums.logit_sum
    whole = shards.sum(torch.stack(list(parts.values())))
    parts = dict(zip(parts, whole, strict=True))
    return sums._replace(shift=shift, maximum=highest, **parts), factor
