"""What one stage hands to the next; every backend fills the same contracts.

::

    Block ──screen──▶ TileMasses ──route──▶ Worklist ──refine──▶ Refined ──finish──▶ Dense
      └──────────────────────── exact (every pair is live) ────────────────────────▶ Dense

    Dense ──rows──▶ RowTerms, Kept ──backward──▶ Coefficients ──weight_gradients──▶ gradients

A backend brings screen, route, refine, exact, combine and weight_gradients; all backends share the
rest, so that two of them can be compared stage by stage. R counts the rows, among all N positions,
that need the whole vocabulary; other shapes use the symbols of ``options``. Four words recur:

- A (row, tile) pair is *live* when the tile holds the label, or enough of the probability outside
  the label's tile. A live pair is computed exactly; the other pairs are *dead*.
- *Open* probability is what a row does not give to its label: ``1 - p_y`` in `Dense`, and the
  probability outside the label's tile in routing, which does not know the label's logit yet.
- An *opened* gradient is ``∂lse/∂h`` without the label's own term.
- A *silent* row gets a gradient of zero, whatever was computed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from str_kernels import waits
from str_kernels.engine.shards import ALONE, Shards
from str_kernels.options import LossOptions

ABSENT = -2  # the label of a row of a block that needs no vocabulary; see `Block`
# The bias, in fp32 or fp64, of a token that sums over the vocabulary leave out; see `engine.rest`.
LEFT_OUT = -1.75 * 2.0**127


class Head(NamedTuple):
    """The operands of the logits: ``hidden_states [R, D]``, ``weight [V, D]``, ``bias [V]``.

    All have one dtype, as ``F.linear`` demands. Under autocast the hidden states have autocast's
    dtype instead, and a backend casts the weight block by block, never as a whole.
    """

    hidden_states: Tensor
    weight: Tensor
    bias: Tensor | None


class Tiles(NamedTuple):
    """How the vocabulary is cut into tiles.

    ``order [V]`` int64 or None for token order, its ``inverse [V]``, and the tiles' ``mean_rows
    [T, D]`` fp32. For 8-bit screens: ``quantised [V, D]`` and ``row_scales [V]`` in tile
    order, and ``columns [D]``, which multiply W and divide H before they are rounded; None: all 1.
    The first ``hot`` tiles are those of `VocabularyIndex.hot`; a backend may compute all their
    pairs exactly, which are live then.
    """

    order: Tensor | None
    inverse: Tensor | None
    mean_rows: Tensor
    quantised: Tensor | None = None
    row_scales: Tensor | None = None
    columns: Tensor | None = None
    hot: int = 0


class Listed(NamedTuple):
    """The rows that need the vocabulary, listed where the host does not count them.

    ``rows [N]`` int64: these rows in their order, and then the others; ``labels [N]`` int64, their
    labels in the order of ``rows``, and ``ABSENT`` for the others; ``places [N]`` int32, the same
    as places in the order of the vocabulary. ``off []`` int32 counts the rows whose screen was
    wrong; it begins with 0. ``count []`` int32: how many rows need the vocabulary.
    """

    rows: Tensor
    labels: Tensor
    places: Tensor
    off: Tensor
    count: Tensor


class Present:
    """How many of a call's N rows are not ``ABSENT``, for a host that has not counted them.

    A backend may send for the number, queue the rows it computes in any case, and then read.
    """

    def __init__(self, listed: Listed) -> None:
        """Nothing has been sent for."""
        self.total, self._count = len(listed.rows), listed.count
        self._sent: waits.Sent | None = None
        self._read: int | None = None

    def send(self) -> None:
        """Have the device send the number, unless it has."""
        if self._sent is None:
            self._sent = waits.send(self._count)

    def read(self) -> int:
        """Wait for the number; N where nothing can be sent, as while a CUDA graph is captured."""
        if self._read is None:
            self.send()
            self._read = self.total if self._sent is None else waits.read_sent(self._sent)
        return self._read


class RowPlan(NamedTuple):
    """Which of N rows need which computation.

    ``labels [N]`` int64, -1 where there is none; ``labelled [N]``: rows with a cross-entropy;
    ``dense [N]``: rows that need the whole vocabulary; ``safety [N]`` or None: rows that need the K
    safety columns; ``penalty_scale [N]`` or None: λ w. ``bad []`` or None: how many labels and
    weights are out of range, where they have not been checked before; their rows have NaN as the
    loss. ``listed``: only where the host must not count the dense rows.
    """

    labels: Tensor
    labelled: Tensor
    dense: Tensor
    safety: Tensor | None
    penalty_scale: Tensor | None
    bad: Tensor | None = None
    listed: Listed | None = None


class Columns(NamedTuple):
    """Logits of the few tokens that are always computed exactly; fp32 (fp64 for fp64 inputs).

    ``label [R]`` is that of each row's label, NaN on rows without one; ``anchor [R]``, on the
    routed path only, an offset of the row's logits, relative to which their masses are kept. The
    logarithm of a mass is then as small as logits differ, and has as many decimals. It is the
    largest logit of the label and a few other tokens, since one may be masked by -1e9. ``safety
    [R, K]`` are those of the safety tokens, with a constraint only, NaN on rows that need none;
    ``difference [R]`` is ``mean_v z_v - z_y``, with label smoothing on the routed path only.
    """

    label: Tensor
    anchor: Tensor | None = None
    safety: Tensor | None = None
    difference: Tensor | None = None

    def listed(self, rows: Tensor | None) -> Columns:
        """All but the safety logits in the order of ``rows [R]``; None leaves them as they are."""
        return self if rows is None else self.part(rows)._replace(safety=self.safety)

    def part(self, rows: Tensor | slice) -> Columns:
        """Those of some rows, but for the safety logits, which no block reads."""
        kept = (None if x is None else x[rows] for x in self._replace(safety=None))
        return Columns(*kept)


class Block(NamedTuple):
    """The input of every stage: R rows, the head and the tiles.

    ``labels [R]`` int64, -1 on rows without a label, ``ABSENT`` on rows that need no vocabulary and
    stand in the block since the host has not counted them; the results of these are undefined.
    ``tiles`` is None on the exact path; ``columns`` are computed before the vocabulary is read, and
    None only until then; ``places [R]`` int32 or None: the labels as places in the order, where
    they are known. ``present``: only where rows may be ``ABSENT``, and these stand last; ``start``
    rows of the call stand in earlier blocks. Where the vocabulary is split over processes, the head
    and the labels are this process's own: a label that another has is -1 here; ``everywhere [R]``
    has all of them, as rows of the whole head.
    """

    head: Head
    labels: Tensor
    tiles: Tiles | None
    options: LossOptions
    columns: Columns | None = None
    places: Tensor | None = None
    present: Present | None = None
    start: int = 0
    everywhere: Tensor | None = None
    shards: Shards = ALONE

    @property
    def vocab(self) -> int:
        """V, the rows of the head on all processes."""
        return self.shards.total or len(self.head.weight)

    @property
    def unlabelled(self) -> Tensor:
        """``[R]`` bool: rows without a label on any process."""
        return (self.labels if self.everywhere is None else self.everywhere) < 0


class Wanted(NamedTuple):
    """Which results the caller uses; a backend computes no others.

    ``hidden``: the gradients of the hidden states; ``masses``: each pair's dead mass, and
    ``probabilities``: those of an exact pass, both for the gradient of a trainable weight;
    ``entropy``: the entropy of each row. A backend may leave the probabilities out.
    """

    hidden: bool
    masses: bool
    entropy: bool
    probabilities: bool = False


class RowInputs(NamedTuple):
    """Constants of N rows: ``labels [N]``, ``reference [N, K]`` or ``[K]``, weights ``[N]``."""

    labels: Tensor
    reference: Tensor | None = None
    position_weights: Tensor | None = None


@dataclass(frozen=True)
class Resolved:
    """How one loss runs, after every choice.

    Attributes:
        backend: computes the stages; None: the oracle materialises every logit.
        options: the settings of the loss.
        needs: whether hidden states, weight and bias need a gradient.
        dtype: the dtype of the hidden states, and of their gradient.
        eps: a pair is live above this share of the open probability; 0 computes every pair exactly.
        screen: the precision of the screen.
        auto: whether the backend may change the screen once it knows how many rows there are.
        entropy: whether each row's entropy is computed.
        backend_reason: why this backend was chosen.
        reason: why this filter was chosen.
        shards: the processes over which the vocabulary is split.
        most_rows: rows of a block, where these processes have agreed on it; 0: the backend's.
    """

    backend: Backend | None
    options: LossOptions
    needs: tuple[bool, bool, bool]
    dtype: torch.dtype
    eps: float = 0.0
    screen: str = "exact"
    auto: bool = False
    entropy: bool = False
    backend_reason: str = ""
    reason: str = ""
    shards: Shards = ALONE
    most_rows: int = 0


class TileMasses(NamedTuple):
    """The screen's result: ``log_mass [R, T]`` fp32, the log-sum-exp of each tile's ``z - anchor``.

    ``anchor [R]``: see ``Columns``. ``slope [R, T]``, with a softcap only: the tile's softmax
    mean of ``1 - (z/softcap)²``.
    """

    log_mass: Tensor
    slope: Tensor | None
    anchor: Tensor

    def split(self, rows: int) -> Iterator[TileMasses]:
        """Yield views of so many rows each; even R = 0 gives one."""
        for start in range(0, max(1, len(self.anchor)), rows):
            where = slice(start, start + rows)
            yield TileMasses(*(None if x is None else x[where] for x in self))


class Worklist(NamedTuple):
    """The router's result: the live pairs, sorted by tile.

    ``rows [L]`` int64: the live rows of tile 0, then those of tile 1, and so on. A backend that
    leaves L on the device may pad each tile's to ``[T, R]``, and leave those of hot tiles out,
    since only its own refinement reads them. ``counts [T]``: how many rows each tile has. ``shift
    [R]``: the screened log-sum-exp, which exponentials are taken relative to. ``dead [R, T]``: the
    pair's probability mass relative to ``exp(shift)``. A live pair has -0.0 there: it adds nothing
    to sums, and its sign distinguishes it from a dead mass that underflowed to zero.
    """

    rows: Tensor
    counts: Tensor
    shift: Tensor
    dead: Tensor

    def live(self) -> Tensor:
        """``[R, T]`` bool."""
        return live_pairs(self.dead)


def live_pairs(dead: Tensor) -> Tensor:
    """``[R, T]`` bool: the pairs whose dead mass is -0.0."""
    return dead.signbit() & (dead == 0)


class Refined(NamedTuple):
    """The refinement's result: sums over the live pairs *without the label*.

    ``mass [R]``: Σ exp(z - shift); ``expected [R, D]`` or None: Σ exp(z - shift) · slope · w;
    ``maximum [R]``: the largest logit. The label is left out because a confident row's expected
    embedding and the label's own row are nearly equal, and their difference would lose its digits.
    """

    mass: Tensor
    expected: Tensor | None
    maximum: Tensor


class Routed(NamedTuple):
    """The results of screen, routing and refinement of one block."""

    masses: TileMasses
    work: Worklist
    refined: Refined


class OpenRows(NamedTuple):
    """The opened gradient ``[R, D]``: ``Σ_{v ≠ y} p_v · slope_v · w_v``.

    It is ``scale [R]`` times the sum of ``live [R, D]`` and ``dead [R, D]`` (None after an exact
    pass). The sum is left to `Backend.combine`, which adds the label's row in the same pass.
    """

    live: Tensor
    dead: Tensor | None
    scale: Tensor


class Statistics(NamedTuple):
    """Each row's statistics; fp32 (fp64 for fp64 inputs).

    ``lse`` log-sum-exp; ``lse_rest`` what rounding took from it, since a large one has few
    decimals; ``correct`` bool, whether the label has the largest logit; ``dead_mass`` the
    probability that was screened but not refined; ``live_share`` the share of the tiles that was
    computed exactly; ``entropy`` in nats or None; ``safety_logits [·, K]`` or None; ``log_rest``
    log of the probability outside the safety tokens, where a constraint reads it, or None.
    """

    lse: Tensor
    lse_rest: Tensor
    correct: Tensor
    dead_mass: Tensor
    live_share: Tensor
    entropy: Tensor | None
    safety_logits: Tensor | None = None
    log_rest: Tensor | None = None


class RowSums(NamedTuple):
    """A row's sums over the vocabulary without the label, relative to ``exp(shift)``.

    ``mass [R]``, that of pairs computed exactly; ``maximum [R]``, their largest logit; ``dead
    [R, T]`` or None as in `Worklist`; ``weighted [R]`` Σ exp(z - shift) · (z - shift), for the
    entropy only; ``logit_sum [R]`` as in `Dense`. ``exact [R]`` and ``kept [R]``: what the factors
    of the opened sums add up to before they were rounded, and after; or None.
    """

    shift: Tensor
    mass: Tensor
    maximum: Tensor
    dead: Tensor | None = None
    weighted: Tensor | None = None
    logit_sum: Tensor | None = None
    exact: Tensor | None = None
    kept: Tensor | None = None


class Factors(NamedTuple):
    """The loss ``[R]``, NaN on rows without a label, and the factors ``[R]`` of row gradients.

    ``opened`` is that of the opened sums and ``label`` that of the label's row in ``∂CE/∂h``;
    ``lse_label`` is the latter in ``∂lse/∂h``.
    """

    loss: Tensor
    opened: Tensor
    label: Tensor
    lse_label: Tensor


class Rest(NamedTuple):
    """The vocabulary without the safety tokens, where these are left out of a row's sums.

    ``log_sum [R]``: the log of its sum, relative to the shift of `RowSums`; ``label [R]``: the
    share that the label has of it, 0 for a safety token. ``safety [R, K]``: the probabilities of
    the safety tokens, 0 at the label. ``keep [R]`` or None: what corrects the opened sums: their
    rounding, or this process's own shift.
    """

    log_sum: Tensor
    label: Tensor
    safety: Tensor
    keep: Tensor | None = None


class Joined(NamedTuple):
    """What follows from `RowSums`: fields of `Dense`, and ``rescale [R]``, exp(shift - lse).

    ``scale [R]`` is that of `OpenRows`; it corrects what the rounding of factors added up to.
    ``factors``: only where they are computed together; `engine.rows` has them otherwise. ``rest``:
    only where the safety tokens are left out.
    """

    statistics: Statistics
    surprise: Tensor
    open_mass: Tensor
    rescale: Tensor
    scale: Tensor
    factors: Factors | None = None
    rest: Rest | None = None


class Dense(NamedTuple):
    """The results for R rows over the whole vocabulary, fp32 (fp64 for fp64 inputs).

    Attributes:
        statistics: those of the R rows, without safety logits.
        label_logit: ``[R]``, NaN on rows without a label.
        surprise: ``[R]``, ``-log p_y``, exact relative to itself; undefined without a label.
        open_mass: ``[R]``, ``1 - p_y`` summed without cancellation; 1 without a label.
        opened: the opened gradient; only when hidden gradients are wanted.
        logit_sum: ``[R]`` Σ_v (z_v - z_y), with label smoothing only.
        smooth_gradient: ``[D]`` or ``[R, D]``: ∂(Σ_v z)/∂h, with label smoothing only.
        masses: ``[R, T]`` dead masses as probabilities, -1 on live pairs; only when wanted.
        slope: ``[R, T]``, see ``TileMasses``; only with a softcap and masses wanted.
        probabilities: ``[R, V]``, undefined at the label; only when wanted.
        factors: see `Joined`.
        rest: see `Joined`.
    """

    statistics: Statistics
    label_logit: Tensor
    surprise: Tensor
    open_mass: Tensor
    opened: OpenRows | None
    logit_sum: Tensor | None
    smooth_gradient: Tensor | None
    masses: Tensor | None = None
    slope: Tensor | None = None
    probabilities: Tensor | None = None
    factors: Factors | None = None
    rest: Rest | None = None


class RowTerms(NamedTuple):
    """Both loss terms of every position, differentiable, and its statistics; shapes ``[...]``.

    ``backend``: what computed them, and may reduce them; None in compiled code, for one.
    """

    cross_entropy: Tensor
    penalty: Tensor
    statistics: Statistics
    backend: Backend | None = None


class Totals(NamedTuple):
    """Both terms reduced, and their sum, the ``loss``; differentiable as far as torch says.

    ``factor []``: what the upstream gradient of the loss is multiplied by, where a backend reduces;
    ``num_correct []`` and ``num_labels []`` int64: of how many labelled positions the label has the
    largest logit, and how many there are.
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    factor: Tensor | None
    num_correct: Tensor
    num_labels: Tensor


