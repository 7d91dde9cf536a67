"""The constraint's inputs of one loss, row by row.

Stage: `Fold` with its row numbers, labels ``[n]`` → weights ``[n]``, references ``[n, K]``. Both
are made for all R rows of the head's call, and those of the loss are gathered from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.huggingface.constraint.positions import position_weights
from str_kernels.huggingface.constraint.reference_pass import safety_reference
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.huggingface.constraint.sequences import Sequences
from str_kernels.huggingface.constraint.share import Drawn, spread_rows
from str_kernels.huggingface.constraint.splits import Whole, gathered, require_whole
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.patch.context import LossContext
from str_kernels.options import LossOptions


class Constrained(NamedTuple):
    """The constraint's inputs of n rows: ``reference [n, K]`` and ``weights [n]``."""

    reference: Tensor
    weights: Tensor


def check_weights(weights: Any, options: LossOptions) -> None:
    """Refuse ``position_weights`` of a batch that are no weights, or have nothing to weigh.

    Raises:
        ValueError: no tensor of floating point, or no constraint.
    """
    if weights is None:
        return
    if options.safety is None:
        raise ValueError(
            "position_weights: weigh the positions of the safety constraint, and the model was "
            "patched with safety=None."
        )
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        given = getattr(weights, "dtype", type(weights).__name__)
        raise ValueError(f"position_weights={given}: must be a tensor [B, T] of floating point.")


def constrained_rows(
    context: LossContext, fold: Fold, labels: Tensor, ignore_index: int
) -> Constrained:
    """Weights and references of the rows whose targets are ``labels [n]``, already shifted."""
    rows, shape = fold.rows.reshape(-1), batch_shape(context, fold)
    every = labels.new_full((shape.numel(),), ignore_index)
    every[rows] = labels
    whole = _whole(context, every.reshape(shape))
    scored = torch.zeros_like(every, dtype=torch.bool)
    scored[rows] = True
    targets = Targets(every.reshape(shape), scored.reshape(shape), ignore_index)
    table = _drawn(_weights(context, targets, whole), context).reshape(-1)
    if isinstance(context.reference, ReferenceCache):
        reference = _cached(context, fold, whole)
    else:
        reference = _computed(context, fold, table > 0)
    return Constrained(reference[rows], table[rows])


class Targets(NamedTuple):
    """The labels of a batch ``[B, T]``, which positions reach the loss, and what is no label."""

    labels: Tensor
    scored: Tensor
    ignore_index: int


def _whole(context: LossContext, labels: Tensor) -> Whole | None:
    """The batch put together, where its sequences are split and something needs all of them."""
    split, cached = context.split, isinstance(context.reference, ReferenceCache)
    weighed = context.position_weights is None and context.positions != "labels"
    given = context.position_weights
    longer = given is not None and given.shape != labels.shape
    if split is None or not (cached or weighed or longer):
        return None
    return gathered(split, labels, context.sequences, ids=cached)


def _weights(context: LossContext, targets: Targets, whole: Whole | None) -> Tensor:
    """Weights ``[B, T]`` of the rows of the head's call, from the labels that reached the loss."""
    given = context.position_weights
    if given is not None:
        return _given_weights(context, targets.labels, whole)
    if context.positions == "labels":
        return (targets.labels != targets.ignore_index).float()
    if whole is None:
        arguments, training = context.sequences.packing, not context.evaluating
        require_whole(arguments, training=training, positions=context.positions)
        return _weighed(context, targets, context.sequences)
    everything = Targets(whole.labels, torch.ones_like(whole.labels) > 0, targets.ignore_index)
    return whole.mine(_weighed(context, everything, whole.sequences))


def _weighed(context: LossContext, targets: Targets, sequences: Sequences) -> Tensor:
    return position_weights(
        targets.labels,
        context.positions,
        ignore_index=targets.ignore_index,
        attention_mask=sequences.mask,
        mask_name=sequences.mask_name,
        packing=sequences.packing,
        scored=targets.scored,
    )


