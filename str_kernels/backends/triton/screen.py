"""The screen computes the log-mass of every (row, tile) pair.

Stage: ``Block`` → ``TileMasses``. Logits stay in registers. The operands are those of the head, or
have 8 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.operands import GROUP, Operands, common, operands, tuning
from str_kernels.backends.triton.quantise import quantised
from str_kernels.backends.triton.tiles import (
    ABSENT,
    LOWEST,
    TILE,
    all_absent,
    finish_logits,
    grouped,
    products,
    rows_at,
    softcap_slope,
)
from str_kernels.engine.contract import Block, TileMasses
from str_kernels.engine.logits import columns_of
from str_kernels.quantise import ALIGNED

LOG2_E = tl.constexpr(math.log2(math.e))

POINTERS = {
    "i64": ("order",),
    "i32": ("label",),
    "fp32": ("hidden_scale", "weight_scale", "anchor", "log_mass", "slope"),
}


@triton.jit
def screen_kernel(
    hidden_ptr,
    hidden_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    order_ptr,
    bias_ptr,
    anchor_ptr,
    label_ptr,
    log_mass_ptr,
    slope_ptr,
    rows,
    stride,
    vocab,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program takes BLOCK_R rows × one tile and alone writes ``log_mass`` and ``slope`` there.

    In: ``hidden [R, D]`` fp or int8, ``hidden_scale [R]`` fp32 or None, ``weight [V, D]`` (through
    the order, or already in tile order), ``weight_scale [V]`` fp32 in tile order or None, ``order
    [V]`` int64 or None, ``bias [V]`` in tile order or None, ``anchor [R]`` fp32, ``label [R]``
    int32, or None where no row is absent. Out: ``log_mass [T, R]`` fp32, its tiles ``stride``
    numbers apart, relative to the anchor; ``slope [T, R]`` fp32, the tile's softmax mean of the
    softcap's derivative, or None. Absent rows are not written.
    """
    block, tile = grouped(rows, tl.cdiv(vocab, TILE), BLOCK_R, GROUP)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    if all_absent(label_ptr, row, rows):
        return
    position = tile * TILE + tl.arange(0, TILE)
    total = products(
        hidden_ptr,
        tl.minimum(row, rows - 1),
        weight_ptr,
        rows_at(order_ptr, position, vocab),
        dim,
        precision,
        BLOCK_D,
    ).to(tl.float32)
    inside = position < vocab
    of_row, of_word = tl.full([BLOCK_R], 1.0, tl.float32), tl.full([TILE], 1.0, tl.float32)
    if hidden_scale_ptr is not None:
        of_row = tl.load(hidden_scale_ptr + row, mask=row < rows, other=0.0)
        of_word = tl.load(weight_scale_ptr + position, mask=inside, other=0.0)
    if softcap is None and bias_ptr is None:
        # a row's scale is positive, so that the largest logit is found without it
        z = total * (of_word * logit_scale)[None, :]
        if (tile + 1) * TILE > vocab:
            z = tl.where(inside[None, :], z, float("-inf"))
        top = tl.maximum(tl.max(z, 1), LOWEST)
        p = tl.exp2((z - top[:, None]) * (of_row * LOG2_E)[:, None])
        top *= of_row
    else:
        total *= of_row[:, None] * of_word[None, :]
        z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
        top = tl.maximum(tl.max(z, 1), LOWEST)
        p = tl.exp(z - top[:, None])
    mass = tl.sum(p, 1)
    out = tile.to(tl.int64) * stride + row
    anchor = tl.load(anchor_ptr + row, mask=row < rows, other=0.0)
    here = row < rows
    if label_ptr is not None:
        here &= tl.load(label_ptr + row, mask=here, other=ABSENT) != ABSENT
    tl.store(log_mass_ptr + out, (top - anchor) + tl.log(mass), mask=here)
    if slope_ptr is not None:
        slope = tl.sum(p * softcap_slope(z, softcap), 1) / tl.maximum(mass, 1e-30)
        tl.store(slope_ptr + out, slope, mask=here)


class _Scales(NamedTuple):
    """The scales of 8-bit operands: ``hidden [R]`` and ``weight [V]``."""

    hidden: Tensor | None = None
    weight: Tensor | None = None


def screen_tiles(block: Block, launch: Launch) -> TileMasses:
    """Screen with the operands' own dtype; W is cast to that of H."""
    given = operands(block)
    found = _empty_masses(block, given)
    _screen(given, _Scales(), found, launch)
    return _by_rows(found)


def screen_again(block: Block, masses: TileMasses, launch: Launch) -> None:
    """Screen the rows that are not absent once more, with the operands' own dtype, in place."""
    found = TileMasses(*(None if x is None else x.T for x in masses[:2]), masses.anchor)
    _screen(operands(block), _Scales(), found, launch)


def screen_quantised(
    block: Block, launch: Launch, dtype: torch.dtype, byte_budget: int
) -> TileMasses:
    """Screen with 8-bit operands.

    The rows of W are those that an index has quantised, or are quantised here, as many tiles at a
    time as the budget holds; then rows begin at multiples of 16 bytes, which wide loads need.
    """
    given, tiles = operands(block), block.tiles
    found, columns = _empty_masses(block, given), tiles.columns
    inverse = None if columns is None else columns.reciprocal()
    known = tiles.quantised is not None and tiles.quantised.dtype == dtype
    width = tiles.quantised.shape[1] if known else -(-given.dim // ALIGNED) * ALIGNED
    hidden, scale = quantised(given.hidden, dtype, columns=inverse, width=width)
    if known:
        kept = given._replace(hidden=hidden, weight=tiles.quantised.contiguous(), order=None)
        _screen(kept, _Scales(scale, tiles.row_scales), found, launch)
        return _by_rows(found)
    step = max(1, byte_budget // (TILE.value * width))
    for first in range(0, given.tiles, step):
        places = range(first * TILE.value, min((first + step) * TILE.value, given.vocab))
        weight, scales = quantised(
            given.weight, dtype, order=given.order, places=places, columns=columns, width=width
        )
        bias = None if given.bias is None else given.bias[places.start : places.stop]
        part = given._replace(hidden=hidden, weight=weight, order=None, bias=bias)
        here = TileMasses(
            *(None if x is None else x[first : first + step] for x in found[:2]), found.anchor
        )
        _screen(part, _Scales(scale, scales), here, launch)
    return _by_rows(found)


def _empty_masses(block: Block, given: Operands) -> TileMasses:
    """Allocate log-masses and slopes, ``[T, R]`` both; without a softcap there are no slopes."""
    log_mass = given.hidden.new_empty(given.tiles, given.rows, dtype=torch.float32)
    slope = None if given.options.softcap is None else torch.empty_like(log_mass)
    return TileMasses(log_mass, slope, columns_of(block).anchor)


def _by_rows(found: TileMasses) -> TileMasses:
    log_mass, slope, anchor = found
    return TileMasses(log_mass.T, None if slope is None else slope.T, anchor)


def _screen(given: Operands, scales: _Scales, found: TileMasses, launch: Launch) -> None:
    screen_kernel[(-(-given.rows // launch.block_r) * given.tiles,)](
        given.hidden,
        scales.hidden,
        given.weight,
        scales.weight,
        given.order,
        given.bias,
        found.anchor,
        given.places,
        found.log_mass,
        found.slope,
        given.rows,
        found.log_mass.stride(0),
        **common(given),
        GROUP=GROUP,
        **tuning(launch, "RD"),
    )
