"""Finish turns the sums of the stages into ``Dense``.

Stage: ``TileMasses``, ``Worklist``, ``Refined``, or the sums of an exact pass → ``Dense``. A
dead pair adds its screened mass to the log-sum-exp, and ``mass · mean row of its tile`` to the
gradient, as one ``[R, T] @ [T, D]`` product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.engine.contract import (
    Block,
    Dense,
    OpenRows,
    Refined,
    Statistics,
    TileMasses,
    Wanted,
    Worklist,
)
from str_kernels.engine.logits import label_logits
from str_kernels.engine.products import dead_product
from str_kernels.options import TILE


def join_pairs(
    block: Block, masses: TileMasses, work: Worklist, refined: Refined, wanted: Wanted
) -> Dense:
    """Return ``Dense`` of R rows after routing."""
    head, labels, tiles, options = block
    label_logit = label_logits(head, labels, options)
    dead = work.dead.sum(-1)
    others = refined.mass + dead
    of_label = torch.where(labels < 0, 0.0, torch.exp(label_logit - work.shift))
    lse = work.shift + torch.log(others + of_label)
    rescale = torch.exp(work.shift - lse)
    opened = None
    if wanted.hidden:
        share = work.dead if masses.slope is None else work.dead * masses.slope
        dead_part = dead_product(share, tiles.mean_rows, head.hidden_states.dtype)
        opened = OpenRows(refined.expected, dead_part, options.logit_scale * rescale)
    kept_masses, live = None, work.live()
    if wanted.masses:
        kept_masses = torch.where(live, -1.0, work.dead * rescale[:, None])
    logit_sum, smooth_gradient = _whole_sums(block)
    return Dense(
        statistics=Statistics(
            lse=lse,
            correct=label_logit >= refined.maximum,
            dead_mass=dead * rescale,
            live_share=live.mean(-1, dtype=lse.dtype),
            entropy=None,
        ),
        label_logit=label_logit,
        open_mass=others * rescale,
        opened=opened,
        logit_sum=logit_sum,
        smooth_gradient=smooth_gradient,
        masses=kept_masses,
        slope=masses.slope if wanted.masses else None,
    )


def join_sums(
    block: Block,
    label_logit: Tensor,
    *,
    shift: Tensor,
    mass: Tensor,
    maximum: Tensor,
    expected: Tensor | None,
    weighted: Tensor | None,
    logit_sum: Tensor | None,
    smooth_gradient: Tensor | None,
) -> Dense:
    """Return ``Dense`` of an exact pass from sums that leave the label out.

    Relative to ``exp(shift)``, ``mass [R]`` is Σ exp(z), ``expected [R, D]`` Σ exp(z) · slope · w
    and ``weighted [R]`` Σ exp(z) · z; ``maximum [R]`` is the largest logit. The last two arguments
    go into ``Dense`` unchanged.
    """
    labelled = block.labels >= 0
    others = shift + mass.log()
    lse = torch.where(labelled, torch.logaddexp(others, label_logit), others)
    rescale = torch.exp(shift - lse)
    opened = None
    if expected is not None:
        opened = OpenRows(expected, None, block.options.logit_scale * rescale)
    entropy = None
    if weighted is not None:
        of_label = torch.where(labelled, torch.exp(label_logit - lse) * label_logit, 0.0)
        entropy = lse - weighted * rescale - of_label
    return Dense(
        statistics=Statistics(
            lse=lse,
            correct=label_logit >= maximum,
            dead_mass=torch.zeros_like(lse),
            live_share=torch.ones_like(lse),
            entropy=entropy,
        ),
        label_logit=label_logit,
        open_mass=mass * rescale,
        opened=opened,
        logit_sum=logit_sum,
        smooth_gradient=smooth_gradient,
    )


def _whole_sums(block: Block) -> tuple[Tensor | None, Tensor | None]:
    """``Σ_v z [R]`` and its gradient ``[D]``; without a softcap both come from one column sum."""
    head, _, tiles, options = block
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
