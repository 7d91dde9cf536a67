"""One kernel adds up the terms and the counts of all rows, and divides.

Stage: ``RowTerms [N]`` → ``Totals``. Torch calls for the same are a dozen launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import SCAN
from str_kernels.engine.contract import RowTerms, Totals
from str_kernels.options import LossOptions

POINTERS = {
    "i64": ("label", "num_correct", "num_labels"),
    "i1": ("correct",),
    "fp32": ("cross_entropy", "penalty", "given", "loss", "ce_total", "penalty_total", "factor"),
}


@triton.jit
def reduce_kernel(
    cross_entropy_ptr,
    penalty_ptr,
    correct_ptr,
    label_ptr,
    given_ptr,
    loss_ptr,
    ce_total_ptr,
    penalty_total_ptr,
    factor_ptr,
    num_correct_ptr,
    num_labels_ptr,
    rows,
    ignore_index,
    divisor,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program passes over all N rows.

    In: ``cross_entropy [N]`` and ``penalty [N]`` or None, fp32, ``correct [N]`` bool, ``label [N]``
    int64 or int32; with MEAN the divisor is ``given [1]``, any dtype, or without it the number of
    labels; else it is ``divisor``. Out, one number each: both totals divided, ``factor``, what an
    upstream gradient is multiplied by, and ``loss``, the sum of both totals, fp32; ``num_correct``
    and ``num_labels`` int64. All are 0 for a divisor of 0.
    """
    ce, penalty = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    correct, labels = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        ce += tl.load(cross_entropy_ptr + row, mask=inside, other=0.0)
        if penalty_ptr is not None:
            penalty += tl.load(penalty_ptr + row, mask=inside, other=0.0)
        correct += (tl.load(correct_ptr + row, mask=inside, other=0) != 0).to(tl.int32)
        label = tl.load(label_ptr + row, mask=inside, other=0)
        labels += (inside & (label != ignore_index)).to(tl.int32)
    number = tl.sum(labels.to(tl.int64), 0)
    if MEAN:
        divisor = number.to(tl.float32)
        if given_ptr is not None:
            divisor = tl.load(given_ptr).to(tl.float32)
    none = divisor == 0.0
    some = tl.where(none, 0.0, 1.0)  # NaN stays NaN
    divisor = tl.where(none, 1.0, divisor)
    ce_total = tl.div_rn(tl.sum(ce, 0) * some, divisor)
    penalty_total = tl.div_rn(tl.sum(penalty, 0) * some, divisor)
    tl.store(loss_ptr, ce_total + penalty_total)
    tl.store(ce_total_ptr, ce_total)
    tl.store(penalty_total_ptr, penalty_total)
    tl.store(factor_ptr, tl.div_rn(some, divisor))
    tl.store(num_correct_ptr, tl.sum(correct.to(tl.int64), 0))
    tl.store(num_labels_ptr, number)


def reduce_rows(
    terms: RowTerms, labels: Tensor, options: LossOptions, count: float | Tensor | None
) -> Totals:
    """Return both terms and their sum, reduced as ``options`` say; ``count`` divides a mean."""
    made = terms.cross_entropy.new_empty
    four = (made((), dtype=torch.float32) for _ in range(4))
    totals = Totals(*four, *(made((), dtype=torch.int64) for _ in range(2)))
    given = count if isinstance(count, Tensor) else None
    reduce_kernel[(1,)](
        terms.cross_entropy.contiguous(),
        terms.penalty.contiguous() if options.constrained else None,
        terms.statistics.correct.contiguous(),
        labels.contiguous(),
        given,
        *totals,
        labels.numel(),
        options.ignore_index,
        1.0 if given is not None or count is None else float(count),
        MEAN=options.reduction == "mean" and (given is not None or count is None),
        **SCAN,
    )
    return totals
