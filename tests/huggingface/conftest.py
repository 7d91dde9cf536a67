"""What the trainers leave behind is not for the next test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_accelerator_state():
    """Accelerate keeps its mixed precision in a singleton; older transformers do not reset it."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
