"""Rows whose 8-bit screen was wrong are computed again, exactly, without the host's knowledge.

Stage: ``TileMasses``, ``Worklist``, ``Refined`` → the same, in place. ``guard_kernel`` finds such
rows by the correction that the refinement made to their log-sum-exp. Screen, routing and refinement
are then launched once more with every other row ``ABSENT``, and where there are none they end at
once. A row's result does not depend on the other rows of its block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import ROWWISE
from str_kernels.backends.triton.operands import label_places, tuning
from str_kernels.backends.triton.route import THRESHOLD
from str_kernels.backends.triton.tiles import ABSENT, all_absent
from str_kernels.engine.contract import Block, Refined, Routed
from str_kernels.engine.logits import columns_of
from str_kernels.engine.rest import of_safety

POINTERS = {
    "i32": ("label", "again", "number"),
    "fp32": ("dead", "mass", "maximum", "shift", "label_logit", "expected"),
}


@triton.jit
def guard_kernel(
    dead_ptr,
    mass_ptr,
    shift_ptr,
    label_logit_ptr,
    label_ptr,
    again_ptr,
    number_ptr,
    rows,
    stride,
    tiles,
    most,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program passes over all tiles of BLOCK_R rows and alone writes these rows of ``again``.

    In: ``dead [T, R]`` fp32, its tiles ``stride`` numbers apart, ``mass [R]``, ``shift [R]`` and
    ``label_logit [R]`` fp32, ``label [R]`` int32. Out: ``again [R]`` int32, the label of a row
    whose log-sum-exp is more than ``most`` from the shift, or is NaN, and ``ABSENT`` for the
    others. In and out: ``number [1]`` int32, to which the number of such rows is added.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    total = tl.load(mass_ptr + row, mask=inside, other=0.0)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        dead = tl.load(
            dead_ptr + tile.to(tl.int64)[:, None] * stride + row[None, :],
            mask=(tile < tiles)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(dead, 0)
    label = tl.load(label_ptr + row, mask=inside, other=ABSENT)
    shift = tl.load(shift_ptr + row, mask=inside, other=0.0)
    its = tl.load(label_logit_ptr + row, mask=inside, other=0.0)
    total += tl.where(label >= 0, tl.exp(its - shift), 0.0)
    right = tl.abs(tl.log(total)) <= most
    wrong = (label != ABSENT) & (right == 0)
    tl.store(again_ptr + row, tl.where(wrong, label, ABSENT), mask=inside)
    number = tl.sum(wrong.to(tl.int32), 0)
    if number > 0:
        tl.atomic_add(number_ptr, number, sem="relaxed")


@triton.jit
def reset_kernel(
    label_ptr,
    mass_ptr,
    maximum_ptr,
    expected_ptr,
    rows,
    dim: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program alone writes BLOCK_R rows × BLOCK_D columns of the sums that are not absent.

    In: ``label [R]`` int32. Out, fp32: ``mass [R]``, ``maximum [R]`` and ``expected [R, D]`` or
    None, as they are before any pair has been added.
    """
    wide = 1 if expected_ptr is None else tl.cdiv(dim, BLOCK_D)
    row = tl.program_id(0) // wide * BLOCK_R + tl.arange(0, BLOCK_R)
    along = tl.program_id(0) % wide * BLOCK_D + tl.arange(0, BLOCK_D)
    if all_absent(label_ptr, row, rows):
        return
    here = tl.load(label_ptr + row, mask=row < rows, other=ABSENT) != ABSENT
    nothing = tl.zeros([BLOCK_R], tl.float32)
    tl.store(mass_ptr + row, nothing, mask=here)
    tl.store(maximum_ptr + row, nothing - float("inf"), mask=here)
    if expected_ptr is not None:
        at = expected_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
        mask = here[:, None] & (along < dim)[None, :]
        tl.store(at, tl.zeros([BLOCK_R, BLOCK_D], tl.float32), mask=mask)


def rows_off(block: Block, routed: Routed, most: float, number: Tensor) -> Tensor:
    """Return the label's place ``[R]`` int32 of rows that are off by ``most`` nats, and ``ABSENT``.

    How many they are is added to ``number [1]``.
    """
    work = routed.work
    dead, label = work.dead.T, label_places(block)
    (tiles, rows), stride = dead.shape, dead.stride(0)
    again, label_logit = torch.empty_like(label), columns_of(block).label
    if block.options.leaves_out:  # the screen saw no safety token
        own = of_safety(block.labels, block.options).any(-1)
        label_logit = label_logit.masked_fill(own, -torch.inf)
    guard_kernel[(-(-rows // THRESHOLD["BLOCK_R"]),)](
        dead,
        routed.refined.mass,
        work.shift,
        label_logit,
        label,
        again,
        number,
        rows,
        stride,
        tiles,
        most,
        **THRESHOLD,
    )
    return again


def reset_rows(sums: Refined, label: Tensor) -> None:
    """Take everything from the sums of rows that are not absent."""
    rows, dim = len(label), 1 if sums.expected is None else sums.expected.shape[1]
    wide = 1 if sums.expected is None else -(-dim // ROWWISE.block_d)
    reset_kernel[(-(-rows // ROWWISE.block_r) * wide,)](
        label, sums.mass, sums.maximum, sums.expected, rows, dim, **tuning(ROWWISE, "RD")
    )
