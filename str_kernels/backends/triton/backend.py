"""`TritonBackend` runs the stages on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor
from triton.runtime import JITFunction

from str_kernels.backends.triton.columns import exact_columns
from str_kernels.backends.triton.combine import combine_rows
from str_kernels.backends.triton.exact import exact_pass
from str_kernels.backends.triton.exact_blas import blas_refusal
from str_kernels.backends.triton.exact_blas import exact_pass as exact_pass_by_blas
from str_kernels.backends.triton.finish import join_rows
from str_kernels.backends.triton.fitting import with_default
from str_kernels.backends.triton.gradient import gradient_rows
from str_kernels.backends.triton.launch import (
    EXACT,
    FEWEST_FILTERED,
    FEWEST_WITHOUT_BLAS,
    Exact,
    Kind,
    Launch,
    Stage,
    arch_of,
    has_eight_bits,
    kind_of,
    launch_for,
)
from str_kernels.backends.triton.mend import reset_rows, rows_off
from str_kernels.backends.triton.penalty import penalty_rows
from str_kernels.backends.triton.prepare import prepare
from str_kernels.backends.triton.reduce import reduce_rows
from str_kernels.backends.triton.refine import refine_in_order, refine_pairs
from str_kernels.backends.triton.route import route_again, route_pairs
from str_kernels.backends.triton.scatter import scatter_rows
from str_kernels.backends.triton.screen import (
    screen_again,
    screen_kernel,
    screen_quantised,
    screen_tiles,
)
from str_kernels.backends.triton.weight import weight_gradients
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
    Routed,
    RowGradients,
    RowInputs,
    RowPlan,
    RowShares,
    RowSums,
    RowTerms,
    SafetyTerm,
    Saved,
    Statistics,
    TileMasses,
    Tiles,
    Totals,
    Upstream,
    Wanted,
    Worklist,
)
from str_kernels.options import TILE, LossOptions
from str_kernels.quantise import EIGHT_BITS

DEFAULT_BYTE_BUDGET = 160 << 20
_MAX_ROWS = 16384
_ROWS_OF_A_BLOCK = 256  # a multiple of every launch's rows
_ROWS_FOR_INT8: dict[Kind, int] = {"half": 3072, "single": 256}


class TritonBackend:
    """Logits stay in registers, and 1 + 2 · live GEMMs are computed; ``Backend`` documents a stage.

    Args:
        byte_budget: bytes for the scratch of one block of rows (tile masses, live lists, sums).
            Gradients need more: a row of H keeps one of D numbers, and up to 256 bytes, whether it
            has a label or not. Block sizes follow from the budget alone, never from free memory.
        exact: the products of the exact pass: "blas" is the vendor's, in fp32 and bf16; "triton"
            is in every dtype; "auto" is the vendor's wherever they can run.
        launches: sizes that replace the table's, by stage and kind of operand; see ``launch``.
    """

    name = "triton"
    contiguous = True  # the kernels read rows of W that lie one after the other

    def __init__(
        self,
        byte_budget: int = DEFAULT_BYTE_BUDGET,
        launches: Mapping[tuple[Stage, Kind], Launch] | None = None,
        exact: Exact = "auto",
    ) -> None:
        if isinstance(byte_budget, bool) or not isinstance(byte_budget, int) or byte_budget < 1:
            raise ValueError(f"byte_budget={byte_budget!r}: must be a positive number of bytes.")
        if exact not in EXACT:
            raise ValueError(f"exact={exact!r}: must be one of {', '.join(map(repr, EXACT))}.")
        self.exact_by = exact
        self.byte_budget, self.launches = byte_budget, dict(launches or {})

    def refuses(self, screen: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """See ``Backend.refuses``."""
        if dtype == torch.float64:
            return "it has no fp64 kernels"
        if not (interpreted() if device.type == "cpu" else device.type == "cuda"):
            return (
                f"tensors are on {device.type}: it needs CUDA or ROCm, or on a CPU its interpreter "
                "(TRITON_INTERPRET=1 in the environment)"
            )
        arch = arch_of(device)
        if isinstance(arch, int) and 0 < arch < 80:
            return f"compute capability {arch / 10} lacks bf16 instructions"
        if screen in EIGHT_BITS and not has_eight_bits(arch, EIGHT_BITS[screen]):
            name, other = ("fp8 (e4m3)", "int8") if screen == "fp8" else ("int8", "fp8")
            return f"this GPU has no {name} instructions; use '{other}', 'exact' or 'auto'"
        return None

    def auto_screen(self, dtype: torch.dtype, device: torch.device, rows: int) -> str:
        """Choose int8 on Hopper, where it was measured, for enough rows to repay quantising W."""
        enough = _ROWS_FOR_INT8[kind_of(dtype)]
        return "int8" if arch_of(device) == 90 and rows >= enough else "exact"

    def filters(self, dtype: torch.dtype, device: torch.device, positions: int) -> bool:
        """See ``Backend.filters``; the interpreter, whose time tells nothing, always does."""
        if device.type == "cpu":
            return True
        if self.exact_by == "triton" or blas_refusal(dtype, device, LossOptions()) is not None:
            return positions >= FEWEST_WITHOUT_BLAS
        return positions >= FEWEST_FILTERED[kind_of(dtype)]

    def row_block(self, head: Head, rows: int, *, routed: bool) -> int:
        """Count two 4-byte entries a tile and two fp32 rows of D; make blocks of about one size.

        A softcap makes four entries a tile, by which the budget is exceeded.
        """
        vocab, dim = head.weight.shape
        size = 8 * dim + (8 * -(-vocab // TILE) if routed else 0)
        fitting = min(_MAX_ROWS, self.byte_budget // size) // _ROWS_OF_A_BLOCK
        most = max(1, fitting) * _ROWS_OF_A_BLOCK
        blocks = -(-rows // most)
        even = -(-rows // max(1, blocks * _ROWS_OF_A_BLOCK)) * _ROWS_OF_A_BLOCK
        return max(1, min(rows, even))

    def prepare(
        self, inputs: RowInputs, options: LossOptions, vocab_size: int, tiles: Tiles | None
    ) -> RowPlan:
        """See ``Prepares.prepare``."""
        with _on(inputs.labels.device):
            return prepare(inputs, options, vocab_size, None if tiles is None else tiles.inverse)

    @with_default("columns")
    def columns(self, block: Block, needed: Tensor | None, rows: Tensor | None = None) -> Columns:
        """See ``RowStages.columns``; a part of the rows is gathered from the results of all."""
        whole = rows is None or len(rows) == len(block.labels)
        with _on(block.head.weight.device):
            launch = self._launch(block.head, "columns")
            found = exact_columns(block, needed, rows if whole else None, launch)
        return found if whole else found.listed(rows)

    def join(self, block: Block, label_logit: Tensor, sums: RowSums) -> Joined:
        """See ``RowStages.join``."""
        with _on(block.head.weight.device):
            return join_rows(block, label_logit, sums)

    def penalty(
        self, options: LossOptions, statistics: Statistics, reference: Tensor, scale: Tensor
    ) -> Tensor:
        """See ``RowStages.penalty``."""
        with _on(scale.device):
            return penalty_rows(options, statistics, reference, scale)

    def gradient(self, kept: Kept, upstream: Upstream, resolved: Resolved) -> RowGradients:
        """See ``RowStages.gradient``."""
        device = kept.lse.device
        launch = self._launch_on(device, "backward", resolved.dtype, False)
        with _on(device):
            return gradient_rows(kept, upstream, resolved, launch)

    def reduce(
        self, terms: RowTerms, labels: Tensor, options: LossOptions, count: float | Tensor | None
    ) -> Totals:
        """See ``Reduces.reduce``."""
        with _on(labels.device):
            return reduce_rows(terms, labels, options, count)

    def scratch(self, head: Head, rows: int) -> int:
        """Count the bytes that a block takes while it is computed: no more than its budget."""
        vocab, dim = head.weight.shape
        return min(self.byte_budget, rows * (4 * vocab + 8 * dim))

    def screen_rows(self, head: Head, size: int, screen: str) -> int:
        """Quantise W once for many blocks, whose masses and rows of H take half of the budget.

        Without 8 bits nothing is gained by that.
        """
        fitting = self.byte_budget // 2 // _screened_bytes(head) // size
        return size * max(1, fitting) if screen in EIGHT_BITS else size

    @with_default("softmax", "expected")
    def exact(self, block: Block, wanted: Wanted) -> Dense:
        """See ``Backend.exact``."""
        head = block.head
        self._require(head, "exact")
        launches = (self._launch(head, "softmax"), self._launch(head, "expected"))
        budget = self.byte_budget // 2  # the sums use the other half
        with _on(head.weight.device):
            if self._by_blas(block):
                return exact_pass_by_blas(block, wanted, budget)
            return exact_pass(block, wanted, launches, budget)

    def _by_blas(self, block: Block) -> bool:
        """Whether the exact pass of this block uses the vendor's products."""
        if self.exact_by == "triton":
            return False
        refusal = blas_refusal(
            block.head.hidden_states.dtype, block.head.weight.device, block.options
        )
        if refusal is not None and self.exact_by == "blas":
            raise ValueError(f"exact='blas': {refusal}; use exact='auto' or 'triton'.")
        return refusal is None

    @with_default("screen")
    def screen(self, block: Block, screen: str) -> TileMasses:
        """See ``Backend.screen``."""
        head, dtype = block.head, EIGHT_BITS.get(screen)
        self._require(head, screen)
        if screen == "bf16":
            head = head._replace(hidden_states=head.hidden_states.bfloat16())
            block = block._replace(head=head)
        launch = self._launch(head, "screen", dtype)
        with _on(head.weight.device):
            if dtype is None:
                return screen_tiles(block, launch)
            # W's rows have what H's rows and the masses leave; no sums have been allocated yet
            budget = self.byte_budget - len(head.hidden_states) * _screened_bytes(head)
            return screen_quantised(block, launch, dtype, max(budget, self.byte_budget // 4))

    def route(self, block: Block, masses: TileMasses, eps: float) -> Worklist:
        """See ``Backend.route``; the memory of the log-masses is reused for ``dead``."""
        with _on(masses.log_mass.device):
            return route_pairs(block, masses, eps)

    @with_default("refine")
    def refine(self, block: Block, work: Worklist, wanted: Wanted) -> Refined:
        """See ``Backend.refine``."""
        return self._refine(block, work, wanted)

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
        """See ``Prepares.mend``; the masses had become ``dead``, and are masses again meanwhile."""
        (_, slope, anchor), work, sums = routed
        with _on(block.head.weight.device):
            # few rows are no reason to multiply all with the hot tiles again
            tiles = block.tiles._replace(hot=0)
            again = block._replace(places=rows_off(block, routed, most, number), tiles=tiles)
            self._screen_again(again, TileMasses(work.dead, slope, anchor))
            route_again(again, anchor, work, eps)
            reset_rows(sums, again.places)
        self._refine(again, work, wanted, sums)

    @with_default("screen")
    def _screen_again(self, block: Block, masses: TileMasses) -> None:
        screen_again(block, masses, self._launch(block.head, "screen"))

    def scatter(
        self, plan: RowPlan, blocks: list[tuple[Tensor, Statistics]]
    ) -> tuple[Tensor, Statistics]:
        """See ``Prepares.scatter``."""
        with _on(plan.labels.device):
            return scatter_rows(plan, blocks)

    def _refine(
        self, block: Block, work: Worklist, wanted: Wanted, sums: Refined | None = None
    ) -> Refined:
        device = block.head.weight.device
        sizes = {
            "launch": self._launch(block.head, "refine"),
            "programs": _programs(device),
            "byte_budget": self.byte_budget,
        }
        with _on(device):
            if torch.are_deterministic_algorithms_enabled() or arch_of(device) == "gfx90a":
                return refine_in_order(block, work, wanted, sums, **sizes)
            return refine_pairs(block, work, wanted, sums, **sizes)

    def combine(
        self,
        block: Block,
        opened: OpenRows,
        shares: RowShares,
        *,
        spare: bool,
        out: Tensor | None = None,
    ) -> Tensor:
        """See ``Backend.combine``; the opened rows are left unchanged."""
        with _on(block.head.weight.device):
            return combine_rows(block, opened, shares, out)

    @with_default("gradient", "weight")
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
        head = block.head
        with _on(head.weight.device):
            return weight_gradients(
                block,
                saved,
                coefficients,
                safety=safety,
                needs=needs,
                launches=(self._launch(head, "gradient"), self._launch(head, "weight")),
                byte_budget=self.byte_budget,
            )

    def _launch(self, head: Head, stage: Stage, dtype: torch.dtype | None = None) -> Launch:
        """Return a stage's sizes; ``dtype`` is that of its operands where it is not H's."""
        operands = head.hidden_states.dtype
        wide = dtype is None and head.weight.dtype.itemsize > operands.itemsize
        return self._launch_on(head.weight.device, stage, dtype or operands, wide)

    def _launch_on(
        self, device: torch.device, stage: Stage, dtype: torch.dtype, wide: bool
    ) -> Launch:
        table = launch_for(arch_of(device), stage, dtype, wide_weight=wide)
        return self.launches.get((stage, kind_of(dtype)), table)

    def _require(self, head: Head, screen: str) -> None:
        refusal = self.refuses(screen, head.hidden_states.dtype, head.weight.device)
        if refusal is not None:
            raise ValueError(f"backend='triton': {refusal}.")


def _screened_bytes(head: Head) -> int:
    """Bytes of a row of H in 8 bits and its masses."""
    vocab, dim = head.weight.shape
    return dim + 4 * -(-vocab // TILE)


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter."""
    return not isinstance(screen_kernel, JITFunction)


def _programs(device: torch.device) -> int:
    """Run two programs of a persistent kernel on each multiprocessor; any number is correct."""
    if device.type != "cuda":
        return 3
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch on the tensors' device, which need not be the process's current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
