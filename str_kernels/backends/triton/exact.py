"""The exact pass computes every logit in the operands' precision, in two GEMMs.

Stage: ``Block`` → ``Dense``. As many tiles are taken at a time as a buffer of probabilities holds.
``softmax_kernel`` computes them relative to each tile's own maximum; ``expected_kernel`` multiplies
them by W and rescales, so that the row's maximum over the vocabulary need not be known. No atomics
are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.finish import join_rows
from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.operands import (
    GROUP,
    common,
    label_places,
    masked_sum,
    operands,
    tuning,
)
from str_kernels.backends.triton.tiles import (
    LOWEST,
    TILE,
    all_absent,
    finish_logits,
    grouped,
    multiply,
    products,
    rounded,
    rows_at,
    softcap_slope,
)
from str_kernels.engine.contract import Block, Dense, Wanted
from str_kernels.engine.finish import join_sums
from str_kernels.engine.logits import columns_of

POINTERS = {"i32": ("label",), "fp32": ("label_logit", "sums", "scale", "rescale", "expected")}


@triton.jit
def softmax_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    label_ptr,
    label_logit_ptr,
    share_ptr,
    slope_ptr,
    sums_ptr,
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
    """One program takes BLOCK_R rows × one of the C tiles from ``first_tile`` on, and writes them.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``bias [V]`` or None, ``label [R]`` int32,
    ``label_logit [R]`` fp32 or None. Out: ``share [C, R, TILE]`` in the dtype of H, exp(z -
    maximum) · slope without the label, or None;
    ``slope [C, R, TILE]`` in the dtype of H, or None; ``sums [5, C, R]`` fp32: without the label
    the maximum, Σ exp(z - maximum), Σ exp(z - maximum) · (z - maximum) and the factor that corrects
    the rounding of ``share``; with the label Σ (z - label_logit) over logits above -inf.
    """
    tiles = tl.num_programs(0) // tl.cdiv(rows, BLOCK_R)
    block, slot = grouped(rows, tiles, BLOCK_R, GROUP)
    row, column = block * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, TILE)
    position = (first_tile + slot) * TILE + column
    inside = row < rows
    if all_absent(label_ptr, row, rows):
        return
    weight_row = rows_at(None, position, vocab)
    row_in = tl.minimum(row, rows - 1)
    total = products(hidden_ptr, row_in, weight_ptr, weight_row, dim, precision, BLOCK_D)
    z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
    out = slot.to(tl.int64) * rows + row
    wide = out[:, None] * TILE + column[None, :]
    sums, plane = sums_ptr + out, tiles.to(tl.int64) * rows
    if label_logit_ptr is not None:
        its = tl.load(label_logit_ptr + row, mask=inside, other=0.0)
        counted = (position < vocab)[None, :] if bias_ptr is None else z > float("-inf")
        total = tl.sum(tl.where(counted, z - its[:, None], 0.0), 1)
        tl.store(sums + 4 * plane, total, mask=inside)
    if slope_ptr is not None:
        slope = softcap_slope(z, softcap)  # 0 where a logit is -inf
        tl.store(slope_ptr + wide, slope.to(slope_ptr.dtype.element_ty), mask=inside[:, None])
    label = tl.load(label_ptr + row, mask=inside, other=-1)
    z = tl.where(label[:, None] == position[None, :], float("-inf"), z)
    top = tl.maximum(tl.max(z, 1), LOWEST)
    p = tl.exp(z - top[:, None])
    tl.store(sums, top, mask=inside)
    tl.store(sums + plane, tl.sum(p, 1), mask=inside)
    tl.store(sums + 2 * plane, tl.sum(p * tl.maximum(z - top[:, None], LOWEST), 1), mask=inside)
    if share_ptr is not None:
        if softcap is not None:
            p *= softcap_slope(z, softcap)
        p, keep = rounded(p, share_ptr.dtype.element_ty)
        tl.store(sums + 3 * plane, keep, mask=inside)
        tl.store(share_ptr + wide, p, mask=inside[:, None])


@triton.jit
def expected_kernel(
    share_ptr,
    scale_ptr,
    weight_ptr,
    rescale_ptr,
    label_ptr,
    expected_ptr,
    rows,
    vocab,
    first_tile,
    tiles,
    dim: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program computes BLOCK_R × BLOCK_E of ``expected · rescale + Σ_tiles scale · share @ W``.

    In: ``share [C, R, TILE]``, ``scale [C, R]`` fp32 or None for 1, ``weight [V, D]``, ``rescale
    [R]`` fp32, ``label [R]`` int32, or None where no row is absent. In and out: ``expected [R, D]``
    fp32, of which no other program has this block.
    """
    wide = tl.cdiv(dim, BLOCK_E)
    row = tl.program_id(0) // wide * BLOCK_R + tl.arange(0, BLOCK_R)
    along = tl.program_id(0) % wide * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, TILE)
    inside, within = row < rows, (along < dim)[None, :]
    if all_absent(label_ptr, row, rows):
        return
    total = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for slot in range(0, tiles):
        weight_row = rows_at(None, (first_tile + slot) * TILE + column, vocab)
        here = row + rows * tl.full([1], slot, tl.int64)
        share = tl.load(
            share_ptr + here[:, None] * TILE + column[None, :], mask=inside[:, None], other=0.0
        )
        w = tl.load(weight_ptr + weight_row[:, None] * dim + along[None, :], mask=within, other=0.0)
        part = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        part = multiply(share, w.to(share.dtype), part, precision)
        if scale_ptr is not None:
            part *= tl.load(scale_ptr + here, mask=inside, other=0.0)[:, None]
        total += part
    out = expected_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
    mask = inside[:, None] & within
    total += (
        tl.load(out, mask=mask, other=0.0)
        * tl.load(rescale_ptr + row, mask=inside, other=0.0)[:, None]
    )
    tl.store(out, total, mask=mask)


