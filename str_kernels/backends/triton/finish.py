"""The row arithmetic between the sums over the vocabulary and the row gradients, in one kernel.

Stage: ``RowSums`` → ``Joined``; ``engine.finish`` and ``engine.rows`` state the formulas. Every
difference of logits is taken before a sum is added to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.engine.contract import Block, Factors, Joined, RowSums, Statistics

_ROUNDED = ("exact", "kept")
POINTERS = {
    "i64": ("label",),
    "i1": ("correct",),
    "fp32": (
        "label_logit",
        "shift",
        "mass",
        "maximum",
        "dead",
        "weighted",
        "logit_sum",
        *_ROUNDED,
        "out",
    ),
}
# Rows of a program, and tiles that it adds up at once.
FINISH = {"BLOCK_R": 32, "TILES": 32}
_RESULTS = ("lse", "lse_rest", "dead_mass", "live_share", "entropy", "surprise", "open_mass")
_RESULTS += ("rescale", "scale", *Factors._fields)


@triton.jit
def exact_exp(x):
    """Return exp(x) within two roundings, where the device's own loses digits of a large x."""
    x = tl.where(tl.abs(x) > 150.0, tl.where(x > 0.0, 150.0, -150.0), x)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # ln 2 in two parts
    return tl.exp(rest) * tl.exp2(whole)


