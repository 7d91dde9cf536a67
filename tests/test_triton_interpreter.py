"""The kernels' numerics, in a process of their own: Triton must be told before it is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# logits of -inf are part of the tests, and numpy warns about the logarithm of nothing
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_interpreted_kernels_agree_with_the_truth():
    """Everything in tests/triton/interpreted passes under ``TRITON_INTERPRET=1``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "tests/triton/interpreted"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
