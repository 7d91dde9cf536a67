"""What the host gives a device once, and what it learns from it late."""

from __future__ import annotations

import torch

from str_kernels import waits

CPU = torch.device("cpu")


def test_constants_are_made_once():
    """The same numbers are the same tensor, which autograd can save whoever asked first."""
    with torch.inference_mode():
        made = waits.constant((3, 1, 2), torch.int64, CPU)
    assert made.tolist() == [3, 1, 2]
    assert not made.is_inference()
    assert waits.constant((3, 1, 2), torch.int64, CPU) is made
    assert waits.constant((3, 1, 2), torch.float32, CPU).dtype == torch.float32


def test_constants_are_bounded():
    """A process that makes many constraints does not keep every one's numbers."""
    for i in range(1000):
        waits.constant((i,), torch.int64, CPU)
    info = waits.constant.cache_info()
    assert info.currsize <= info.maxsize < 1000
