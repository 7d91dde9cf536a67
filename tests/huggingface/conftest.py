"""What the trainers leave behind is not for the next test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_accelerator_state(monkeypatch):
    """Mixed precision outlives a trainer, in a singleton or in the environment."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
