"""The forward computes both loss terms, the statistics, and the tensors kept for the backward.

Stage: ``Head [N]``, ``RowInputs``, ``Tiles`` → ``RowTerms``, ``Kept``. Only rows that need the
whole vocabulary are computed over it, in blocks, so that scratch memory does not grow with N.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels import waits
from str_kernels.constraint import needs_lse
from str_kernels.engine.contract import (
    Block,
    Columns,
    Dense,
    Head,
    Kept,
    Present,
    Resolved,
    Routed,
    RowInputs,
    RowTerms,
    Statistics,
    TileMasses,
    Tiles,
    Wanted,
    Worklist,
)
from str_kernels.engine.finish import join_pairs
from str_kernels.engine.joins import columns_over_shards
from str_kernels.engine.logits import accumulator, kept_dtype, safety_ids, weight_rows
from str_kernels.engine.rest import leave_out
from str_kernels.engine.rows import (
    cross_entropy,
    judge_values_later,
    plan_for,
    row_blocks,
    row_gradients,
)
from str_kernels.engine.stages import row_stages, whole_head
from str_kernels.notices import say_once
from str_kernels.vocabulary import VocabularyIndex, tile_means

_SCREEN_ERROR = 1.0  # nats of a row's log-sum-exp; an 8-bit screen is wrong by tenths
_KEPT = 2 << 20  # so many probabilities are kept for a trained weight; more are recomputed
# The statistics of a row that does not need the whole vocabulary.
_NAN = float("nan")
_ABSENT = {
    "lse": _NAN,
    "lse_rest": _NAN,
    "correct": False,
    "dead_mass": 0.0,
    "live_share": _NAN,
    "entropy": _NAN,
    "log_rest": _NAN,
}


def kept_weight(weight: Tensor, *, trained: bool) -> Tensor:
    """Return `Kept.weight`: the weight of a trained head, and the size of a frozen one's."""
    return weight if trained else weight.new_empty(len(weight), 0)


def tiles_of(
    weight: Tensor,
    index: VocabularyIndex | None,
    *,
    fresh: bool,
    operands: torch.dtype | None = None,
) -> Tiles:
    """Cut the vocabulary; ``fresh`` recomputes the mean rows, for a weight that is trained.

    ``operands`` is the dtype of the logits' operands, to which autocast rounds the weight.
    """
    if index is None:
        return Tiles(None, None, tile_means(weight, None, operands))
    means = tile_means(weight, index.order, operands) if fresh else index.mean_rows
    eight_bits = index.quantised, index.row_scales, index.columns
    hot = 0 if index.hot is None else len(index.hot)
    return Tiles(index.order, index.inverse, means, *eight_bits, hot)


def forward_rows(
    head: Head, inputs: RowInputs, tiles: Tiles | None, resolved: Resolved
) -> tuple[RowTerms, Kept]:
    """Compute both terms of N rows; ``tiles`` is None on the exact path.

    The host waits for the device before the first block and after the last, if it may, and in
    between only where a backend reads `Block.present`.
    """
    work = _Work(head, inputs, tiles, resolved)
    work.run()
    result = work.result()
    again = work.too_coarse()
    if again:
        del result  # frees its memory first
        work.run_exactly(again)
        result = work.result()
    return result


class _Finished(NamedTuple):
    """A block of R rows: the loss ``[R]``, and row gradients ``[R, D]`` in ``kept_dtype``.

    These are None where they stand among those of all rows. ``error [R]``: the screen's error in
    the log-sum-exp, in nats; None on the exact path, and where the backend judges it.
    """

    dense: Dense
    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None]
    error: Tensor | None


