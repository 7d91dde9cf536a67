"""The gradient ``dz`` by the logits of some tiles' live pairs, which a trainable weight needs.

Stage: ``Saved``, ``Coefficients`` → ``dz [C, R, TILE]``. After routing ``live_kernel`` lists the
live rows of each tile, and ``logit_gradient_kernel`` computes the logits of these rows alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import SCAN, Launch
from str_kernels.backends.triton.operands import GROUP, Operands, common, tuning
from str_kernels.backends.triton.tiles import (
    TILE,
    all_absent,
    finish_logits,
    grouped,
    products,
    rows_at,
    softcap_slope,
)
from str_kernels.engine.contract import Coefficients, Saved
from str_kernels.engine.dead import silent_rows
from str_kernels.engine.rows import factor_of_logits

POINTERS = {
    "i64": ("order",),
    "i32": ("list", "count", "label"),
    "fp32": ("masses", "coefficient"),
}


@triton.jit
def live_kernel(
    masses_ptr,
    list_ptr,
    count_ptr,
    rows,
    first_tile,
    row_stride,
    tile_stride,
    BLOCK: tl.constexpr,
):
    """One program alone writes list and count of one of the C tiles from ``first_tile`` on.

    In: ``masses [R, T]`` fp32 with its strides, negative on live pairs. Out: ``list [C, R]`` int32,
    of which the first ``count [C]`` int32 entries are the tile's live rows, ascending.
    """
    slot, count = tl.program_id(0), 0
    column = (first_tile + slot).to(tl.int64) * tile_stride
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place = row.to(tl.int64) * row_stride + column
        live = tl.load(masses_ptr + place, mask=row < rows, other=0.0) < 0
        chosen = live.to(tl.int32)
        out = slot.to(tl.int64) * rows + count + tl.cumsum(chosen, 0) - 1
        tl.store(list_ptr + out, row, mask=live)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + slot, count)


@triton.jit
def logit_gradient_kernel(
    hidden_ptr,
    weight_ptr,
    order_ptr,
    bias_ptr,
    list_ptr,
    count_ptr,
    coefficient_ptr,
    label_ptr,
    dz_ptr,
    rows,
    vocab,
    first_tile,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program takes BLOCK_R listed rows × one of the C tiles from ``first_tile`` on.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``order [V]`` int64 or None, ``bias [V]`` in tile
    order or None, ``list [C, R]`` and ``count [C]`` int32 (None: every row), ``coefficient [4, R]``
    fp32 (lse, α, the label's dz, σ), ``label [R]`` int32. Out: ``dz [C, R, TILE]`` in the dtype of
    H, by ``H Wᵀ + b``, entry i for the tile's i-th listed row; a program alone writes its entries.
    """
    tiles = tl.num_programs(0) // tl.cdiv(rows, BLOCK_R)
    block, slot = grouped(rows, tiles, BLOCK_R, GROUP)
    base = slot.to(tl.int64) * rows
    place = block * BLOCK_R + tl.arange(0, BLOCK_R)
    count = rows if count_ptr is None else tl.load(count_ptr + slot)
    live = place < count
    column = tl.arange(0, TILE)
    out = dz_ptr + (base + place)[:, None] * TILE + column[None, :]
    if all_absent(label_ptr if list_ptr is None else None, place, rows):
        zero = tl.zeros([BLOCK_R, TILE], dz_ptr.dtype.element_ty)
        tl.store(out, zero, mask=live[:, None])
    elif block * BLOCK_R < count:
        row = place if list_ptr is None else tl.load(list_ptr + base + place, mask=live, other=0)
        row = tl.minimum(row, rows - 1)
        position = (first_tile + slot) * TILE + column
        weight_row = rows_at(order_ptr, position, vocab)
        total = products(hidden_ptr, row, weight_ptr, weight_row, dim, precision, BLOCK_D)
        z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
        lse = tl.load(coefficient_ptr + row)[:, None]
        alpha = tl.load(coefficient_ptr + rows + row)[:, None]
        at_label = tl.load(coefficient_ptr + 2 * rows + row)[:, None]
        # a row without an upstream gradient adds nothing, whatever its logits are
        z = tl.where((alpha == 0.0) & (at_label == 0.0), 0.0, z)
        dz = alpha * tl.exp(z - lse)
        label = tl.load(label_ptr + row)
        dz = tl.where(label[:, None] == position[None, :], at_label, dz)
        dz -= tl.load(coefficient_ptr + 3 * rows + row)[:, None]
        if softcap is not None:
            dz *= softcap_slope(z, softcap)
        dz = tl.where((position < vocab)[None, :], dz * logit_scale, 0.0)
        tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=live[:, None])


class Lists(NamedTuple):
    """The live rows of C tiles, ``rows [C, R]`` and ``counts [C]`` int32; None if every row is."""

    rows: Tensor | None
    counts: Tensor | None


class Rows(NamedTuple):
    """The operands, each row's ``label [R]`` int32, and the ``packed`` coefficients ``[4, R]``."""

    given: Operands
    label: Tensor
    coefficients: Tensor


def list_live(masses: Tensor | None, tiles: range) -> Lists:
    """List the live rows of these tiles; every row is live without ``masses [R, T]``."""
    if masses is None:
        return Lists(None, None)
    rows = torch.empty(len(tiles), len(masses), dtype=torch.int32, device=masses.device)
    counts = torch.empty(len(tiles), dtype=torch.int32, device=masses.device)
    live_kernel[(len(tiles),)](
        masses, rows, counts, len(masses), tiles.start, *masses.stride(), **SCAN
    )
    return Lists(rows, counts)


def logit_gradients(rows: Rows, lists: Lists, tiles: range, launch: Launch) -> Tensor:
    """Return ``dz [C, R, TILE]``, of which only the entries of listed rows are written."""
    given = rows.given
    dz = given.hidden.new_empty(len(tiles), given.rows, TILE.value)
    logit_gradient_kernel[(-(-given.rows // launch.block_r) * len(tiles),)](
        given.hidden,
        given.weight,
        given.order,
        given.bias,
        *lists,
        rows.coefficients,
        rows.label,
        dz,
        given.rows,
        first_tile=tiles.start,
        **common(given),
        GROUP=GROUP,
        **tuning(launch, "RD"),
    )
    return dz


def packed(coefficients: Coefficients, saved: Saved) -> tuple[Tensor, Tensor]:
    """Stack lse, α, the label's dz and σ to ``[4, R]``; the last three are divided by a scale.

    The scale ``[1]``, that of the largest row, is returned too. Without it fp16 would lose a mean
    over a long batch, whose gradients are about as small as fp16's smallest number, 6e-8.
    """
    alpha, gamma, sigma = coefficients
    of_logits = factor_of_logits(saved, coefficients)
    at_label = alpha - gamma - alpha * saved.open_mass
    packed = torch.stack(
        [saved.lse, of_logits, at_label, torch.zeros_like(alpha) if sigma is None else sigma]
    )
    packed.masked_fill_(silent_rows(coefficients), 0.0)
    # the other logits of a row have at most α · open mass together; NaN rows are ignored
    largest = torch.maximum(packed[2].abs(), (packed[1] * saved.open_mass).abs())
    largest = torch.nan_to_num(largest, nan=0.0, posinf=0.0)
    scale = torch.cat([largest, largest.new_zeros(1)]).amax(0, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    packed[1:] /= scale
    return packed, scale
