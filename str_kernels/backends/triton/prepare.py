"""One kernel decides what each row needs, and lists the rows that need the vocabulary.

Stage: ``RowInputs`` → ``RowPlan``. The host learns nothing of it, and so it need not wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import SCAN
from str_kernels.backends.triton.tiles import ABSENT
from str_kernels.constraint import needs_lse
from str_kernels.engine.contract import Listed, RowInputs, RowPlan
from str_kernels.options import LossOptions

POINTERS = {
    "i64": ("labels", "inverse", "label", "row", "listed_label"),
    "i32": ("listed_place", "off", "count", "bad"),
    "fp32": ("weights", "scale"),
    "i1": ("labelled", "dense", "safety"),
}


@triton.jit
def prepare_kernel(
    labels_ptr,
    weights_ptr,
    inverse_ptr,
    label_ptr,
    labelled_ptr,
    dense_ptr,
    safety_ptr,
    scale_ptr,
    row_ptr,
    listed_label_ptr,
    listed_place_ptr,
    off_ptr,
    count_ptr,
    bad_ptr,
    rows,
    vocab,
    ignore_index,
    strength,
    LSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program passes over all N rows.

    In: ``labels [N]`` int64, ``weights [N]`` or None for 1 on labelled rows, ``inverse [V]`` int64
    or None, the places of the order. Out, as in ``RowPlan``: ``label [N]`` int64, ``labelled [N]``
    and ``dense [N]`` bool, ``safety [N]`` bool or None, ``scale [N]`` fp32 or None, ``bad [1]``
    int32; as in ``Listed``: ``row [N]`` and ``listed_label [N]`` int64, ``listed_place [N]``,
    ``off []`` and ``count []`` int32.
    With LSE constrained rows are dense too.
    """
    count, bad = 0, 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        label = tl.load(labels_ptr + row, mask=inside, other=0)
        labelled = inside & (label != ignore_index)
        outside = labelled & ((label < 0) | (label >= vocab))
        label = tl.where(labelled & (label >= 0) & (label < vocab), label, -1)
        bad += tl.sum(outside.to(tl.int32), 0)
        safety = labelled
        if safety_ptr is not None:
            weight = labelled.to(tl.float32)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + row, mask=inside, other=0.0).to(tl.float32)
                right = (weight >= 0.0) & (weight < float("inf"))
                bad += tl.sum((inside & (right == 0)).to(tl.int32), 0)
                weight = tl.where(right, weight, float("nan"))
            safety = labelled | (inside & (weight != 0.0))
            if scale_ptr is not None:
                tl.store(scale_ptr + row, strength * weight, mask=inside)
            tl.store(safety_ptr + row, safety, mask=inside)
        dense = safety if LSE else labelled
        tl.store(label_ptr + row, label, mask=inside)
        tl.store(labelled_ptr + row, labelled, mask=inside)
        tl.store(dense_ptr + row, dense, mask=inside)
        chosen = dense.to(tl.int32)
        before = count + tl.cumsum(chosen, 0) - chosen
        at = tl.where(dense, before, rows - 1 - (row - before))
        listed = tl.where(dense, label, ABSENT)
        tl.store(row_ptr + at, row.to(tl.int64), mask=inside)
        tl.store(listed_label_ptr + at, listed, mask=inside)
        if inverse_ptr is not None:
            there = tl.load(inverse_ptr + tl.maximum(label, 0), mask=label >= 0, other=0)
            listed = tl.where(label >= 0, there, listed)
        tl.store(listed_place_ptr + at, listed.to(tl.int32), mask=inside)
        count += tl.sum(chosen, 0)
    tl.store(bad_ptr, bad)
    tl.store(off_ptr, 0)
    tl.store(count_ptr, count)


def prepare(
    inputs: RowInputs, options: LossOptions, vocab_size: int, inverse: Tensor | None
) -> RowPlan:
    """Return the plan of N rows; ``inverse [V]`` is that of the order, if there is one."""
    labels, _, weights = inputs
    safety, device, one = options.safety, labels.device, torch.Size()

    def empty(dtype: torch.dtype, shape: torch.Size = labels.shape) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    constrained = empty(torch.bool) if safety is not None else None
    plan = RowPlan(
        labels=empty(torch.int64),
        labelled=empty(torch.bool),
        dense=empty(torch.bool),
        safety=constrained,
        penalty_scale=empty(torch.float32) if options.constrained else None,
        bad=empty(torch.int32, one),
        listed=Listed(
            empty(torch.int64),
            empty(torch.int64),
            empty(torch.int32),
            empty(torch.int32, one),
            empty(torch.int32, one),
        ),
    )
    prepare_kernel[(1,)](
        labels.contiguous(),
        None if weights is None else weights.contiguous(),
        inverse,
        plan.labels,
        plan.labelled,
        plan.dense,
        plan.safety,
        plan.penalty_scale,
        *plan.listed,
        plan.bad,
        len(labels),
        vocab_size,
        options.ignore_index,
        0.0 if safety is None else float(safety.strength),
        LSE=safety is not None and needs_lse(safety),
        **SCAN,
    )
    return plan
