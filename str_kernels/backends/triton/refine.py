"""The refinement computes the live pairs again from the original operands.

Stage: ``Worklist`` → ``Refined``. A program takes one chunk of a tile's live rows at a time. Chunks
are added up with atomics, or in order without them. With atomics a first kernel keeps exponentials
in the operands' dtype, and a second multiplies them by W a slice of D at a time, so that the sums
which are being added to stay in L2. What exceeds the budget for exponentials is added at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.hot import hot_sums
from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.operands import Operands, common, label_places, operands, tuning
from str_kernels.backends.triton.route import plan_chunks
from str_kernels.backends.triton.tiles import (
    LOWEST,
    TILE,
    finish_logits,
    multiply,
    products,
    rounded,
    rows_at,
    softcap_slope,
)
from str_kernels.engine.contract import Block, Refined, Wanted, Worklist

_IN_CACHE = 24 << 20  # bytes of sums that half of a Hopper's L2 holds
_SPREAD_COLUMNS = 64 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6) else 32
POINTERS = {
    "i64": ("order",),
    "i32": ("list", "plan", "label"),
    "fp32": ("shift", "mass", "maximum", "expected", "scale"),
}


@triton.jit
def refine_kernel(
    hidden_ptr,
    weight_ptr,
    order_ptr,
    bias_ptr,
    list_ptr,
    plan_ptr,
    shift_ptr,
    label_ptr,
    mass_ptr,
    maximum_ptr,
    expected_ptr,
    p_ptr,
    scale_ptr,
    first,
    last,
    vocab,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """A persistent program i takes chunks i, i + programs, … of ``first`` to ``last`` in the plan.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``order [V]`` int64 or None, ``bias [V]`` in tile
    order or None, ``list [T·R]`` int32, ``plan [1 + C, 3]`` int32 of ``plan_kernel``, ``shift [R]``
    fp32, ``label [R]`` int32. Out, without the label, fp32: ``mass``, Σ exp(z - shift), the largest
    logit ``maximum``, and ``expected``, Σ exp(z - shift) · slope · w, or None. With ATOMIC the
    shapes are ``[R]``, ``[R]``, ``[R, D]``, and every chunk that has a row adds to it. Otherwise
    they are ``[C·BLOCK_R]``, …, and each chunk alone writes its own BLOCK_R slots. For
    ``spread_kernel``: ``p [C·BLOCK_R, TILE]`` in the operands' dtype, exp(z - top) · slope, and
    ``scale [C·BLOCK_R]`` fp32, or None.

    Exponentials are taken relative to the row's maximum *in this tile* before they are rounded to
    the operands' dtype, so that a row that is nearly right keeps its precision, even in fp16.
    """
    lane, along = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    last = tl.minimum(last, tl.load(plan_ptr))
    for chunk in range(first + tl.program_id(0), last, tl.num_programs(0)):
        tile = tl.load(plan_ptr + 3 * chunk + 3)
        place = tl.load(plan_ptr + 3 * chunk + 4) + lane
        live = place < tl.load(plan_ptr + 3 * chunk + 5)
        row = tl.load(list_ptr + place, mask=live, other=0)
        position = tile * TILE + tl.arange(0, TILE)
        weight_row = rows_at(order_ptr, position, vocab)
        total = products(hidden_ptr, row, weight_ptr, weight_row, dim, precision, BLOCK_D)
        z = finish_logits(total, bias_ptr, position, vocab, logit_scale, softcap)
        label = tl.load(label_ptr + row, mask=live, other=-1)
        z = tl.where(label[:, None] == position[None, :], float("-inf"), z)
        top = tl.maximum(tl.max(z, 1), LOWEST)
        p = tl.exp(z - top[:, None])
        scale = tl.exp(top - tl.load(shift_ptr + row, mask=live, other=0.0))
        slot = row if ATOMIC else chunk * BLOCK_R + lane
        if ATOMIC:
            tl.atomic_add(mass_ptr + slot, scale * tl.sum(p, 1), mask=live, sem="relaxed")
            tl.atomic_max(maximum_ptr + slot, top, mask=live, sem="relaxed")
        else:
            tl.store(mass_ptr + slot, scale * tl.sum(p, 1), mask=live)
            tl.store(maximum_ptr + slot, top, mask=live)
        if expected_ptr is not None or p_ptr is not None:
            if softcap is not None:
                p *= softcap_slope(z, softcap)
            p, keep = rounded(p, hidden_ptr.dtype.element_ty)
            scale *= keep
        if p_ptr is not None:
            entry = chunk * BLOCK_R + lane
            tl.store(scale_ptr + entry, scale)
            of_tile = tl.arange(0, TILE)[None, :]
            tl.store(p_ptr + entry.to(tl.int64)[:, None] * TILE + of_tile, p)
        if expected_ptr is not None:
            weight = weight_ptr + weight_row[:, None] * dim + along[None, :]
            out = expected_ptr + slot.to(tl.int64)[:, None] * dim + along[None, :]
            for start in range(0, dim, BLOCK_E):
                inside = (start + along < dim)[None, :]
                w = tl.load(weight + start, mask=inside, other=0.0).to(p.dtype)
                e = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
                e = multiply(p, w, e, precision) * scale[:, None]
                if ATOMIC:
                    tl.atomic_add(out + start, e, mask=live[:, None] & inside, sem="relaxed")
                else:
                    tl.store(out + start, e, mask=live[:, None] & inside)


@triton.jit
def spread_kernel(
    p_ptr,
    scale_ptr,
    weight_ptr,
    order_ptr,
    list_ptr,
    plan_ptr,
    expected_ptr,
    last,
    width,
    vocab,
    dim: tl.constexpr,
    precision: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add ``scale · p W`` to the rows of the first ``last`` chunks, ``width`` columns at a time.

    In: ``p [C·BLOCK_R, TILE]``, ``scale [C·BLOCK_R]`` fp32 of ``refine_kernel``, ``weight [V, D]``,
    ``order [V]`` int64 or None, ``list [T·R]``, ``plan [1 + C, 3]`` int32. Out: ``expected [R, D]``
    fp32, to which every chunk that has a row adds. A persistent program i takes items i, i +
    programs, …; all chunks of one slice of D come before those of the next.
    """
    lane, along = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_E)
    chunks = tl.minimum(last, tl.load(plan_ptr))
    for item in range(tl.program_id(0), chunks * tl.cdiv(dim, width), tl.num_programs(0)):
        chunk = item % chunks
        tile = tl.load(plan_ptr + 3 * chunk + 3)
        place = tl.load(plan_ptr + 3 * chunk + 4) + lane
        live = place < tl.load(plan_ptr + 3 * chunk + 5)
        row = tl.load(list_ptr + place, mask=live, other=0)
        position = tile * TILE + tl.arange(0, TILE)
        weight = weight_ptr + rows_at(order_ptr, position, vocab)[:, None] * dim + along[None, :]
        entry = chunk * BLOCK_R + lane
        scale = tl.load(scale_ptr + entry)
        of_tile = tl.arange(0, TILE)[None, :]
        p = tl.load(p_ptr + entry.to(tl.int64)[:, None] * TILE + of_tile)
        out = expected_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
        start = item // chunks * width
        for column in range(start, tl.minimum(start + width, dim), BLOCK_E):
            inside = (column + along < dim)[None, :]
            w = tl.load(weight + column, mask=inside, other=0.0).to(p.dtype)
            e = multiply(p, w, tl.zeros([BLOCK_R, BLOCK_E], tl.float32), precision)
            mask = live[:, None] & inside
            tl.atomic_add(out + column, e * scale[:, None], mask=mask, sem="relaxed")


