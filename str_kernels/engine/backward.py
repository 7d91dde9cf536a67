"""The backward turns upstream gradients of both terms into gradients of the head's operands.

Stage: ``Kept``, two upstream gradients ``[N]`` → gradients of hidden states ``[N, D]``, weight
``[V, D]`` and bias ``[V]``. A frozen head's backward runs no kernel: it scales the kept ``∂CE/∂h``
by the upstream gradient and adds the constraint's K columns. It never changes a kept tensor, so a
second backward is right as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.constraint import constraint_terms, needs_lse
from str_kernels.engine.contract import (
    ABSENT,
    Block,
    Coefficients,
    Head,
    Kept,
    Resolved,
    RowInputs,
    SafetyTerm,
    Saved,
    Tiles,
)
from str_kernels.engine.logits import log_probabilities, logit_slope, safety_ids
from str_kernels.engine.rows import plan_for, row_blocks, silence, weight_coefficients
from str_kernels.engine.stages import whole_head

_SCRATCH = 4 << 20  # numbers in one block ``[rows, D]``
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def backward_rows(
    kept: Kept,
    tiles: Tiles | None,
    resolved: Resolved,
    grad_cross_entropy: Tensor | None,
    grad_penalty: Tensor | None,
) -> Gradients:
    """Return gradients of hidden states, weight and bias, or None where none is needed.

    An upstream gradient of None means zero.
    """
    upstream = (grad_cross_entropy, grad_penalty)
    upstream = [torch.zeros_like(kept.lse) if grad is None else grad for grad in upstream]
    needs = resolved.needs
    # backward() may be called under the user's autocast, which would round the fp32 scratch
    with torch.autocast(kept.lse.device.type, enabled=False):
        backward = _Backward(kept, tiles, resolved, *upstream)
        hidden = backward.hidden_gradient() if needs[0] else None
        weight, bias = backward.weight_gradients() if any(needs[1:]) else (None, None)
    return hidden, weight, bias


class _Backward:
    """One backward: the upstream gradients of both terms, and the gradients they give."""

    def __init__(
        self,
        kept: Kept,
        tiles: Tiles | None,
        resolved: Resolved,
        grad_cross_entropy: Tensor,
        grad_penalty: Tensor,
    ) -> None:
        self.kept, self.tiles, self.resolved = kept, tiles, resolved
        self.options, self.dtype = resolved.options, kept.lse.dtype
        inputs = RowInputs(kept.labels, kept.reference, kept.position_weights)
        self.plan = plan_for(resolved, inputs, len(kept.weight), tiles)
        whole = len(kept.rows) == len(self.plan.labels)
        self.every = whole and self.plan.listed is None
        self.make = torch.empty if whole else torch.zeros  # some rows may never be written
        self.grad_cross_entropy = grad_cross_entropy
        self.beta = self.d_lse = self.ids = None
        if self.options.constrained:
            self._differentiate_penalty(grad_penalty * self.plan.penalty_scale)

    def _differentiate_penalty(self, scale: Tensor) -> None:
        """Set β ``[N, K]``, the logits' slope included, and the penalty's part of α ``[N]``."""
        safety, kept = self.options.safety, self.kept
        values = kept.safety_logits
        if needs_lse(safety):
            values = log_probabilities(values, kept)
        terms = constraint_terms(safety, values, kept.reference)
        on = scale != 0
        beta = scale[:, None] * terms.d_logits * logit_slope(kept.safety_logits, self.options)
        self.beta = torch.where(on[:, None], beta, 0.0)
        if terms.d_lse is not None:
            self.d_lse = torch.where(on, scale * terms.d_lse, 0.0)
        self.ids = safety_ids(safety, kept.lse.device)

    def hidden_gradient(self) -> Tensor:
        """Scale the row gradients and add the constraint's K columns: ``[N, D]``."""
        kept, dtype = self.kept, self.resolved.dtype
        shape = (len(self.plan.labels), kept.weight.shape[1])
        out = self.make(shape, dtype=dtype, device=kept.weight.device)
        size = max(1, _SCRATCH // shape[1])
        for block, rows in row_blocks(kept.rows, size, every=self.every):
            gradient = _scaled(kept.ce_gradient[block], self.grad_cross_entropy[rows])
            if self.d_lse is not None:
                gradient += _scaled(kept.lse_gradient[block], self.d_lse[rows])
            if self.beta is not None:
                gradient += self._safety_part(rows)
            out[rows] = gradient.to(dtype)
        if self.beta is not None:
            for rows in kept.safety_alone.split(size):
                out[rows] = self._safety_part(rows).to(dtype)
        return out

    def _safety_part(self, rows: Tensor | slice) -> Tensor:
        return self.beta[rows] @ self.kept.weight[self.ids].to(self.dtype)

    def weight_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return those of weight ``[V, D]`` and bias ``[V]``; the backend recomputes the logits."""
        kept = self.kept
        rows = slice(None) if self.every else kept.rows
        coefficients = weight_coefficients(
            self.plan,
            kept.lse,
            self.grad_cross_entropy,
            self.d_lse,
            options=self.options,
            vocab_size=len(kept.weight),
        )
        hidden = kept.hidden_states[rows].contiguous()
        if self.plan.listed is not None:  # a factor of zero does not silence NaN
            hidden.masked_fill_((self.plan.listed.labels == ABSENT)[:, None], 0.0)
        head = whole_head(Head(hidden, kept.weight, kept.bias), self.resolved.backend)
        return self.resolved.backend.weight_gradients(
            self._block(head, rows),
            Saved(
                kept.lse[rows],
                kept.lse_rest[rows],
                kept.open_mass,
                kept.masses,
                kept.slope,
                kept.probabilities,
            ),
            Coefficients(*(None if c is None else c[rows] for c in coefficients)),
            safety=self._safety_term(),
            needs=self.resolved.needs[1:],
        )

    def _block(self, head: Head, rows: Tensor | slice) -> Block:
        listed = self.plan.listed
        if listed is None:
            return Block(head, self.plan.labels[rows], self.tiles, self.options)
        return Block(head, listed.labels, self.tiles, self.options, listed.places)

    def _safety_term(self) -> SafetyTerm | None:
        if self.beta is None:
            return None
        if self.plan.listed is None:
            rows = self.plan.safety.nonzero()[:, 0]
            beta, hidden = self.beta[rows], self.kept.hidden_states[rows].to(self.dtype)
        else:
            beta = self.beta
            hidden = torch.where(self.plan.safety[:, None], self.kept.hidden_states, 0.0)
            hidden = hidden.to(self.dtype)
        return SafetyTerm(self.ids, beta.T @ hidden, beta.sum(0))


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply rows ``[R, D]`` by their upstream gradients ``[R]``, in the dtype of the latter."""
    # a row with an upstream gradient of zero adds nothing, even where its logits overflowed
    return silence(gradient * upstream[:, None], upstream == 0)
