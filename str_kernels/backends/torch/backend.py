"""`TorchBackend`: the stages in blocked torch calls, within a byte budget."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.torch import blocks
from str_kernels.backends.torch.exact import exact_pass
from str_kernels.backends.torch.refine import refine_pairs
from str_kernels.backends.torch.route import route_pairs
from str_kernels.backends.torch.screen import screen_tiles
from str_kernels.backends.torch.weight import weight_gradients
from str_kernels.engine.contract import (
    Coefficients,
    Dense,
    Gradients,
    Head,
    OpenRows,
    Refined,
    RowShares,
    SafetyTerm,
    Saved,
    TileMasses,
    Tiles,
    Wanted,
    Worklist,
)
from str_kernels.engine.cpu import this_cpu
from str_kernels.engine.rows import combine_rows
from str_kernels.options import LossOptions

DEFAULT_BYTE_BUDGET = 64 << 20


class TorchBackend:
    """Bounded memory on any device; ``Backend`` documents every stage.

    Args:
        byte_budget: bytes for the scratch of one block of rows (logits, weight rows, tile masses);
            gradients, ``[N, D]`` in the dtype of the hidden states, come on top. Block sizes follow
            from it alone, never from free memory.
    """

    name = "torch"

    def __init__(self, byte_budget: int = DEFAULT_BYTE_BUDGET) -> None:
        """Check the budget."""
        if isinstance(byte_budget, bool) or not isinstance(byte_budget, int) or byte_budget < 1:
            raise ValueError(f"byte_budget={byte_budget!r}: must be a positive number of bytes.")
        self.byte_budget = byte_budget

    def refuses(self, screen: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """See ``Backend.refuses``."""
        if screen == "fp8":
            return "the torch backend has no fp8 screen; use 'auto', 'exact', 'bf16' or 'int8'"
        if screen == "int8" and device.type != "cpu":
            return "the torch backend has an int8 screen on CPUs only; use 'auto' or 'exact'"
        return None

    def auto_screen(self, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        """int8 or bf16 where the CPU multiplies it faster, else the operands' own dtype."""
        if device.type != "cpu" or dtype == torch.float64:
            return "exact"
        cpu = this_cpu()
        if cpu.int8 and not cpu.amx:
            return "int8"
        return "bf16" if dtype == torch.float32 and cpu.bf16 else "exact"

    def row_block(self, head: Head, rows: int, *, routed: bool) -> int:
        """See ``Backend.row_block``."""
        return blocks.row_block(self.byte_budget, head, rows, routed=routed)

    def exact(self, head: Head, labels: Tensor, options: LossOptions, wanted: Wanted) -> Dense:
        """See ``Backend.exact``."""
        columns = blocks.column_block(self.byte_budget, head)
        return exact_pass(head, labels, options, wanted, columns)

    def screen(self, head: Head, tiles: Tiles, options: LossOptions, screen: str) -> TileMasses:
        """See ``Backend.screen``."""
        columns = blocks.column_block(self.byte_budget, head)
        return screen_tiles(head, tiles, options, screen, columns)

    def route(self, masses: TileMasses, labels: Tensor, tiles: Tiles, eps: float) -> Worklist:
        """See ``Backend.route``."""
        return route_pairs(masses, labels, tiles, eps)

    def refine(
        self,
        head: Head,
        labels: Tensor,
        tiles: Tiles,
        work: Worklist,
        options: LossOptions,
        wanted: Wanted,
    ) -> Refined:
        """See ``Backend.refine``."""
        return refine_pairs(head, labels, tiles, work, options, wanted, self.byte_budget // 8)

    def combine(
        self, head: Head, labels: Tensor, opened: OpenRows, shares: RowShares, *, spare: bool
    ) -> Tensor:
        """See ``Backend.combine``."""
        return combine_rows(head, labels, opened, shares, spare=spare)

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
        """See ``Backend.weight_gradients``."""
        columns = blocks.column_block(self.byte_budget, head)
        return weight_gradients(head, labels, saved, coefficients, safety, options, needs, columns)
