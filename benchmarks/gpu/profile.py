"""Step 2: one call under torch's profiler: how long the device works, and what it waits for."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.gpu.run import Run
from str_kernels.bench.contenders import CONTENDERS

_LAUNCHES = ("LaunchKernel", "GraphLaunch", "hipLaunch", "hipExtModuleLaunch")
_WAITS = ("Synchronize", "StreamWaitEvent")
_COPIES = ("Memcpy", "Memset")
_TOP = 15  # kernels that are listed by name


class Event(NamedTuple):
    """Something the profiler saw; times in µs."""

    name: str
    on_device: bool
    start: float
    end: float


def profile(run: Run) -> None:
    """Add a row for each N, with and without the constraint."""
    for rows, name in itertools.product(run.sizes.profiled, ("ours", "ours-str")):
        case = run.case(rows, run.sizes.heads[0])
        if not run.todo(name, case):
            continue
        call = CONTENDERS[name].run
        call(case)  # compiles, builds an index
        _profiled(run, call, case)  # the profiler's own first use is slow
        run.add(name, case, **_profiled(run, call, case))


def _profiled(run: Run, call, case) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run.settle()
    with torch.profiler.profile(activities=activities) as seen:
        began = time.perf_counter()
        call(case)
        enqueued = time.perf_counter()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        ended = time.perf_counter()
    events = [
        Event(e.name, e.device_type != DeviceType.CPU, e.time_range.start, e.time_range.end)
        for e in seen.events()
        if not getattr(e, "is_user_annotation", False)
    ]
    times = {"wall_ms": 1e3 * (ended - began), "enqueued_ms": 1e3 * (enqueued - began)}
    return times | summary(events)


def summary(events: Iterable[Event]) -> dict[str, Any]:
    """Count what the host asked for and how long the device worked on it.

    ``busy_ms``: at least one kernel or copy runs; ``span_ms``: from the first one's start to the
    last one's end. The rest of it is ``idle``, a share. ``torch_calls`` counts operators.
    """
    device, host = [], []
    for event in events:
        (device if event.on_device else host).append(event)
    span, busy = _union([(event.start, event.end) for event in device])
    by_kernel: dict[str, list[float]] = {}
    for event in device:
        by_kernel.setdefault(event.name, []).append(event.end - event.start)
    longest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))
    return {
        "span_ms": span / 1e3,
        "busy_ms": busy / 1e3,
        "idle": 1 - busy / span if span else None,
        "kernels": sum(not e.name.startswith(_COPIES) for e in device),
        "launches": sum(any(word in e.name for word in _LAUNCHES) for e in host),
        "waits": dict(Counter(e.name for e in host if _starts(e.name, _WAITS))),
        "copies": dict(Counter(e.name for e in host if _starts(e.name, _COPIES))),
        "device_copies": dict(Counter(e.name for e in device if e.name.startswith(_COPIES))),
        "torch_calls": sum("::" in e.name for e in host),
        "longest": [
            {"kernel": name[:120], "count": len(times), "ms": sum(times) / 1e3}
            for name, times in longest[:_TOP]
        ],
    }


def _starts(name: str, words: tuple[str, ...]) -> bool:
    """Return whether this is a call of the runtime or driver with one of the words in its name."""
    return name.startswith(("cuda", "hip", "cu")) and any(word in name for word in words)


def _union(intervals: list[tuple[float, float]]) -> tuple[float, float]:
    """Return from the first start to the last end, and how much of it is covered."""
    if not intervals:
        return 0.0, 0.0
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return reached - min(intervals)[0], covered
