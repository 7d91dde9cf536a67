"""One forward with labels: from deferred logits and targets to the loss that the model gets back.

Stage: `Fold`, target ``[n]`` → rows of the batch → position weights and references → both terms of
every row → what ``F.cross_entropy`` would have returned, with the penalty in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from str_kernels.functional import reduce_terms
from str_kernels.huggingface.positions import position_weights
from str_kernels.huggingface.recording import Fold
from str_kernels.huggingface.reference_pass import safety_reference
from str_kernels.huggingface.sft import TokenTerms, entropy_is_free, entropy_of
from str_kernels.safety.references import ReferenceCache
from str_kernels.terms import row_terms

if TYPE_CHECKING:
    from str_kernels.huggingface.patch import Patch


class LabelledForward:
    """The owner of the logits of one forward with labels.

    Args:
        patch: settings, and where the statistics go.
        arguments: of the model's forward, by name.
        aligned: the reference pass of this batch, if the patch has one.
        tokens: filled with the terms of every token, if somebody wants them.
        position_weights: ``[B, T]``, what each position's logits count in the constraint, in place
            of the patch's ``positions``; None: those.
    """

    def __init__(
        self,
        patch: Patch,
        arguments: dict[str, Any],
        aligned: Fold | None,
        tokens: TokenTerms | None = None,
        position_weights: Tensor | None = None,
    ) -> None:
        self._patch, self._arguments, self._aligned = patch, arguments, aligned
        self._tokens, self._given = tokens, position_weights
        self._inside = True
        self.fused = False

    def leave(self, outputs: Any) -> None:
        """The forward is over: the constraint must have had its part in the loss.

        Raises:
            ValueError: the model computed a loss in a way that the patch cannot follow.
        """
        self._inside = False
        self._arguments, self._aligned = {}, None  # the logits may outlive the step; these need not
        has_loss = getattr(outputs, "loss", None) is not None or isinstance(outputs, tuple)
        if has_loss and self._patch.options.constrained and not self.fused:
            raise ValueError(
                f"model={type(self._patch.model).__name__}: computed its loss without a "
                "cross-entropy of its deferred logits, so the safety constraint took no part in "
                "it; it can be patched with safety=None only."
            )

    def logits_read(self, by: str, size: int) -> None:
        """Say once for every function that the logits were built in full."""
        self._patch.notices.say_materialised(by, size)

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
        patch = self._patch
        constrain = self._joins_constraint()
        options = replace(
            patch.options,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=fold.logit_scale,
            softcap=fold.softcap,
            safety=patch.options.safety if constrain else None,
        )
        _require_whole(fold.weight)
        labels, rows = target.reshape(-1), fold.rows.reshape(-1)
        weights = reference = None
        if constrain:
            table = self._weights(fold, labels, rows, ignore_index)
            weights, reference = table[rows], self._reference(fold, rows, table > 0)
        arguments = (_states(fold), fold.weight, labels)
        inputs = {
            "bias": fold.bias,
            "index": patch.vocabulary_index(fold),
            "backend": patch.backend,
        }
        tokens = self._tokens if self._inside else None
        terms = row_terms(
            *arguments,
            options,
            reference=reference,
            position_weights=weights,
            entropy=tokens is not None and entropy_is_free(arguments[0], options, inputs),
            **inputs,
        )
        loss, parts = reduce_terms(terms, labels, ignore_index=ignore_index, reduction=reduction)
        if self._inside:
            self.fused = True
            if tokens is not None:
                if terms.entropy is None:
                    terms = terms._replace(entropy=entropy_of(arguments, options, inputs))
                tokens.record(terms, labels != ignore_index, rows, self._batch_shape(fold))
            patch.observe(terms, parts, (reference, weights) if constrain else None)
            patch.check_accuracy(arguments, options=options, **inputs)
        return loss.reshape(target.shape) if reduction == "none" else loss

    def _joins_constraint(self) -> bool:
        """Whether this cross-entropy is the model's own loss, of which there can be one."""
        if not self._patch.options.constrained:
            return False
        if not self._inside:
            self._patch.notices.say_unconstrained(
                "a cross-entropy of outputs.logits is that alone; the constraint is in outputs.loss"
            )
            return False
        if self.fused:
            raise ValueError(
                f"model={type(self._patch.model).__name__}: computes more than one cross-entropy "
                "from its head, and the safety constraint can stand in one only; "
                "patch it with safety=None."
            )
        return True

    def _weights(self, fold: Fold, labels: Tensor, rows: Tensor, ignore_index: int) -> Tensor:
        """Weights ``[R]`` of the rows of the head's call, from the labels that reached the loss."""
        shape = self._batch_shape(fold)
        if self._given is not None:
            return self._given_weights(shape, labels.device)
        every = labels.new_full((shape.numel(),), ignore_index)
        every[rows] = labels
        scored = torch.zeros_like(every, dtype=torch.bool)
        scored[rows] = True
        weights = position_weights(
            every.reshape(shape),
            self._patch.positions,
            ignore_index=ignore_index,
            attention_mask=self._arguments.get("attention_mask"),
            packing=self._arguments,
            scored=scored.reshape(shape),
        )
        return weights.reshape(-1)

    def _given_weights(self, shape: torch.Size, device: torch.device) -> Tensor:
        if self._given.shape != shape:
            raise ValueError(
                f"position_weights={list(self._given.shape)}: must have one number for each row of "
                f"the head, {list(shape)}."
            )
        return self._given.to(device, torch.float32).reshape(-1)

    def _batch_shape(self, fold: Fold) -> torch.Size:
        """``[B, T]`` of the rows that the head was called with."""
        shape, ids = fold.batch_shape, self._arguments.get("input_ids")
        if len(shape) == 1 and ids is not None and ids.dim() == 2 and ids.numel() == shape.numel():
            return ids.shape
        if len(shape) != 2:
            raise ValueError(
                f"model={type(self._patch.model).__name__}: calls its head with rows "
                f"{list(shape)}, not [B, T], so the safety constraint cannot tell sequences apart."
            )
        return shape

    def _reference(self, fold: Fold, rows: Tensor, constrained: Tensor) -> Tensor:
        """``[n, K]`` for these rows."""
        patch = self._patch
        if isinstance(patch.reference, ReferenceCache):
            return self._cached(fold, patch.reference)[rows]
        if self._aligned.batch_shape != fold.batch_shape:
            raise ValueError(
                f"reference='adapter_off': with labels the head is called with rows "
                f"{list(fold.batch_shape)}, without them {list(self._aligned.batch_shape)}; use a "
                "cache file."
            )
        return safety_reference(self._aligned, constrained, patch.options, patch.backend)[rows]

    def _cached(self, fold: Fold, cache: ReferenceCache) -> Tensor:
        ids = self._arguments.get("input_ids")
        if ids is None or ids.shape != self._batch_shape(fold):
            raise ValueError(
                "input_ids: a reference cache is looked up by token ids [B, T], one for each row "
                f"of the head, {list(fold.batch_shape)}."
            )
        values = cache.lookup(ids, self._arguments.get("attention_mask"))
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
