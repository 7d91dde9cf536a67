"""Compute both loss terms of every position: check, choose backend and filter, apply.

Stage: hidden states ``[..., D]`` and the head's weight ``[V, D]`` → `RowTerms` ``[...]``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from str_kernels import oracle, waits
from str_kernels.autocast import without_autocast
from str_kernels.backends.empty import EmptyBackend
from str_kernels.backends.selection import resolve, select_backend
from str_kernels.engine.agreement import agreed
from str_kernels.engine.autograd import fused_rows
from str_kernels.engine.contract import (
    Backend,
    Block,
    Head,
    Resolved,
    RowInputs,
    RowTerms,
    Statistics,
    Tiles,
)
from str_kernels.engine.forward import tiles_of
from str_kernels.engine.joins import columns_over_shards
from str_kernels.engine.shards import ALONE, Shards, VocabularyShard, shards_of
from str_kernels.engine.stages import row_stages, whole_head
from str_kernels.options import LossOptions
from str_kernels.validation import validate_loss_inputs, validate_values
from str_kernels.vocabulary import VocabularyIndex


def row_terms(
    head: Head,
    inputs: RowInputs,
    options: LossOptions,
    *,
    index: VocabularyIndex | None = None,
    backend: str | Backend = "auto",
    shard: VocabularyShard | None = None,
    entropy: bool = False,
) -> RowTerms:
    """Compute both terms of every position, unreduced; tensors as in ``linear_cross_entropy``.

    ``entropy`` asks for the entropy of each labelled position's prediction too, in nats.
    """
    shards = shards_of(shard, len(head.weight))
    check_inputs(head, inputs, options, index, shards)
    shape = inputs.labels.shape
    head, inputs = flatten(head, inputs)
    flat = head.hidden_states
    resolved = resolve(
        options,
        _backend_of(head, backend, shards),
        dtype=flat.dtype,
        device=flat.device,
        indexed=index is not None,
        entropy=entropy,
        needs=gradients_needed(head),
        positions=len(flat),
    )
    if not shards.alone:
        resolved = agreed(replace(resolved, shards=shards), head, inputs)
    # `flatten` has made autocast's casts; inside, autocast would only round fp32 scratch blocks
    with without_autocast(flat.device):
        if resolved.backend is None:
            if not waits.checks_at_once(head.weight.device):
                # autograd would index with them
                _check_values(inputs, options, len(head.weight))
            terms = _dense_terms(head, inputs, options)
        else:
            terms = fused_rows(head, inputs, tiles_for(head.weight, index, resolved), resolved)
    return unflatten(terms, shape)


def safety_logits(
    head: Head,
    inputs: RowInputs,
    options: LossOptions,
    *,
    backend: str | Backend = "auto",
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Compute the safety tokens' logits ``[N, K]`` where a position weight is above 0; else NaN.

    They are the training loss's own to the last bit. The vocabulary is not read, unless
    ``backend="dense"`` materialises it, and nothing is kept for a gradient.
    """
    shards = shards_of(shard, len(head.weight))
    check_inputs(head, inputs, options, None, shards)
    flat, rows = flatten(head, inputs)
    backend = _backend_of(head, backend, shards)
    chosen, _ = select_backend(backend, flat.weight.device, flat.hidden_states.dtype)
    if chosen is None:
        return row_terms(head, inputs, options, backend=backend).statistics.safety_logits
    with torch.no_grad(), without_autocast(flat.weight.device):
        labels = torch.full_like(rows.labels, -1)
        block = Block(whole_head(flat, chosen), labels, None, options, shards=shards)
        needed = rows.position_weights > 0
        return columns_over_shards(row_stages(chosen), block, needed).safety


def _backend_of(head: Head, backend: str | Backend, shards: Shards) -> str | Backend:
    """Refuse the oracle, which has no shards; a process without rows has nothing to compute."""
    if shards.alone:
        return backend
    if backend == "dense":
        raise ValueError(
            "backend='dense' with a split vocabulary: it materialises a whole head's logits; use "
            "'auto' or 'torch', or gather the weight."
        )
    return backend if len(head.weight) else EmptyBackend()


