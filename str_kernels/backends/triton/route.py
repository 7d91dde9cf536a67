"""Routing lists the live rows of each tile, on the device and without atomics.

Stage: ``TileMasses`` → ``Worklist``. A pair is live if its tile holds the label, or if its mass
exceeds ε times the row's mass outside the label's tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import SCAN
from str_kernels.backends.triton.operands import label_places
from str_kernels.backends.triton.tiles import ABSENT, LOWEST, TILE, all_absent
from str_kernels.engine.contract import Block, TileMasses, Worklist
from str_kernels.engine.joins import route_over_shards
from str_kernels.engine.shards import Shards
from str_kernels.engine.tiles import LEAST_OPEN

# These are the bits of -0.0; the literal loses its sign in Triton 3.4.
NEGATIVE_ZERO = tl.constexpr(-(1 << 31))
LOG_LEAST_OPEN = tl.constexpr(math.log(LEAST_OPEN))
THRESHOLD = {"BLOCK_R": 32, "BLOCK_T": 32}  # the sizes of ``threshold_kernel``

POINTERS = {
    "i32": ("label", "list", "count", "plan"),
    "fp32": ("log_mass", "anchor", "shift", "threshold"),
}


@triton.jit
def threshold_kernel(
    log_mass_ptr,
    anchor_ptr,
    label_ptr,
    shift_ptr,
    threshold_ptr,
    rows,
    stride,
    tiles,
    log_eps,
    AGAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program passes over all tiles of BLOCK_R rows and alone writes these rows of the outputs.

    In: ``log_mass [T, R]`` fp32, relative to ``anchor [R]`` fp32, its tiles ``stride`` numbers
    apart; ``label [R]`` int32, a place in the order or -1. Out: ``shift [R]`` fp32, the log-sum-exp
    over tiles, 0 where it is infinite, not relative; ``threshold [R]`` fp32, the log-mass that a
    live pair must exceed. With AGAIN absent rows are not written.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    label = tl.load(label_ptr + row, mask=inside, other=-1)
    if AGAIN:
        if all_absent(label_ptr, row, rows):
            return
        inside &= label != ABSENT
    label_tile = tl.where(label >= 0, label // TILE, -1)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    whole, opened = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mass = tl.load(
            log_mass_ptr + tile.to(tl.int64)[:, None] * stride + row[None, :],
            mask=(tile < tiles)[:, None] & inside[None, :],
            other=float("-inf"),
        )
        higher = tl.maximum(top, tl.max(mass, 0))
        rescale = tl.exp(top - higher)
        p = tl.exp(mass - higher[None, :])
        whole = whole * rescale + tl.sum(p, 0)
        p = tl.where(tile[:, None] == label_tile[None, :], 0.0, p)
        opened = opened * rescale + tl.sum(p, 0)
        top = higher
    lse = top + tl.log(whole)
    least = tl.maximum(top + tl.log(opened), lse + LOG_LEAST_OPEN)
    tl.store(threshold_ptr + row, least + log_eps, mask=inside)
    shift = tl.load(anchor_ptr + row, mask=inside, other=0.0) + lse
    shift = tl.where((label == ABSENT) | (tl.abs(lse) == float("inf")), 0.0, shift)
    tl.store(shift_ptr + row, shift, mask=inside)


@triton.jit
def route_kernel(
    log_mass_ptr,
    anchor_ptr,
    shift_ptr,
    threshold_ptr,
    label_ptr,
    list_ptr,
    count_ptr,
    rows,
    stride,
    hot,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program passes over all rows of one tile and alone reads and writes the tile's entries.

    In: ``anchor [R]``, ``shift [R]``, ``threshold [R]`` fp32, ``label [R]`` int32. In and out:
    ``log_mass [T, R]`` fp32, its tiles ``stride`` numbers apart, which becomes the dead share of
    ``exp(shift)``, -0.0 on live pairs and 0 on absent rows. Out: ``list [T, R]`` int32, of which
    the first ``count [T]`` int32 entries are the tile's live rows, ascending. The first ``hot``
    tiles are live for all rows, and list none. With AGAIN absent rows' shares stay as they are.
    """
    tile, count = tl.program_id(0), 0
    base, masses = tile.to(tl.int64) * rows, log_mass_ptr + tile.to(tl.int64) * stride
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        mass = tl.load(masses + row, mask=inside, other=float("-inf"))
        threshold = tl.load(threshold_ptr + row, mask=inside, other=float("inf"))
        label = tl.load(label_ptr + row, mask=inside, other=-1)
        present = inside & (label != ABSENT)
        live = (mass > threshold) | ((label >= 0) & (label // TILE == tile)) | (tile < hot)
        live &= present
        chosen = (live & (tile >= hot)).to(tl.int32)
        place = base + count + tl.cumsum(chosen, 0) - 1
        tl.store(list_ptr + place, row, mask=chosen != 0)
        # adding the anchor has rounded the shift; subtracting it again is exact
        shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
        share = tl.exp(mass - (shift - tl.load(anchor_ptr + row, mask=inside, other=0.0)))
        share = tl.where(label == ABSENT, 0.0, share)
        bits = tl.where(live, NEGATIVE_ZERO, share.to(tl.int32, bitcast=True))
        if AGAIN:
            inside = present
        tl.store(masses + row, bits.to(tl.float32, bitcast=True), mask=inside)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + tile, count)


@triton.jit
def plan_kernel(
    count_ptr,
    plan_ptr,
    tiles,
    rows,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program alone writes the chunks of one tile; the first also writes how many there are.

    In: ``count [T]`` int32, the live rows of each tile. Out: ``plan [1 + C, 3]`` int32, whose first
    row begins with the number of chunks of at most CHUNK rows; each further row has a chunk's tile,
    and the first and the end of its rows in ``list [T·R]``.
    """
    tile = tl.program_id(0)
    before, number = 0, 0
    for start in range(0, tiles, BLOCK):
        other = start + tl.arange(0, BLOCK)
        count = tl.load(count_ptr + other, mask=other < tiles, other=0)
        chunks = (count + CHUNK - 1) // CHUNK
        number += tl.sum(chunks, 0)
        before += tl.sum(tl.where(other < tile, chunks, 0), 0)
    if tile == 0:
        tl.store(plan_ptr, number)
    stop = tile * rows + tl.load(count_ptr + tile)
    for offset in range(0, tl.load(count_ptr + tile), CHUNK * 16):
        chunk = offset // CHUNK + tl.arange(0, 16)
        first = tile * rows + chunk * CHUNK
        out, live = plan_ptr + 3 * (1 + before + chunk), first < stop
        tl.store(out, tile + tl.zeros_like(chunk), mask=live)
        tl.store(out + 1, first, mask=live)
        tl.store(out + 2, tl.minimum(first + CHUNK, stop), mask=live)


def route_pairs(block: Block, masses: TileMasses, eps: float) -> Worklist:
    """List the live pairs; the memory of the log-masses is reused for ``dead``."""
    log_mass = masses.log_mass.T
    if log_mass.stride(1) != 1:
        log_mass = log_mass.contiguous()
    count, rows = log_mass.shape
    shift, threshold = torch.empty(2, rows, dtype=torch.float32, device=log_mass.device)
    counts = torch.empty(count, dtype=torch.int32, device=log_mass.device)
    listed = torch.empty(count, rows, dtype=torch.int32, device=log_mass.device)
    work = Worklist(listed, counts, shift, log_mass.T)
    _route(block, masses.anchor, work, threshold, eps=eps, again=False)
    return work


def route_again(block: Block, anchor: Tensor, work: Worklist, eps: float) -> None:
    """List the live pairs of the rows that are not absent, in place, from their masses in ``dead``.

    The other rows keep their shift and their dead shares.
    """
    _route(block, anchor, work, torch.empty_like(work.shift), eps=eps, again=True)


def _route(
    block: Block, anchor: Tensor, work: Worklist, threshold: Tensor, *, eps: float, again: bool
) -> None:
    log_mass, label = work.dead.T, label_places(block)
    (count, rows), stride = log_mass.shape, log_mass.stride(0)
    log_eps = math.log(eps) if eps else -math.inf
    threshold_kernel[(-(-rows // THRESHOLD["BLOCK_R"]),)](
        log_mass,
        anchor,
        label,
        work.shift,
        threshold,
        rows,
        stride,
        count,
        log_eps,
        AGAIN=again,
        **THRESHOLD,
    )
    if not block.shards.alone:
        _share(block.shards, anchor, work.shift, threshold, log_eps)
    route_kernel[(count,)](
        log_mass,
        anchor,
        work.shift,
        threshold,
        label,
        work.rows,
        work.counts,
        rows,
        stride,
        block.tiles.hot,
        AGAIN=again,
        **SCAN,
    )


def _share(
    shards: Shards, anchor: Tensor, shift: Tensor, threshold: Tensor, log_eps: float
) -> None:
    """Replace a process's shift and threshold by those of the whole vocabulary, in place."""
    # a row without any mass here has no shift, and its threshold is as low as none
    mine = torch.where(threshold == -math.inf, -math.inf, shift)
    opened = torch.exp(threshold - log_eps - (shift - anchor))
    common, opened, _ = route_over_shards(shards, mine, torch.ones_like(mine), opened)
    shift.copy_(common)
    least = (opened.clamp(min=LEAST_OPEN)).log() + log_eps
    threshold.copy_(least + (common - anchor))


def plan_chunks(counts: Tensor, rows: int, block: int) -> Tensor:
    """Cut each tile's live rows into chunks of at most ``block``: ``[1 + C, 3]`` int32.

    C is an upper bound. The number of chunks stands in the first row and stays on the device; the
    rows after the last chunk are uninitialised. ``plan_kernel`` documents the columns.
    """
    if len(counts) * rows >= 2**31:  # the plan's places in the lists have 32 bits
        raise ValueError(
            f"rows={rows} in one block of {len(counts)} tiles: must be fewer than 2^31 pairs; give "
            "the backend a smaller byte_budget."
        )
    most = len(counts) * -(-rows // block)
    plan = torch.empty(1 + most, 3, dtype=torch.int32, device=counts.device)
    plan_kernel[(len(counts),)](counts, plan, len(counts), rows, CHUNK=block, **SCAN)
    return plan
