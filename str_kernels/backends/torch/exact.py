"""The exact pass is an online softmax over blocks of the vocabulary, all in full precision.

Stage: ``Head`` → ``Dense``, two GEMMs with the gradient of the hidden states and one without. The
running sums leave the label out (``Refined`` says why) and are rescaled when the maximum rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.torch.blocks import head_rows, in_block, spans
from str_kernels.backends.torch.narrow import is_narrow, narrow_pass
from str_kernels.engine.contract import Block, Dense, Wanted
from str_kernels.engine.finish import join_sums
from str_kernels.engine.logits import accumulator, block_logits, columns_of, softcap_slope
from str_kernels.engine.products import product
from str_kernels.engine.rest import left_out


def exact_pass(block: Block, wanted: Wanted, columns: int) -> Dense:
    """Return ``Dense`` of R rows, from ``columns`` of the vocabulary at a time."""
    if is_narrow(block, wanted):
        dense = narrow_pass(block, wanted)
        if dense is not None:
            return dense
    head, options = block.head, block.options
    dtype = accumulator(head.hidden_states.dtype)
    hidden = head.hidden_states.to(dtype)
    totals = _RunningTotals(hidden, block, wanted, columns_of(block).label)
    for part in spans(head.weight.shape[0], columns):
        weight, bias = head_rows(head, None, part, dtype)
        out = left_out(bias, options)
        totals.add(part, block_logits(hidden, weight, bias, options), weight, out)
    return totals.finish()


class _RunningTotals:
    """Sums over the vocabulary without the label, relative to ``exp(shift)``."""

    def __init__(self, hidden: Tensor, block: Block, wanted: Wanted, label_logit: Tensor) -> None:
        self.block, self.labels, self.options = block, block.labels, block.options
        self.label_logit = label_logit
        zeros = hidden.new_zeros(len(hidden))
        self.maximum = torch.full_like(zeros, float("-inf"))
        self.shift, self.mass = zeros, zeros.clone()
        self.wanted, self.expected = wanted, None
        self.kept: list[tuple[Tensor, Tensor]] = []  # exponentials [R, C] and their shift
        self.weighted = zeros.clone() if wanted.entropy else None
        self.logit_sum = self.smooth_gradient = None
        if self.options.label_smoothing:
            self.logit_sum = zeros.clone()
            # without a softcap the gradient of Σ_v z is the same for every row
            shape = hidden.shape[1:] if self.options.softcap is None else hidden.shape
            self.smooth_gradient = hidden.new_zeros(shape)

    def add(self, block: slice, logits: Tensor, weight: Tensor, out: Tensor | None) -> None:
        """Add the logits ``[R, C]`` of one block but those ``out [C]``, overwriting them."""
        slope = None if self.options.softcap is None else softcap_slope(logits, self.options)
        if self.logit_sum is not None and out is not None:
            logits = torch.where(out, self.label_logit[:, None], logits)  # Σ (z - z_y) skips them
        if slope is not None and out is not None:
            slope.masked_fill_(out, 0.0)
        if self.logit_sum is not None:
            self._add_smooth(logits, slope, weight)
        here, column = in_block(self.labels, block)
        logits[here, column] = float("-inf")
        if out is not None:
            logits.masked_fill_(out, float("-inf"))
        before = self.shift
        rescale = self._raise_shift(logits)
        logits.sub_(self.shift[:, None])
        finite = None
        if self.weighted is not None:
            finite = logits.clamp(min=torch.finfo(logits.dtype).min)
            self.weighted.addcmul_(self.mass, before - self.shift).mul_(rescale)
        exponentials = logits.exp_()
        self.mass.mul_(rescale).add_(exponentials.sum(-1))
        if finite is not None:
            self.weighted.add_(finite.mul_(exponentials).sum(-1))
        if self.wanted.hidden:
            if slope is not None:
                exponentials.mul_(slope)
            if self.expected is None:
                self.expected = product(exponentials, weight)
            else:
                self.expected.mul_(rescale[:, None]).add_(product(exponentials, weight))
        if self.wanted.probabilities:
            self.kept.append((exponentials, self.shift))

    def _raise_shift(self, logits: Tensor) -> Tensor:
        """Shift by the new maximum; return the factor of the older sums."""
        self.maximum = torch.maximum(self.maximum, logits.amax(-1))
        # a shift by an infinite maximum would give inf - inf; without one exp gives inf or 0
        shift = self.maximum.masked_fill(self.maximum.isinf(), 0.0)
        rescale = torch.exp(self.shift - shift)
        self.shift = shift
        # a sum of zero must stay zero: 0 · exp(large) may be NaN
        return torch.where(self.mass == 0, 1.0, rescale)

    def _add_smooth(self, logits: Tensor, slope: Tensor | None, weight: Tensor) -> None:
        self.logit_sum += (logits - self.label_logit[:, None]).sum(-1)
        if slope is None:
            self.smooth_gradient += weight.sum(0)
        else:
            self.smooth_gradient.addmm_(slope, weight)

    def finish(self) -> Dense:
        """Add the label's term and turn the sums into probabilities."""
        if self.smooth_gradient is not None:
            self.smooth_gradient.mul_(self.options.logit_scale)
        dense = join_sums(
            self.block,
            self.label_logit,
            shift=self.shift,
            mass=self.mass,
            maximum=self.maximum,
            expected=self.expected,
            weighted=self.weighted,
            logit_sum=self.logit_sum,
            smooth_gradient=self.smooth_gradient,
        )
        if not self.kept:
            return dense
        lse, rest = dense.statistics.lse, dense.statistics.lse_rest
        blocks = [
            exponentials.mul_(torch.exp((shift - lse) - rest)[:, None])
            for exponentials, shift in self.kept
        ]
        return dense._replace(probabilities=torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0])
