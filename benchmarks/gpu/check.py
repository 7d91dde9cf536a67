"""Check a stage against plain fp32 on a few rows: a quick variant that is wrong is no variant."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.accuracy import relative_error, rms
from str_kernels.engine.contract import Block, Refined, TileMasses, Worklist
from str_kernels.options import TILE

_ROWS = 64
_PART = 1 << 15  # tokens at once


class Plain(NamedTuple):
    """The first rows' logits ``[S, V]`` fp32 in tile order, and where the tiles end."""

    logits: Tensor
    weight: Tensor  # [V, D], in tile order
    labels: Tensor  # [S], places in tile order


def plain_of(block: Block) -> Plain:
    """Multiply a few rows by the whole head in fp32."""
    head, order = block.head, block.tiles.order
    weight = head.weight if order is None else head.weight[order]
    hidden = head.hidden_states[:_ROWS].float()
    logits = torch.cat([hidden @ part.float().T for part in weight.split(_PART)], -1)
    labels = block.labels[: len(hidden)]
    return Plain(logits, weight, labels if order is None else block.tiles.inverse[labels])


def screen_error(plain: Plain, masses: TileMasses) -> dict[str, float]:
    """Return the errors of the tiles' log-masses, by their share, and of the log-sum-exp; nats."""
    rows = len(plain.logits)
    got = masses.log_mass[:rows] + masses.anchor[:rows, None]
    want = _by_tile(plain.logits).logsumexp(-1)
    lse = want.logsumexp(-1)
    shares = torch.exp(want - lse[:, None])
    by_share = (shares * (got - want).square()).sum(-1).mean().sqrt()
    return {"tile_error": by_share.item(), "lse_error": rms(got.logsumexp(-1) - lse)}


def refine_error(plain: Plain, work: Worklist, refined: Refined) -> dict[str, float]:
    """Return the relative errors of the live pairs' mass and of their expected embedding."""
    rows = len(plain.logits)
    live = work.live()[:rows].repeat_interleave(TILE, -1)[:, : plain.logits.shape[1]]
    p = torch.exp(plain.logits - work.shift[:rows, None]) * live
    p[torch.arange(rows, device=p.device), plain.labels] = 0.0
    want = torch.zeros_like(refined.expected[:rows])
    for start in range(0, len(plain.weight), _PART):
        part = slice(start, start + _PART)
        want += p[:, part] @ plain.weight[part].float()
    return {
        "mass_error": relative_error(refined.mass[:rows], p.sum(-1)),
        "expected_error": relative_error(refined.expected[:rows], want),
    }


def _by_tile(logits: Tensor) -> Tensor:
    short = -logits.shape[1] % TILE
    padded = torch.nn.functional.pad(logits, (0, short), value=float("-inf"))
    return padded.view(len(logits), -1, TILE)
