"""The gradient of a trainable weight and bias, some tiles at a time, without atomics.

Stage: ``Saved``, ``Coefficients`` → ``Gradients``. For each group of tiles its live rows are listed
(routed), ``dz`` of these rows is made again into a buffer, and one program owns each block of the
weight's gradient: it sums ``dzᵀ H`` in fp32, adds what the dead pairs and the constraint give, and
rounds once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.contract import Coefficients, Gradients, Head, SafetyTerm, Saved
from str_kernels.backends.dead import dead_share, silent_rows
from str_kernels.backends.triton import host
from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.tiles import (
    TILE,
    finish_logits,
    grouped,
    multiply,
    products,
    rows_at,
    softcap_slope,
)
from str_kernels.options import TILE as TILE_ROWS
from str_kernels.options import LossOptions

_GROUP = 8


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
    """One program: one of the C tiles from ``first_tile`` on; it alone writes its list and count.

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
    """One program: BLOCK_R listed rows × one of the C tiles from ``first_tile`` on.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``order [V]`` int64 or None, ``bias [V]`` in tile
    order or None, ``list [C, R]`` and ``count [C]`` int32 (None: every row), ``coefficient [4, R]``
    fp32 (lse, α, the label's dz, σ), ``label [R]`` int32. Out: ``dz [C, R, TILE]`` in the dtype of
    H, by ``H Wᵀ + b``, entry i for the tile's i-th listed row; each program writes its own entries.
    """
    tiles = tl.num_programs(0) // tl.cdiv(rows, BLOCK_R)
    block, slot = grouped(rows, tiles, BLOCK_R, GROUP)
    base = slot.to(tl.int64) * rows
    place = block * BLOCK_R + tl.arange(0, BLOCK_R)
    count = rows if count_ptr is None else tl.load(count_ptr + slot)
    if block * BLOCK_R < count:
        live = place < count
        row = place if list_ptr is None else tl.load(list_ptr + base + place, mask=live, other=0)
        row = tl.minimum(row, rows - 1)
        column = tl.arange(0, TILE)
        position = (first_tile + slot) * TILE + column
        weight_row = rows_at(order_ptr, position, vocab)
        total = products(hidden_ptr, row, weight_ptr, weight_row, dim, precision, BLOCK_D)
        z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
        lse = tl.load(coefficient_ptr + row)[:, None]
        alpha = tl.load(coefficient_ptr + rows + row)[:, None]
        at_label = tl.load(coefficient_ptr + 2 * rows + row)[:, None]
        # a silent row adds nothing, whatever its logits are
        z = tl.where((alpha == 0.0) & (at_label == 0.0), 0.0, z)
        dz = alpha * tl.exp(z - lse)
        label = tl.load(label_ptr + row)
        dz = tl.where(label[:, None] == position[None, :], at_label, dz)
        dz -= tl.load(coefficient_ptr + 3 * rows + row)[:, None]
        if softcap is not None:
            dz *= softcap_slope(z, softcap)
        dz = tl.where((position < vocab)[None, :], dz * logit_scale, 0.0)
        out = dz_ptr + (base + place)[:, None] * TILE + column[None, :]
        tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def weight_kernel(
    hidden_ptr,
    dz_ptr,
    list_ptr,
    count_ptr,
    order_ptr,
    scale_ptr,
    spread_ptr,
    safety_slot_ptr,
    safety_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    rows,
    vocab,
    first_tile,
    dim: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: one of the C tiles from ``first_tile`` on × BLOCK_E columns, its own to write.

    In: ``hidden [R, D]``, ``dz [C, R, TILE]``, ``list [C, R]`` and ``count [C]`` int32 or None,
    ``order [V]`` int64 or None, ``scale [1]`` fp32 what dz is multiplied by, ``spread [T, D]`` fp32
    or None, ``safety_slot [V]`` int32 in tile order (-1: none) or None, ``safety [K, D]`` fp32.
    Out: ``weight_grad [V, D]`` or None; ``bias_grad [V]`` fp32 in tile order, of dz alone, or None.
    """
    wide = tl.cdiv(dim, BLOCK_E)
    slot, block = tl.program_id(0) // wide, tl.program_id(0) % wide
    along, column = block * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, TILE)
    within = (along < dim)[None, :]
    base, tile = slot.to(tl.int64) * rows, first_tile + slot
    count = rows if count_ptr is None else tl.load(count_ptr + slot)
    total, bias = tl.zeros([TILE, BLOCK_E], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, count, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        live = place < count
        row = place if list_ptr is None else tl.load(list_ptr + base + place, mask=live, other=0)
        there = dz_ptr + (base + place)[None, :] * TILE + column[:, None]
        dz = tl.load(there, mask=live[None, :], other=0.0)
        if bias_grad_ptr is not None:
            bias += tl.sum(dz.to(tl.float32), 1)
        if weight_grad_ptr is not None:
            hidden = hidden_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
            h = tl.load(hidden, mask=live[:, None] & within, other=0.0)
            total = multiply(dz, h, total, precision)
    position, scale = tile * TILE + column, tl.load(scale_ptr)
    inside = position < vocab
    if bias_grad_ptr is not None:
        first = position < tl.where(block == 0, vocab, 0)  # one of the tile's programs writes it
        tl.store(bias_grad_ptr + position, bias * scale, mask=first)
    if weight_grad_ptr is not None:
        total *= scale
        if spread_ptr is not None:
            spread = spread_ptr + tile.to(tl.int64) * dim + along
            total += tl.load(spread, mask=along < dim, other=0.0)[None, :]
        if safety_slot_ptr is not None:
            token = tl.load(safety_slot_ptr + position, mask=inside, other=-1)
            mask = (token >= 0)[:, None] & within
            safety = safety_ptr + token.to(tl.int64)[:, None] * dim + along[None, :]
            total += tl.load(safety, mask=mask, other=0.0)
        out = weight_grad_ptr + rows_at(order_ptr, position, vocab)[:, None] * dim + along[None, :]
        tl.store(out, total.to(weight_grad_ptr.dtype.element_ty), mask=inside[:, None] & within)


class _Lists(NamedTuple):
    """Live rows of C tiles: ``rows [C, R]``, ``counts [C]`` int32, or None for every row."""

    rows: Tensor | None
    counts: Tensor | None


def weight_gradients(
    head: Head,
    labels: Tensor,
    saved: Saved,
    coefficients: Coefficients,
    safety: SafetyTerm | None,
    options: LossOptions,
    needs: tuple[bool, bool],
    launches: tuple[Launch, Launch],
    byte_budget: int,
) -> Gradients:
    """Gradients of R rows with labels ``[R]``, -1 where there is none; see ``Backend``."""
    routed = saved.masses is not None
    order, inverse = saved.tiles[:2] if routed else (None, None)
    given = host.operands(head, order)
    spread = dead_share(head, saved, coefficients, options) if routed else (None, None)
    sums = _Sums(given, host.label_places(labels, inverse), saved, coefficients, options, launches)
    weight = torch.empty_like(given.weight) if needs[0] else None
    bias = torch.zeros(given.vocab, device=given.hidden.device) if needs[1] else None
    slots = _safety_slots(safety, inverse, given.vocab)
    one = max(1, given.rows) * (TILE_ROWS * given.hidden.element_size() + 4)
    step = max(1, byte_budget // one)
    for first in range(0, given.tiles, step):
        tiles = min(step, given.tiles - first)
        lists = sums.list_live(first, tiles)
        dz = sums.logit_gradients(lists, first, tiles)
        sums.multiply(lists, dz, (spread[0], slots, safety), (weight, bias), first, tiles)
    if bias is not None:
        bias = _finish_bias(bias, spread[1], order, safety).to(head.bias.dtype)
    return Gradients(weight, bias)


class _Sums:
    """What every group of tiles is made from."""

    def __init__(
        self,
        given: host.Operands,
        label: Tensor,
        saved: Saved,
        coefficients: Coefficients,
        options: LossOptions,
        launches: tuple[Launch, Launch],
    ) -> None:
        self.given, self.label, self.masses = given, label, saved.masses
        self.options, self.launches = options, launches
        self.coefficients, self.scale = _packed(coefficients, saved)

    def list_live(self, first: int, tiles: int) -> _Lists:
        """The live rows of ``tiles`` tiles from tile ``first`` on."""
        if self.masses is None:
            return _Lists(None, None)
        rows = self.label.new_empty(tiles, self.given.rows)
        counts = self.label.new_empty(tiles)
        strides = self.masses.stride()
        live_kernel[(tiles,)](
            self.masses, rows, counts, self.given.rows, first, *strides, BLOCK=1024
        )
        return _Lists(rows, counts)

    def logit_gradients(self, lists: _Lists, first: int, tiles: int) -> Tensor:
        """``dz [C, R, TILE]``, the entries of listed rows."""
        given, launch = self.given, self.launches[0]
        dz = given.hidden.new_empty(tiles, given.rows, TILE_ROWS)
        logit_gradient_kernel[(-(-given.rows // launch.block_r) * tiles,)](
            given.hidden,
            given.weight,
            given.order,
            given.bias,
            *lists,
            self.coefficients,
            self.label,
            dz,
            given.rows,
            first_tile=first,
            **host.common(given, self.options),
            BLOCK_R=launch.block_r,
            BLOCK_D=launch.block_d,
            GROUP=_GROUP,
            **host.tuning(launch),
        )
        return dz

    def multiply(
        self,
        lists: _Lists,
        dz: Tensor,
        extra: tuple[Tensor | None, Tensor | None, SafetyTerm | None],
        results: tuple[Tensor | None, Tensor | None],
        first: int,
        tiles: int,
    ) -> None:
        """Write the group's rows of both gradients."""
        given, launch = self.given, self.launches[1]
        spread, slots, safety = extra
        wide = 1 if results[0] is None else -(-given.dim // launch.block_e)
        weight_kernel[(tiles * wide,)](
            given.hidden,
            dz,
            *lists,
            given.order,
            self.scale,
            spread,
            slots,
            None if safety is None else safety.weight,
            *results,
            given.rows,
            given.vocab,
            first,
            given.dim,
            given.precision,
            BLOCK_R=launch.block_r,
            BLOCK_E=launch.block_e,
            **host.tuning(launch),
        )


def _packed(coefficients: Coefficients, saved: Saved) -> tuple[Tensor, Tensor]:
    """``[4, R]`` lse, α, the label's dz, σ, divided by the scale ``[1]`` that is also returned.

    Scaled to the largest row, since fp16 ends at 6e-8 and a mean over a long batch begins there.
    """
    alpha, gamma, sigma = coefficients
    at_label = alpha - gamma - alpha * saved.open_mass
    packed = torch.stack(
        [saved.lse, alpha, at_label, torch.zeros_like(alpha) if sigma is None else sigma]
    )
    packed.masked_fill_(silent_rows(coefficients), 0.0)
    # others of a row have at most α · open mass between them; NaN rows shall not decide
    largest = torch.maximum(packed[2].abs(), (packed[1] * saved.open_mass).abs())
    largest = torch.nan_to_num(largest, nan=0.0, posinf=0.0)
    scale = torch.cat([largest, largest.new_zeros(1)]).amax(0, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    packed[1:] /= scale
    return packed, scale


def _safety_slots(safety: SafetyTerm | None, inverse: Tensor | None, vocab: int) -> Tensor | None:
    """``[V]`` int32: which safety token stands at a place of the order, -1 for none."""
    if safety is None:
        return None
    slots = torch.full((vocab,), -1, dtype=torch.int32, device=safety.ids.device)
    places = safety.ids if inverse is None else inverse[safety.ids]
    slots[places] = torch.arange(len(places), dtype=torch.int32, device=slots.device)
    return slots


def _finish_bias(
    bias: Tensor, spread: Tensor | None, order: Tensor | None, safety: SafetyTerm | None
) -> Tensor:
    """Add the dead pairs' and the constraint's part; from tile order to token order, ``[V]``."""
    if spread is not None:
        bias = bias + spread.repeat_interleave(TILE_ROWS)[: len(bias)]
    if order is not None:
        bias = torch.empty_like(bias).index_copy_(0, order, bias)
    if safety is not None:
        bias.index_add_(0, safety.ids, safety.bias)
    return bias
