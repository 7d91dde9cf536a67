"""Step 3: how long each stage of the backend takes, and the variants of the refinement."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.run import Run
from str_kernels.backends.selection import DEFAULT_EPS
from str_kernels.bench.inputs import Case
from str_kernels.engine.contract import Backend, Block, Head, Wanted, Worklist
from str_kernels.engine.forward import tiles_of
from str_kernels.engine.stages import row_stages
from str_kernels.functional import linear_cross_entropy
from str_kernels.options import LossOptions
from str_kernels.quantise import EIGHT_BITS
from str_kernels.vocabulary import VocabularyIndex

BOTH = Wanted(hidden=True, masses=False, entropy=False)
_CHOICES = ("refuses", "auto_screen", "row_block", "screen_rows")  # they compute nothing
LOGITS = Wanted(hidden=False, masses=False, entropy=False)


class StageTimes:
    """Wraps a backend's stages, each between two marks of the device's own clock."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []
        for name, method in inspect.getmembers(backend, inspect.isroutine):
            if not name.startswith("_") and name not in _CHOICES:
                setattr(backend, name, functools.partial(self._run, name, method))

    def _run(self, name: str, method, *arguments: Any, **options: Any) -> Any:
        with self.span(name):
            return method(*arguments, **options)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is enqueued inside; a span may lie in another."""
        begin = self._mark()
        yield
        self.spans.append((name, begin, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each name, summed over row blocks, and forget them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for name, begin, end in self.spans:
            ms = begin.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - begin)
            found[name] = found.get(name, 0.0) + ms
        self.spans.clear()
        return found


def stages(run: Run) -> None:
    """Add the stages of a call, with and without the constraint, then single stages by themselves.

    Two marks around each launch cost microseconds; what a stage waits for the host is in it.
    """
    case = run.case(run.sizes.rows[0], run.sizes.heads[0])
    for name in ("ours", "ours-kept", "ours-str", "ours-exact"):
        if run.todo(name, case):
            run.add(name, case, **_by_stage(run, case, name))
    for name, screen, index in (
        ("screen int8", "int8", case.index),
        ("screen int8, W kept in int8", "int8", run.kept_index(run.sizes.heads[0])),
        ("screen, 16 bits", "exact", case.index),
    ):
        _screen(run, case, name, screen=screen, index=index)
    _refine(run, case)
    if run.todo("quantise W", case):
        _quantise(run, case)


def _by_stage(run: Run, case: Case, name: str) -> dict[str, Any]:
    backend = run.ours()
    times = StageTimes(backend, run.device)
    settings: dict[str, Any] = {"backend": backend}
    if name == "ours-exact":
        settings["filter_eps"] = 0.0
    else:
        head = run.sizes.heads[0]
        settings["index"] = run.kept_index(head) if name == "ours-kept" else case.index
    if name == "ours-str":
        settings["safety"], settings["reference"] = case.usual_constraint
    found = []
    for _ in range(1 + max(2, run.sizes.repeats)):
        hidden = case.hidden_states.detach().requires_grad_()
        run.settle()
        with times.span("whole"):
            with times.span("forward"):
                loss = linear_cross_entropy(hidden, case.weight, case.labels, **settings)
            with times.span("backward"):
                torch.autograd.grad(loss, hidden)
        found.append(times.read())
    medians = {key: statistics.median(one[key] for one in found[1:]) for key in found[-1]}
    named = sum(ms for key, ms in medians.items() if key not in ("whole", "forward", "backward"))
    return {"ms": medians, "in_stages": named / medians["whole"]}


def block_of(
    case: Case, rows: int, backend: Backend, index: VocabularyIndex | None = None
) -> Block:
    """Return a block of the first rows, as the engine makes it; ``index`` None: the case's."""
    head = Head(case.hidden_states[:rows].contiguous(), case.weight, None)
    tiles = tiles_of(case.weight, case.index if index is None else index, fresh=False)
    block = Block(head, case.labels[:rows], tiles, LossOptions())
    return block._replace(columns=row_stages(backend).columns(block, None))


def rows_of_block(backend: Backend, case: Case) -> int:
    """Return how many rows the engine hands over at once."""
    head = Head(case.hidden_states, case.weight, None)
    return backend.row_block(head, len(case.labels), routed=True)


def rows_screened(backend: Backend, case: Case, screen: str) -> int:
    """Return how many rows the engine screens at once, a few blocks where that pays."""
    head = Head(case.hidden_states, case.weight, None)
    most = backend.screen_rows(head, rows_of_block(backend, case), screen)
    return min(most, len(case.labels))


def _screen(run: Run, case: Case, name: str, *, screen: str, index: VocabularyIndex) -> None:
    """Time the screen of as many rows as the engine screens at once."""
    backend = run.ours()
    block = block_of(case, rows_screened(backend, case, screen), backend, index)
    part = case.first(len(block.labels))
    if run.todo(name, part):
        timing = run.timed(lambda: backend.screen(block, screen), part)
        run.add(name, part, **timing.as_row())


def _refine(run: Run, case: Case) -> None:
    """Time the refinement of one block, and how it adds up its sums."""
    backend = run.ours()
    block = block_of(case, rows_of_block(backend, case), backend)
    part = case.first(len(block.labels))

    def routed() -> Worklist:
        return backend.route(block, backend.screen(block, "int8"), DEFAULT_EPS)

    if run.todo("screen and route", part):  # together, for routing reuses the screen's memory
        run.add("screen and route", part, **run.timed(routed, part).as_row())
    work = routed()
    live = work.live().float().mean().item()
    for name, wanted, ordered in (
        ("refine, logits alone", LOGITS, False),
        ("refine, sums added by atomics", BOTH, False),
        ("refine, sums stored and added in order", BOTH, True),
    ):
        if run.todo(name, part):

            def refined(wanted=wanted, ordered=ordered):
                with _deterministic(ordered):
                    return backend.refine(block, work, wanted)

            run.add(name, part, live=live, **run.timed(refined, part).as_row())


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Switch torch's deterministic mode on for our stage; it warns of cuBLAS in the unit."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _quantise(run: Run, case: Case) -> None:
    from str_kernels.backends.triton.quantise import quantised

    """Time what a kept index saves: the whole head in 8 bits, slice by slice."""
    index, slice_rows = case.index, 8192

    def call() -> None:
        for first in range(0, len(case.weight), slice_rows):
            places = range(first, min(first + slice_rows, len(case.weight)))
            quantised(case.weight, EIGHT_BITS["int8"], order=index.order, places=places)

    run.add("quantise W", case, **run.timed(call, case).as_row())
