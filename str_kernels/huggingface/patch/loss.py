"""One forward with labels: from deferred logits and targets to the loss that the model gets back.

Stage: `Fold`, target ``[n]`` → position weights and references → both terms of every row → what
``F.cross_entropy`` would have returned, with the penalty in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import Head, RowInputs, RowTerms
from str_kernels.functional import LossParts, reduce_terms
from str_kernels.huggingface.constraint.sequences import Sequences
from str_kernels.huggingface.deferred.fold import Fold
from str_kernels.huggingface.patch.context import LossContext
from str_kernels.huggingface.patch.rows import Constrained, batch_shape, constrained_rows
from str_kernels.huggingface.trl import SumOnly, entropy_is_free, entropy_of
from str_kernels.options import LossOptions
from str_kernels.terms import row_terms


class FusedLoss(NamedTuple):
    """One loss of a forward and everything that it was computed from.

    ``operands``, ``options`` and ``inputs`` are arguments of ``check_accuracy``; ``constrained`` is
    None where the constraint took no part.
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
        running: whether the forward has not returned yet.
        losses: every loss that was fused inside the forward; whoever reads them should drop them.
    """

    def __init__(self, context: LossContext) -> None:
        """Begin a forward."""
        self._context, self._fused = context, False
        self.running = True
        self.losses: list[FusedLoss] = []

    def leave(self, outputs: Any) -> None:
        """End the forward; the constraint must have taken part in its loss.

        Raises:
            ValueError: the model computed a loss in a way that the patch cannot follow.
        """
        self.running = False
        # the logits may outlive the step; these need not
        self._context = replace(self._context, sequences=Sequences(), aligned=None, tokens=None)
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
        safety = self._context.options.safety if self._joins_constraint() else None
        options = replace(
            self._context.options,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logit_scale=fold.logit_scale,
            softcap=fold.softcap,
            safety=safety,
        )
        loss = self._fuse(fold, target.reshape(-1), options)
        if reduction != "none":
            return loss
        loss = loss.reshape(target.shape)
        # whoever weighs or leaves out tokens would do so with the penalty
        return loss if safety is None else SumOnly.of(loss)

    def _fuse(self, fold: Fold, labels: Tensor, options: LossOptions) -> Tensor:
        context, tokens = self._context, self._context.tokens if self.running else None
        constrained = reference = weights = None
        if options.safety is not None:
            constrained = constrained_rows(context, fold, labels, options.ignore_index)
            reference, weights = constrained
        operands, index = (
            (_states(fold), fold.weight, labels),
            context.index.find(fold, options, context.together),
        )
        inputs = {"bias": fold.bias, "index": index, "backend": context.backend}
        inputs["shard"] = fold.shard
        terms = row_terms(
            Head(*operands[:2], fold.bias),
            RowInputs(labels, reference, weights),
            options,
            index=index,
            backend=context.backend,
            shard=fold.shard,
            entropy=tokens is not None and entropy_is_free(operands[0], options, inputs),
        )
        loss, parts = self._reduced(terms, labels, options)
        if tokens is not None:
            entropy = terms.statistics.entropy
            if entropy is None:
                entropy = entropy_of(operands, options, inputs)
            labelled, rows = labels != options.ignore_index, fold.rows.reshape(-1)
            tokens.record(terms, entropy, labelled, rows=rows, shape=batch_shape(context, fold))
        if self.running:
            self._fused = True
            self.losses.append(FusedLoss(terms, parts, constrained, operands, options, inputs))
        return loss

    def _reduced(
        self, terms: RowTerms, labels: Tensor, options: LossOptions
    ) -> tuple[Tensor, LossParts]:
        """The loss; a mean over a part of sequences has the penalty of all parts.

        Whoever averages the means of processes weighs each as its labels (DeepSpeed's sequence
        parallelism), and a part without any would lose its constraint.
        """
        loss, parts = reduce_terms(terms, labels, options)
        split = self._context.split
        if split is None or options.safety is None or options.reduction != "mean":
            return loss, parts
        unconstrained = replace(options, safety=None)
        cross_entropy, _ = reduce_terms(terms, labels, unconstrained)
        penalty = split.mean(terms.penalty.sum(), parts.num_labels)
        return cross_entropy + penalty, replace(parts, penalty=penalty.detach())

    def _joins_constraint(self) -> bool:
        """Whether this cross-entropy is the model's own loss; there can be one only."""
        if not self._context.options.constrained:
            return False
        if not self.running:
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


def _states(fold: Fold) -> Tensor:
    """Hidden states ``[n, D]``, in the dtype that ``F.linear`` would have met."""
    states = fold.hidden_states.reshape(-1, fold.hidden_states.shape[-1])
    if torch.is_autocast_enabled(states.device.type):
        return states
    return states.to(fold.weight.dtype)
