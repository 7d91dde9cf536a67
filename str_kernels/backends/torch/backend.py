"""`TorchBackend`: the stages in blocked torch calls, within a byte budget."""

from __future__ import annotations

import torch
from torch import Tensor

from str_kernels.backends.torch import blocks
from str_kernels.backends.torch.exact import exact_pass
from str_kernels.backends.torch.measured import fastest_screen
from str_kernels.backends.torch.refine import refine_pairs
from str_kernels.backends.torch.route import route_pairs
from str_kernels.backends.torch.screen import screen_tiles
from str_kernels.backends.torch.weight import weight_gradients
from str_kernels.engine.contract import (
    Block,
    Coefficients,
    Dense,
    Head,
    Refined,
    SafetyTerm,
    Saved,
    TileMasses,
    Wanted,
    Worklist,
)
from str_kernels.engine.cpu import this_cpu
from str_kernels.engine.rows import combine_rows

DEFAULT_BYTE_BUDGET = 64 << 20
# A screen in 8 bits quantises W. At V 262,144, D 640 the filtered head took 10 times as long as the
# exact one for one row, 3 times for 32 (bf16) and 64 (fp32), 1.1 times for 128 and 192.
FEWEST_FILTERED = 129


class TorchBackend:
    """Computes every stage in bounded memory, on any device; ``Backend`` documents the stages.

    Args:
        byte_budget: bytes of scratch for one block of rows (logits, weight rows, tile masses), on
            top of the gradients ``[N, D]``. Block sizes depend on it, never on free memory.
    """

    name = "torch"
    route = staticmethod(route_pairs)
    combine = staticmethod(combine_rows)

    def __init__(self, byte_budget: int = DEFAULT_BYTE_BUDGET) -> None:
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
        """Choose int8 or bf16 where the CPU multiplies it faster, else the operands' own dtype.

        On a CPU of an unknown kind the choice is measured.
        """
        if device.type != "cpu" or dtype == torch.float64:
            return "exact"
        cpu = this_cpu()
        if not cpu.known:
            return fastest_screen(dtype)
        if cpu.int8 and not cpu.amx:
            return "int8"
        return "bf16" if dtype == torch.float32 and cpu.bf16 else "exact"

    def filters(self, dtype: torch.dtype, device: torch.device, positions: int) -> bool:
        """See ``Backend.filters``."""
        return device.type != "cpu" or positions >= FEWEST_FILTERED

    def row_block(self, head: Head, rows: int, *, routed: bool) -> int:
        """See ``Backend.row_block``."""
        return blocks.row_block(self.byte_budget, head, rows, routed=routed)

    def scratch(self, head: Head, rows: int) -> int:
        """Count the bytes that a block of ``rows`` rows takes while it is computed."""
        return blocks.scratch(self.byte_budget, head, rows)

    def screen_rows(self, head: Head, size: int, screen: str) -> int:
        """Screen a block at a time, for W is small beside its masses."""
        return size

    def exact(self, block: Block, wanted: Wanted) -> Dense:
        """See ``Backend.exact``."""
        return exact_pass(block, wanted, self._columns(block))

    def screen(self, block: Block, screen: str) -> TileMasses:
        """See ``Backend.screen``."""
        return screen_tiles(block, screen, self._columns(block))

    def refine(self, block: Block, work: Worklist, wanted: Wanted) -> Refined:
        """See ``Backend.refine``."""
        return refine_pairs(block, work, wanted, self.byte_budget // 8)

    def weight_gradients(
        self,
        block: Block,
        saved: Saved,
        coefficients: Coefficients,
        *,
        safety: SafetyTerm | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``Backend.weight_gradients``."""
        columns = self._columns(block)
        return weight_gradients(
            block, saved, coefficients, safety=safety, needs=needs, columns=columns
        )

    def _columns(self, block: Block) -> int:
        return blocks.column_block(self.byte_budget, block.head)
