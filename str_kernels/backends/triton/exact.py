"""The exact pass: two GEMMs, every logit in the operands' precision, no atomics.

Stage: ``Head`` → ``Dense``, some tiles at a time, as many as a buffer of probabilities holds.
``softmax_kernel`` makes them relative to each tile's own maximum; ``expected_kernel`` multiplies
them by W and rescales, so that the row's maximum over the vocabulary need not be known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.triton import host
from str_kernels.backends.triton.exact_kernels import expected_kernel, softmax_kernel
from str_kernels.backends.triton.launch import Launch
from str_kernels.backends.triton.tiles import LOWEST
from str_kernels.engine.contract import Dense, Head, Wanted
from str_kernels.engine.finish import join_sums
from str_kernels.engine.logits import label_logits
from str_kernels.options import TILE, LossOptions


def exact_pass(
    head: Head,
    labels: Tensor,
    options: LossOptions,
    wanted: Wanted,
    launches: tuple[Launch, Launch],
    byte_budget: int,
) -> Dense:
    """``Dense`` of R rows with labels ``[R]``, -1 where there is none."""
    totals = _RunningTotals(host.operands(head, None), labels, options, wanted, launches)
    given = totals.given
    buffers = (wanted.hidden + totals.smooth_rows) or 1
    one = buffers * TILE * given.hidden.element_size() * max(1, given.rows)
    step = max(1, byte_budget // one)
    for first in range(0, given.tiles, step):
        totals.add(first, min(step, given.tiles - first))
    return totals.finish(label_logits(head, labels, options))


class _RunningTotals:
    """Sums over the vocabulary without the label, relative to ``exp(maximum)``."""

    def __init__(
        self,
        given: host.Operands,
        labels: Tensor,
        options: LossOptions,
        wanted: Wanted,
        launches: tuple[Launch, Launch],
    ) -> None:
        self.given, self.labels, self.options, self.wanted = given, labels, options, wanted
        self.launches, self.place = launches, host.label_places(labels, None)
        sums = torch.zeros(given.rows, dtype=torch.float32, device=given.hidden.device)
        self.maximum = torch.full_like(sums, LOWEST.value)
        self.mass, self.ones = sums, torch.ones_like(sums)
        self.expected = sums.new_zeros(given.rows, given.dim) if wanted.hidden else None
        self.weighted = sums.clone() if wanted.entropy else None
        self.logit_sum = self.smooth_gradient = None
        if options.label_smoothing:
            self.logit_sum = sums.clone()
            if self.smooth_rows:
                self.smooth_gradient = sums.new_zeros(given.rows, given.dim)
            else:
                self.smooth_gradient = given.weight.sum(0, dtype=torch.float32)

    @property
    def smooth_rows(self) -> bool:
        """Whether ∂(Σ_v z)/∂h differs from row to row."""
        return bool(self.options.label_smoothing) and self.options.softcap is not None

    def add(self, first: int, tiles: int) -> None:
        """Take in ``tiles`` tiles from tile ``first`` on."""
        share, slope, sums = self._softmax(first, tiles)
        top, mass, weighted, keep, logit_sum = sums
        maximum = torch.maximum(self.maximum, top.amax(0))
        rescale, scale = torch.exp(self.maximum - maximum), torch.exp(top - maximum)
        self.maximum = maximum
        self.mass = self.mass * rescale + (mass * scale).sum(0)
        if self.weighted is not None:
            self.weighted = self.weighted * rescale + (weighted * scale).sum(0)
        if self.logit_sum is not None:
            self.logit_sum += logit_sum.sum(0)
        if self.expected is not None:
            self._multiply(share, scale * keep, rescale, self.expected, first, tiles)
        if self.smooth_rows:
            self._multiply(slope, None, self.ones, self.smooth_gradient, first, tiles)

    def _softmax(self, first: int, tiles: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
        given, launch = self.given, self.launches[0]
        shape = (tiles, given.rows)
        share = self._buffer((*shape, TILE), self.wanted.hidden)
        slope = self._buffer((*shape, TILE), self.smooth_rows)
        sums = self.mass.new_empty(5, *shape)
        softmax_kernel[(-(-given.rows // launch.block_r) * tiles,)](
            given.hidden,
            given.weight,
            given.bias,
            self.place,
            share,
            slope,
            sums,
            given.rows,
            first_tile=first,
            **host.common(given, self.options),
            BLOCK_R=launch.block_r,
            BLOCK_D=launch.block_d,
            GROUP=host.GROUP,
            **host.tuning(launch),
        )
        return share, slope, sums

    def _buffer(self, shape: tuple[int, ...], on: bool) -> Tensor | None:
        return self.given.hidden.new_empty(shape) if on else None

    def _multiply(
        self,
        share: Tensor,
        scale: Tensor | None,
        rescale: Tensor,
        out: Tensor,
        first: int,
        tiles: int,
    ) -> None:
        given, launch = self.given, self.launches[1]
        blocks = -(-given.rows // launch.block_r) * -(-given.dim // launch.block_e)
        expected_kernel[(blocks,)](
            share,
            scale,
            given.weight,
            rescale,
            out,
            given.rows,
            given.vocab,
            first,
            tiles,
            given.dim,
            given.precision,
            BLOCK_R=launch.block_r,
            BLOCK_E=launch.block_e,
            **host.tuning(launch),
        )

    def finish(self, label_logit: Tensor) -> Dense:
        """Bring the label in and turn the sums into probabilities."""
        if self.smooth_gradient is not None:
            self.smooth_gradient *= self.options.logit_scale
        return join_sums(
            self.labels,
            label_logit,
            self.options,
            shift=self.maximum,
            mass=self.mass,
            maximum=self.maximum,
            expected=self.expected,
            weighted=self.weighted,
            logit_sum=self.logit_sum,
            smooth_gradient=self.smooth_gradient,
        )