def _given_weights(context: LossContext, labels: Tensor, whole: Whole | None) -> Tensor:
    """The batch's own weights: of the rows of the head's call, or of the whole sequences."""
    given = context.position_weights.to(labels.device, torch.float32)
    if context.sequences.source == "labels":
        raise ValueError(
            "position_weights: weigh the positions of an encoder-decoder's decoder_input_ids, "
            "which must be in the batch then; rows that are constrained and not learned have "
            "none in their labels (AnchoredCollator is for models without an encoder)."
        )
    if whole is not None and given.shape == whole.labels.shape:
        return whole.mine(given)
    if given.shape != labels.shape:
        raise ValueError(
            f"position_weights={list(given.shape)}: must have one number for each row of the "
            f"head, {list(labels.shape)}."
        )
    return given


def _drawn(weights: Tensor, context: LossContext) -> Tensor:
    """Weights ``[B, T]`` of the drawn rows of the batch alone, divided by their share."""
    drawn = context.drawn
    if drawn is None:
        return weights
    if len(weights) != drawn.size:
        raise ValueError(
            f"share={drawn.share}: model={context.model} calls its head with rows "
            f"{list(weights.shape)}, not one for each of the batch's {drawn.size}; leave share=1."
        )
    return weights * drawn.factors(weights.device)[:, None]


def batch_shape(context: LossContext, fold: Fold) -> torch.Size:
    """``[B, T]`` of the rows that the head was called with."""
    shape, ids = fold.batch_shape, context.sequences.ids
    if len(shape) == 1 and ids is not None and ids.dim() == 2 and ids.numel() == shape.numel():
        return ids.shape
    if len(shape) != 2:
        raise ValueError(
            f"model={context.model}: calls its head with rows {list(shape)}, not [B, T], so the "
            "safety constraint cannot tell sequences apart."
        )
    return shape


def _computed(context: LossContext, fold: Fold, constrained: Tensor) -> Tensor:
    """References ``[R, K]`` from the pass with the adapters off."""
    drawn, count = context.drawn, fold.batch_shape.numel()
    if context.aligned is None:  # no row of this batch is constrained
        return fold.hidden_states.new_zeros(count, context.options.safety.references)
    if drawn is not None:
        return _computed_share(context, fold, constrained, drawn)
    if context.aligned.batch_shape != fold.batch_shape:
        raise ValueError(
            f"reference='adapter_off': with labels the head is called with rows "
            f"{list(fold.batch_shape)}, without them {list(context.aligned.batch_shape)}; use a "
            "cache file."
        )
    aligned = context.aligned.lend_by(fold)
    return safety_reference(aligned, constrained, context.options, context.backend)


def _computed_share(context: LossContext, fold: Fold, constrained: Tensor, drawn: Drawn) -> Tensor:
    """References ``[R, K]`` from the pass of a part of the rows."""
    wanted, length = fold.batch_shape.numel() // drawn.size, len(drawn.passed)
    if context.aligned.batch_shape.numel() != wanted * length:
        raise ValueError(
            f"reference='adapter_off': with labels the head is called with rows "
            f"{list(fold.batch_shape)}, without them {list(context.aligned.batch_shape)} for "
            f"{length} of {drawn.size}; leave share=1."
        )
    part = constrained.reshape(drawn.size, wanted)[drawn.passed].reshape(-1)
    aligned = context.aligned.lend_by(fold)
    found = safety_reference(aligned, part, context.options, context.backend)
    return spread_rows(found, drawn)


def _cached(context: LossContext, fold: Fold, whole: Whole | None) -> Tensor:
    """References ``[R, K]`` from a cache file."""
    sequences = context.sequences
    if sequences.missing is not None or sequences.ids.shape != batch_shape(context, fold):
        raise ValueError(
            f"{sequences.missing or sequences.source}: a reference cache is looked up by token ids "
            f"[B, T], one for each row of the head, {list(fold.batch_shape)}."
        )
    places, evaluating = None, context.evaluating
    if whole is not None:
        sequences, places = whole.sequences, whole.places
    values = context.reference.find(sequences, places=places, evaluating=evaluating)
    return values.reshape(-1, values.shape[-1]).to(fold.device)
