"""The stages in order: blocks of rows in, everything the rows know of the vocabulary out.

Stage: ``Head [N]``, ``RowPlan`` → ``Forward``. Only rows that need the vocabulary meet it, a block
of them at a time, so that scratch memory does not grow with N.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from str_kernels.engine.contract import Backend, Dense, Filter, Head, Tiles, Wanted
from str_kernels.engine.finish import join_pairs
from str_kernels.engine.logits import accumulator, safety_logits
from str_kernels.engine.rows import RowPlan, cross_entropy, row_blocks, row_gradients
from str_kernels.notices import say_once
from str_kernels.options import LossOptions
from str_kernels.vocabulary import VocabularyIndex, tile_means

_SCREEN_ERROR = 1.0  # nats of a row's log-sum-exp; 8-bit screens are off by tenths


class Forward(NamedTuple):
    """What the forward knows of N rows, of which R (``rows [R]``) met the vocabulary.

    ``[N]``: ``cross_entropy`` (0 without a label), ``lse``, ``entropy`` (NaN where not computed),
    ``correct``, ``dead_mass``, ``live_share``; ``safety_logits [N, K]``, NaN where not computed;
    ``safety_alone [S]``: the rows that have these and did not meet the vocabulary.
    ``[R]``-sized, for the backward: ``ce_gradient [R, D]`` and ``lse_gradient [R, D]`` in
    ``kept_dtype``, ``open_mass``, ``masses``, ``slope``, ``probabilities``.
    """

    rows: Tensor
    safety_alone: Tensor | None
    cross_entropy: Tensor
    lse: Tensor
    entropy: Tensor | None
    correct: Tensor
    dead_mass: Tensor
    live_share: Tensor
    safety_logits: Tensor | None
    ce_gradient: Tensor | None
    lse_gradient: Tensor | None
    open_mass: Tensor
    masses: Tensor | None
    slope: Tensor | None
    probabilities: Tensor | None


def tiles_of(weight: Tensor, index: VocabularyIndex | None, *, fresh: bool) -> Tiles:
    """The cut of the vocabulary; ``fresh`` takes the mean rows anew, for a weight that moves."""
    if index is None:
        return Tiles(None, None, tile_means(weight, None))
    means = tile_means(weight, index.order) if fresh else index.mean_rows
    return Tiles(index.order, index.inverse, means, index.quantised, index.row_scales)


def run_forward(
    backend: Backend,
    head: Head,
    plan: RowPlan,
    options: LossOptions,
    chosen: Filter,
    tiles: Tiles | None,
    wanted: Wanted,
) -> Forward:
    """Run every stage over blocks of rows; ``tiles`` is None on the exact path.

    What must be read from a device is read before the first block or after everything else, so that
    a device pauses for nothing in between. Refined pairs correct the screened log-sum-exp, so
    they tell how far the screen was off. Where that is more than rounding, at logits of hundreds
    or thousands, the block is screened again, exactly.
    """
    collected = _Collected(head, plan, options)
    rows = collected.rows
    if chosen.auto:  # only now is it known how many rows there are
        operands = head.hidden_states
        screen = backend.auto_screen(operands.dtype, operands.device, len(rows))
        if screen != chosen.screen:
            say_once(f"str_kernels: with few rows screen={screen}, not {chosen.screen}")
        chosen = chosen._replace(screen=screen)
    size = backend.row_block(head, len(rows), routed=tiles is not None)
    parts = [part for _, part in row_blocks(rows, len(plan.labels), size)]
    stages = _Stages(backend, head, plan, options, tiles, wanted)
    off = []
    for part in parts:
        finished, error = stages.run(part, chosen)
        collected.blocks.append(finished)
        if chosen.screen != "exact":
            off.append(~(error <= _SCREEN_ERROR).all())  # NaN is off as well
    done = collected.result()
    again = torch.stack(off).nonzero()[:, 0].tolist() if off else []
    if not again:
        return done
    del done, finished
    say_once(
        f"str_kernels: logits too large for the {chosen.screen} screen, which was off by more "
        f"than {_SCREEN_ERROR:g} nats in a block of rows; such blocks are screened exactly",
        logging.WARNING,
    )
    for place in again:
        collected.blocks[place] = None
        collected.blocks[place], _ = stages.run(parts[place], chosen._replace(screen="exact"))
    return collected.result()


class _Finished(NamedTuple):
    """A block of R rows: the loss ``[R]``, and row gradients ``[R, D]`` in ``kept_dtype``."""

    dense: Dense
    loss: Tensor
    ce_gradient: Tensor | None
    lse_gradient: Tensor | None


class _Stages(NamedTuple):
    """From a block of rows to its row gradients; what lies between does not outlive the block."""

    backend: Backend
    head: Head
    plan: RowPlan
    options: LossOptions
    tiles: Tiles | None
    wanted: Wanted

    def run(self, part: Tensor | slice, chosen: Filter) -> tuple[_Finished, Tensor | None]:
        """A finished block, and how far off ``[R]`` its screen was, in nats, if it had one."""
        block = self.head._replace(hidden_states=self.head.hidden_states[part].contiguous())
        labels, error = self.plan.labels[part], None
        if self.tiles is None:
            dense = self.backend.exact(block, labels, self.options, self.wanted)
        else:
            dense, error = self._routed(block, labels, chosen)
        loss, ce, lse = cross_entropy(dense, self.options, block.weight.shape[0]), None, None
        if dense.opened is not None:
            ce, lse = row_gradients(self.backend, block, labels, dense, self.options)
        # row gradients stand for these two from here on
        return _Finished(dense._replace(opened=None, smooth_gradient=None), loss, ce, lse), error

    def _routed(self, block: Head, labels: Tensor, chosen: Filter) -> tuple[Dense, Tensor]:
        backend, tiles, options, wanted = self.backend, self.tiles, self.options, self.wanted
        masses = backend.screen(block, tiles, options, chosen.screen)
        work = backend.route(masses, labels, tiles, chosen.eps)
        refined = backend.refine(block, labels, tiles, work, options, wanted)
        dense = join_pairs(block, labels, tiles, masses, work, refined, options, wanted)
        return dense, (dense.lse - work.shift).abs()


class _Collected:
    """Finished blocks put together; finds out which rows there are, and waits for the device."""

    def __init__(self, head: Head, plan: RowPlan, options: LossOptions) -> None:
        self.head, self.plan, self.options = head, plan, options
        self.rows = plan.dense.nonzero()[:, 0]
        self.safety_rows = self.safety_alone = None
        if options.safety is not None:
            self.safety_rows = plan.safety.nonzero()[:, 0]
            self.safety_alone = (plan.safety & ~plan.dense).nonzero()[:, 0]
        self.blocks: list[_Finished | None] = []

    def result(self) -> Forward:
        head, plan = self.head, self.plan
        dtype = accumulator(head.hidden_states.dtype)
        losses = self._spread(_joined([block.loss for block in self.blocks]), 0.0)
        entropy = self._field("entropy")
        return Forward(
            rows=self.rows,
            safety_alone=self.safety_alone,
            cross_entropy=torch.where(plan.labelled, losses, 0.0),
            lse=self._spread(self._field("lse"), float("nan")),
            entropy=None if entropy is None else self._spread(entropy, float("nan")),
            correct=self._spread(self._field("correct"), False),
            dead_mass=self._spread(self._field("dead_mass"), 0.0),
            live_share=self._spread(self._field("live_share"), float("nan")),
            safety_logits=self._safety_logits(dtype),
            ce_gradient=_joined([block.ce_gradient for block in self.blocks]),
            lse_gradient=_joined([block.lse_gradient for block in self.blocks]),
            open_mass=self._field("open_mass"),
            masses=self._field("masses"),
            slope=self._field("slope"),
            probabilities=self._field("probabilities"),
        )

    def _field(self, name: str) -> Tensor | None:
        return _joined([getattr(block.dense, name) for block in self.blocks])

    def _spread(self, values: Tensor, fill: float | bool) -> Tensor:
        """Back to all N rows."""
        if len(self.rows) == len(self.plan.labels):
            return values
        return values.new_full((len(self.plan.labels),), fill).index_copy_(0, self.rows, values)

    def _safety_logits(self, dtype: torch.dtype) -> Tensor | None:
        if self.options.safety is None:
            return None
        head, rows = self.head, self.safety_rows
        ids = torch.tensor(self.options.safety.token_ids, device=head.weight.device)
        shape = (len(self.plan.labels), len(ids))
        out = torch.full(shape, float("nan"), dtype=dtype, device=ids.device)
        for part in rows.split(4096):
            block = head._replace(hidden_states=head.hidden_states[part])
            out[part] = safety_logits(block, ids, self.options)
        return out


def _joined(values: list[Tensor | None]) -> Tensor | None:
    """One after the other; None of nothing, and a single one as it is."""
    if len(values) == 1:
        return values[0]
    return None if values[0] is None else torch.cat(values)
