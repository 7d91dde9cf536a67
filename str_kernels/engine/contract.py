"""What one stage hands to the next; every backend fills the same contracts.

::

    Block ──screen──▶ TileMasses ──route──▶ Worklist ──refine──▶ Refined ──finish──▶ Dense
      └──────────────────────── exact (every pair is live) ────────────────────────▶ Dense

    Dense ──rows──▶ RowTerms, Kept ──backward──▶ Coefficients ──weight_gradients──▶ gradients

A backend brings screen, route, refine, exact, combine and weight_gradients; the rest is shared, so
that two backends can be compared stage by stage. R counts the rows, among all N positions, that
need the whole vocabulary; other shapes use the symbols of ``options``. A (row, tile) pair is *live*
when the tile holds enough of the probability that lies outside the tile of the row's label; a live
pair is computed exactly. The other pairs are *dead*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from str_kernels.options import LossOptions


class Head(NamedTuple):
    """The operands of the logits: ``hidden_states [R, D]``, ``weight [V, D]``, ``bias [V]``.

    One dtype for all, as ``F.linear`` demands, except under autocast: there the hidden states come
    in autocast's dtype and a backend casts the weight block by block, never as a whole.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None


class Tiles(NamedTuple):
    """How the vocabulary is cut.

    ``order [V]`` int64 or None for token order, its ``inverse [V]``, and the tiles' ``mean_rows
    [T, D]`` fp32. ``quantised [V, D]`` and ``row_scales [V]`` come in tile order (8-bit screens).
    """

    order: Tensor | None
    inverse: Tensor | None
    mean_rows: Tensor
    quantised: Tensor | None = None
    row_scales: Tensor | None = None


class Block(NamedTuple):
    """R rows, the head and the cut of the vocabulary: what every stage reads.

    ``labels [R]`` int64, -1 on rows without a label; ``tiles`` is None on the exact path.
    """

    head: Head
    labels: Tensor
    tiles: Tiles | None
    options: LossOptions


class Wanted(NamedTuple):
    """What the caller will use, so that nothing else is computed.

    ``hidden``: the rows' gradients by the hidden states; ``masses``: each pair's dead mass, for the
    gradient of a trainable weight; ``entropy``: the entropy of each row; ``probabilities``: those
    of an exact pass, for the gradient of a trainable weight; a backend may leave them out.
    """

    hidden: bool
    masses: bool
    entropy: bool
    probabilities: bool = False


class RowInputs(NamedTuple):
    """Constants of N rows: ``labels [N]``, ``reference [N, K]`` or ``[K]``, weights ``[N]``."""

    labels: Tensor
    reference: Tensor | None
    position_weights: Tensor | None


@dataclass(frozen=True)
class Resolved:
    """How one loss runs, after every choice.

    Attributes:
        backend: who computes the stages.
        options: the settings of the loss.
        eps: a pair is live above this share; 0 computes every pair exactly.
        screen: the precision of the screen.
        auto: whether the backend may change the screen once it knows how many rows there are.
        entropy: whether each row's entropy is computed.
        needs: whether hidden states, weight and bias will be asked for a gradient.
        dtype: the dtype of the hidden states, and of their gradient.
        reason: why this filter and no other.
    """

    backend: Backend
    options: LossOptions
    eps: float
    screen: str
    auto: bool
    entropy: bool
    needs: tuple[bool, bool, bool]
    dtype: torch.dtype
    reason: str = ""


class TileMasses(NamedTuple):
    """From the screen: ``log_mass [R, T]`` fp32, log Σ exp(z) over each tile.

    ``slope [R, T]``, with a softcap only: the tile's softmax mean of ``1 - (z/softcap)²``.
    """

    log_mass: Tensor
    slope: Tensor | None


