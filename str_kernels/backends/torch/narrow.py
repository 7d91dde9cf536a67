"""The exact pass of few rows of 16-bit operands, which reads the weight once.

Stage: ``Head`` → ``Dense``, as ``exact``. With few rows the time is that of moving the weight. Its
rows are widened to fp32 a cacheful at a time, and each cacheful is multiplied twice while it is
there: into logits, and by their exponentials. The shift of these is raised now and then; where the
logits spread too far for that, ``exact`` computes the rows instead.

Widening costs as much as both products of a single row, and where the CPU multiplies bf16 as such
more than those of any few. There the products are of bf16, which rounds logits as a bf16 head does;
those of a row's likeliest tokens are computed again, so that the loss is an order more exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.torch.blocks import in_block, spans
from str_kernels.engine.contract import Block, Dense, Head, Wanted
from str_kernels.engine.finish import join_sums
from str_kernels.engine.logits import (
    accumulator,
    columns_of,
    finish_logits,
    softcap_slope,
    take_rows,
)
from str_kernels.engine.products import multiplies_bf16
from str_kernels.engine.rest import left_out

MOST_ROWS = 128
_CACHEFUL = 5 << 15  # numbers of the weight: 640 KiB of fp32, most of a core's second-level cache
_PRODUCT, _PRODUCT_LOGITS = 1 << 24, 1 << 21  # numbers of the weight and of logits in a bf16 one
_LARGE = 1 << 24  # numbers of a weight that leaves the cache; widening a smaller one costs nothing
_LIKELY = 2.0**-7  # share of the mass so far above which a logit of a bf16 product is mended
_LOGITS = 1 << 18  # numbers at most in the logits of one block, after which the shift is raised
_CACHEFULS = 16  # at most in one block


def is_narrow(block: Block, wanted: Wanted) -> bool:
    """Whether this pass computes what is wanted of so many rows."""
    dtype = block.head.hidden_states.dtype
    return (
        0 < len(block.labels) <= MOST_ROWS
        and dtype.itemsize < accumulator(dtype).itemsize
        and not (block.options.label_smoothing or wanted.entropy or wanted.probabilities)
    )


def narrow_pass(block: Block, wanted: Wanted) -> Dense | None:
    """Return ``Dense`` of R rows; None if a row's logits spread too far for its shift."""
    sums = _Sums(block, wanted)
    wide = min(_CACHEFULS, max(1, _LOGITS // (sums.size * len(block.labels)))) * sums.size
    for part in spans(len(block.head.weight), wide):
        sums.add(part)
    # relative to the maximum a sum is 1 or more; NaN is neither
    if not ((sums.mass >= 0.5) & (sums.mass < float("inf"))).all():
        return None
    return join_sums(
        block,
        columns_of(block).label,
        shift=sums.shift[:, 0],
        mass=sums.mass,
        maximum=sums.maximum,
        expected=sums.expected,
        weighted=None,
        logit_sum=None,
        smooth_gradient=None,
    )


class _Sums:
    """Each row's sums over the vocabulary without the label, relative to ``exp(shift)``."""

    def __init__(self, block: Block, wanted: Wanted) -> None:
        self.head, self.labels, self.options = block.head, block.labels, block.options
        self.hidden = self.head.hidden_states.to(accumulator(self.head.hidden_states.dtype))
        self.out = left_out(self.head.bias, self.options)
        self.rounded = _multiplies_as_such(self.head)
        rows, dim = self.hidden.shape
        size = min(_PRODUCT // dim, _PRODUCT_LOGITS // rows) if self.rounded else _CACHEFUL // dim
        self.size = max(1, size)
        self.widened = None
        if not self.rounded:
            self.widened = self.hidden.new_empty(self.size, self.hidden.shape[1])
        self.labelled = set(self.labels.div(self.size, rounding_mode="floor").tolist())
        self.shift: Tensor | None = None
        self.mass = self.hidden.new_zeros(len(self.hidden))
        self.maximum = torch.full_like(self.mass, float("-inf"))
        self.expected = torch.zeros_like(self.hidden) if wanted.hidden else None

    def add(self, part: slice) -> None:
        """Add a block of the vocabulary, a cacheful at a time."""
        logits = self.hidden.new_empty(len(self.hidden), part.stop - part.start)
        exponentials = torch.empty_like(logits)
        weights = self.head.weight[part].split(self.size)
        places = (logits.split(self.size, 1), exponentials.split(self.size, 1))
        starts = range(part.start, part.stop, self.size)
        for start, weight, here, there in zip(starts, weights, *places, strict=True):
            self._add(start, weight.to(self.head.hidden_states.dtype), here, there)
        self.mass += exponentials.sum(-1)
        torch.maximum(self.maximum, logits.amax(-1), out=self.maximum)
        self._raise_shift()

    def _raise_shift(self) -> None:
        """Let the sums be relative to the maximum so far: an exponent then has most decimals."""
        maximum = self.maximum[:, None]
        shift = torch.where(maximum.isinf(), self.shift, maximum)
        rescale = torch.exp(self.shift - shift)
        self.mass *= rescale[:, 0]
        if self.expected is not None:
            self.expected *= rescale
        self.shift = shift

    def _add(self, start: int, narrow: Tensor, logits: Tensor, exponentials: Tensor) -> None:
        """Add a cacheful ``[C, D]``, writing its logits and their exponentials ``[R, C]``."""
        weight = narrow if self.rounded else self.widened[: len(narrow)].copy_(narrow)
        left = self.head.hidden_states if self.rounded else self.hidden
        _multiply(left, weight.T, logits)
        tokens = slice(start, start + len(narrow))
        if self.head.bias is not None:
            logits += self.head.bias[tokens]
        finish_logits(logits, self.options)
        slope = None if self.options.softcap is None else softcap_slope(logits, self.options)
        if self.out is not None:
            logits.masked_fill_(self.out[tokens], float("-inf"))
        if start // self.size in self.labelled:
            here, column = in_block(self.labels, tokens)
            logits[here, column] = float("-inf")
        if self.shift is None:
            highest = logits.amax(-1, keepdim=True)
            self.shift = highest.masked_fill_(highest.isinf(), 0.0)
        torch.sub(logits, self.shift, out=exponentials).exp_()
        if self.rounded:
            self._mend(start, narrow, logits, exponentials, slope)
        if self.expected is not None:
            spread = exponentials if slope is None else slope.mul_(exponentials)
            _multiply(spread.to(weight.dtype), weight, self.expected, add=True)

    def _mend(
        self,
        start: int,
        narrow: Tensor,
        logits: Tensor,
        exponentials: Tensor,
        slope: Tensor | None,
    ) -> None:
        """Compute the likeliest logits again, in fp32."""
        total = self.mass + exponentials.sum(-1)
        pairs = (exponentials > _LIKELY * total[:, None]).nonzero()
        if not len(pairs):
            return
        rows, columns = pairs.unbind(-1)
        chosen = take_rows(narrow, columns).to(self.hidden.dtype)
        exactly = (take_rows(self.hidden, rows) * chosen).sum(-1)
        if self.head.bias is not None:
            exactly += self.head.bias[start + columns]
        finish_logits(exactly, self.options)
        logits[rows, columns] = exactly
        exponentials[rows, columns] = torch.exp(exactly - self.shift[rows, 0])
        if slope is not None:
            slope[rows, columns] = softcap_slope(exactly, self.options)


def _multiplies_as_such(head: Head) -> bool:
    """Whether products of bf16 operands, not of widened ones, pay for so many rows."""
    hidden, weight = head.hidden_states, head.weight
    if hidden.dtype != torch.bfloat16 or weight.numel() < _LARGE:
        return False
    return len(hidden) == 1 or multiplies_bf16(weight.device)


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out = left @ right``, or add it, in fp32; one row goes through the faster `torch.mv`."""
    one, beta = len(left) == 1, 1 if add else 0
    if left.dtype != out.dtype:
        made = torch.mv(right.T, left[0])[None] if one else torch.mm(left, right)
        out.add_(made) if add else out.copy_(made)
    elif one:
        torch.addmv(out[0], right.T, left[0], beta=beta, out=out[0])
    else:
        torch.addmm(out, left, right, beta=beta, out=out)
