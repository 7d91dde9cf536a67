"""Measure time in units: a call beside the bare product of hidden states and head.

One unit, a GEMM, is ``2·N·V·D`` operations in the operands' own dtype, blocked so that it needs no
memory to speak of. Both are timed in turns in one process, and a call is compared with the products
right before and after it: what slows a machine down for a while slows both.

Everything is timed by one protocol. Both are called once to warm up. A *single* call starts on an
idle device, so the time in which the host enqueues it counts. *Queued* calls, on a GPU, follow each
other without a wait of ours, and their sum is divided by their number: the host's time is hidden,
and the clocks fall to what the chip sustains. On a GPU events on the device's own clock delimit
both, elsewhere the host's clock does. Nothing flushes a cache: a head is larger than one.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from str_kernels.bench.sensors import Sensors, read_sensors

_ROWS, _COLUMNS = 2048, 8192  # of a block of the bare product
_QUEUE_S = 0.05  # seconds of calls that follow each other
_QUEUES = 3  # such queues, of the call and of the unit in turns
_FEWEST, _MOST = 2, 20  # calls of a queue


@dataclass(frozen=True)
class Timing:
    """Paired measurements, repeat by repeat: seconds of a call, and of the unit around it.

    ``queued`` and ``queued_units`` are those of calls that follow each other, empty if there were
    none; ``sensors`` were read while the last of them ran.
    """

    seconds: list[float]
    units: list[float]
    queued: list[float] = field(default_factory=list)
    queued_units: list[float] = field(default_factory=list)
    sensors: Sensors = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Single calls in units."""
        return _ratios(self.seconds, self.units)

    @property
    def ratio(self) -> float:
        """The median of single calls in units."""
        return statistics.median(self.ratios)

    def as_row(self) -> dict[str, object]:
        """Return what a row of results holds of it."""
        row = {"gemms": self.ratio, "ratios": self.ratios}
        row |= {"seconds": self.seconds, "unit_seconds": self.units}
        if self.queued:
            ratios = _ratios(self.queued, self.queued_units)
            row |= {"queued_gemms": statistics.median(ratios), "queued_seconds": self.queued}
            row |= {"queued_unit_seconds": self.queued_units, "sensors": self.sensors}
        return row


def bare_product(hidden_states: Tensor, weight: Tensor) -> Callable[[], None]:
    """Return a call that multiplies ``H Wᵀ`` block by block into one buffer."""
    rows, columns = min(_ROWS, len(hidden_states)), min(_COLUMNS, len(weight))
    buffer = hidden_states.new_empty(rows, columns)

    def run() -> None:
        with torch.no_grad():
            for block in weight.split(columns):
                for part in hidden_states.split(rows):
                    out = buffer.view(-1)[: len(part) * len(block)].view(len(part), len(block))
                    torch.mm(part, block.T, out=out)

    return run


def paired(
    call: Callable[[], object],
    unit: Callable[[], object],
    *,
    device: torch.device,
    repeats: int = 7,
    budget_s: float = 30.0,
    queued: bool | None = None,
) -> Timing:
    """Time a call in units of another, both warmed up; at least once, at most ``budget_s`` long.

    ``queued`` None times queued calls too where there is a GPU, in as many seconds as the queues
    take: the budget is that of the single calls.
    """
    call()
    unit()
    with _no_collection():
        seconds, units = _in_turns(partial(elapsed, device=device), call, unit, repeats, budget_s)
        if queued is False or (queued is None and device.type != "cuda"):
            return Timing(seconds, units)
        count = max(_FEWEST, min(_MOST, int(_QUEUE_S / statistics.median(seconds))))
        sensors: Sensors = {}

        def timed(function: Callable[[], object]) -> float:
            return elapsed(function, device, count, sensors if function is call else None) / count

        queues = min(repeats, _QUEUES)
        return Timing(seconds, units, *_in_turns(timed, call, unit, queues, budget_s), sensors)


def _in_turns(
    timed: Callable[[Callable[[], object]], float],
    call: Callable[[], object],
    unit: Callable[[], object],
    repeats: int,
    budget_s: float,
) -> tuple[list[float], list[float]]:
    """Return seconds of the calls, and the mean of the units right before and after each."""
    seconds, units = [], [timed(unit)]
    started = time.perf_counter()
    while not seconds or (len(seconds) < repeats and time.perf_counter() - started < budget_s):
        seconds.append(timed(call))
        units.append(timed(unit))
    return seconds, [(before + after) / 2 for before, after in itertools.pairwise(units)]


def elapsed(
    call: Callable[[], object],
    device: torch.device,
    count: int = 1,
    sensors: Sensors | None = None,
) -> float:
    """Return the seconds of ``count`` calls on a device that was idle; fill ``sensors``."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            call()
        seconds = time.perf_counter() - started
        if sensors is not None:
            sensors.update(read_sensors(device))
        return seconds
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    for _ in range(count):
        call()
    end.record(stream)
    if sensors is not None:  # while the device still works
        sensors.update(read_sensors(device))
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


@contextmanager
def _no_collection():
    """Collect garbage before and not while something is timed."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _ratios(seconds: list[float], units: list[float]) -> list[float]:
    return [second / unit for second, unit in zip(seconds, units, strict=True)]
