"""What one stage hands to the next; every backend fills the same contracts.

::

    Head, RowPlan ──statistics──▶ RowStatistics ──finish──▶ loss rows
                                        │
                   upstream gradient ──finish──▶ RowCoefficients ──gradients──▶ Gradients

Two backends can so be compared stage by stage. Shapes use the symbols of ``options``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from str_kernels.options import LossOptions


class Head(NamedTuple):
    """The operands of the logits: ``hidden_states [N, D]``, ``weight [V, D]``, ``bias [V]``.

    One dtype for all, as ``F.linear`` demands, except under autocast: there the hidden states come
    in autocast's dtype and a backend casts the weight block by block, never as a whole.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None


class RowPlan(NamedTuple):
    """Which rows need what.

    ``labels [N]`` int64; ``labelled [N]``: rows with a cross-entropy; ``dense [N]``: rows that need
    the whole vocabulary; ``safety [N]``: rows that need the K safety columns.
    """

    labels: Tensor
    labelled: Tensor
    dense: Tensor
    safety: Tensor


class RowStatistics(NamedTuple):
    """What the forward keeps of the logits, fp32 (fp64 for fp64 inputs).

    ``lse [N]`` and ``label_logit [N]`` are NaN on rows outside ``plan.dense``, ``safety_logits
    [N, K]`` on rows outside ``plan.safety``. ``correct [N]`` bool: the label's logit is the row's
    maximum. ``logit_sum [N]`` only with label smoothing, ``entropy [N]`` (nats) only when asked.
    """

    lse: Tensor
    label_logit: Tensor
    safety_logits: Tensor | None
    correct: Tensor
    logit_sum: Tensor | None
    entropy: Tensor | None


class RowCoefficients(NamedTuple):
    """``dz[n,v] = α[n]·p[n,v] + Σ_k β[n,k]·[v = id_k] - γ[n]·[v = y_n] - σ[n]``.

    ``alpha [N]``, ``beta [N, K]`` or None, ``gamma [N]``, ``sigma [N]`` or None (label smoothing).
    All are zero, never NaN, on rows that do not carry the term, unless a NaN got there by itself.
    """

    alpha: Tensor
    beta: Tensor | None
    gamma: Tensor
    sigma: Tensor | None


class Gradients(NamedTuple):
    """Gradients in the dtype of their tensor; None where none was asked for."""

    hidden_states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@runtime_checkable
class Backend(Protocol):
    """A way to compute the two expensive stages."""

    name: str

    def statistics(
        self, head: Head, plan: RowPlan, options: LossOptions, *, entropy: bool = False
    ) -> RowStatistics:
        """Forward: one pass over the vocabulary, no logits kept."""
        ...

    def gradients(
        self,
        head: Head,
        plan: RowPlan,
        lse: Tensor,
        coefficients: RowCoefficients,
        options: LossOptions,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        """Backward: ``needs`` says whether hidden states, weight and bias want a gradient."""
        ...
