"""The reduction of both terms to a loss, with one divisor.

Stage: ``RowTerms [...]`` → ``Totals``. A backend may bring it as one kernel (`Reduces`); torch
calls serve all others, compiled code and second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from str_kernels import waits
from str_kernels.engine.contract import Reduces, RowTerms, Totals, brings
from str_kernels.options import LossOptions

Count = int | float | Tensor | None


def totals_of(terms: RowTerms, labels: Tensor, options: LossOptions, count: Count) -> Totals:
    """Reduce both terms; ``count`` divides a mean, by default the number of labels.

    With ``reduction="none"`` both stay as they are.
    """
    backend = terms.backend
    if backend is not None and options.reduction != "none" and brings(type(backend), Reduces):
        if isinstance(count, Tensor):
            count = _there(count, labels.device)
        kept = terms.cross_entropy, terms.penalty
        return Totals(*_Reduced.apply(*kept, terms, labels, options, count))
    num_labels = (labels != options.ignore_index).sum()
    # by name: torch 2.8 does not trace a slice of a named tuple
    cross_entropy, penalty = terms.cross_entropy, terms.penalty
    if options.reduction != "none":
        cross_entropy = cross_entropy.sum()
        # without a constraint there is nothing to add up
        penalty = penalty.sum() if options.constrained else torch.zeros_like(cross_entropy)
    if options.reduction == "mean":
        divisor = num_labels if count is None else count
        # in compiled code and under transforms of torch.func no backend is named
        if backend is not None and isinstance(divisor, Tensor) and waits.allowed(divisor.device):
            divisor = divisor.item()
        cross_entropy, *rest = _divided(divisor, cross_entropy, *[penalty] * options.constrained)
        penalty = rest[0] if rest else penalty
    loss = cross_entropy + penalty if options.constrained else cross_entropy
    correct = terms.statistics.correct.sum()
    return Totals(loss, cross_entropy, penalty, None, correct, num_labels)


class _Reduced(Function):
    """The reduction as a backend computes it; the loss alone is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        cross_entropy: Tensor,
        penalty: Tensor,
        terms: RowTerms,
        labels: Tensor,
        options: LossOptions,
        count: Count,
    ) -> tuple[Tensor, ...]:
        """Return `Totals`."""
        totals = terms.backend.reduce(terms, labels, options, count)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(totals.factor)
        ctx.shape, ctx.constrained = cross_entropy.shape, options.constrained
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the upstream gradient of each row's terms, a view of one number."""
        if upstream is None:
            return (None,) * 6
        (factor,) = ctx.saved_tensors
        of_rows = (upstream * factor).expand(ctx.shape)
        return of_rows, of_rows if ctx.constrained else None, None, None, None, None


def _divided(count: int | float | Tensor, *totals: Tensor) -> list[Tensor]:
    """``total / count`` of each; for a count of 0 a zero that stays attached to the graph.

    A number of the host is not copied to the device.
    """
    if not isinstance(count, Tensor):
        return [total / count if count else total * 0.0 for total in totals]
    count = _there(count, totals[0].device)
    empty = count == 0
    some, count = ~empty, count + empty
    return [total * some / count for total in totals]


def _there(count: Tensor, device: torch.device) -> Tensor:
    """Move one number to a device; one on the host goes with any device's tensors."""
    count = count.reshape(())
    return count if count.device.type == "cpu" else count.to(device)