class Worklist(NamedTuple):
    """From the router: the live pairs, tile by tile.

    ``rows``: the live rows of tile 0, then those of tile 1, …, ``[L]`` int64, or each tile's padded
    to ``[T, R]`` where L stays on the device: only the backend's own refinement reads them.
    ``counts [T]``: how many each tile has. ``shift [R]``: the screened log-sum-exp, a safe scale of
    exponentials. ``dead [R, T]``: the pair's share of ``exp(shift)``; a live pair has -0.0, so that
    sums pass over it and its sign tells it from a share that underflowed.
    """

    rows: Tensor
    counts: Tensor
    shift: Tensor
    dead: Tensor

    def live(self) -> Tensor:
        """``[R, T]`` bool."""
        return self.dead.signbit() & (self.dead == 0)


class Refined(NamedTuple):
    """From the refinement, over live pairs and *without the label*, relative to ``exp(shift)``.

    ``mass [R]``: Σ exp(z - shift); ``expected [R, D]`` or None: Σ exp(z - shift) · slope · w;
    ``maximum [R]``: the largest logit. The label is left out because for a confident row the
    expected embedding and the label's row nearly cancel.
    """

    mass: Tensor
    expected: Tensor | None
    maximum: Tensor


class OpenRows(NamedTuple):
    """``∂lse/∂h [R, D]`` without the label's own term, ``Σ_{v ≠ y} p_v · slope_v · w_v``.

    Not yet added up, for whoever adds the label's row can do it in the same pass: ``scale [R]``
    times the sum of ``live [R, D]`` and ``dead [R, D]``, None after an exact pass.
    """

    live: Tensor
    dead: Tensor | None
    scale: Tensor


class Statistics(NamedTuple):
    """What is known of each row besides its loss; fp32 (fp64 for fp64 inputs).

    ``lse`` log-sum-exp; ``correct`` bool, whether the label has the largest logit; ``dead_mass``
    the probability that was screened but not refined; ``live_share`` the share of the tiles that
    was computed exactly; ``entropy`` in nats or None; ``safety_logits [·, K]`` or None.
    """

    lse: Tensor
    correct: Tensor
    dead_mass: Tensor
    live_share: Tensor
    entropy: Tensor | None
    safety_logits: Tensor | None = None


class Dense(NamedTuple):
    """What R rows know of the whole vocabulary, fp32 (fp64 for fp64 inputs).

    Attributes:
        statistics: of the R rows, without safety logits.
        label_logit: ``[R]``, NaN on rows without a label.
        open_mass: ``[R]``, ``1 - p_y`` summed without cancellation; 1 without a label.
        opened: ∂lse/∂h without the label's own term; only when hidden gradients are wanted.
        logit_sum: ``[R]`` Σ_v z, with label smoothing only.
        smooth_gradient: ``[D]`` or ``[R, D]``: ∂(Σ_v z)/∂h, with label smoothing only.
        masses: ``[R, T]`` dead masses as probabilities, -1 on live pairs; only when wanted.
        slope: ``[R, T]``, see ``TileMasses``; only with a softcap and masses wanted.
        probabilities: ``[R, V]``, anything on the label's own; only when wanted.
    """

    statistics: Statistics
    label_logit: Tensor
    open_mass: Tensor
    opened: OpenRows | None
    logit_sum: Tensor | None
    smooth_gradient: Tensor | None
    masses: Tensor | None = None
    slope: Tensor | None = None
    probabilities: Tensor | None = None


class RowTerms(NamedTuple):
    """Both loss terms of every position, differentiable, and its statistics; shapes ``[...]``."""

    cross_entropy: Tensor
    penalty: Tensor
    statistics: Statistics