def spread_launch(launch: Launch) -> Launch:
    """Return the refinement's sizes with so few columns that none spills where D is cut."""
    return launch._replace(block_e=min(launch.block_e, _SPREAD_COLUMNS))


def refine_pairs(
    block: Block,
    work: Worklist,
    wanted: Wanted,
    sums: Refined | None = None,
    *,
    launch: Launch,
    programs: int,
    byte_budget: int,
) -> Refined:
    """Refine the live pairs and add them up with atomics, to ``sums`` if there are any."""
    pairs = _pairs(block, work, launch, programs)
    if sums is None:
        sums = pairs.first_sums(block.tiles.hot, wanted, byte_budget)
    pairs.add(pairs.plan(), sums, byte_budget // 4)
    return sums


def refine_in_order(
    block: Block,
    work: Worklist,
    wanted: Wanted,
    sums: Refined | None = None,
    *,
    launch: Launch,
    programs: int,
    byte_budget: int,
) -> Refined:
    """Refine without atomics: each chunk fills slots of its own, which torch adds up in order.

    The result repeats bit for bit where ``index_add_`` repeats, as it does under
    ``torch.use_deterministic_algorithms``.
    """
    pairs = _pairs(block, work, launch, programs)
    plan = pairs.plan()
    if sums is None:
        sums = pairs.first_sums(block.tiles.hot, wanted, byte_budget)
    chunks = int(plan[0, 0])  # the one number that is read back, to allocate the slots
    step = max(1, byte_budget // (4 * pairs.given.dim * launch.block_r))
    for part in plan[1 : 1 + chunks].split(step):
        head = torch.tensor([[len(part), 0, 0]], dtype=torch.int32, device=part.device)
        rows = pairs.rows_of(part)
        slots = pairs.empty_sums(len(rows), wanted)
        pairs.refine(torch.cat([head, part]), slots, atomic=False)
        sums.mass.index_add_(0, rows, slots.mass)
        sums.maximum.scatter_reduce_(0, rows, slots.maximum, "amax")
        if sums.expected is not None:
            sums.expected.index_add_(0, rows, slots.expected)
    return sums


def _pairs(block: Block, work: Worklist, launch: Launch, programs: int) -> _Pairs:
    return _Pairs(operands(block), label_places(block), work, launch, programs)


class _Pairs(NamedTuple):
    """The live pairs of a block of rows, and how the kernel is launched over them."""

    given: Operands
    label: Tensor
    work: Worklist
    launch: Launch
    programs: int

    def plan(self) -> Tensor:
        """Return the chunks of all live rows; see ``plan_chunks``."""
        return plan_chunks(self.work.counts, self.given.rows, self.launch.block_r)

    def rows_of(self, chunks: Tensor) -> Tensor:
        """Return the row of each slot of ``chunks [C, 3]``; unused slots repeat a chunk's first."""
        first, stop = chunks[:, 1:2], chunks[:, 2:]
        place = first + torch.arange(self.launch.block_r, device=chunks.device)
        return self.work.rows.flatten()[torch.where(place < stop, place, first)].flatten().long()

    def first_sums(self, hot: int, wanted: Wanted, byte_budget: int) -> Refined:
        """Return the sums of all rows over the hot tiles."""
        if not hot:
            return self.empty_sums(self.given.rows, wanted)
        shift, budget = self.work.shift, byte_budget // 8
        return hot_sums(
            self.given, self.label, shift, hot, hidden=wanted.hidden, byte_budget=budget
        )

    def empty_sums(self, rows: int, wanted: Wanted) -> Refined:
        """Allocate the sums of so many rows or slots, to which no pair has been added."""
        mass = self.work.shift.new_zeros(rows)
        expected = mass.new_zeros(rows, self.given.dim) if wanted.hidden else None
        return Refined(mass, expected, torch.full_like(mass, float("-inf")))

    def add(self, plan: Tensor, sums: Refined, byte_budget: int) -> None:
        """Add all chunks to ``sums``; so many bytes of exponentials are kept between kernels."""
        given, rows, most = self.given, self.launch.block_r, len(plan) - 1
        if sums.expected is None:
            self.refine(plan, sums, atomic=True)
            return
        held = min(most, max(1, byte_budget // (rows * (TILE.value * given.hidden.itemsize + 4))))
        p = given.hidden.new_empty(held * rows, TILE.value)
        scale = self.work.shift.new_empty(len(p))
        self.refine(plan, sums._replace(expected=None), atomic=True, kept=(p, scale))
        launch = spread_launch(self.launch)
        width = max(1, _IN_CACHE // (4 * max(1, given.rows)) // launch.block_e)
        spread_kernel[(min(self.programs, most),)](
            p,
            scale,
            given.weight,
            given.order,
            self.work.rows,
            plan,
            sums.expected,
            held,
            width * launch.block_e,
            given.vocab,
            given.dim,
            given.precision,
            **tuning(launch, "RE"),
        )
        if held < most:
            self.refine(plan, sums, atomic=True, first=held)

    def refine(
        self,
        plan: Tensor,
        sums: Refined,
        *,
        atomic: bool,
        first: int = 0,
        kept: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    ) -> None:
        """Run the kernel over the chunks of a plan from ``first`` on, as many as ``kept`` holds."""
        given, launch = self.given, self.launch
        last = len(plan) if kept[0] is None else len(kept[1]) // launch.block_r
        programs = min(self.programs, len(plan) - 1)  # there are no more chunks than that
        refine_kernel[(programs,)](
            given.hidden,
            given.weight,
            given.order,
            given.bias,
            self.work.rows,
            plan,
            self.work.shift,
            self.label,
            sums.mass,
            sums.maximum,
            sums.expected,
            *kept,
            first,
            last,
            **common(given),
            ATOMIC=atomic,
            **tuning(launch, "RDE"),
        )