class Kept(NamedTuple):
    """The tensors kept from forward to backward, the same in eager and in compiled code.

    Inputs of the loss: ``labels``, ``reference``, ``position_weights`` (`RowInputs`); for a
    trainable head also ``hidden_states``, ``weight`` and ``bias``. A frozen head's ``weight`` is
    ``[V, 0]``, which says its size alone: whoever gathered the weight may free it before backward.
    Outputs: ``lse [N]``, ``lse_rest [N]`` and ``safety_logits [N, K]``. Made by the forward:
    ``rows [R]``, the indices of the R rows, or `Listed.rows`, when R = N;
    ``safety_alone [S]``, those of rows that need the safety tokens alone; ``safety_rows [K, D]``,
    the weight's at the safety tokens in the dtype of the hidden states; ``ce_gradient [R, D]``
    and ``lse_gradient [R, D]`` in ``kept_dtype``; then four as in `Dense`, if the head trains.
    ``log_rest [N]`` as in `Statistics`; with it ``lse_gradient`` is that of the log-sum-exp of all
    tokens but the safety tokens.
    """

    labels: Tensor
    reference: Tensor | None
    position_weights: Tensor | None
    weight: Tensor
    hidden_states: Tensor | None
    bias: Tensor | None
    lse: Tensor
    lse_rest: Tensor
    safety_logits: Tensor | None
    rows: Tensor
    safety_alone: Tensor | None
    safety_rows: Tensor | None
    ce_gradient: Tensor | None
    lse_gradient: Tensor | None
    open_mass: Tensor | None
    masses: Tensor | None = None
    slope: Tensor | None = None
    probabilities: Tensor | None = None
    log_rest: Tensor | None = None