class Kept(NamedTuple):
    """The tensors that wait from forward to backward, the same in eager and in compiled code.

    Inputs of the loss: ``labels``, ``reference``, ``position_weights`` (`RowInputs`), ``weight``;
    for a trainable head also ``hidden_states`` and ``bias``. Outputs: ``lse [N]`` and
    ``safety_logits [N, K]``. Made by the forward: ``rows [R]``, those that met the vocabulary;
    ``safety_alone [S]``, those that only met the safety tokens; ``ce_gradient [R, D]`` and
    ``lse_gradient [R, D]`` in ``kept_dtype``; for a trainable head ``open_mass [R]``,
    ``masses [R, T]``, ``slope [R, T]`` and ``probabilities [R, V]`` as in `Dense`.
    """

    labels: Tensor
    reference: Tensor | None
    position_weights: Tensor | None
    weight: Tensor
    hidden_states: Tensor | None
    bias: Tensor | None
    lse: Tensor
    safety_logits: Tensor | None
    rows: Tensor
    safety_alone: Tensor | None
    ce_gradient: Tensor | None
    lse_gradient: Tensor | None
    open_mass: Tensor | None
    masses: Tensor | None = None
    slope: Tensor | None = None
    probabilities: Tensor | None = None


class RowShares(NamedTuple):
    """``shares.opened · ∂lse/∂h without the label + shares.label · w_label + also``.

    ``opened [R]``; ``label [R]``, 0 where there is none; ``also [D]`` or ``[R, D]``; rows in
    ``silent [R]`` bool become zero, whatever stood there.
    """

    opened: Tensor
    label: Tensor
    also: Tensor | None = None
    silent: Tensor | None = None


class Coefficients(NamedTuple):
    """``dz[n,v] = α[n]·p[n,v] + Σ_k β[n,k]·[v = id_k] - γ[n]·[v = y_n] - σ[n]``, before the slope.

    ``alpha [R]``, ``gamma [R]``, ``sigma [R]`` or None (label smoothing). β belongs to the
    constraint and is handled with its K columns alone.
    """

    alpha: Tensor
    gamma: Tensor
    sigma: Tensor | None


class Saved(NamedTuple):
    """What R rows' part of a weight's gradient needs of the forward; see `Kept`."""

    lse: Tensor
    open_mass: Tensor
    masses: Tensor | None
    slope: Tensor | None
    probabilities: Tensor | None


class SafetyTerm(NamedTuple):
    """The constraint's part of a weight's gradient: ``ids [K]``, ``weight [K, D]``, ``bias [K]``.

    Weight and bias rows in fp32 (fp64 for fp64 operands), to be added before the cast.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor


@runtime_checkable
class Backend(Protocol):
    """A way to compute the stages that see the vocabulary. Labels are -1 on rows without one."""

    name: str

    def refuses(self, screen: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run this screen on operands of this dtype here; None if it can."""
        ...

    def auto_screen(self, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        """The screen that ``"auto"`` means for so many rows that meet the vocabulary."""
        ...

    def row_block(self, head: Head, rows: int, *, routed: bool) -> int:
        """How many of ``rows`` to hand over at once, from the byte budget alone."""
        ...

    def exact(self, block: Block, wanted: Wanted) -> Dense:
        """Compute every pair in one pass."""
        ...

    def screen(self, block: Block, screen: str) -> TileMasses:
        """Log-mass of every (row, tile) pair in the precision of ``screen``."""
        ...

    def route(self, block: Block, masses: TileMasses, eps: float) -> Worklist:
        """Find live pairs: above ``eps`` of the row's open mass, and always the label's tile."""
        ...

    def refine(self, block: Block, work: Worklist, wanted: Wanted) -> Refined:
        """Compute live pairs exactly, from the original operands, accumulated in fp32."""
        ...

    def combine(self, block: Block, opened: OpenRows, shares: RowShares, *, spare: bool) -> Tensor:
        """``∂/∂h [R, D]`` of what has these shares, in ``kept_dtype``.

        ``spare``: the opened rows are not needed afterwards, and may be overwritten.
        """
        ...

    def weight_gradients(
        self,
        block: Block,
        saved: Saved,
        coefficients: Coefficients,
        *,
        safety: SafetyTerm | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight ``[V, D]`` and bias ``[V]``, each if ``needs`` says so.

        They are accumulated in fp32 and cast to the operands' dtype once.
        """
        ...
