"""Finish turns the sums of the stages into ``Dense``.

Stage: ``TileMasses``, ``Worklist``, ``Refined``, or the sums of an exact pass → ``Dense``. A
dead pair adds its screened mass to the log-sum-exp, and ``mass · mean row of its tile`` to the
gradient, as one ``[R, T] @ [T, D]`` product.

Every difference of logits is taken before a sum is added to it: ``lse - z`` of large logits would
have their rounding, which may exceed the loss.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import (
    Block,
    Dense,
    Joined,
    OpenRows,
    Refined,
    RowSums,
    Statistics,
    TileMasses,
    Wanted,
    Worklist,
    live_pairs,
)
from str_kernels.engine.joins import Join, join_shards
from str_kernels.engine.logits import column_sum, columns_of
from str_kernels.engine.products import dead_product
from str_kernels.engine.rest import join_all, safety_logit_sum, safety_part


def join_rows(block: Block, label_logit: Tensor, sums: RowSums) -> Joined:
    """Implement `RowStages.join` in torch calls."""
    mass, dead = sums.mass, torch.zeros_like(sums.mass)
    live_share = torch.ones_like(mass)
    if sums.dead is not None:
        dead = sums.dead.sum(-1)
        live_share = live_pairs(sums.dead).mean(-1, dtype=mass.dtype)
    others = mass + dead
    found = _log_sums(block.labels, label_logit, sums.shift, others)
    rescale, entropy = torch.exp(-found.log_sum), None
    if sums.weighted is not None:
        # Σ p (-log p): no term is negative, so that none cancels
        of_label = torch.exp(-found.surprise) * found.surprise
        entropy = (mass * found.log_sum - sums.weighted) * rescale
        entropy = torch.where(block.labels >= 0, entropy + of_label, entropy)
    statistics = Statistics(
        lse=found.lse,
        lse_rest=found.lse_rest,
        correct=label_logit >= sums.maximum,
        dead_mass=dead * rescale,
        live_share=live_share,
        entropy=entropy,
    )
    scale = block.options.logit_scale * rescale
    if sums.kept is not None:
        scale = scale * torch.where(sums.kept > 0, sums.exact / sums.kept, 1.0)
    return Joined(statistics, found.surprise, others * rescale, rescale, scale)


def join_pairs(
    block: Block,
    masses: TileMasses,
    work: Worklist,
    refined: Refined,
    wanted: Wanted,
    join: Join = join_rows,
) -> Dense:
    """Return ``Dense`` of R rows after routing."""
    head, _, tiles, options = block[:4]
    columns, logit_sum, smooth_gradient = columns_of(block), None, None
    if options.label_smoothing:
        logit_sum = block.vocab * columns.difference
        smooth_gradient = options.logit_scale * column_sum(block)
    sums = RowSums(work.shift, refined.mass, refined.maximum, work.dead, None, logit_sum)
    joined = join_shards(block, columns.label, sums, partial(join_all, join)).joined
    opened = kept_masses = None
    if wanted.hidden:
        share = work.dead if masses.slope is None else work.dead * masses.slope
        dead_part = dead_product(share, tiles.mean_rows, head.hidden_states.dtype)
        opened = OpenRows(refined.expected, dead_part, joined.scale)
    if wanted.masses:
        kept_masses = torch.where(work.live(), -1.0, work.dead * joined.rescale[:, None])
    return Dense(
        statistics=joined.statistics,
        label_logit=columns.label,
        surprise=joined.surprise,
        open_mass=joined.open_mass,
        opened=opened,
        logit_sum=logit_sum,
        smooth_gradient=smooth_gradient,
        masses=kept_masses,
        slope=masses.slope if wanted.masses else None,
        factors=joined.factors,
        rest=joined.rest,
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
    exact: Tensor | None = None,
    kept: Tensor | None = None,
    join: Join = join_rows,
) -> Dense:
    """Return ``Dense`` of an exact pass from sums that leave the label out.

    ``mass [R]`` is Σ exp(z - shift), ``expected [R, D]`` Σ exp(z - shift) · slope · w and
    ``weighted [R]`` Σ exp(z - shift) · (z - shift); ``maximum [R]`` is the largest logit. The next
    two arguments go into ``Dense`` unchanged; the last but one are in `RowSums`; ``join`` is the
    backend's.
    """
    if block.options.leaves_out and logit_sum is not None:
        logit_sum = logit_sum + safety_logit_sum(block, label_logit)
        if smooth_gradient.dim() > 1:
            ones = torch.ones_like(block.columns.safety)
            smooth_gradient = smooth_gradient + safety_part(block, ones, smooth_gradient.dtype)
    sums = RowSums(shift, mass, maximum, None, weighted, logit_sum, exact, kept)
    joined, logit_sum, factor = join_shards(block, label_logit, sums, partial(join_all, join))
    opened, factors, rest = None, joined.factors, joined.rest
    if expected is not None:
        opened = OpenRows(expected, None, joined.scale)
    if factor is not None and opened is not None:
        opened = opened._replace(scale=opened.scale * factor)
        factors = factors and factors._replace(opened=factors.opened * factor)
        rest = rest and rest._replace(keep=factor if rest.keep is None else rest.keep * factor)
    return Dense(
        statistics=joined.statistics,
        label_logit=label_logit,
        surprise=joined.surprise,
        open_mass=joined.open_mass,
        opened=opened,
        logit_sum=logit_sum,
        smooth_gradient=smooth_gradient,
        factors=factors,
        rest=rest,
    )


class _LogSums(NamedTuple):
    """``log_sum [R]`` is ``lse - shift``; the others stand in ``Statistics`` and ``Dense``."""

    log_sum: Tensor
    lse: Tensor
    lse_rest: Tensor
    surprise: Tensor


def _log_sums(labels: Tensor, label_logit: Tensor, shift: Tensor, mass: Tensor) -> _LogSums:
    """Add the label to ``mass [R]``, Σ exp(z - shift) without it."""
    # a row whose only token is the label has no other logit to be relative to
    shift = torch.where((labels >= 0) & (mass == 0), label_logit, shift)
    others, gap = mass.log(), label_logit - shift
    log_sum = torch.where(labels < 0, others, torch.logaddexp(others, gap))
    surprise = torch.logaddexp(others - gap, torch.zeros_like(gap))
    # the larger of both is taken out, so that what is left is small
    highest = torch.where(gap > 0, label_logit, shift)
    above = torch.where(gap > 0, surprise, log_sum)
    lse = highest + above
    rest = torch.where(lse.isfinite(), (highest - lse) + above, 0.0)
    # -log(inf / inf)
    surprise = surprise.masked_fill(label_logit == float("inf"), float("nan"))
    return _LogSums(log_sum, lse, rest, surprise)
