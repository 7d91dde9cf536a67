"""`linear_cross_entropy`: validate, choose a backend, apply, reduce.

Stage: hidden states ``[..., D]`` and the head's weight ``[V, D]`` → the loss. The patch of Hugging
Face models calls its two halves, ``row_terms`` and ``reduce_terms``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from str_kernels.backends.selection import check_backend
from str_kernels.engine.contract import Backend, Head, RowInputs, RowTerms
from str_kernels.engine.reduce import totals_of
from str_kernels.engine.shards import VocabularyShard
from str_kernels.operator import traced_terms
from str_kernels.options import LossOptions, Reduction, SafetyConstraint, Screen
from str_kernels.split import is_split, split_terms
from str_kernels.terms import row_terms
from str_kernels.validation import validate_num_items
from str_kernels.vocabulary import VocabularyIndex


@dataclass(frozen=True)
class LossParts:
    """The parts of the loss; detached, fp32 (fp64 for fp64 inputs).

    ``loss = cross_entropy + penalty``; both are reduced as the loss is, and ``penalty`` has the
    factor λ. ``lse [...]`` is NaN on positions that did not need the vocabulary, ``safety_logits
    [..., K]`` (None without a constraint) on those that needed no logit. ``num_correct`` of the
    ``num_labels`` labelled positions have a label with the largest logit; both are int64 scalars on
    the device. ``dead_mass [...]`` is the probability that the filter did not compute exactly,
    ``live_share [...]`` the share of the vocabulary's tiles that it did, NaN as ``lse``.
    """

    cross_entropy: Tensor
    penalty: Tensor
    lse: Tensor
    safety_logits: Tensor | None
    dead_mass: Tensor
    live_share: Tensor
    num_correct: Tensor
    num_labels: Tensor

    @property
    def token_accuracy(self) -> Tensor:
        """The share of labelled positions predicted right; 0 if there are none."""
        return self.num_correct / self.num_labels.clamp(min=1)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    safety: SafetyConstraint | None = None,
    reference: Tensor | None = None,
    position_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    filter_eps: float | Literal["auto"] = "auto",
    screen: Screen = "auto",
    index: VocabularyIndex | None = None,
    shard: VocabularyShard | None = None,
    backend: str | Backend = "auto",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, LossParts]:
    """Cross-entropy of a linear head plus a safety-token constraint, without storing the logits.

    ``z = softcap · tanh(logit_scale · (H Wᵀ + b) / softcap)``, ``CE = -log softmax(z)[y]``, and ::

        loss = (Σ CE + strength · Σ w · C) / n

    with C of ``SafetyConstraint`` (arXiv 2604.17210), w the ``position_weights`` and n the number
    of labelled positions or ``num_items_in_batch``. It is differentiable once by ``hidden_states``,
    ``weight`` and ``bias``, and computes only the gradients that these require. Second derivatives
    (``create_graph=True``), forward-mode AD and ``torch.func`` need ``backend="dense"``.

    Args:
        hidden_states: ``[..., D]`` bf16, fp16, fp32 or fp64.
        weight: ``[V, D]``, same dtype and device; under autocast any of these dtypes. A
            ``DTensor`` that is split by rows needs no ``shard``.
        labels: ``[...]`` int64 or int32, already shifted: position i is compared with label i.
        bias: ``[V]``.
        safety: the constraint, or None.
        reference: the constraint's r, ``[..., K]`` or ``[K]`` (K + 1 for ``kl_mass``); a constant.
        position_weights: w ``[...]``, finite and 0 or more; None: 1 where there is a label.
        ignore_index: the label of positions without a target.
        reduction: ``"mean"`` as above; ``"sum"`` without n; ``"none"`` gives ``CE + strength · w ·
            C`` of every position, ``[...]``, each with its own upstream gradient.
        num_items_in_batch: n, counted by the trainer over accumulation steps and processes.
        logit_scale: factor of the logits, applied after the bias.
        softcap: bound of the logits, applied last; in logit units.
        label_smoothing: ε in ``(1 - ε) CE + ε · mean_v(lse - z_v)``; 0 to 1.
        z_loss: ζ in ``+ ζ · lse²``; 0 or more.
        filter_eps: a tile of 128 tokens is approximated (by its screened mass and mean row) if it
            holds at most this share of the probability outside the label's tile. 0.0 is exact;
            ``"auto"`` is 2⁻¹¹ with an index or a cheaper screen by name, and 0.0 otherwise; on a
            GPU it is 0.0 for few positions too (512 in 16 bits), which are faster exactly. A row's
            loss then moves by the filter's error with N; a number keeps the filter the same.
        screen: precision of the pass that finds those tiles: ``"exact"`` (the inputs' own),
            ``"bf16"``, ``"int8"``, ``"fp8"``; ``"auto"`` chooses by device.
        index: a clustered order of the vocabulary, in which few tiles matter; None: token order.
        shard: which rows of the head ``weight`` and ``bias`` are, where several processes have one
            part each; all have the same hidden states and labels, and get the same loss. The index
            is one of the part.
        backend: ``"auto"`` (Triton on CUDA and ROCm, torch elsewhere), ``"triton"``, ``"torch"``,
            ``"dense"`` (materialises the logits) or a ``Backend``.
        return_parts: also return ``LossParts``.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or ``[...]`` for ``"none"``. Without any
        label it is a zero with zero gradients. NaN and inf in a row's inputs make it NaN or inf.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.
    """
    options = LossOptions(
        ignore_index=ignore_index,
        reduction=reduction,
        logit_scale=logit_scale,
        softcap=softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        filter_eps=filter_eps,
        screen=screen,
        safety=safety,
    )
    validate_num_items(num_items_in_batch, reduction)
    head, inputs = Head(hidden_states, weight, bias), RowInputs(labels, reference, position_weights)
    if shard is not None or is_split(weight):
        terms = split_terms
        if torch.compiler.is_compiling():
            from str_kernels.untraced import split_terms as terms

        rows = terms(head, inputs, options, index=index, backend=backend, shard=shard)
    elif torch.compiler.is_compiling() and backend != "dense":
        rows = traced_terms(head, inputs, options, index, backend)
    else:
        rows = row_terms(head, inputs, options, index=index, backend=backend)
    loss, parts = reduce_terms(rows, labels, options, num_items_in_batch)
    return (loss, parts) if return_parts else loss


def reduce_terms(
    rows: RowTerms,
    labels: Tensor,
    options: LossOptions,
    num_items_in_batch: int | float | Tensor | None = None,
) -> tuple[Tensor, LossParts]:
    """Reduce both terms with one denominator; see ``linear_cross_entropy``."""
    totals, statistics = totals_of(rows, labels, options, num_items_in_batch), rows.statistics
    cross_entropy = totals.cross_entropy.detach()
    if totals.cross_entropy is totals.loss:  # which the caller may change in place
        cross_entropy = cross_entropy.clone()
    parts = LossParts(
        cross_entropy,
        totals.penalty.detach(),
        statistics.lse.detach(),
        None if statistics.safety_logits is None else statistics.safety_logits.detach(),
        statistics.dead_mass.detach(),
        statistics.live_share.detach(),
        totals.num_correct,
        totals.num_labels,
    )
    return totals.loss, parts


class LinearCrossEntropyLoss(nn.Module):
    """``linear_cross_entropy`` with fixed settings; arguments and errors are the same.

    >>> loss = LinearCrossEntropyLoss(softcap=30.0)(hidden_states, lm_head.weight, labels)
    """

    def __init__(
        self,
        *,
        index: VocabularyIndex | None = None,
        shard: VocabularyShard | None = None,
        backend: str | Backend = "auto",
        return_parts: bool = False,
        **options: Any,
    ) -> None:
        """Check the settings, rather than at the first step; ``options`` are of `LossOptions`."""
        super().__init__()
        check_backend(backend)
        others = {"index": index, "shard": shard, "backend": backend}
        others["return_parts"] = return_parts
        self._settings: dict[str, Any] = vars(LossOptions(**options)) | others

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        reference: Tensor | None = None,
        position_weights: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossParts]:
        """Compute the loss; see ``linear_cross_entropy``."""
        return linear_cross_entropy(
            hidden_states,
            weight,
            labels,
            bias=bias,
            reference=reference,
            position_weights=position_weights,
            num_items_in_batch=num_items_in_batch,
            **self._settings,
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
