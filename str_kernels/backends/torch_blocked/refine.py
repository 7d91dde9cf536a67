"""Refine: the live pairs from the original operands, in fp32, tile by tile.

Stage: ``Worklist`` → ``Refined``. A tile's live rows are gathered, or taken whole where most of
them are live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.contract import Head, Refined, Tiles, Wanted, Worklist
from str_kernels.backends.logits import accumulator, block_logits, softcap_slope
from str_kernels.backends.torch_blocked.blocks import head_rows, in_block, positions_of
from str_kernels.options import TILE, LossOptions


def refine_pairs(
    head: Head,
    labels: Tensor,
    tiles: Tiles,
    work: Worklist,
    options: LossOptions,
    wanted: Wanted,
) -> Refined:
    """``Refined`` of R rows with labels ``[R]``, -1 where there is none."""
    dtype = accumulator(head.hidden_states.dtype)
    hidden = head.hidden_states.to(dtype)
    positions = positions_of(labels, tiles.inverse)
    mass = torch.zeros_like(work.shift)
    maximum = torch.full_like(mass, float("-inf"))
    expected = torch.zeros_like(hidden) if wanted.hidden else None
    for tile, rows in live_rows(work.rows, work.counts):
        block = slice(tile * TILE, min((tile + 1) * TILE, head.weight.shape[0]))
        weight, bias = head_rows(head, tiles.order, block, dtype)
        logits = block_logits(hidden[rows], weight, bias, options)
        slope = None if options.softcap is None else softcap_slope(logits, options)
        here, column = in_block(positions[rows], block)
        logits[here, column] = float("-inf")
        maximum[rows] = torch.maximum(maximum[rows], logits.amax(-1))
        exponentials = logits.sub_(work.shift[rows, None]).exp_()
        mass.index_add_(0, rows, exponentials.sum(-1))
        if expected is not None:
            if slope is not None:
                exponentials.mul_(slope)
            expected.index_add_(0, rows, exponentials @ weight)
    return Refined(mass, expected, maximum)


def live_rows(rows: Tensor, counts: Tensor) -> list[tuple[int, Tensor]]:
    """``(tile, its live rows)`` for every tile that has any."""
    parts = rows.split(counts.tolist())
    return [(tile, part) for tile, part in enumerate(parts) if len(part)]