class RowShares(NamedTuple):
    """The factors of a row gradient: ``opened · (opened gradient) + label · w_label + also``.

    ``opened [R]``, or None where the opened gradient has this factor; ``label [R]``, 0 where there
    is none; ``also [D]`` or ``[R, D]``; ``silent [R]`` bool, the rows that become zero.
    """

    opened: Tensor | None
    label: Tensor
    also: Tensor | None = None
    silent: Tensor | None = None


class Coefficients(NamedTuple):
    """``dz[n,v] = α[n]·p[n,v] + Σ_k β[n,k]·[v = id_k] - γ[n]·[v = y_n] - σ[n]``, before the slope.

    ``alpha [R]``, ``gamma [R]``, ``sigma [R]`` or None (label smoothing); β is in `SafetyTerm`.
    """

    alpha: Tensor
    gamma: Tensor
    sigma: Tensor | None


class Saved(NamedTuple):
    """The part of `Kept` that the gradient of a weight needs, for R rows."""

    lse: Tensor
    lse_rest: Tensor
    open_mass: Tensor
    masses: Tensor | None
    slope: Tensor | None
    probabilities: Tensor | None


class Upstream(NamedTuple):
    """The upstream gradients of N rows.

    ``cross_entropy [N]``, of any stride; ``penalty [N]`` or None: that of the penalty times λ w,
    zero on rows without a constraint; ``dense [N]`` bool or None for all: which of the rows in
    `Kept` have row gradients.
    """

    cross_entropy: Tensor
    penalty: Tensor | None = None
    dense: Tensor | None = None


