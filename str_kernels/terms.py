"""Both loss terms of every position: check, choose backend and filter, apply.

Stage: hidden states ``[..., D]`` and the head's weight ``[V, D]`` → `RowTerms` ``[...]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels import oracle
from str_kernels.backends.selection import resolve, select_backend
from str_kernels.engine.autograd import fused_rows
from str_kernels.engine.contract import (
    Backend,
    Head,
    Resolved,
    RowInputs,
    RowTerms,
    Statistics,
    Tiles,
)
from str_kernels.engine.forward import tiles_of
from str_kernels.options import LossOptions
from str_kernels.validation import validate_loss_inputs
from str_kernels.vocabulary import VocabularyIndex


def row_terms(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None = None,
    reference: Tensor | None = None,
    position_weights: Tensor | None = None,
    index: VocabularyIndex | None = None,
    backend: str | Backend = "auto",
    entropy: bool = False,
) -> RowTerms:
    """Both terms of every position before any reduction; arguments as ``linear_cross_entropy``.

    With ``entropy`` also that of each labelled position's prediction, in nats.
    """
    check_inputs(
        hidden_states,
        weight,
        labels,
        options,
        bias=bias,
        reference=reference,
        position_weights=position_weights,
        index=index,
    )
    flat, inputs = flatten(hidden_states, labels, reference, position_weights)
    head = Head(flat, weight, bias)
    chosen = select_backend(backend, flat.device, flat.dtype).backend
    # the casts are decided; inside, autocast would only round fp32 scratch blocks again
    with torch.autocast(hidden_states.device.type, enabled=False):
        if chosen is None:
            terms = _dense_terms(head, inputs, options)
        else:
            resolved = resolve(
                options,
                chosen,
                dtype=flat.dtype,
                device=flat.device,
                indexed=index is not None,
                entropy=entropy,
                needs=gradients_needed(head),
            )
            terms = fused_rows(head, inputs, tiles_for(weight, index, resolved), resolved)
    return unflatten(terms, labels.shape)


def check_inputs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None,
    reference: Tensor | None,
    position_weights: Tensor | None,
    index: VocabularyIndex | None,
) -> None:
    """Everything that the boundary refuses; see ``linear_cross_entropy``."""
    validate_loss_inputs(
        hidden_states,
        weight,
        labels,
        options,
        bias=bias,
        reference=reference,
        position_weights=position_weights,
    )
    if index is None:
        return
    if not isinstance(index, VocabularyIndex):
        raise ValueError(f"index={index!r}: must be a VocabularyIndex or None.")
    index.check(weight)


def flatten(
    hidden_states: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    position_weights: Tensor | None,
) -> tuple[Tensor, RowInputs]:
    """``[..., D]`` → ``[N, D]``, cast as autocast demands, and the rows' constants."""
    flat = _autocast(hidden_states).reshape(-1, hidden_states.shape[-1])
    if reference is not None and reference.dim() > 1:
        reference = reference.reshape(-1, reference.shape[-1])
    if position_weights is not None:
        position_weights = position_weights.reshape(-1)
    return flat, RowInputs(labels.reshape(-1).long(), reference, position_weights)


def gradients_needed(head: Head) -> tuple[bool, bool, bool]:
    """Whether hidden states, weight and bias can be asked for a gradient later."""
    grad = torch.is_grad_enabled()
    hidden, weight, bias = (grad and x is not None and x.requires_grad for x in head)
    return hidden, weight, bias


def tiles_for(weight: Tensor, index: VocabularyIndex | None, resolved: Resolved) -> Tiles | None:
    """The cut of the vocabulary; None on the exact path."""
    if not resolved.eps:
        return None
    moves = resolved.needs[1]
    with torch.no_grad():
        # label smoothing reads Σ_v z off the mean rows: they must be this very weight's
        tiles = tiles_of(weight, index, fresh=moves or resolved.options.label_smoothing > 0)
    if moves:  # rows quantised when the index was built are another weight's by now
        tiles = tiles._replace(quantised=None, row_scales=None)
    return tiles


def _autocast(hidden_states: Tensor) -> Tensor:
    """Cast as ``F.linear`` would; fp64 stays, as autocast leaves it."""
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device) or hidden_states.dtype == torch.float64:
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device))


def _dense_terms(head: Head, inputs: RowInputs, options: LossOptions) -> RowTerms:
    if options.screen not in ("auto", "exact"):
        raise ValueError(
            f"screen={options.screen!r}: backend='dense' computes every logit in full and screens "
            "none; leave screen='auto'."
        )
    rows = oracle.dense_rows(
        head.hidden_states,
        head.weight,
        inputs.labels,
        options,
        bias=head.bias,
        reference=inputs.reference,
        position_weights=inputs.position_weights,
    )
    statistics = Statistics(
        lse=rows.lse,
        correct=rows.correct,
        dead_mass=torch.zeros_like(rows.lse),
        live_share=torch.ones_like(rows.lse),
        entropy=rows.entropy,
        safety_logits=rows.safety_logits,
    )
    return RowTerms(rows.cross_entropy, rows.penalty, statistics)


def unflatten(terms: RowTerms, shape: torch.Size) -> RowTerms:
    """``[N, ...]`` → ``[..., ...]``."""

    def view(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(shape + values.shape[1:])

    statistics = Statistics(*map(view, terms.statistics))
    return RowTerms(view(terms.cross_entropy), view(terms.penalty), statistics)
