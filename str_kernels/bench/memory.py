"""Count the most bytes that a call has alive at once, at the allocator.

On a CPU torch's profiler reports every allocation, inside kernels and compiled code too, so the
count is the same on every machine (libraries' own scratch space excepted). A dispatch mode would
not do: it makes compiled code run uncompiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_SHARE = 0.9  # of the free memory that a call may take


class Peak(NamedTuple):
    """``peak``: most bytes alive at once, of those allocated in the call; ``kept``: at its end."""

    peak: int
    kept: int


def peak_bytes(
    call: Callable[[], object], device: torch.device, *then: Callable[[], object]
) -> Peak:
    """Run ``call`` once and count; what it returns counts as kept.

    ``then`` are further calls in the same account. On a CPU the events of each are dropped before
    the next runs, so that a long step can be counted in parts.
    """
    calls, kept = (call, *then), []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for each in calls:
            kept.append(each())
        after = torch.cuda.memory_allocated(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, after - before)
    live: dict[int, int] = {}
    now = peak = 0
    for each in calls:
        result, allocations = _allocations(each)
        kept.append(result)
        for _, address, size in allocations:
            if size > 0:
                live[address] = size
                now += size
                peak = max(peak, now)
            else:  # of something older: not ours
                now -= live.pop(address, 0)
    return Peak(peak, now)


def _allocations(call: Callable[[], object]) -> tuple[object, list[tuple[int, int, int]]]:
    """Return the result and each allocation in order: time, address, size; a negative size frees.

    Torch's profiler records operators too, three of them to an allocation, of 2 KiB each: a scope
    in which nothing runs leaves them out.
    """
    from torch._C import _autograd
    from torch._C._profiler import RecordScope, _EventType

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr
    recorder = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
    config, activities = recorder.config(), recorder.kineto_activities
    _autograd._prepare_profiler(config, activities)
    _autograd._enable_profiler(config, activities, {RecordScope.STATIC_RUNTIME_OP})
    try:
        kept = call()
    finally:
        recorded = _autograd._disable_profiler()
    events, todo = [], list(recorded.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return kept, sorted(events, key=lambda event: event[0])


@contextmanager
def within_free_memory(device: torch.device) -> Iterator[None]:
    """Let an allocation that the machine has no room for fail, instead of the process.

    Nothing is limited where the system cannot (not Linux), nor on a GPU, whose driver maps far more
    than it uses.
    """
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        yield
        return
    import resource

    free, used = _bytes("/proc/meminfo", "MemAvailable"), _bytes("/proc/self/status", "VmSize")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(_SHARE * free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def free_bytes() -> int | None:
    """The memory that new allocations may take on the CPU; None: this system does not say."""
    if not os.path.exists("/proc/meminfo"):
        return None
    return int(_SHARE * _bytes("/proc/meminfo", "MemAvailable"))


def _bytes(path: str, field: str) -> int:
    """Return a field of a file whose lines are ``name: number kB``."""
    with open(path, encoding="utf-8") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts[field].split()[0]) * 1024
