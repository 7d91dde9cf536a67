"""The backward turns upstream gradients of both terms into gradients of the head's operands.

Stage: ``Kept``, two upstream gradients ``[N]`` → gradients of hidden states ``[N, D]``, weight
``[V, D]`` and bias ``[V]``. A frozen head's backward runs no kernel: it scales the kept ``∂CE/∂h``
by the upstream gradient and adds the constraint's K columns. It never changes a kept tensor, so a
second backward is right as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from str_kernels.autocast import without_autocast
from str_kernels.engine.contract import (
    ABSENT,
    Block,
    Coefficients,
    Head,
    Kept,
    Resolved,
    RowGradients,
    RowInputs,
    RowPlan,
    SafetyTerm,
    Saved,
    Tiles,
    Upstream,
)
from str_kernels.engine.logits import accumulator, safety_ids
from str_kernels.engine.rest import by_dense, leave_out, of_safety, safety_factors
from str_kernels.engine.rows import lists_rows, plan_for, weight_coefficients
from str_kernels.engine.stages import row_stages, whole_head

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
    if grad_cross_entropy is None:
        grad_cross_entropy = torch.zeros_like(kept.lse)
    needs = resolved.needs
    # backward() may be called under the user's autocast, which would round the fp32 scratch
    with without_autocast(kept.lse.device):
        backward = _Backward(kept, tiles, resolved, grad_cross_entropy, grad_penalty)
        weight, bias = backward.weight_gradients() if any(needs[1:]) else (None, None)
    return backward.found.hidden, weight, bias


def _gradient(kept: Kept, upstream: Upstream, resolved: Resolved) -> RowGradients:
    """Compute row gradients; those of several processes are added up before they are rounded."""
    stages, shards = row_stages(resolved.backend), resolved.shards
    if shards.alone:
        return stages.gradient(kept, upstream, resolved)
    wide = replace(resolved, dtype=accumulator(resolved.dtype))
    found = stages.gradient(kept, upstream, wide)
    if found.hidden is None:
        return found
    return found._replace(hidden=shards.sum(found.hidden).to(resolved.dtype))


class _Backward:
    """One backward: the upstream gradients of both terms, and the gradients they give."""

    def __init__(
        self,
        kept: Kept,
        tiles: Tiles | None,
        resolved: Resolved,
        grad_cross_entropy: Tensor,
        grad_penalty: Tensor | None,
    ) -> None:
        self.kept, self.tiles, self.resolved = kept, tiles, resolved
        self.options, self.dtype = resolved.options, kept.lse.dtype
        self.shards = resolved.shards
        self.vocab = self.shards.total or len(kept.weight)
        self.grad_cross_entropy = grad_cross_entropy
        penalty = None
        if self.options.constrained and grad_penalty is not None:
            penalty = grad_penalty * self.plan.penalty_scale
        dense = self.plan.dense if lists_rows(resolved, kept.lse.device) else None
        upstream = Upstream(grad_cross_entropy, penalty, dense)
        self.found = _gradient(kept, upstream, resolved)

    @cached_property
    def plan(self) -> RowPlan:
        """The forward's plan, made again where something of it is needed."""
        kept = self.kept
        inputs = RowInputs(kept.labels, kept.reference, kept.position_weights)
        return plan_for(self.resolved, inputs, self.vocab, self.tiles)

    @cached_property
    def every(self) -> bool:
        """Whether all rows are dense, and in order."""
        return self.plan.listed is None and len(self.kept.rows) == len(self.kept.labels)

    @property
    def _rows(self) -> Tensor | slice:
        """Which of the N rows have row gradients."""
        return slice(None) if self.every else self.kept.rows

    def weight_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return those of weight ``[V, D]`` and bias ``[V]``; the backend recomputes the logits."""
        kept, rows = self.kept, self._rows
        coefficients = weight_coefficients(
            self.plan,
            kept.lse,
            self.grad_cross_entropy,
            by_dense(self.found.d_lse, kept),
            options=self.options,
            vocab_size=self.vocab,
        )
        hidden = kept.hidden_states[rows].contiguous()
        if self.plan.listed is not None:  # a factor of zero does not silence NaN
            hidden.masked_fill_((self.plan.listed.labels == ABSENT)[:, None], 0.0)
        head = whole_head(Head(hidden, kept.weight, kept.bias), self.resolved.backend)
        head = leave_out(head, self.options, self.shards)
        weight, bias = self.resolved.backend.weight_gradients(
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
        return weight, None if bias is None else bias.to(kept.bias.dtype)

    def _block(self, head: Head, rows: Tensor | slice) -> Block:
        listed, places = self.plan.listed, None
        labels = self.shards.own(self.plan.labels[rows]) if listed is None else listed.labels
        if listed is not None:
            places = listed.places
        if self.options.leaves_out:  # `safety_factors` has the labels that are safety tokens
            whole = self.plan.labels[rows] if listed is None else labels
            own = of_safety(whole, self.options).any(-1)
            labels = labels.masked_fill(own, -1)
            places = None if places is None else places.masked_fill(own, -1)
        return Block(head, labels, self.tiles, self.options, places=places, shards=self.shards)

    def _safety_term(self) -> SafetyTerm | None:
        beta = self._beta()
        if beta is None:
            return None
        safety, device = self.options.safety, self.kept.lse.device
        ids = safety_ids(safety, device)
        if not self.shards.alone:
            places, ids = self.shards.tokens(safety, device)
            beta = beta[:, places]
        if self.plan.listed is None:
            rows = self.plan.safety.nonzero()[:, 0]
            beta, hidden = beta[rows], self.kept.hidden_states[rows].to(self.dtype)
        else:
            hidden = torch.where(self.plan.safety[:, None], self.kept.hidden_states, 0.0)
            hidden = hidden.to(self.dtype)
        return SafetyTerm(ids, beta.T @ hidden, beta.sum(0))

    def _beta(self) -> Tensor | None:
        """Derivatives ``[N, K]`` by ``H Wᵀ + b`` at the safety tokens that no pass computes."""
        beta, kept = self.found.beta, self.kept
        if not self.options.leaves_out:
            return beta
        coefficients = weight_coefficients(
            self.plan,
            kept.lse,
            self.grad_cross_entropy,
            None,
            options=self.options,
            vocab_size=self.vocab,
        )
        own = safety_factors(kept, self.plan.labels, coefficients, self._rows, self.options)
        return own if beta is None else own + beta