def exact_pass(
    block: Block, wanted: Wanted, launches: tuple[Launch, Launch], byte_budget: int
) -> Dense:
    """Compute every pair of R rows; ``launches`` are those of the two kernels."""
    totals = _RunningTotals(block, wanted, launches)
    given = totals.given
    buffers = (wanted.hidden + totals.smooth_rows) or 1
    one = buffers * TILE.value * given.hidden.element_size() * max(1, given.rows)
    step = max(1, byte_budget // one)
    for first in range(0, given.tiles, step):
        totals.add(range(first, min(first + step, given.tiles)))
    return totals.finish()


class _RunningTotals:
    """Sums over the vocabulary without the label, relative to ``exp(maximum)``."""

    def __init__(self, block: Block, wanted: Wanted, launches: tuple[Launch, Launch]) -> None:
        self.block, self.wanted, self.launches = block, wanted, launches
        self.given = given = operands(block)
        self.place = label_places(block)
        self.label_logit = columns_of(block).label
        sums = torch.zeros(given.rows, dtype=torch.float32, device=given.hidden.device)
        self.maximum = torch.full_like(sums, LOWEST.value)
        self.mass, self.ones = sums, torch.ones_like(sums)
        self.expected = sums.new_zeros(given.rows, given.dim) if wanted.hidden else None
        self.weighted = sums.clone() if wanted.entropy else None
        self.logit_sum = self.smooth_gradient = None
        if block.options.label_smoothing:
            self.logit_sum = sums.clone()
            if self.smooth_rows:
                self.smooth_gradient = sums.new_zeros(given.rows, given.dim)
            else:
                self.smooth_gradient = given.weight.sum(0, dtype=torch.float32)

    @property
    def smooth_rows(self) -> bool:
        """Whether ∂(Σ_v z)/∂h differs from row to row."""
        options = self.block.options
        return bool(options.label_smoothing) and options.softcap is not None

    def add(self, tiles: range) -> None:
        """Add these tiles to the sums."""
        share, slope, sums = self._softmax(tiles)
        top, mass, weighted, keep, logit_sum = sums
        maximum = torch.maximum(self.maximum, top.amax(0))
        fall, below = self.maximum - maximum, top - maximum
        rescale, scale = torch.exp(fall), torch.exp(below)
        if self.weighted is not None:
            self.weighted = (self.weighted + self.mass * fall) * rescale
            self.weighted += ((weighted + mass * below) * scale).sum(0)
        self.maximum = maximum
        self.mass = self.mass * rescale + (mass * scale).sum(0)
        if self.logit_sum is not None:
            self.logit_sum += logit_sum.sum(0)
        if self.expected is not None:
            self._multiply(share, scale * keep, tiles, rescale=rescale, out=self.expected)
        if self.smooth_rows:
            self._multiply(slope, None, tiles, rescale=self.ones, out=self.smooth_gradient)

    def _softmax(self, tiles: range) -> tuple[Tensor | None, Tensor | None, Tensor]:
        given, launch = self.given, self.launches[0]
        shape = (len(tiles), given.rows)
        share = self._buffer((*shape, TILE.value), self.wanted.hidden)
        slope = self._buffer((*shape, TILE.value), self.smooth_rows)
        sums = self.mass.new_empty(5, *shape)
        softmax_kernel[(-(-given.rows // launch.block_r) * len(tiles),)](
            given.hidden,
            given.weight,
            given.bias,
            self.place,
            None if self.logit_sum is None else self.label_logit,
            share,
            slope,
            sums,
            given.rows,
            first_tile=tiles.start,
            **common(given),
            GROUP=GROUP,
            **tuning(launch, "RD"),
        )
        return share, slope, sums

    def _buffer(self, shape: tuple[int, ...], on: bool) -> Tensor | None:
        return self.given.hidden.new_empty(shape) if on else None

    def _multiply(
        self, share: Tensor, scale: Tensor | None, tiles: range, *, rescale: Tensor, out: Tensor
    ) -> None:
        given, launch = self.given, self.launches[1]
        blocks = -(-given.rows // launch.block_r) * -(-given.dim // launch.block_e)
        expected_kernel[(blocks,)](
            share,
            scale,
            given.weight,
            rescale,
            given.places,
            out,
            given.rows,
            given.vocab,
            tiles.start,
            len(tiles),
            given.dim,
            given.precision,
            **tuning(launch, "RE"),
        )

    def finish(self) -> Dense:
        """Add the label's own logit and turn the sums into probabilities."""
        if self.smooth_gradient is not None:
            self.smooth_gradient *= self.block.options.logit_scale
        return join_sums(
            self.block,
            self.label_logit,
            shift=self.maximum,
            mass=self.mass,
            maximum=self.maximum,
            expected=self.expected,
            weighted=self.weighted,
            logit_sum=masked_sum(self.logit_sum, self.given),
            smooth_gradient=self.smooth_gradient,
            join=join_rows,
        )
