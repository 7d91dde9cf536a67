"""What is read off a profile: no GPU is needed to know that it is read right."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.profile import Event, summary
from benchmarks.gpu.suite import read

EVENTS = [
    Event("aten::mm", False, 0.0, 50.0),
    Event("cudaLaunchKernel", False, 1.0, 2.0),
    Event("cuLaunchKernelEx", False, 3.0, 4.0),
    Event("cudaMemcpyAsync", False, 5.0, 6.0),
    Event("cudaStreamSynchronize", False, 7.0, 90.0),
    Event("cudaStreamSynchronize", False, 91.0, 92.0),
    Event("screen_kernel", True, 10.0, 40.0),
    Event("gemm", True, 30.0, 60.0),  # on another stream: both at once count once
    Event("gemm", True, 100.0, 110.0),
    Event("Memcpy DtoH (Device -> Pageable)", True, 110.0, 115.0),
]


def test_summary():
    """Busy time is a union, idle its complement; launches, waits and copies are the host's."""
    found = summary(EVENTS)
    assert (found["span_ms"], found["busy_ms"]) == pytest.approx((0.105, 0.065))
    assert found["idle"] == pytest.approx(40 / 105)
    assert (found["kernels"], found["launches"], found["torch_calls"]) == (3, 2, 1)
    assert found["waits"] == {"cudaStreamSynchronize": 2}
    assert found["copies"] == {"cudaMemcpyAsync": 1}
    assert found["device_copies"] == {"Memcpy DtoH (Device -> Pageable)": 1}
    assert found["longest"][0] == {"kernel": "gemm", "count": 2, "ms": pytest.approx(0.04)}


def test_a_profile_without_a_device():
    """Nothing ran there: no idle share, and no division by zero."""
    found = summary([Event("aten::add", False, 0.0, 1.0)])
    assert found["idle"] is None
    assert found["torch_calls"] == 1


def test_events_of_the_profiler_have_what_is_read():
    """Names, device and times are there in this version of torch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.ones(4).sum()
    event = next(e for e in seen.events() if e.name == "aten::sum")
    assert event.device_type == torch.autograd.DeviceType.CPU
    assert event.time_range.end >= event.time_range.start


@pytest.mark.parametrize(
    ("output", "counts", "failed"),
    [
        ("..\n50 passed, 2 skipped in 61.20s", {"passed": 50, "skipped": 2}, 0),
        ("F\nFAILED tests/a.py::b - E\n1 failed, 3 passed in 2s", {"failed": 1, "passed": 3}, 1),
        ("", {}, 0),
    ],
)
def test_the_counts_of_pytest(output, counts, failed):
    """The last line has the counts, and those that failed are named."""
    found = read(output)
    assert found["counts"] == counts
    assert len(found["failed"]) == failed
