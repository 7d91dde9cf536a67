"""`EmptyBackend` computes the stages of a process that has no row of a split vocabulary.

Every sum is 0 and every maximum -inf; the other processes have the logits. It reads no weight, and
takes part in all that is exchanged at the stages' borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.torch.route import route_pairs
from str_kernels.engine.contract import (
    Block,
    Coefficients,
    Columns,
    Dense,
    Head,
    Joined,
    Kept,
    OpenRows,
    Refined,
    Resolved,
    RowGradients,
    RowShares,
    RowSums,
    SafetyTerm,
    Saved,
    Statistics,
    TileMasses,
    Upstream,
    Wanted,
    Worklist,
)
from str_kernels.engine.finish import join_rows, join_sums
from str_kernels.engine.logits import accumulator, columns_of, kept_dtype, mean_of
from str_kernels.engine.penalty import gradient_rows, penalty_rows
from str_kernels.engine.rows import silence
from str_kernels.options import LossOptions


class EmptyBackend:
    """``Backend`` and ``RowStages`` document the stages."""

    name = "empty"
    route = staticmethod(route_pairs)

    def refuses(self, screen: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Refuse none."""
        return None

    def auto_screen(self, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        """Screen nothing, exactly."""
        return "exact"

    def filters(self, dtype: torch.dtype, device: torch.device, positions: int) -> bool:
        """Leave it to the others."""
        return True

    def row_block(self, head: Head, rows: int, *, routed: bool) -> int:
        """Leave it to the others."""
        return max(1, rows)

    def screen_rows(self, head: Head, size: int, screen: str) -> int:
        """See ``Backend.screen_rows``."""
        return size

    def columns(self, block: Block, needed: Tensor | None, rows: Tensor | None = None) -> Columns:
        """No label and no safety token is here."""
        zeros, routed = _zeros(block), block.tiles is not None
        if routed and block.options.label_smoothing:
            mean_of(block)  # the others add up theirs
        none = torch.full_like(zeros, float("nan"))
        smoothed = routed and block.options.label_smoothing > 0
        found = Columns(none, zeros if routed else None, None, none if smoothed else None)
        return found.listed(rows)

    def join(self, block: Block, label_logit: Tensor, sums: RowSums) -> Joined:
        """See ``RowStages.join``."""
        return join_rows(block, label_logit, sums)

    def penalty(
        self, options: LossOptions, statistics: Statistics, reference: Tensor, scale: Tensor
    ) -> Tensor:
        """See ``RowStages.penalty``."""
        return penalty_rows(options, statistics, reference, scale)

    def gradient(self, kept: Kept, upstream: Upstream, resolved: Resolved) -> RowGradients:
        """See ``RowStages.gradient``."""
        return gradient_rows(kept, upstream, resolved)

    def exact(self, block: Block, wanted: Wanted) -> Dense:
        """See ``Backend.exact``."""
        zeros, smoothed, wide = _zeros(block), bool(block.options.label_smoothing), _wide(block)
        return join_sums(
            block,
            columns_of(block).label,
            shift=zeros,
            mass=zeros.clone(),
            maximum=torch.full_like(zeros, float("-inf")),
            expected=wide if wanted.hidden else None,
            weighted=zeros.clone() if wanted.entropy else None,
            logit_sum=zeros.clone() if smoothed else None,
            smooth_gradient=wide.new_zeros(wide.shape[1]) if smoothed else None,
        )

    def screen(self, block: Block, screen: str) -> TileMasses:
        """See ``Backend.screen``."""
        none = _wide(block)[:, :0]
        slope = None if block.options.softcap is None else none
        return TileMasses(none, slope, columns_of(block).anchor)

    def refine(self, block: Block, work: Worklist, wanted: Wanted) -> Refined:
        """See ``Backend.refine``."""
        zeros = _zeros(block)
        lowest = torch.full_like(zeros, float("-inf"))
        return Refined(zeros, _wide(block) if wanted.hidden else None, lowest)

    def combine(
        self,
        block: Block,
        opened: OpenRows,
        shares: RowShares,
        *,
        spare: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """See ``Backend.combine``; no label's row is here."""
        total = opened.live.clone() if shares.also is None else opened.live + shares.also
        if shares.silent is not None:
            silence(total, shares.silent)
        total = total.to(kept_dtype(block.head.hidden_states.dtype, block.shards))
        return total if out is None else out.copy_(total)

    def weight_gradients(
        self,
        block: Block,
        saved: Saved,
        coefficients: Coefficients,
        *,
        safety: SafetyTerm | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return gradients without rows."""
        of_head = zip(needs, block.head[1:], strict=True)
        weight, bias = (torch.zeros_like(x) if need else None for need, x in of_head)
        return weight, bias


def _zeros(block: Block) -> Tensor:
    hidden = block.head.hidden_states
    return hidden.new_zeros(len(hidden), dtype=accumulator(hidden.dtype))


def _wide(block: Block) -> Tensor:
    hidden = block.head.hidden_states
    return torch.zeros_like(hidden, dtype=accumulator(hidden.dtype))
