"""One forward with labels: from deferred logits and targets to the loss that the model gets back.

Stage: `Fold`, target ``[n]`` → rows of the batch → position weights and references → both terms of
every row → what ``F.cross_entropy`` would have returned, with the penalty in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import Backend, RowTerms
from str_kernels.functional import LossParts, reduce_terms
from str_kernels.huggingface.constraint.positions import Positions, position_weights
from str_kernels.huggingface.constraint.reference_pass import safety_reference
from str_kernels.huggingface.constraint.references import ReferenceCache
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.patch.filtering import IndexSource
from str_kernels.huggingface.patch.notices import Notices
from str_kernels.huggingface.trl import TokenTerms, entropy_is_free, entropy_of
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms

Reference = Literal["adapter_off"] | ReferenceCache


@dataclass(frozen=True)
class LossContext:
    """What the loss of one forward is computed from, besides the logits and their targets.

    Attributes:
        model: the name of the model's class, for errors.
        options: of the patch.
        reference: of the patch.
        positions: of the patch.
        backend: of the patch.
        index: gives the vocabulary index for a call of the head.
        notices: where warnings go.
        arguments: of the model's forward, by name.
        aligned: the reference pass of this batch, if there was one.
        position_weights: ``[B, T]``, the weight of each position's logits in the constraint,
            instead of ``positions``; None: those.
        tokens: receives the terms of every token, if TRL asks for them.
    """

    model: str
    options: LossOptions
    reference: Reference
    positions: Positions
    backend: str | Backend
    index: IndexSource
    notices: Notices
    arguments: dict[str, Any] = field(default_factory=dict)
    aligned: Fold | None = None
    position_weights: Tensor | None = None
    tokens: TokenTerms | None = None


class Constrained(NamedTuple):
    """The constraint's inputs of n rows: ``reference [n, K]`` and ``weights [n]``."""

    reference: Tensor
    weights: Tensor


class FusedLoss(NamedTuple):
    """One loss of a forward and everything that it was computed from.

    ``operands``, ``options`` and ``inputs`` are arguments of ``row_terms``; ``constrained`` is None
    where the constraint took no part.
    """

    terms: RowTerms
    parts: LossParts
    constrained: Constrained | None
    operands: tuple[Tensor, Tensor, Tensor]
    options: LossOptions
    inputs: dict[str, Any]


