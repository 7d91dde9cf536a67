"""Finish: join live and dead pairs into what a row knows of the vocabulary.

Stage: ``TileMasses``, ``Worklist``, ``Refined`` → ``Dense``. A dead pair adds its screened mass to
the log-sum-exp and ``mass · mean row of its tile`` to the gradient: one ``[R, T] @ [T, D]``
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.contract import Dense, Head, Refined, TileMasses, Tiles, Wanted, Worklist
from str_kernels.backends.logits import label_logits
from str_kernels.options import TILE, LossOptions


def join_pairs(
    head: Head,
    labels: Tensor,
    tiles: Tiles,
    masses: TileMasses,
    work: Worklist,
    refined: Refined,
    options: LossOptions,
    wanted: Wanted,
) -> Dense:
    """``Dense`` of R rows; ``labels [R]`` is -1 where there is none."""
    label_logit = label_logits(head, labels, options)
    dead = work.dead.sum(-1)
    others = refined.mass + dead
    of_label = torch.where(labels < 0, 0.0, torch.exp(label_logit - work.shift))
    lse = work.shift + torch.log(others + of_label)
    rescale = torch.exp(work.shift - lse)
    gradient = None
    if wanted.hidden:
        share = work.dead if masses.slope is None else work.dead * masses.slope
        gradient = torch.addmm(refined.expected, share, tiles.mean_rows.to(share.dtype))
        gradient.mul_((options.logit_scale * rescale)[:, None])
    kept_masses = None
    if wanted.masses:
        kept_masses = torch.where(_live_mask(work), -1.0, work.dead * rescale[:, None])
    logit_sum, smooth_gradient = _whole_sums(head, tiles, options)
    return Dense(
        lse=lse,
        label_logit=label_logit,
        correct=label_logit >= refined.maximum,
        dead_mass=dead * rescale,
        logit_sum=logit_sum,
        entropy=None,
        open_gradient=gradient,
        open_mass=others * rescale,
        smooth_gradient=smooth_gradient,
        masses=kept_masses,
        slope=masses.slope if wanted.masses else None,
    )


def _live_mask(work: Worklist) -> Tensor:
    """``[R, T]`` bool, from the tile-major list."""
    live = torch.zeros(work.dead.shape, dtype=torch.bool, device=work.dead.device)
    tile = torch.repeat_interleave(
        torch.arange(len(work.counts), device=live.device), work.counts, output_size=len(work.rows)
    )
    live[work.rows, tile] = True
    return live


def _whole_sums(
    head: Head, tiles: Tiles, options: LossOptions
) -> tuple[Tensor | None, Tensor | None]:
    """``Σ_v z [R]`` and its gradient ``[D]``: without a softcap both come from one column sum."""
    if not options.label_smoothing:
        return None, None
    vocab_size = head.weight.shape[0]
    sizes = torch.full_like(tiles.mean_rows[:, :1], TILE)
    sizes[-1] = vocab_size - TILE * (len(sizes) - 1)
    gradient = options.logit_scale * (tiles.mean_rows * sizes).sum(0)
    total = head.hidden_states.to(gradient.dtype) @ gradient
    if head.bias is not None:
        total = total + options.logit_scale * head.bias.sum(dtype=gradient.dtype)
    return total, gradient