class _Work:
    """The blocks of one forward, and their results put together."""

    def __init__(
        self, head: Head, inputs: RowInputs, tiles: Tiles | None, resolved: Resolved
    ) -> None:
        """Find the rows that need the whole vocabulary; the host waits for a device here."""
        self.weight, self.bias, head = head.weight, head.bias, whole_head(head, resolved.backend)
        self.head, self.inputs, self.tiles, self.resolved = head, inputs, tiles, resolved
        self.options, self.dtype = resolved.options, accumulator(resolved.dtype)
        self.shards = resolved.shards
        self.vocab = self.shards.total or len(head.weight)
        self.plan = plan_for(resolved, inputs, self.vocab, tiles)
        judge_values_later(self.plan, inputs, self.options, self.vocab)
        listed = self.plan.listed
        self.rows = self.plan.dense.nonzero()[:, 0] if listed is None else listed.rows
        self.every = listed is None and len(self.rows) == len(self.plan.labels)
        self.safety_alone, needed = None, self.plan.dense
        if self.options.safety is not None:
            needed, self.safety_alone = self.plan.safety, self.rows[:0]
        if self.options.safety is not None and listed is None:  # else every row is in a block
            self.safety_alone = (self.plan.safety & ~self.plan.dense).nonzero()[:, 0]
        self.trained = any(resolved.needs[1:])
        self.wanted = self._wanted()
        every, rows = self._block_of(head, self.plan.labels), None if self.every else self.rows
        stages = row_stages(resolved.backend)
        self.columns = columns_over_shards(stages, every, needed, rows)
        self.head = leave_out(head, self.options, self.shards)
        self.size = resolved.most_rows or resolved.backend.row_block(
            head, len(self.rows), routed=tiles is not None
        )
        self.parts = self._parts(self.size)
        self.present = None if listed is None else Present(listed)

    def _wanted(self) -> Wanted:
        exactly = self.tiles is None and self.options.softcap is None
        few = len(self.head.hidden_states) * len(self.head.weight) <= _KEPT
        return Wanted(
            hidden=self.resolved.needs[0],
            masses=self.trained and self.tiles is not None,
            entropy=self.resolved.entropy,
            probabilities=self.trained and exactly and few,
        )

    @cached_property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of cross-entropy and lse of all rows, into which blocks write theirs.

        They are allocated when the first block has been screened; the only block's stay as they
        are.
        """
        if len(self.parts) == 1 or not self.wanted.hidden:
            return None, None
        hidden, safety = self.head.hidden_states, self.options.safety
        dtype = kept_dtype(self.resolved.dtype, self.shards)
        shape = (len(self.rows), hidden.shape[1])
        by_lse = safety is not None and needs_lse(safety)
        ce = hidden.new_empty(shape, dtype=dtype)
        return ce, torch.empty_like(ce) if by_lse else None

    def run(self) -> None:
        """Compute every block; few rows may be screened in another precision than many."""
        resolved, self.screen = self.resolved, self.resolved.screen
        if resolved.auto:
            device = self.head.hidden_states.device
            self.screen = resolved.backend.auto_screen(resolved.dtype, device, len(self.rows))
            if self.screen != resolved.screen:
                say_once(f"str_kernels: with few rows screen={self.screen}, not {resolved.screen}")
        if len(self.rows) or (self.trained and self.tiles is not None):
            self.blocks = [self._block(part, masses) for part, masses in self._screened()]
        else:  # another process has all the labels, or this is the reference of a constraint
            self.blocks = [self._no_rows()]

    def too_coarse(self) -> list[int]:
        """Find blocks whose screen was wrong by more than rounding, as large logits make it.

        The refined pairs correct the screened log-sum-exp; the correction measures its error.
        """
        alike = self.shards.alone  # another process may have another screen
        if self.tiles is None or (alike and self.screen == "exact"):
            return []
        if self.plan.listed is not None:  # the backend has computed such rows again
            waits.judge_later(self.plan.listed.off, partial(_say_too_coarse, self.screen))
            return []
        # written so that NaN counts as too coarse
        off = [~(block.error <= _SCREEN_ERROR).all() for block in self.blocks]
        return self.shards.any(torch.stack(off)).nonzero()[:, 0].tolist()

    def run_exactly(self, places: list[int]) -> None:
        """Compute blocks again with the exact screen."""
        _say_too_coarse(self.screen)
        for place in places:
            self.blocks[place] = None  # frees its memory first
            part = self.parts[place]
            masses = self.resolved.backend.screen(self._given(part), "exact")
            self.blocks[place] = self._block(part, masses)

    def _parts(self, size: int) -> list[slice]:
        """Cut the R rows into parts of so many."""
        return [part for part, _ in row_blocks(self.rows, size, every=self.every)]

    def _given(self, part: slice) -> Block:
        """Gather a block of the R rows."""
        rows = part if self.every else self.rows[part]
        head = self.head._replace(hidden_states=self.head.hidden_states[rows].contiguous())
        columns, listed = self.columns.part(part), self.plan.listed
        if self.options.leaves_out:  # which have the order of all rows
            columns = columns._replace(safety=self.columns.safety[rows])
        if listed is None:
            return self._block_of(head, self.plan.labels[rows], columns)
        labels, places = listed.labels[part], listed.places[part]
        return Block(
            head, labels, self.tiles, self.options, columns, places, self.present, part.start
        )

    def _block_of(self, head: Head, labels: Tensor, columns: Columns | None = None) -> Block:
        """Make a block of rows that the host has listed, with this process's own labels."""
        return Block(
            head,
            self.shards.own(labels),
            self.tiles,
            self.options,
            columns,
            everywhere=None if self.shards.alone else labels,
            shards=self.shards,
        )

    def _screened(self) -> Iterator[tuple[slice, TileMasses | None]]:
        """Yield each block's rows and its masses, which are views where blocks are screened as one.

        On the exact path there are no masses.
        """
        if self.tiles is None:
            yield from ((part, None) for part in self.parts)
            return
        parts, backend = iter(self.parts), self.resolved.backend
        for several in self._parts(backend.screen_rows(self.head, self.size, self.screen)):
            for masses in backend.screen(self._given(several), self.screen).split(self.size):
                yield next(parts), masses

    def _block(self, part: slice, masses: TileMasses | None) -> _Finished:
        """Compute one block, from its masses (None: exactly) to row gradients."""
        block, backend, error = self._given(part), self.resolved.backend, None
        listed = self.plan.listed
        if masses is None:
            dense = backend.exact(block, self.wanted)
        else:
            work = backend.route(block, masses, self.resolved.eps)
            refined = backend.refine(block, work, self.wanted)
            if listed is not None and self.screen != "exact":
                backend.mend(
                    block,
                    Routed(masses, work, refined),
                    self.wanted,
                    eps=self.resolved.eps,
                    most=_SCREEN_ERROR,
                    number=listed.off,
                )
            join = row_stages(backend).join
            dense = join_pairs(block, masses, work, refined, self.wanted, join)
            error = None if listed is not None else _screen_error(dense, work)
        loss = cross_entropy(dense, self.options, self.vocab)
        gradients = None, None
        if dense.opened is not None:
            out = tuple(None if x is None else x[part] for x in self.gradients)
            gradients = row_gradients(backend, block, dense, out)
            if len(self.parts) > 1:
                gradients = None, None
        # the row gradients replace these two, whose memory is freed
        dense = dense._replace(opened=None, smooth_gradient=None)
        return _Finished(dense, loss, gradients, error)

    def _no_rows(self) -> _Finished:
        """Make a block of no rows, for which the vocabulary is not read."""
        hidden = self.head.hidden_states
        none, gradient, by_lse = hidden.new_empty(0, dtype=self.dtype), None, None
        if self.wanted.hidden:
            kept = kept_dtype(self.resolved.dtype, self.shards)
            gradient = hidden.new_empty(0, hidden.shape[1], dtype=kept)
            by_lse = gradient if self.options.safety and needs_lse(self.options.safety) else None
        entropy = none if self.wanted.entropy else None
        statistics = Statistics(none, none, none.bool(), none, none, entropy)
        if self.options.leaves_out:
            statistics = statistics._replace(log_rest=none)
        dense = Dense(statistics, none, none, none, None, None, None)
        return _Finished(dense, none, (gradient, by_lse), none)

    def result(self) -> tuple[RowTerms, Kept]:
        """Both terms and the statistics of all N rows, and what a backward needs."""
        of_blocks = [(block.loss, block.dense.statistics) for block in self.blocks]
        if self.plan.listed is None:
            losses, statistics = self._scattered(of_blocks)
        else:
            losses, statistics = self.resolved.backend.scatter(self.plan, of_blocks)
        statistics = statistics._replace(safety_logits=self.columns.safety)
        terms = RowTerms(losses, self._penalty(losses, statistics), statistics)
        return terms, self._kept(statistics)

    def _scattered(self, blocks: list[tuple[Tensor, Statistics]]) -> tuple[Tensor, Statistics]:
        """Implement `Prepares.scatter` for rows that the host has listed."""
        losses = self._scatter([loss for loss, _ in blocks], 0.0)
        found = {
            name: self._scatter([getattr(block, name) for _, block in blocks], fill)
            for name, fill in _ABSENT.items()
        }
        return torch.where(self.plan.labelled, losses, 0.0), Statistics(**found)

    def _scatter(self, blocks: list[Tensor | None], fill: float | bool) -> Tensor | None:
        """Scatter blocks of ``[R]`` to ``[N]``."""
        values = _joined(blocks)
        if values is None or self.every:
            return values
        return values.new_full(self.plan.labels.shape, fill).index_copy_(0, self.rows, values)

    def _penalty(self, losses: Tensor, statistics: Statistics) -> Tensor:
        """λ w C ``[N]``; zero on rows without a constraint."""
        scale = self.plan.penalty_scale
        if scale is None:
            return torch.zeros_like(losses)
        stages = row_stages(self.resolved.backend)
        return stages.penalty(self.options, statistics, self.inputs.reference, scale)

    def _kept(self, statistics: Statistics) -> Kept:
        ce, by_lse = self.blocks[0].gradients if len(self.blocks) == 1 else self.gradients
        # the returned tensors themselves are kept: autograd then notices an in-place change
        kept = Kept(
            *self.inputs,
            weight=kept_weight(self.weight, trained=self.trained),
            hidden_states=None,
            bias=None,
            lse=statistics.lse,
            lse_rest=statistics.lse_rest,
            safety_logits=statistics.safety_logits,
            rows=self.rows,
            safety_alone=self.safety_alone,
            safety_rows=self._safety_rows(),
            ce_gradient=ce,
            lse_gradient=by_lse,
            open_mass=None,
            log_rest=statistics.log_rest,
        )
        if not self.trained:
            return kept
        of_blocks = {
            name: _joined([getattr(block.dense, name) for block in self.blocks])
            for name in ("open_mass", "masses", "slope", "probabilities")
        }
        head = self.head
        return kept._replace(hidden_states=head.hidden_states, bias=self.bias, **of_blocks)

    def _safety_rows(self) -> Tensor | None:
        if not self.resolved.needs[0] or not self.options.constrained:
            return None
        safety, device = self.options.safety, self.weight.device
        if self.shards.alone:
            return weight_rows(self.head, safety_ids(safety, device), self.resolved.dtype)
        places, own = self.shards.tokens(safety, device)
        rows = self.head.hidden_states.new_zeros(len(safety.token_ids), self.weight.shape[1])
        rows[places] = weight_rows(self.head, own, rows.dtype)
        return rows  # those of other processes add nothing to the gradient here


def _screen_error(dense: Dense, work: Worklist) -> Tensor:
    """Return how far the screened log-sum-exp of each row was off, in nats."""
    if dense.rest is not None:  # the screen saw the rest alone
        return dense.rest.log_sum.abs()
    return (dense.statistics.lse - work.shift).abs()


def _say_too_coarse(screen: str) -> None:
    say_once(
        f"str_kernels: the logits are too large for the {screen} screen, which was wrong by more "
        f"than {_SCREEN_ERROR:g} nats in a block of rows; such blocks are screened exactly",
        logging.WARNING,
    )


def _joined(values: list[Tensor | None]) -> Tensor | None:
    """Concatenate blocks; None stays None, and a single block is not copied."""
    if len(values) == 1:
        return values[0]
    return None if values[0] is None else torch.cat(values)
