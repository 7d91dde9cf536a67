"""The gradient of a trainable weight and bias is computed some tiles at a time, without atomics.

Stage: ``Saved``, ``Coefficients`` → gradients. ``dz`` of a group of tiles is recomputed into a
buffer. One program owns each block of the weight's gradient: it sums ``dzᵀ H`` in fp32, adds what
the dead pairs and the constraint give, and rounds once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.logit_gradient import (
    Lists,
    Rows,
    list_live,
    logit_gradients,
    packed,
)
from str_kernels.backends.triton.operands import Operands, label_places, operands, tuning
from str_kernels.backends.triton.tiles import TILE, multiply, rows_at
from str_kernels.engine.contract import Block, Coefficients, SafetyTerm, Saved
from str_kernels.engine.dead import dead_share
from str_kernels.engine.tiles import positions_of

POINTERS = {
    "i64": ("order",),
    "i32": ("list", "count", "safety_slot"),
    "fp32": ("scale", "spread", "safety", "bias_grad"),
}


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
    """One program alone writes BLOCK_E columns of one of the C tiles from ``first_tile`` on.

    In: ``hidden [R, D]``, ``dz [C, R, TILE]``, ``list [C, R]`` and ``count [C]`` int32 or None,
    ``order [V]`` int64 or None, ``scale [1]`` fp32, the factor of dz, ``spread [T, D]`` fp32 or
    None, ``safety_slot [V]`` int32 in tile order (-1: none) or None, ``safety [K, D]`` fp32.
    Out: ``weight_grad [V, D]`` or None; ``bias_grad [V]`` fp32 in tile order, from dz alone, or
    None.
    """
    wide = 1 if weight_grad_ptr is None else tl.cdiv(dim, BLOCK_E)
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
        first = position < tl.where(block == 0, vocab, 0)  # one of the tile's programs writes
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


class _Result(NamedTuple):
    """Both gradients, None where not wanted, and what ``weight_kernel`` adds to ``dzᵀ H``."""

    given: Operands
    scale: Tensor
    spread: Tensor | None
    slots: Tensor | None
    safety: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def write(self, dz: Tensor, lists: Lists, tiles: range, launch: Launch) -> None:
        """Write these tiles' rows of both gradients."""
        given = self.given
        wide = 1 if self.weight is None else -(-given.dim // launch.block_e)
        weight_kernel[(len(tiles) * wide,)](
            given.hidden,
            dz,
            *lists,
            given.order,
            self.scale,
            self.spread,
            self.slots,
            self.safety,
            self.weight,
            self.bias,
            given.rows,
            given.vocab,
            tiles.start,
            given.dim,
            given.precision,
            **tuning(launch, "RE"),
        )


def weight_gradients(
    block: Block,
    saved: Saved,
    coefficients: Coefficients,
    *,
    safety: SafetyTerm | None,
    needs: tuple[bool, bool],
    launches: tuple[Launch, Launch],
    byte_budget: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of R rows; ``launches`` are those of the logits and of the product."""
    given, spread = operands(block), (None, None)
    if saved.masses is not None:
        spread = dead_share(block, saved, coefficients)
    pack, scale = packed(coefficients, saved)
    rows = Rows(given, label_places(block), pack)
    result = _Result(
        given,
        scale,
        spread[0],
        _safety_slots(safety, block),
        None if safety is None else safety.weight,
        torch.empty_like(given.weight) if needs[0] else None,
        torch.zeros(given.vocab, device=given.hidden.device) if needs[1] else None,
    )
    one = max(1, given.rows) * (TILE.value * given.hidden.element_size() + 4)
    step = max(1, byte_budget // one)
    for first in range(0, given.tiles, step):
        tiles = range(first, min(first + step, given.tiles))
        lists = list_live(saved.masses, tiles)
        dz = logit_gradients(rows, lists, tiles, launches[0])
        result.write(dz, lists, tiles, launches[1])
    bias = result.bias
    if bias is not None:
        bias = _finish_bias(bias, spread[1], given.order, safety).to(block.head.bias.dtype)
    return result.weight, bias


def _safety_slots(safety: SafetyTerm | None, block: Block) -> Tensor | None:
    """Return the index of the safety token at each place of the order, ``[V]`` int32; -1: none."""
    if safety is None:
        return None
    vocab = block.head.weight.shape[0]
    slots = torch.full((vocab,), -1, dtype=torch.int32, device=safety.ids.device)
    places = positions_of(safety.ids, None if block.tiles is None else block.tiles.inverse)
    slots[places] = torch.arange(len(places), dtype=torch.int32, device=slots.device)
    return slots


def _finish_bias(
    bias: Tensor, spread: Tensor | None, order: Tensor | None, safety: SafetyTerm | None
) -> Tensor:
    """Add the dead pairs' and the constraint's part; return ``[V]`` in token order."""
    if spread is not None:
        bias = bias + spread.repeat_interleave(TILE.value)[: len(bias)]
    if order is not None:
        bias = torch.empty_like(bias).index_copy_(0, order, bias)
    if safety is not None:
        bias.index_add_(0, safety.ids, safety.bias)
    return bias