class RowGradients(NamedTuple):
    """What the backward of N rows makes: ``hidden [N, D]`` if the hidden states need a gradient.

    With a constraint also ``beta [N, K]``, the penalty's derivatives by ``H Wᵀ + b`` at the safety
    tokens, and ``d_lse [N]``, those by the log-sum-exp, for a kind that reads it (``kl_mass``: by
    that of all tokens but the safety tokens).
    """

    hidden: Tensor | None = None
    beta: Tensor | None = None
    d_lse: Tensor | None = None


class SafetyTerm(NamedTuple):
    """The constraint's part of a weight's gradient: ``ids [K]``, ``weight [K, D]``, ``bias [K]``.

    Its rows are fp32 (fp64 for fp64 operands); a backend adds them before it casts.
    """

    ids: Tensor
    weight: Tensor
    bias: Tensor


@cache
def brings(backend: type, stages: type) -> bool:
    """Whether a class of backends has all methods of one of these protocols."""
    return issubclass(backend, stages)


@runtime_checkable
class Prepares(Protocol):
    """A backend that lists the dense rows on the device, so that the host need not wait for it.

    Its stages skip rows whose label is ``ABSENT``, as far as they take time.
    """

    def prepare(
        self, inputs: RowInputs, options: LossOptions, vocab_size: int, tiles: Tiles | None
    ) -> RowPlan:
        """Decide what each of N rows needs; ``tiles`` is None on the exact path."""

    def scatter(
        self, plan: RowPlan, blocks: list[tuple[Tensor, Statistics]]
    ) -> tuple[Tensor, Statistics]:
        """Put loss and statistics of blocks ``[R]`` in their places ``[N]``.

        A row that is absent has a loss of 0, and the statistics of ``engine.forward``.
        """

    def mend(
        self,
        block: Block,
        routed: Routed,
        wanted: Wanted,
        *,
        eps: float,
        most: float,
        number: Tensor,
    ) -> None:
        """Compute rows again, from an exact screen on, whose screen was wrong by ``most`` nats.

        ``routed`` is corrected in place, and their number is added to ``number``.
        """


