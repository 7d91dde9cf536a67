"""The kernels run interpreted, each file in a process: Triton reads the setting on import."""

from __future__ import annotations

import importlib.util

import pytest

from tests.interpreted import FILES, RUNS


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path):
    """Every test of the file passes under ``TRITON_INTERPRET=1``."""
    done = RUNS[path].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
