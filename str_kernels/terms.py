"""Both loss terms of every position: check, choose backend and filter, apply.

Stage: hidden states ``[..., D]`` and the head's weight ``[V, D]`` → `RowTerms` ``[...]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels import oracle
from str_kernels.backends.selection import select_backend, select_filter
from str_kernels.engine.autograd import FusedRows, RowInputs, Settings
from str_kernels.engine.contract import Backend
from str_kernels.engine.forward import tiles_of
from str_kernels.options import LossOptions
from str_kernels.validation import validate_loss_inputs
from str_kernels.vocabulary import VocabularyIndex


class RowTerms(NamedTuple):
    """Both loss terms of every position, differentiable, and their statistics; shapes ``[...]``."""

    cross_entropy: Tensor
    penalty: Tensor
    lse: Tensor
    safety_logits: Tensor | None
    correct: Tensor
    dead_mass: Tensor
    live_share: Tensor
    entropy: Tensor | None


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
    check_inputs(hidden_states, weight, labels, options, bias, reference, position_weights, index)
    flat, constants = flatten(hidden_states, labels, reference, position_weights)
    chosen = select_backend(backend, flat.device, flat.dtype).backend
    # the casts are decided; inside, autocast would only round fp32 scratch blocks again
    with torch.autocast(hidden_states.device.type, enabled=False):
        if chosen is None:
            if options.screen not in ("auto", "exact"):
                raise ValueError(
                    f"screen={options.screen!r}: backend='dense' computes every logit in full "
                    "and screens none; leave screen='auto'."
                )
            rows = _dense_terms(flat, weight, bias, constants, options)
        else:
            settings = resolve(
                chosen, options, flat, weight, index, entropy=entropy, grad=torch.is_grad_enabled()
            )
            rows = RowTerms(*FusedRows.apply(flat, weight, bias, constants, settings))
    return unflatten(rows, labels.shape)


def check_inputs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
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


def resolve(
    backend: Backend,
    options: LossOptions,
    flat: Tensor,
    weight: Tensor,
    index: VocabularyIndex | None,
    *,
    entropy: bool,
    grad: bool,
) -> Settings:
    """Choose filter and tiles; ``grad`` says whether anybody can ask for a gradient later."""
    resolved = select_filter(
        options,
        backend,
        indexed=index is not None,
        entropy=entropy,
        dtype=flat.dtype,
        device=flat.device,
    )
    tiles = None
    if resolved.eps:
        with torch.no_grad():
            # label smoothing reads Σ_v z off the mean rows: they must be this very weight's
            moves = grad and weight.requires_grad
            tiles = tiles_of(weight, index, fresh=moves or options.label_smoothing > 0)
            if moves:  # rows quantised when the index was built are another weight's by now
                tiles = tiles._replace(quantised=None, row_scales=None)
    return Settings(backend, options, resolved, tiles, entropy, grad, flat.dtype)


def _autocast(hidden_states: Tensor) -> Tensor:
    """Cast as ``F.linear`` would; fp64 stays, as autocast leaves it."""
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device) or hidden_states.dtype == torch.float64:
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device))


def _dense_terms(
    flat: Tensor, weight: Tensor, bias: Tensor | None, constants: RowInputs, options: LossOptions
) -> RowTerms:
    labels, reference, position_weights = constants
    rows = oracle.dense_rows(
        flat,
        weight,
        labels,
        options,
        bias=bias,
        reference=reference,
        position_weights=position_weights,
    )
    return RowTerms(
        rows.cross_entropy,
        rows.penalty,
        rows.lse,
        rows.safety_logits,
        rows.correct,
        torch.zeros_like(rows.lse),
        torch.ones_like(rows.lse),
        rows.entropy,
    )


def unflatten(rows: RowTerms, shape: torch.Size) -> RowTerms:
    """``[N, ...]`` → ``[..., ...]``."""

    def view(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(shape + values.shape[1:])

    return RowTerms(*map(view, rows))