@runtime_checkable
class Reduces(Protocol):
    """A backend that sums the terms of all rows and divides, at once."""

    def reduce(
        self, terms: RowTerms, labels: Tensor, options: LossOptions, count: float | Tensor | None
    ) -> Totals:
        """Reduce to a sum, or to a mean by ``count``, by default the number of labels."""


@runtime_checkable
class RowStages(Protocol):
    """The stages that read few columns of W, or only what other stages left of a row.

    A backend that lacks them is served by `TorchStages`.
    """

    def columns(self, block: Block, needed: Tensor | None, rows: Tensor | None = None) -> Columns:
        """Compute the logits of the label, the safety tokens and the anchors of N rows.

        ``block`` holds all N rows; ``needed [N]`` bool, or None for all, says which are computed.
        All but the safety logits are those of ``rows [R]``, in their order; None: of all N.
        """

    def join(self, block: Block, label_logit: Tensor, sums: RowSums) -> Joined:
        """Add the label to the sums of R rows; the loss and statistics follow from both."""

    def penalty(
        self, options: LossOptions, statistics: Statistics, reference: Tensor, scale: Tensor
    ) -> Tensor:
        """Compute ``scale · C [N]``, zero where ``scale [N]``, λ w, is zero."""

    def gradient(self, kept: Kept, upstream: Upstream, resolved: Resolved) -> RowGradients:
        """Scale the row gradients and add the constraint's K columns.

        A row with an upstream gradient of zero adds nothing, even where its logits overflowed.
        """


