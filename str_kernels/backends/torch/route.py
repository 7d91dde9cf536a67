"""Route: which (row, tile) pairs are worth computing exactly.

Stage: ``TileMasses`` → ``Worklist``. A pair is live if its tile holds more than ``eps`` of the
row's open probability, what lies outside the label's tile. Relative to the row, because a confident
row's gradient is small and would be lost at an absolute threshold; never relative to the batch, so
that a row's result does not depend on its neighbours, while the screen holds for all of them; but
for the last digits of an 8-bit screen, whose balance of columns they share.
"""

from __future__ import annotations

import torch

from str_kernels.engine.contract import Block, TileMasses, Worklist
from str_kernels.engine.tiles import LEAST_OPEN, positions_of
from str_kernels.options import TILE


def route_pairs(block: Block, masses: TileMasses, eps: float) -> Worklist:
    """``Worklist`` of R rows."""
    labels = block.labels
    log_mass = masses.log_mass
    shift = torch.logsumexp(log_mass, -1)
    dead = torch.exp(log_mass - shift[:, None])
    labelled = (labels >= 0).nonzero()[:, 0]
    label_tile = positions_of(labels, block.tiles.inverse)[labelled] // TILE
    open_mass = dead.sum(-1)
    open_mass[labelled] -= dead[labelled, label_tile]
    live = dead > (eps * open_mass.clamp(min=LEAST_OPEN))[:, None]
    live[labelled, label_tile] = True
    dead.masked_fill_(live, -0.0)
    # in one dimension: half the memory of pairs of coordinates
    rows = live.T.flatten().nonzero()[:, 0].remainder_(len(live))
    return Worklist(rows, live.sum(0), shift, dead)
