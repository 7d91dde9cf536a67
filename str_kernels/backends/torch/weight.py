"""The gradient of a trainable weight and bias, one block of the vocabulary after the other.

Stage: ``Saved``, ``Coefficients`` → gradients ``[V, D]`` and ``[V]``. An exact pass recomputes all
logits. After routing, logits are recomputed for live pairs alone, and ``engine.dead`` adds the dead
ones. Each block is summed over all rows in fp32 and cast once, or summed in place if it is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from str_kernels.backends.torch.blocks import MAX_ROWS, head_rows, in_block, spans
from str_kernels.engine.contract import Block, Coefficients, SafetyTerm, Saved
from str_kernels.engine.dead import dead_share, silent_rows
from str_kernels.engine.logits import accumulator, block_logits, softcap_slope
from str_kernels.engine.rest import left_out
from str_kernels.engine.rows import factor_of_logits
from str_kernels.engine.tiles import positions_of
from str_kernels.options import TILE


def weight_gradients(
    given: Block,
    saved: Saved,
    coefficients: Coefficients,
    *,
    safety: SafetyTerm | None,
    needs: tuple[bool, bool],
    columns: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what R rows add to the gradients of weight and bias; see ``Backend``."""
    head, rows = given.head, _Rows(given, saved, coefficients)
    weight = torch.empty_like(head.weight) if needs[0] else None
    bias = torch.empty_like(head.bias) if needs[1] else None
    spread = dead_share(given, saved, coefficients) if rows.routed else None
    size = TILE if rows.routed else columns
    # in token order and in the accumulator's dtype a block is summed in place
    scratch = None
    if needs[0] and (rows.order is not None or weight.dtype != rows.hidden.dtype):
        scratch = rows.hidden.new_empty(size, weight.shape[1])
    for block in spans(head.weight.shape[0], size):
        total = block.stop - block.start
        if scratch is not None:
            place = scratch[:total]
        else:
            place = None if weight is None else weight[block]
        part = _Part(place, rows.hidden.new_zeros(total) if needs[1] else None)
        if spread is not None:
            part.spread(spread[0][block.start // TILE], spread[1][block.start // TILE])
        for hidden, dz in rows.pieces(block):
            part.add(hidden, dz)
        part.settle()
        if safety is not None:
            here, offset = in_block(positions_of(safety.ids, rows.inverse), block)
            part.scatter(offset, safety.weight[here], safety.bias[here])
        where = block if rows.order is None else rows.order[block]
        if scratch is not None:
            weight[where] = part.weight.to(weight.dtype)
        if bias is not None:
            bias[where] = part.bias.to(bias.dtype)
    return weight, bias


class _Rows:
    """R rows, and the gradients of their logits."""

    def __init__(self, given: Block, saved: Saved, coefficients: Coefficients) -> None:
        head, labels, tiles, self.options = given[:4]
        self.head, self.saved, self.coefficients = head, saved, coefficients
        self.hidden = head.hidden_states.to(accumulator(head.hidden_states.dtype))
        self.routed = saved.masses is not None
        self.order, self.inverse = tiles[:2] if self.routed else (None, None)
        self.of_logits = factor_of_logits(saved, coefficients)
        self.positions = positions_of(labels, self.inverse)
        silent = silent_rows(coefficients)
        self.silent = silent if silent.any() else None

    def pieces(self, block: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``H [R', D]`` and ``dz [R', C]``, by ``H Wᵀ + b``, of the block's live rows."""
        kept, options = self.saved.probabilities, self.options
        if kept is not None:
            for rows in self._live(block):
                alpha = self.coefficients.alpha[rows, None]
                yield self.hidden[rows], self._by_products(rows, kept[rows, block] * alpha, block)
            return
        weight, bias = head_rows(self.head, self.order, block, self.hidden.dtype)
        out = left_out(bias, options)
        for rows in self._live(block):
            hidden, alpha = self.hidden[rows], self.of_logits[rows, None]
            logits = block_logits(hidden, weight, bias, options)
            slope = None if options.softcap is None else softcap_slope(logits, options)
            if out is not None:
                logits.masked_fill_(out, float("-inf"))
            dz = logits.sub_(self.saved.lse[rows, None]).exp_().mul_(alpha)
            yield hidden, self._by_products(rows, dz, block, slope)

    def _by_products(
        self, rows: Tensor | slice, dz: Tensor, block: slice, slope: Tensor | None = None
    ) -> Tensor:
        """Turn ``α p`` into the gradient by ``H Wᵀ + b``, in place; ``slope`` is the softcap's."""
        alpha, gamma = self.coefficients.alpha[rows], self.coefficients.gamma[rows]
        here, column = in_block(self.positions[rows], block)
        # α p_y - γ, where p_y = 1 - open mass, so that a confident row does not lose its digits
        dz[here, column] = (alpha - gamma - alpha * self.saved.open_mass[rows])[here]
        if self.coefficients.sigma is not None:
            dz.sub_(self.coefficients.sigma[rows, None])
        if self.silent is not None:
            dz.masked_fill_(self.silent[rows, None], 0.0)
        if slope is not None:
            dz.mul_(slope)
        return dz if self.options.logit_scale == 1.0 else dz.mul_(self.options.logit_scale)

    def _live(self, block: slice) -> list[Tensor | slice]:
        if not self.routed:
            return list(spans(len(self.hidden), MAX_ROWS))
        live = (self.saved.masses[:, block.start // TILE] < 0).nonzero()[:, 0]
        return list(live.split(MAX_ROWS)) if len(live) else []


class _Part:
    """The gradient of one block of the vocabulary, in the accumulator's dtype.

    ``weight [C, D]`` starts uninitialised, ``bias [C]`` as zeros.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._blank = True

    def spread(self, weight: Tensor, bias: Tensor) -> None:
        """Start from the same row ``[D]`` everywhere."""
        if self.weight is not None:
            self.weight[:] = weight
            self._blank = False
        if self.bias is not None:
            self.bias += bias

    def add(self, hidden: Tensor, dz: Tensor) -> None:
        """Add ``dzᵀ H``."""
        if self.weight is not None:
            self.weight.addmm_(dz.T, hidden, beta=0 if self._blank else 1)
            self._blank = False
        if self.bias is not None:
            self.bias += dz.sum(0)

    def settle(self) -> None:
        """Zero the weight's gradient if nothing was added to it."""
        if self.weight is not None and self._blank:
            self.weight.zero_()

    def scatter(self, offset: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Add ``weight [K, D]`` and ``bias [K]`` to the rows ``offset [K]``."""
        if self.weight is not None:
            self.weight.index_add_(0, offset, weight)
        if self.bias is not None:
            self.bias.index_add_(0, offset, bias)