@runtime_checkable
class Backend(Protocol):
    """A way to compute the stages that read the whole vocabulary."""

    name: str

    def refuses(self, screen: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Say why this screen cannot run on operands of this dtype here; None if it can."""

    def auto_screen(self, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        """Return the screen that ``"auto"`` means for R = ``rows``."""

    def filters(self, dtype: torch.dtype, device: torch.device, positions: int) -> bool:
        """Whether ``filter_eps="auto"`` pays for a loss of N = ``positions``."""

    def row_block(self, head: Head, rows: int, *, routed: bool) -> int:
        """Return how many of ``rows`` to hand over at once, from the byte budget alone."""

    def screen_rows(self, head: Head, size: int, screen: str) -> int:
        """Return how many rows to screen at once, a multiple of the ``size`` of a block."""

    def exact(self, block: Block, wanted: Wanted) -> Dense:
        """Compute every pair in one pass."""

    def screen(self, block: Block, screen: str) -> TileMasses:
        """Compute the log-mass of every pair in the precision of ``screen``."""

    def route(self, block: Block, masses: TileMasses, eps: float) -> Worklist:
        """Find live pairs: above ``eps`` of the row's open mass, and always the label's tile."""

    def refine(self, block: Block, work: Worklist, wanted: Wanted) -> Refined:
        """Compute live pairs exactly, from the original operands, accumulated in fp32."""

    def combine(
        self,
        block: Block,
        opened: OpenRows,
        shares: RowShares,
        *,
        spare: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """Sum a row gradient ``[R, D]`` in ``kept_dtype``, into ``out`` if it is given.

        ``spare`` allows reuse of ``opened``.
        """

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
