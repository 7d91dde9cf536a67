"""What one stage hands to the next; every backend fills the same contracts.

::

    Head, Tiles ──screen──▶ TileMasses ──route──▶ Worklist ──refine──▶ Refined ──finish──▶ Dense
         └───────────────────────────── exact (every pair live) ──────────────────────────▶ Dense

    Dense ──rows.py──▶ losses, row gradients [R, D], Coefficients ──weight_gradients──▶ Gradients

A backend brings screen, route, refine, exact, combine and weight_gradients; the rest is shared.

Two backends can so be compared stage by stage. Everything here speaks of R rows, those of the N
positions that need the whole vocabulary; shapes otherwise use the symbols of ``options``. A
(row, tile) pair is *live* when the tile holds enough of the row's open probability, the part that
lies outside the label's tile, to be computed exactly; the other pairs are *dead*.
"""

from __future__ import annotations

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


class Wanted(NamedTuple):
    """What the caller will use, so that nothing else is computed.

    ``hidden``: the rows' gradients by the hidden states; ``masses``: each pair's dead mass, for the
    gradient of a trainable weight; ``entropy``: the entropy of each row; ``probabilities``: of an
    exact pass, for the same gradient, where they are few; a backend may leave them out.
    """

    hidden: bool
    masses: bool
    entropy: bool
    probabilities: bool = False


class Filter(NamedTuple):
    """The resolved precision: ``eps`` 0 is the exact pass, else ``screen`` names the screen.

    ``auto``: the screen was left to the backend, and may depend on how many rows there are.
    """

    eps: float
    screen: str
    reason: str
    auto: bool = False


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


class Dense(NamedTuple):
    """What R rows know of the whole vocabulary, fp32 (fp64 for fp64 inputs).

    Attributes:
        lse: ``[R]`` log-sum-exp.
        label_logit: ``[R]``, NaN on rows without a label.
        correct: ``[R]`` bool, the label's logit is the largest.
        dead_mass: ``[R]``, the probability that was screened but not refined.
        live_share: ``[R]``, the share of the tiles that was computed exactly.
        logit_sum: ``[R]`` Σ_v z, with label smoothing only.
        entropy: ``[R]`` nats, only when wanted.
        opened: ∂lse/∂h without the label's own term; only when hidden gradients are wanted.
        open_mass: ``[R]``, ``1 - p_y`` summed without cancellation; 1 without a label.
        smooth_gradient: ``[D]`` or ``[R, D]``: ∂(Σ_v z)/∂h, with label smoothing only.
        masses: ``[R, T]`` dead masses as probabilities, -1 on live pairs; only when wanted.
        slope: ``[R, T]``, see ``TileMasses``; only with a softcap and masses wanted.
        probabilities: ``[R, V]``, anything on the label's own; only when wanted.
    """

    lse: Tensor
    label_logit: Tensor
    correct: Tensor
    dead_mass: Tensor
    live_share: Tensor
    logit_sum: Tensor | None
    entropy: Tensor | None
    opened: OpenRows | None
    open_mass: Tensor
    smooth_gradient: Tensor | None
    masses: Tensor | None
    slope: Tensor | None
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
    """What a weight's gradient needs of the forward.

    ``lse [R]``, ``open_mass [R]``; after routing also ``tiles``, ``masses`` and ``slope``; after an
    exact pass perhaps ``probabilities``.
    """

    lse: Tensor
    open_mass: Tensor
    tiles: Tiles | None
    masses: Tensor | None
    slope: Tensor | None
    probabilities: Tensor | None = None


class SafetyTerm(NamedTuple):
    """The constraint's part of a weight's gradient: ``ids [K]``, ``weight [K, D]``, ``bias [K]``.

    Weight and bias rows in fp32 (fp64 for fp64 operands), to be added before the cast.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor


class Gradients(NamedTuple):
    """Gradients of weight ``[V, D]`` and bias ``[V]`` in their dtype; None where not asked for."""

    weight: Tensor | None
    bias: Tensor | None


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

    def exact(self, head: Head, labels: Tensor, options: LossOptions, wanted: Wanted) -> Dense:
        """Every pair live, in one pass."""
        ...

    def screen(self, head: Head, tiles: Tiles, options: LossOptions, screen: str) -> TileMasses:
        """Log-mass of every (row, tile) pair in the precision of ``screen``."""
        ...

    def route(self, masses: TileMasses, labels: Tensor, tiles: Tiles, eps: float) -> Worklist:
        """Live where the mass exceeds ``eps`` of the row's open mass; the label's tile always."""
        ...

    def refine(
        self,
        head: Head,
        labels: Tensor,
        tiles: Tiles,
        work: Worklist,
        options: LossOptions,
        wanted: Wanted,
    ) -> Refined:
        """Live pairs exactly, from the original operands, accumulated in fp32."""
        ...

    def combine(
        self,
        head: Head,
        labels: Tensor,
        opened: OpenRows,
        shares: RowShares,
        *,
        spare: bool,
    ) -> Tensor:
        """``∂/∂h [R, D]`` of what has these shares, in ``kept_dtype``.

        ``spare``: the opened rows will not be needed again, and may be used up.
        """
        ...

    def weight_gradients(
        self,
        head: Head,
        labels: Tensor,
        saved: Saved,
        coefficients: Coefficients,
        safety: SafetyTerm | None,
        options: LossOptions,
        needs: tuple[bool, bool],
    ) -> Gradients:
        """Gradients of weight and bias (``needs``), accumulated in fp32 and cast once."""
        ...
