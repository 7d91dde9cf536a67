"""What every step gets: the device, the sizes, the inputs, a clock, and a place for its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import record
from benchmarks.gpu.plan import FULL, SMALL, Sizes
from str_kernels.backends.selection import select_backend
from str_kernels.bench.clock import Timing, bare_product, paired
from str_kernels.bench.inputs import Case, synthetic
from str_kernels.engine.contract import Backend
from str_kernels.vocabulary import VocabularyIndex


class OutOfTime(Exception):
    """The step's limit is reached; what it found until now is kept."""


@dataclass
class Run:
    """One worker's state."""

    out: Path
    sizes: Sizes
    device: torch.device
    step: str = ""
    deadline: float = 0.0  # of ``time.monotonic``
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @staticmethod
    def open(out: Path, *, small: bool) -> Run:
        """Start or continue a folder, on a GPU, or small on a CPU."""
        if small:
            from benchmarks.interpreter import mend

            mend()
        record.begin(out)
        sizes = SMALL if small else FULL
        return Run(out, sizes, torch.device("cpu" if small else "cuda"))

    def case(self, rows: int, head: tuple[int, int]) -> Case:
        """Return synthetic rows in bf16; of one head all share the weight and the index."""
        return self._inputs(head)[0].first(rows)

    def kept_index(self, head: tuple[int, int]) -> VocabularyIndex:
        """Return the index of this head, with W's rows kept in int8."""
        return self._inputs(head)[1]

    def _inputs(self, head: tuple[int, int]) -> tuple[Case, VocabularyIndex]:
        if head not in self._kept:
            self._kept = {}  # one head at a time
            case = synthetic(max(self.sizes.rows), *head, device=self.device)
            case = case.cast(torch.bfloat16)
            kept = VocabularyIndex.build(case.weight, case.calibration, screen="int8")
            vars(case)["index"] = replace(kept, quantised=None, row_scales=None)
            self._kept[head] = case, kept
            self.settle()
        return self._kept[head]

    def ours(self) -> Backend:
        """Return our backend, of its own, so that a step may change it."""
        backend = select_backend(self.sizes.backend, self.device, torch.bfloat16)[0]
        return type(backend)()

    def timed(self, call: Callable[[], object], case: Case, **options: Any) -> Timing:
        """Time a call beside the bare product of the case."""
        unit = bare_product(case.hidden_states, case.weight)
        return paired(call, unit, device=self.device, **(self.clock() | options))

    def clock(self) -> dict[str, Any]:
        """Return how ``paired`` is asked to time."""
        size = self.sizes
        return {"repeats": size.repeats, "budget_s": size.budget_s, "queued": size.queued}

    def add(self, name: str, case: Case | None = None, **values: Any) -> None:
        """Keep a row."""
        facts = {} if case is None else case.facts
        record.append(self.out, {"step": self.step, "name": name, **facts, **values})

    def todo(self, name: str, case: Case | None = None) -> bool:
        """Return whether this row is missing or has a reason; end the step if time is up."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        wanted = {"step": self.step, "name": name, **({} if case is None else case.facts)}
        rows = record.rows_of(self.out)
        return not any(
            "reason" not in row and all(row.get(key) == x for key, x in wanted.items())
            for row in rows
        )

    def left(self) -> float:
        """Return the seconds that the step has left, at least one."""
        return max(1.0, self.deadline - time.monotonic())

    def forget(self) -> None:
        """Free the inputs, for a step that needs the memory."""
        self._kept = {}
        self.settle()

    def settle(self) -> None:
        """Wait for the device, and return cached memory to it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def usable(self) -> bool:
        """Return whether the device still answers: after an illegal access it never does."""
        try:
            self.settle()
        except RuntimeError:  # torch.AcceleratorError is one
            return False
        return True


def first_line(error: Exception) -> str:
    """Say in one line what was raised."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
