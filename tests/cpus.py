"""Stand in for another CPU than the one that runs the tests."""

from __future__ import annotations

from typing import Any

from str_kernels.engine import cpu


def set_cpu(monkeypatch, **fast: Any) -> None:
    """Let the engine believe in a CPU on which just these products are fast."""
    monkeypatch.setattr(cpu, "_ask", lambda: cpu.Cpu(**fast))
