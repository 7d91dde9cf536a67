"""Every test here runs in Triton's interpreter, as `benchmarks.interpreter` mends it."""

from __future__ import annotations

import pytest

from benchmarks import interpreter
from str_kernels.backends.triton import TritonBackend

interpreter.mend()


@pytest.fixture
def backend():
    """The backend with its default sizes."""
    return TritonBackend()


@pytest.fixture
def dot_flops():
    """Counts operations in ``tl.dot`` from here on, 8-bit ones at half, under "flops"."""
    interpreter.COUNTED["flops"] = 0
    return interpreter.COUNTED