class LabelledForward:
    """The owner of the logits of one forward with labels.

    Attributes:
        losses: every loss that was fused inside the forward; whoever reads them should drop them.
    """

    def __init__(self, context: LossContext) -> None:
        """Begin a forward."""
        self._context, self._inside = context, True
        self.losses: list[FusedLoss] = []
        self._fused = False

    def leave(self, outputs: Any) -> None:
        """End the forward; the constraint must have taken part in its loss.

        Raises:
            ValueError: the model computed a loss in a way that the patch cannot follow.
        """
        self._inside = False
        # the logits may outlive the step; these need not
        self._context = replace(self._context, arguments={}, aligned=None, tokens=None)
        has_loss = getattr(outputs, "loss", None) is not None or isinstance(outputs, tuple)
        if has_loss and self._context.options.constrained and not self._fused:
            raise ValueError(
                f"model={self._context.model}: computed its loss without a cross-entropy of its "
                "deferred logits, so the safety constraint took no part in it; it can be patched "
                "with safety=None only."
            )

    def logits_read(self, by: str, size: int) -> None:
        """Warn, once for every function, that the logits were built in full."""
        self._context.notices.warn_materialised(by, size)

    def cross_entropy(
        self,
        fold: Fold,
        target: Tensor,
        *,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        """``F.cross_entropy(logits, target, ...)``, fused; inside the forward with the penalty."""
        context, constrain = self._context, self._joins_constraint()
        options = replace(
            context.options,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=fold.logit_scale,
            softcap=fold.softcap,
            safety=context.options.safety if constrain else None,
        )
        _require_whole(fold.weight)
        labels, rows = target.reshape(-1), fold.rows.reshape(-1)
        constrained = _constrained(context, fold, labels, ignore_index) if constrain else None
        reference, weights = constrained or (None, None)
        operands = (_states(fold), fold.weight, labels)
        index, tokens = context.index.find(fold, options), context.tokens if self._inside else None
        inputs = {"bias": fold.bias, "index": index, "backend": context.backend}
        terms = row_terms(
            *operands,
            options,
            reference=reference,
            position_weights=weights,
            entropy=tokens is not None and entropy_is_free(operands[0], options, inputs),
            **inputs,
        )
        loss, parts = reduce_terms(terms, labels, ignore_index=ignore_index, reduction=reduction)
        if tokens is not None:
            if terms.statistics.entropy is None:
                found = terms.statistics._replace(entropy=entropy_of(operands, options, inputs))
                terms = terms._replace(statistics=found)
            tokens.record(terms, labels != ignore_index, rows, _batch_shape(context, fold))
        if self._inside:
            self._fused = True
            self.losses.append(FusedLoss(terms, parts, constrained, operands, options, inputs))
        return loss.reshape(target.shape) if reduction == "none" else loss

    def _joins_constraint(self) -> bool:
        """Whether this cross-entropy is the model's own loss; there can be one only."""
        if not self._context.options.constrained:
            return False
        if not self._inside:
            self._context.notices.warn_unconstrained(
                "a cross-entropy of outputs.logits is that alone; the constraint is in outputs.loss"
            )
            return False
        if self._fused:
            raise ValueError(
                f"model={self._context.model}: computes more than one cross-entropy from its head, "
                "and the safety constraint can stand in one only; patch it with safety=None."
            )
        return True


def _constrained(
    context: LossContext, fold: Fold, labels: Tensor, ignore_index: int
) -> Constrained:
    rows = fold.rows.reshape(-1)
    table = _weights(context, fold, labels, ignore_index)
    if isinstance(context.reference, ReferenceCache):
        reference = _cached(context, fold)
    else:
        reference = _computed(context, fold, table > 0)
    return Constrained(reference[rows], table[rows])


def _weights(context: LossContext, fold: Fold, labels: Tensor, ignore_index: int) -> Tensor:
    """Weights ``[R]`` of the rows of the head's call, from the labels that reached the loss."""
    shape, rows = _batch_shape(context, fold), fold.rows.reshape(-1)
    given = context.position_weights
    if given is not None:
        if given.shape != shape:
            raise ValueError(
                f"position_weights={list(given.shape)}: must have one number for each row of the "
                f"head, {list(shape)}."
            )
        return given.to(labels.device, torch.float32).reshape(-1)
    every = labels.new_full((shape.numel(),), ignore_index)
    every[rows] = labels
    scored = torch.zeros_like(every, dtype=torch.bool)
    scored[rows] = True
    weights = position_weights(
        every.reshape(shape),
        context.positions,
        ignore_index=ignore_index,
        attention_mask=context.arguments.get("attention_mask"),
        packing=context.arguments,
        scored=scored.reshape(shape),
    )
    return weights.reshape(-1)


def _batch_shape(context: LossContext, fold: Fold) -> torch.Size:
    """``[B, T]`` of the rows that the head was called with."""
    shape, ids = fold.batch_shape, context.arguments.get("input_ids")
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
    if context.aligned.batch_shape != fold.batch_shape:
        raise ValueError(
            f"reference='adapter_off': with labels the head is called with rows "
            f"{list(fold.batch_shape)}, without them {list(context.aligned.batch_shape)}; use a "
            "cache file."
        )
    return safety_reference(context.aligned, constrained, context.options, context.backend)


def _cached(context: LossContext, fold: Fold) -> Tensor:
    """References ``[R, K]`` from a cache file."""
    ids = context.arguments.get("input_ids")
    if ids is None or ids.shape != _batch_shape(context, fold):
        raise ValueError(
            "input_ids: a reference cache is looked up by token ids [B, T], one for each row "
            f"of the head, {list(fold.batch_shape)}."
        )
    values = context.reference.lookup(ids, context.arguments.get("attention_mask"))
    return values.reshape(-1, values.shape[-1]).to(fold.device)


def _states(fold: Fold) -> Tensor:
    """Hidden states ``[n, D]``, in the dtype that ``F.linear`` would have met."""
    states = fold.hidden_states.reshape(-1, fold.hidden_states.shape[-1])
    if torch.is_autocast_enabled(states.device.type):
        return states
    return states.to(fold.weight.dtype)


def _require_whole(weight: Tensor) -> None:
    storage = weight.untyped_storage()
    if weight.numel() and storage.size() == 0:
        raise ValueError(
            "the head's weight was freed between the head and the loss (a head in an FSDP group of "
            "its own?): keep the head in the root group, or set reshard_after_forward=False for it."
        )
