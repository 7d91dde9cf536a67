"""The autograd function of the loss in eager code; compiled code uses ``operator`` instead.

Stage: ``Head``, ``RowInputs`` → ``RowTerms``; its two terms are differentiable, its statistics not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from str_kernels.engine.backward import backward_rows
from str_kernels.engine.contract import Head, Kept, Resolved, RowInputs, RowTerms, Statistics, Tiles
from str_kernels.engine.forward import forward_rows
from str_kernels.transforms import refuse_forward_mode, refuse_functional, refuse_second_order


class FusedRows(Function):
    """Compute both terms and the statistics of N rows; `fused_rows` calls it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: RowInputs,
        tiles: Tiles | None,
        resolved: Resolved,
    ) -> tuple[Tensor | None, ...]:
        """Return cross-entropy ``[N]`` and penalty ``[N]``, then the statistics."""
        terms, kept = forward_rows(Head(hidden_states, weight, bias), inputs, tiles, resolved)
        if any(resolved.needs):
            ctx.tiles, ctx.resolved = tiles, resolved
            ctx.set_materialize_grads(False)  # the statistics have no gradients
            constants = RowInputs(*map(_savable, inputs))
            ctx.save_for_backward(*kept._replace(**constants._asdict()))
        ctx.mark_non_differentiable(*(x for x in terms.statistics if x is not None))
        return (terms.cross_entropy, terms.penalty, *terms.statistics)

    @staticmethod
    def backward(
        ctx: Any, grad_cross_entropy: Tensor | None, grad_penalty: Tensor | None, *_: Any
    ) -> tuple:
        """Return gradients of the head from an upstream gradient on each row's two terms."""
        refuse_second_order(grad_cross_entropy, grad_penalty)
        kept = Kept(*ctx.saved_tensors)
        gradients = backward_rows(kept, ctx.tiles, ctx.resolved, grad_cross_entropy, grad_penalty)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Refuse forward-mode AD."""
        refuse_forward_mode()


def fused_rows(head: Head, inputs: RowInputs, tiles: Tiles | None, resolved: Resolved) -> RowTerms:
    """Return differentiable terms of N rows, and their statistics."""
    refuse_functional()
    cross_entropy, penalty, *statistics = FusedRows.apply(*head, inputs, tiles, resolved)
    return RowTerms(cross_entropy, penalty, Statistics(*statistics), resolved.backend)


def _savable(constant: Tensor | None) -> Tensor | None:
    """Clone a constant that was made under ``inference_mode``: autograd cannot save it."""
    return constant.clone() if constant is not None and constant.is_inference() else constant
