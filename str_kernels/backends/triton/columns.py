"""One pass over H computes the logits of the few tokens that are always computed exactly.

Stage: ``Block`` → ``Columns``, before the vocabulary is read. A program takes BLOCK_R rows ×
COLUMNS tokens. The rows of W are read through their ids: each is contiguous, so that a gathered
copy would be read no faster, and would cost a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.operands import precision_of, tuning
from str_kernels.backends.triton.tiles import multiply, tanh
from str_kernels.engine.contract import Block, Columns
from str_kernels.engine.logits import ANCHORS, anchor_ids, mean_of, safety_ids

POINTERS = {
    "i64": ("token", "label", "list"),
    "i1": ("needed",),
    "fp32": ("mean", "mean_bias", "label_logit", "anchor", "safety", "difference"),
}
_COLUMNS = 64  # tokens of one program
_FEW = 16  # without a constraint there are the anchors alone


@triton.jit
def capped(x, logit_scale, softcap: tl.constexpr):
    """Return the logits of ``x = H Wᵀ + b``, exact relative to themselves for any softcap."""
    z = x * logit_scale
    if softcap is not None:
        z = softcap * tanh(z * (1.0 / softcap))
    return z


@triton.jit
def columns_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    token_ptr,
    label_ptr,
    needed_ptr,
    list_ptr,
    mean_ptr,
    mean_bias_ptr,
    label_logit_ptr,
    anchor_ptr,
    safety_ptr,
    difference_ptr,
    rows,
    count,
    logit_scale,
    dim: tl.constexpr,
    softcap: tl.constexpr,
    precision: tl.constexpr,
    ANCHORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program takes BLOCK_R rows × COLUMNS tokens; the first COLUMNS also take the labels.

    In: ``hidden [R, D]``, ``weight [V, D]``, ``bias [V]`` or None in token order, ``token
    [ANCHORS + K]`` int64 or None, ``label [R]`` int64, -1 where there is none, ``needed [R]`` bool
    or None for all, ``list [R]`` int64 or None, the order of the rows, ``mean [D]`` fp32, W's mean
    row, or None, ``mean_bias [1]`` fp32 or None; ``count`` is K.
    Out: ``label_logit [R]``, ``anchor [R]`` or None and ``difference [R]`` or None, in the order of
    ``list``, and ``safety [R, K]`` or None, all fp32, as in ``Columns``; rows that are not needed
    become NaN, and anchors 0.
    """
    blocks = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0) // blocks
    place = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    column, along = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    inside = place < rows
    needed, row = inside, place
    if list_ptr is not None:
        row = tl.load(list_ptr + place, mask=inside, other=0).to(tl.int32)
    if needed_ptr is not None:
        needed = tl.load(needed_ptr + row, mask=inside, other=0) != 0
    here = inside & (tl.full([BLOCK_R], tile, tl.int32) == 0)
    label = tl.load(label_ptr + row, mask=here & needed, other=-1)
    labelled = label >= 0
    hidden = hidden_ptr + row.to(tl.int64)[:, None] * dim + along[None, :]
    its = weight_ptr + tl.maximum(label, 0)[:, None] * dim + along[None, :]
    total = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    own = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    apart = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if token_ptr is not None:
        token = tl.load(token_ptr + column, mask=column < ANCHORS + count, other=0)
        weight = weight_ptr + token[None, :] * dim + along[:, None]
    stop = tl.max(needed.to(tl.int32), 0) * dim  # without a row nothing is read
    for start in range(0, stop, BLOCK_D):
        within = start + along < dim
        a = tl.load(hidden + start, mask=needed[:, None] & within[None, :], other=0.0)
        w = tl.load(its + start, mask=labelled[:, None] & within[None, :], other=0.0)
        w, wide = w.to(a.dtype).to(tl.float32), a.to(tl.float32)
        own += wide * w
        if mean_ptr is not None:
            apart += wide * (tl.load(mean_ptr + start + along, mask=within, other=0.0)[None, :] - w)
        if token_ptr is not None:
            b = tl.load(weight + start, mask=within[:, None], other=0.0)
            total = multiply(a, b.to(a.dtype), total, precision)
    own_logit, distance = tl.sum(own, 1), tl.sum(apart, 1)
    if bias_ptr is not None:
        its_bias = tl.load(bias_ptr + label, mask=labelled, other=0.0).to(tl.float32)
        own_logit += its_bias
        if mean_bias_ptr is not None:
            distance += tl.load(mean_bias_ptr) - its_bias
    own_logit = tl.where(labelled, capped(own_logit, logit_scale, softcap), float("nan"))
    tl.store(label_logit_ptr + place, own_logit, mask=here)
    if difference_ptr is not None:
        distance = tl.where(labelled, distance * logit_scale, float("nan"))
        tl.store(difference_ptr + place, distance, mask=here)
    if token_ptr is not None:
        if bias_ptr is not None:
            total += tl.load(bias_ptr + token).to(tl.float32)[None, :]
        z = capped(total, logit_scale, softcap)
        if anchor_ptr is not None:
            # the anchors and the first safety token; NaN is ignored, and an infinite anchor useless
            looked_at = (column < tl.minimum(ANCHORS + 1, ANCHORS + count))[None, :] & (z == z)
            best = tl.max(tl.where(looked_at, z, float("-inf")), 1)
            best = tl.where(own_logit > best, own_logit, best)
            best = tl.where(needed & (tl.abs(best) < float("inf")), best, 0.0)
            tl.store(anchor_ptr + place, best, mask=here)
        if safety_ptr is not None:
            its = column - ANCHORS
            at = safety_ptr + row.to(tl.int64)[:, None] * count + its[None, :]
            mask = inside[:, None] & ((its >= 0) & (its < count))[None, :]
            tl.store(at, tl.where(needed[:, None], z, float("nan")), mask=mask)


def exact_columns(
    block: Block, needed: Tensor | None, listed: Tensor | None, launch: Launch
) -> Columns:
    """Compute `Columns` of N rows in the order ``listed [N]``, where ``needed [N]`` says so."""
    head, labels, tiles, options = block[:4]
    (rows, dim), vocab = head.hidden_states.shape, head.weight.shape[0]
    device, safety, routed = head.weight.device, options.safety, tiles is not None
    tokens = mean = mean_bias = None
    if routed:
        tokens = anchor_ids(safety, vocab, device)
    elif safety is not None:
        tokens = safety_ids(safety, device)
    if routed and options.label_smoothing:
        mean, mean_bias = mean_of(block)
    count = len(safety.token_ids) if safety else 0

    def make(*shape: int, there: bool = True) -> Tensor | None:
        return head.hidden_states.new_empty(shape, dtype=torch.float32) if there else None

    found = Columns(
        make(rows),
        make(rows, there=routed),
        make(rows, count, there=safety is not None),
        make(rows, there=mean is not None),
    )
    width = _FEW if safety is None else _COLUMNS
    columns = 1 if tokens is None else -(-len(tokens) // width)
    columns_kernel[(-(-rows // launch.block_r) * columns,)](
        head.hidden_states.contiguous(),
        head.weight.contiguous(),
        None if head.bias is None else head.bias.contiguous(),
        tokens,
        labels,
        needed,
        listed,
        mean,
        mean_bias,
        *found,
        rows,
        count,
        float(options.logit_scale),
        dim=dim,
        softcap=None if options.softcap is None else float(options.softcap),
        precision=precision_of(),
        ANCHORS=ANCHORS if routed else 0,
        COLUMNS=width,
        **tuning(launch, "RD"),
    )
    return found