@triton.jit
def log_one_plus(x):
    """Return log(1 + x) for x in [0, 1], exact relative to itself."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0 + q * (1.0 / 17.0)))
    series = 1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * series))
    return 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * series))


@triton.jit
def log_add_exp(a, b):
    """Return log(eᵃ + eᵇ), of infinite ones too."""
    apart = tl.where(a == b, 0.0, tl.abs(a - b))
    return tl.where(a > b, a, b) + log_one_plus(exact_exp(-apart))


@triton.jit
def finish_kernel(
    label_ptr,
    label_logit_ptr,
    shift_ptr,
    mass_ptr,
    maximum_ptr,
    dead_ptr,
    weighted_ptr,
    logit_sum_ptr,
    exact_ptr,
    kept_ptr,
    correct_ptr,
    out_ptr,
    rows,
    tiles,
    dead_row,
    dead_tile,
    logit_scale,
    z_loss,
    smoothing,
    smoothing_share,
    softcap: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program takes BLOCK_R rows.

    In: ``label [R]`` int64, negative where there is none, and, all fp32, ``label_logit [R]``,
    ``shift [R]``, ``mass [R]``, ``maximum [R]``, ``dead [R, T]`` with two strides, ``weighted [R]``
    and ``logit_sum [R]``, the last three or None, ``exact [R]`` and ``kept [R]`` or both None;
    ``smoothing_share`` is ε/V. Out: ``correct [R]`` bool, ``out [13, R]`` fp32 in the order of
    ``_RESULTS``.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    labelled = tl.load(label_ptr + row, mask=inside, other=-1) >= 0
    label_logit = tl.load(label_logit_ptr + row, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
    mass = tl.load(mass_ptr + row, mask=inside, other=0.0)
    maximum = tl.load(maximum_ptr + row, mask=inside, other=0.0)
    dead, live = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    if dead_ptr is not None:
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            at = row.to(tl.int64)[None, :] * dead_row + tile.to(tl.int64)[:, None] * dead_tile
            its = tl.load(dead_ptr + at, mask=inside[None, :] & (tile < tiles)[:, None], other=0.0)
            dead += tl.sum(its, 0)
            is_live = (its.to(tl.int32, bitcast=True) < 0) & (its == 0.0)  # -0.0
            live += tl.sum(is_live.to(tl.float32), 0)
        live = live / tiles
    else:
        live += 1.0
    all_others = mass + dead
    # a row whose only token is the label has no other logit to be relative to
    shift = tl.where(labelled & (all_others == 0.0), label_logit, shift)
    others, gap = tl.log(all_others), label_logit - shift
    log_sum = tl.where(labelled, log_add_exp(others, gap), others)
    surprise = log_add_exp(others - gap, tl.zeros([BLOCK_R], tl.float32))
    # the larger of both is taken out, so that what is left is small
    highest = tl.where(gap > 0.0, label_logit, shift)
    above = tl.where(gap > 0.0, surprise, log_sum)
    lse = highest + above
    rest = tl.where(tl.abs(lse) < float("inf"), (highest - lse) + above, 0.0)
    surprise = tl.where(label_logit == float("inf"), float("nan"), surprise)
    rescale = exact_exp(-log_sum)
    open_mass = all_others * rescale
    loss = surprise
    if z_loss != 0.0:
        loss += z_loss * lse * lse
    if logit_sum_ptr is not None:
        loss -= smoothing_share * tl.load(logit_sum_ptr + row, mask=inside, other=0.0)
    loss = tl.where(label_logit == label_logit, loss, float("nan"))
    slope = tl.full([BLOCK_R], 1.0, tl.float32) * logit_scale
    if softcap is not None:
        share = label_logit * (1.0 / softcap)
        slope *= 1.0 - share * share
    slope = tl.where(labelled, slope, 0.0)
    alpha = 1.0 + 2.0 * z_loss * lse
    scale = logit_scale * rescale
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + row, mask=inside, other=0.0)
        exact = tl.load(exact_ptr + row, mask=inside, other=0.0)
        scale *= tl.where(kept > 0.0, exact / kept, 1.0)
    out = out_ptr + row
    tl.store(out, lse, mask=inside)
    tl.store(out + rows, rest, mask=inside)
    tl.store(out + 2 * rows, dead * rescale, mask=inside)
    tl.store(out + 3 * rows, live, mask=inside)
    if weighted_ptr is not None:
        # Σ p (-log p): no term is negative, so that none cancels
        weighted = tl.load(weighted_ptr + row, mask=inside, other=0.0)
        entropy = (mass * log_sum - weighted) * rescale
        entropy += tl.where(labelled, exact_exp(-surprise) * surprise, 0.0)
        tl.store(out + 4 * rows, entropy, mask=inside)
    tl.store(out + 5 * rows, surprise, mask=inside)
    tl.store(out + 6 * rows, open_mass, mask=inside)
    tl.store(out + 7 * rows, rescale, mask=inside)
    tl.store(out + 8 * rows, scale, mask=inside)
    tl.store(out + 9 * rows, loss, mask=inside)
    tl.store(out + 10 * rows, alpha * scale, mask=inside)
    of_label = slope * ((alpha - (1.0 - smoothing)) - alpha * open_mass)
    tl.store(out + 11 * rows, of_label, mask=inside)
    tl.store(out + 12 * rows, slope * (1.0 - open_mass), mask=inside)
    tl.store(correct_ptr + row, label_logit >= maximum, mask=inside)


def join_rows(block: Block, label_logit: Tensor, sums: RowSums) -> Joined:
    """Return all that follows from a row's sums."""
    options, rows, dead = block.options, len(sums.mass), sums.dead
    correct = torch.empty(rows, dtype=torch.bool, device=sums.mass.device)
    out = sums.mass.new_empty(len(_RESULTS), rows)
    strides = (0, 0) if dead is None else dead.stride()
    finish_kernel[(-(-rows // FINISH["BLOCK_R"]),)](
        block.labels,
        label_logit,
        sums.shift.contiguous(),
        sums.mass.contiguous(),
        sums.maximum.contiguous(),
        dead,
        sums.weighted,
        sums.logit_sum,
        sums.exact,
        sums.kept,
        correct,
        out,
        rows,
        0 if dead is None else dead.shape[1],
        *strides,
        float(options.logit_scale),
        float(options.z_loss),
        float(options.label_smoothing),
        options.label_smoothing / block.vocab,
        softcap=None if options.softcap is None else float(options.softcap),
        **FINISH,
        num_warps=4,
    )
    found = dict(zip(_RESULTS, out.unbind(), strict=True))
    factors = Factors(**{name: found.pop(name) for name in Factors._fields})
    rest = {name: found.pop(name) for name in ("surprise", "open_mass", "rescale", "scale")}
    if sums.weighted is None:
        found["entropy"] = None
    return Joined(Statistics(correct=correct, **found), **rest, factors=factors)
