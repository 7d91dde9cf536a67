"""Each step is a function of a `Run`; what fails or takes too long ends its own step alone."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable

from benchmarks.gpu import exact, install, launches, lora, peers, profile, stages, suite, unit
from benchmarks.gpu.record import end
from benchmarks.gpu.run import OutOfTime, Run

STEPS: dict[str, Callable[[Run], None]] = {
    "install": install.install,
    "unit": unit.unit,
    "profile": profile.profile,
    "stages": stages.stages,
    "exact": exact.exact,
    "screen": launches.screen,
    "refine": launches.refine,
    "head": peers.head,
    "lora": lora.lora,
    "tests": suite.tests,
}


def run_step(run: Run, step: str, limit: float) -> str:
    """Run a step and write how it ended."""
    began = time.monotonic()
    run.step, run.deadline = step, began + limit
    state, reason = "done", None
    try:
        STEPS[step](run)
    except OutOfTime:
        state, reason = "cut", f"its {limit:.0f} s were over"
    except Exception as error:  # written down, and the next step goes on
        state, reason = "failed", said(error)
        traceback.print_exc()
    gc.collect()  # an exception's frames hold tensors
    end(run.out, step, state, time.monotonic() - began, reason)
    return state


def said(error: Exception) -> str:
    """Say what was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].name}, line {frames[-1].lineno}" if frames else "nowhere"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]} ({where})"[:400]