def check_inputs(
    head: Head,
    inputs: RowInputs,
    options: LossOptions,
    index: VocabularyIndex | None,
    shards: Shards = ALONE,
) -> None:
    """Raise ValueError for bad input; see ``linear_cross_entropy``.

    Where the host may not wait, the values are checked on the device, and found bad by a later call
    (`engine.rows.plan_rows`).
    """
    waits.judge_arrived()
    total = None if shards.alone else shards.total
    validate_loss_inputs(**head._asdict(), **inputs._asdict(), options=options, vocab_size=total)
    if waits.checks_at_once(head.weight.device):
        _check_values(inputs, options, total or len(head.weight))
    if index is None:
        return
    if not isinstance(index, VocabularyIndex):
        raise ValueError(f"index={index!r}: must be a VocabularyIndex or None.")
    index.check(head.weight)


def _check_values(inputs: RowInputs, options: LossOptions, vocab_size: int) -> None:
    validate_values(inputs.labels, inputs.position_weights, vocab_size, options)


def flatten(head: Head, inputs: RowInputs) -> tuple[Head, RowInputs]:
    """Reshape ``[..., ·]`` to ``[N, ·]``, and cast hidden states as autocast demands."""
    hidden, (labels, reference, weights) = head.hidden_states, inputs
    if reference is not None and reference.dim() > 1:
        reference = reference.reshape(-1, reference.shape[-1])
    if weights is not None:
        weights = weights.reshape(-1)
    # built anew, not by _replace, which torch 2.8 does not trace
    flat = _autocast(hidden)
    if hidden.dim() != 2:
        flat = flat.reshape(-1, hidden.shape[-1])
    head = Head(flat, head.weight, head.bias)
    return head, RowInputs(labels.reshape(-1).long(), reference, weights)


def gradients_needed(head: Head) -> tuple[bool, bool, bool]:
    """Whether hidden states, weight and bias need a gradient."""
    grad = torch.is_grad_enabled()
    hidden, weight, bias = (grad and x is not None and x.requires_grad for x in head)
    return hidden, weight, bias


def tiles_for(weight: Tensor, index: VocabularyIndex | None, resolved: Resolved) -> Tiles | None:
    """Cut the vocabulary; None on the exact path."""
    if not resolved.eps:
        return None
    trained = resolved.needs[1]
    with torch.no_grad():
        # label smoothing takes Σ_v z from the mean rows, which must be those of this weight
        fresh = trained or resolved.options.label_smoothing > 0
        tiles = tiles_of(weight, index, fresh=fresh, operands=resolved.dtype)
    if trained:
        # quantised rows are those of an earlier weight; hot tiles cost its own gradient too much
        tiles = tiles._replace(quantised=None, row_scales=None, hot=0)
    return tiles


def _autocast(hidden_states: Tensor) -> Tensor:
    """Cast as ``F.linear`` would under autocast, which leaves fp64 alone."""
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
    rows = oracle.dense_rows(**head._asdict(), **inputs._asdict(), options=options)
    dead, live = torch.zeros_like(rows.lse), torch.ones_like(rows.lse)
    statistics = Statistics(
        rows.lse,
        rows.lse_rest,
        rows.correct,
        dead,
        live,
        rows.entropy,
        rows.safety_logits,
        rows.log_rest,
    )
    return RowTerms(rows.cross_entropy, rows.penalty, statistics)


def unflatten(terms: RowTerms, shape: torch.Size) -> RowTerms:
    """Reshape ``[N, ...]`` to ``[..., ...]``."""
    if len(shape) == 1:
        return terms

    def view(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(shape + values.shape[1:])

    statistics = Statistics(*map(view, terms.statistics))
    return RowTerms(view(terms.cross_entropy), view(terms.penalty), statistics, terms.backend)
