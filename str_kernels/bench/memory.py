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


def peak_bytes(call: Callable[[], object], device: torch.device) -> Peak:
    """Run ``call`` once and count; what it returns counts as kept."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        after = torch.cuda.memory_allocated(device)
        del kept
        return Peak(torch.cuda.max_memory_allocated(device) - before, after - before)
    live: dict[int, int] = {}
    now = peak = 0
    for address, size in _allocations(call):
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
        else:  # of something older: not ours
            now -= live.pop(address, 0)
    return Peak(peak, now)


def _allocations(call: Callable[[], object]) -> list[tuple[int, int]]:
    """Return address and size of every allocation in order of time; a negative size frees."""
    from torch._C._profiler import _EventType

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    events, todo = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    del kept
    return [(address, size) for _, address, size in sorted(events, key=lambda event: event[0])]


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
