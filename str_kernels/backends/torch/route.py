"""Route decides which (row, tile) pairs are computed exactly.

Stage: ``TileMasses`` → ``Worklist``. A pair is live if its tile holds the label, or more than
``eps`` of the row's open probability, which is that outside the label's tile. The threshold is
relative to the row, because a confident row's gradient is small and an absolute one would drop it
all. It is never relative to the batch, so that a row's result does not depend on the other rows but
in one case: a screen that is too coarse for one row is repeated exactly for its whole block.
"""

from __future__ import annotations

import torch

from str_kernels.engine.contract import Block, TileMasses, Worklist
from str_kernels.engine.joins import route_over_shards
from str_kernels.engine.tiles import LEAST_OPEN, positions_of
from str_kernels.options import TILE


def route_pairs(block: Block, masses: TileMasses, eps: float) -> Worklist:
    """Return the ``Worklist`` of R rows."""
    labels, log_mass = block.labels, masses.log_mass
    shift = masses.anchor + torch.logsumexp(log_mass, -1)
    # adding the anchor has rounded; subtracting it again is exact
    whole = shift - masses.anchor
    # a process whose tokens are all left out has no mass: -inf - -inf
    whole = whole.masked_fill(whole == -torch.inf, 0.0)
    dead = torch.exp(log_mass - whole[:, None])
    labelled = (labels >= 0).nonzero()[:, 0]
    label_tile = positions_of(labels, block.tiles.inverse)[labelled] // TILE
    open_mass = dead.sum(-1)
    open_mass[labelled] -= dead[labelled, label_tile]
    if not block.shards.alone:
        shared = route_over_shards(block.shards, shift, dead.sum(-1), open_mass)
        shift, open_mass, factor = shared
        dead.mul_(factor[:, None])
    live = dead > (eps * open_mass.clamp(min=LEAST_OPEN))[:, None]
    live[labelled, label_tile] = True
    dead.masked_fill_(live, -0.0)
    # flat indices take half the memory of pairs of coordinates
    rows = live.T.flatten().nonzero()[:, 0].remainder_(len(live))
    return Worklist(rows, live.sum(0), shift, dead)
