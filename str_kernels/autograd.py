"""The only autograd.Function: statistics forward, gradients backward, nothing modified.

Stage: ``Head`` and ``RowInputs`` → two loss terms per row, differentiable; and the statistics they
were made from, which are not. Inputs and ``[N]``-sized statistics are saved; the logits are made
again in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from str_kernels.backends.contract import Backend, Head, RowStatistics
from str_kernels.backends.finish import plan_rows, row_coefficients, row_losses
from str_kernels.options import LossOptions


class RowInputs(NamedTuple):
    """Constants of N rows: ``labels [N]``, ``reference [N, K]`` or ``[K]``, weights ``[N]``."""

    labels: Tensor
    reference: Tensor | None
    position_weights: Tensor | None


class Settings(NamedTuple):
    """How to run: nothing here is a tensor."""

    backend: Backend
    options: LossOptions
    entropy: bool = False


class FusedRows(Function):
    """``(hidden_states, weight, bias, rows, settings)`` → terms and statistics of N rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: RowInputs,
        settings: Settings,
    ) -> tuple[Tensor | None, ...]:
        """Return cross-entropy ``[N]`` and penalty ``[N]``, then the statistics."""
        backend, options, entropy = settings
        plan = plan_rows(rows.labels, rows.position_weights, options)
        head = Head(hidden_states, weight, bias)
        statistics = backend.statistics(head, plan, options, entropy=entropy)
        terms = row_losses(
            plan,
            statistics,
            options,
            vocab_size=weight.shape[0],
            reference=rows.reference,
            position_weights=rows.position_weights,
        )
        ctx.settings = settings
        # outputs are handed out as they are: saved here too, autograd notices an in-place change
        ctx.save_for_backward(
            hidden_states, weight, bias, *rows, statistics.lse, statistics.safety_logits
        )
        outputs = (statistics.lse, statistics.safety_logits, statistics.correct, statistics.entropy)
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        return (*terms, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cross_entropy: Tensor, grad_penalty: Tensor, *_: Any) -> tuple:
        """Gradients of the head from an arbitrary upstream gradient on each row's two terms."""
        hidden_states, weight, bias, labels, reference, weights, lse, safety = ctx.saved_tensors
        backend, options, _entropy = ctx.settings
        plan = plan_rows(labels, weights, options)
        coefficients = row_coefficients(
            plan,
            RowStatistics(lse, lse, safety, labels, None, None),
            options,
            vocab_size=weight.shape[0],
            grad_cross_entropy=grad_cross_entropy,
            grad_penalty=grad_penalty,
            reference=reference,
            position_weights=weights,
        )
        head = Head(hidden_states, weight, bias)
        needs = ctx.needs_input_grad[:3]
        gradients = backend.gradients(head, plan, lse, coefficients, options, needs)
        return (*gradients, None, None)
