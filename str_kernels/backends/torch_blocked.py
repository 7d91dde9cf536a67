"""The portable backend: blocked torch calls on any device, within a byte budget.

Stage: ``Head [N, D] x [V, D]`` → ``RowStatistics``; ``RowCoefficients`` → ``Gradients``. Only rows
that need the vocabulary meet it. Blocks of the vocabulary are the outer loop, so the weight is
read once a pass; a block of logits ``[rows, columns]`` lives in one reused buffer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.backends.contract import (
    Gradients,
    Head,
    RowCoefficients,
    RowPlan,
    RowStatistics,
)
from str_kernels.options import LossOptions

DEFAULT_BYTE_BUDGET = 32 << 20
# Taller blocks of rows amortise a GEMM's packing of the weight; beyond this nothing was gained.
_MAX_ROWS = 4096
_COLUMN_MULTIPLE = 64


class _Blocks(NamedTuple):
    rows: int
    columns: int


class TorchBlocked:
    """Bounded memory on any device.

    Args:
        byte_budget: bytes for the scratch blocks (two of logits, two of the weight); gradients and
            the ``[rows, D]`` accumulator of the hidden states come on top. The block sizes follow
            from it alone, never from free memory.
    """

    name = "torch"

    def __init__(self, byte_budget: int = DEFAULT_BYTE_BUDGET) -> None:
        """Check the budget."""
        if isinstance(byte_budget, bool) or not isinstance(byte_budget, int) or byte_budget < 1:
            raise ValueError(f"byte_budget={byte_budget!r}: must be a positive number of bytes.")
        self.byte_budget = byte_budget

    def statistics(
        self, head: Head, plan: RowPlan, options: LossOptions, *, entropy: bool = False
    ) -> RowStatistics:
        """See ``Backend.statistics``."""
        dtype, rows = _accumulator(head), plan.dense.nonzero()[:, 0]
        hidden = head.hidden_states.index_select(0, rows).to(dtype)
        totals = _RowTotals(plan.labels[rows], dtype, options, entropy)
        blocks = self._blocks(hidden, head.weight)
        for columns in _spans(head.weight.shape[0], blocks.columns):
            weight, bias = _head_block(head, columns, dtype)
            for part in _spans(len(rows), blocks.rows):
                totals.add(part, columns, _logits(hidden[part], weight, bias, options))
        return totals.scatter(rows, plan, self._safety_logits(head, plan, options))

    def gradients(
        self,
        head: Head,
        plan: RowPlan,
        lse: Tensor,
        coefficients: RowCoefficients,
        options: LossOptions,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        """See ``Backend.gradients``."""
        dtype, rows = _accumulator(head), plan.dense.nonzero()[:, 0]
        hidden = head.hidden_states.index_select(0, rows).to(dtype)
        dense = _DenseRows(
            hidden,
            plan.labels[rows],
            lse[rows],
            *(None if c is None else c[rows] for c in coefficients._replace(beta=None)),
        )
        sums = _GradientSums(head, hidden, needs, dtype)
        sparse = (
            _SafetyTerm(head, plan, coefficients, options, dtype) if options.constrained else None
        )
        blocks = self._blocks(hidden, head.weight)
        for columns in _spans(head.weight.shape[0], blocks.columns):
            weight, bias = _head_block(head, columns, dtype)
            sums.open(columns)
            for part in _spans(len(rows), blocks.rows):
                sums.add(part, dense.gradient(part, columns, weight, bias, options), weight)
            sums.close(columns, sparse)
        return sums.finish(rows, sparse)

    def _blocks(self, hidden: Tensor, weight: Tensor) -> _Blocks:
        rows = max(1, min(len(hidden), _MAX_ROWS))
        each_column = hidden.element_size() * 2 * (rows + weight.shape[1])
        columns = self.byte_budget // each_column // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE
        return _Blocks(rows, max(_COLUMN_MULTIPLE, min(columns, weight.shape[0])))

    def _safety_logits(self, head: Head, plan: RowPlan, options: LossOptions) -> Tensor | None:
        if options.safety is None:
            return None
        dtype, rows = _accumulator(head), plan.safety.nonzero()[:, 0]
        hidden = head.hidden_states.index_select(0, rows).to(dtype)
        logits = _logits(hidden, *_head_block(head, _ids(options, head), dtype), options)
        out = logits.new_full((len(plan.labels), logits.shape[1]), float("nan"))
        return out.index_copy_(0, rows, logits)


class _RowTotals:
    """Running maximum, sum of exponentials and label logit of every dense row."""

    def __init__(
        self, labels: Tensor, dtype: torch.dtype, options: LossOptions, entropy: bool
    ) -> None:
        zeros = torch.zeros(len(labels), dtype=dtype, device=labels.device)
        self.labels = labels
        self.maximum = torch.full_like(zeros, float("-inf"))
        self.shift, self.total = zeros, zeros.clone()
        self.label_logit = torch.full_like(zeros, float("nan"))
        self.logit_sum = zeros.clone() if options.label_smoothing else None
        self.weighted = zeros.clone() if entropy else None

    def add(self, part: slice, columns: slice, logits: Tensor) -> None:
        """Take in the logits of one block; the block itself is used up."""
        self._pick_labels(part, columns, logits)
        if self.logit_sum is not None:
            self.logit_sum[part] += logits.sum(-1)
        maximum = torch.maximum(self.maximum[part], logits.amax(-1))
        # an infinite maximum would shift by inf - inf; unshifted, exp says inf or 0 by itself
        shift = maximum.masked_fill(maximum.isinf(), 0.0)
        rescale = torch.exp(self.shift[part] - shift)
        finite = (
            logits.clamp(min=torch.finfo(logits.dtype).min) if self.weighted is not None else None
        )
        exponentials = logits.sub_(shift[:, None]).exp_()
        self.total[part] = self.total[part] * rescale + exponentials.sum(-1)
        if self.weighted is not None:
            added = exponentials.mul_(finite).sum(-1)
            self.weighted[part] = self.weighted[part] * rescale + added
        self.maximum[part], self.shift[part] = maximum, shift

    def _pick_labels(self, part: slice, columns: slice, logits: Tensor) -> None:
        here, offset = _labels_here(self.labels[part], columns)
        picked = logits.gather(1, offset[:, None])[:, 0]
        self.label_logit[part] = torch.where(here, picked, self.label_logit[part])

    def scatter(self, rows: Tensor, plan: RowPlan, safety_logits: Tensor | None) -> RowStatistics:
        """Back to all N rows, NaN where nothing was computed."""
        lse = self.shift + self.total.log()

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_full((len(plan.labels),), float("nan")).index_copy_(0, rows, values)

        correct = torch.zeros_like(plan.labelled)
        correct[rows] = self.label_logit >= self.maximum
        return RowStatistics(
            spread(lse),
            spread(self.label_logit),
            safety_logits,
            correct & plan.labelled,
            spread(self.logit_sum),
            None if self.weighted is None else spread(lse - self.weighted / self.total),
        )


class _DenseRows(NamedTuple):
    """The rows that meet the whole vocabulary, and their coefficients."""

    hidden: Tensor
    labels: Tensor
    lse: Tensor
    alpha: Tensor
    beta: None
    gamma: Tensor
    sigma: Tensor | None

    def gradient(
        self, part: slice, columns: slice, weight: Tensor, bias: Tensor | None, options: LossOptions
    ) -> Tensor:
        """``∂loss/∂(H Wᵀ + b)`` of one block, without the safety term: ``[rows, columns]``."""
        logits = _logits(self.hidden[part], weight, bias, options)
        slope = _slope(logits, options) if options.softcap is not None else None
        grad = logits.sub_(self.lse[part, None]).exp_().mul_(self.alpha[part, None])
        if self.sigma is not None:
            grad.sub_(self.sigma[part, None])
        here, offset = _labels_here(self.labels[part], columns)
        gamma = torch.where(here, self.gamma[part], 0.0)
        grad.scatter_add_(1, offset[:, None], -gamma[:, None])
        # a row without any upstream gradient adds nothing, even where its logits overflowed
        grad.masked_fill_((self.alpha[part] == 0)[:, None] & (self.gamma[part] == 0)[:, None], 0.0)
        return grad.mul_(options.logit_scale if slope is None else slope)


class _SafetyTerm:
    """The sparse term of the constraint: K columns, in the accumulator's precision."""

    def __init__(
        self,
        head: Head,
        plan: RowPlan,
        coefficients: RowCoefficients,
        options: LossOptions,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.ids = plan.safety.nonzero()[:, 0], _ids(options, head)
        self.weight, bias = _head_block(head, self.ids, dtype)
        self.hidden = head.hidden_states.index_select(0, self.rows).to(dtype)
        self.grad = coefficients.beta[self.rows].to(dtype)
        if options.softcap is None:
            self.grad = self.grad * options.logit_scale
        else:
            self.grad = self.grad * _slope(
                _logits(self.hidden, self.weight, bias, options), options
            )

    def to_hidden(self) -> Tensor:
        """``[rows, D]``."""
        return self.grad @ self.weight

    def to_weight(self, columns: slice, out: Tensor | None, bias: Tensor | None) -> None:
        """Add to the gradients of one block of weight and bias rows."""
        here = ((self.ids >= columns.start) & (self.ids < columns.stop)).nonzero()[:, 0]
        grad, offset = self.grad[:, here], self.ids[here] - columns.start
        if out is not None:
            out.index_add_(0, offset, grad.T @ self.hidden)
        if bias is not None:
            bias.index_add_(0, offset, grad.sum(0))


class _GradientSums:
    """Accumulates the gradients asked for, in fp32 or fp64, and casts each once."""

    def __init__(
        self, head: Head, hidden: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype
    ) -> None:
        self.head, self.rows_hidden, self.dtype = head, hidden, dtype
        self.hidden = torch.zeros_like(hidden) if needs[0] else None
        self.weight = torch.empty_like(head.weight) if needs[1] else None
        self.bias = torch.empty_like(head.bias) if needs[2] else None

    def open(self, columns: slice) -> None:
        """Start one block of the vocabulary."""
        width, hidden = columns.stop - columns.start, self.rows_hidden
        self.block = None if self.weight is None else hidden.new_zeros(width, hidden.shape[1])
        self.block_bias = None if self.bias is None else hidden.new_zeros(width)

    def add(self, part: slice, grad: Tensor, weight: Tensor) -> None:
        """Take in ``∂loss/∂(H Wᵀ + b)`` of one block."""
        if self.hidden is not None:
            self.hidden[part].addmm_(grad, weight)
        if self.block is not None:
            self.block.addmm_(grad.T, self.rows_hidden[part])
        if self.block_bias is not None:
            self.block_bias += grad.sum(0)

    def close(self, columns: slice, sparse: _SafetyTerm | None) -> None:
        """Write one finished block of the vocabulary."""
        if sparse is not None and (self.block is not None or self.block_bias is not None):
            sparse.to_weight(columns, self.block, self.block_bias)
        if self.block is not None:
            self.weight[columns] = self.block
        if self.block_bias is not None:
            self.bias[columns] = self.block_bias

    def finish(self, rows: Tensor, sparse: _SafetyTerm | None) -> Gradients:
        """Bring the hidden states' gradient back to all N rows."""
        if self.hidden is None:
            return Gradients(None, self.weight, self.bias)
        states = self.head.hidden_states
        if sparse is None:
            hidden = torch.zeros_like(states).index_copy_(0, rows, self.hidden.to(states.dtype))
        else:
            hidden = torch.zeros(states.shape, dtype=self.dtype, device=states.device)
            hidden.index_copy_(0, rows, self.hidden).index_add_(0, sparse.rows, sparse.to_hidden())
        return Gradients(hidden.to(states.dtype), self.weight, self.bias)


def _accumulator(head: Head) -> torch.dtype:
    return torch.float64 if head.hidden_states.dtype == torch.float64 else torch.float32


def _spans(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _head_block(
    head: Head, columns: slice | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    bias = None if head.bias is None else head.bias[columns].to(dtype)
    return head.weight[columns].to(dtype), bias


def _ids(options: LossOptions, head: Head) -> Tensor:
    return torch.tensor(options.safety.token_ids, device=head.weight.device)


def _labels_here(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    here = (labels >= columns.start) & (labels < columns.stop)
    return here, torch.where(here, labels - columns.start, 0)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    """The one place that makes logits, so that forward and backward cannot drift apart."""
    logits = torch.mm(hidden, weight.T) if bias is None else torch.addmm(bias, hidden, weight.T)
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def _slope(logits: Tensor, options: LossOptions) -> Tensor:
    """``∂z/∂(H Wᵀ + b)`` with a softcap: ``scale · (1 - (z/softcap)²)``."""
    return (logits / options.softcap).square_().neg_().add_(1.0).mul_(options.logit_scale)
