"""One kernel puts the loss and the statistics of a block of rows in their places among all rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.tiles import ABSENT
from str_kernels.engine.contract import RowPlan, Statistics

POINTERS = {
    "i64": ("row", "label"),
    "fp32": tuple(
        f"{side}_{name}"
        for side in ("in", "out")
        for name in ("loss", "lse", "rest", "dead", "live", "entropy", "log_rest")
    ),
    "i1": ("labelled", "in_correct", "out_correct"),
}
_SIZE = {"BLOCK": 256}  # the rows of a program


@triton.jit
def scatter_kernel(
    row_ptr,
    label_ptr,
    labelled_ptr,
    in_loss_ptr,
    in_lse_ptr,
    in_rest_ptr,
    in_correct_ptr,
    in_dead_ptr,
    in_live_ptr,
    in_entropy_ptr,
    in_log_rest_ptr,
    out_loss_ptr,
    out_lse_ptr,
    out_rest_ptr,
    out_correct_ptr,
    out_dead_ptr,
    out_live_ptr,
    out_entropy_ptr,
    out_log_rest_ptr,
    rows,
    BLOCK: tl.constexpr,
):
    """One program moves BLOCK of the R rows of a block.

    In: ``row [R]`` int64, each one's place among N, ``label [R]`` int64, ``labelled [N]`` bool, and
    of R rows, fp32: loss, lse, lse_rest, dead mass, live share, entropy and log_rest, each of the
    last two or None; bool: correct.
    Out: the same of N rows. An absent row has no loss, and no statistics.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    row = tl.load(row_ptr + at, mask=inside, other=0)
    here = inside & (tl.load(label_ptr + at, mask=inside, other=ABSENT) != ABSENT)
    labelled = inside & (tl.load(labelled_ptr + row, mask=inside, other=0) != 0)
    none = float("nan")
    loss = tl.load(in_loss_ptr + at, mask=here & labelled, other=0.0)
    tl.store(out_loss_ptr + row, loss, mask=inside)
    tl.store(out_lse_ptr + row, tl.load(in_lse_ptr + at, mask=here, other=none), mask=inside)
    tl.store(out_rest_ptr + row, tl.load(in_rest_ptr + at, mask=here, other=none), mask=inside)
    correct = tl.load(in_correct_ptr + at, mask=here, other=0) != 0
    tl.store(out_correct_ptr + row, correct, mask=inside)
    tl.store(out_dead_ptr + row, tl.load(in_dead_ptr + at, mask=here, other=0.0), mask=inside)
    tl.store(out_live_ptr + row, tl.load(in_live_ptr + at, mask=here, other=none), mask=inside)
    if in_entropy_ptr is not None:
        entropy = tl.load(in_entropy_ptr + at, mask=here, other=none)
        tl.store(out_entropy_ptr + row, entropy, mask=inside)
    if in_log_rest_ptr is not None:
        log_rest = tl.load(in_log_rest_ptr + at, mask=here, other=none)
        tl.store(out_log_rest_ptr + row, log_rest, mask=inside)


def scatter_rows(
    plan: RowPlan, blocks: list[tuple[Tensor, Statistics]]
) -> tuple[Tensor, Statistics]:
    """Return the loss ``[N]`` and the statistics ``[N]`` of blocks of rows, in the plan's order."""
    _, first = blocks[0]
    fields = [first.lse, first.lse, first.lse_rest, first.correct, first.dead_mass]
    fields += [first.live_share, first.entropy, first.log_rest]
    count = len(plan.labels)
    found = [None if x is None else x.new_empty(count) for x in fields]
    start = 0
    for loss, statistics in blocks:
        part = slice(start, start + len(loss))
        scatter_kernel[(-(-len(loss) // _SIZE["BLOCK"]),)](
            plan.listed.rows[part],
            plan.listed.labels[part],
            plan.labelled,
            loss,
            *statistics[:6],
            statistics.log_rest,
            *found,
            len(loss),
            **_SIZE,
        )
        start = part.stop
    *found, log_rest = found
    return found[0], Statistics(*found[1:], log_rest=log_rest)
