"""What a run measured, and the description that is saved beside its adapter."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from str_kernels.files import write_json
from str_kernels.ranks import sharing
from str_kernels.safety.tokens import SafetyTokens
from str_kernels.training.checks import DESCRIPTION, Prepared
from str_kernels.version import run_versions

SCHEMA = "str_kernels.train/1"


@dataclass(frozen=True)
class Result:
    """The measured numbers of a run, or of its part since it was resumed.

    Args:
        steps: optimizer steps, including those before a resume.
        total_steps: the planned number of steps.
        interrupted: whether Ctrl-C ended it early.
        step_seconds: the median wall-clock time of an optimizer step.
        tokens_per_second: tokens without padding, of all processes, over the time of all steps.
        loss: its average in the last log, like the next two.
        cross_entropy: the first term.
        safety_penalty: the second term, strength included; None without a constraint.
        eval_cross_entropy: the first term on the held-out rows, at the last step; None without.
        safety_probe: every probe of the run, as ``Series`` of the probe has them; None without.
        peak_process_mib: the largest resident size of a process.
        peak_device_mib: the largest allocation on the accelerator; None on a CPU.
    """

    steps: int
    total_steps: int
    interrupted: bool
    step_seconds: float
    tokens_per_second: float
    loss: float | None
    cross_entropy: float | None
    safety_penalty: float | None
    eval_cross_entropy: float | None
    peak_process_mib: float
    peak_device_mib: float | None
    safety_probe: dict[str, Any] | None = None

    @property
    def whole(self) -> bool:
        """Tell whether the run came to its end; neither Ctrl-C nor the probe stopped it."""
        return not self.interrupted and self.stopped_at is None

    @property
    def stopped_at(self) -> int | None:
        """Return the step at which the probe stopped the run."""
        return None if self.safety_probe is None else self.safety_probe["stopped_at"]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return dataclasses.asdict(self)


def peak_memory() -> dict[str, float | None]:
    """Return the peak memory of this process and of its accelerator, MiB."""
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"peak_process_mib": _peak_process_bytes() / 2**20, "peak_device_mib": on_gpu}


def largest(peaks: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """Return the largest peaks of several processes."""
    first, *others = peaks
    return {
        name: value and max([value, *(other[name] or 0.0 for other in others)])
        for name, value in first.items()
    }


def _peak_process_bytes() -> int:
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_description(
    prepared: Prepared, tokens: SafetyTokens | None, result: Result | None
) -> None:
    """Write ``str_kernels.json``: how the adapter is made; ``result`` is None until the end."""
    settings = prepared.settings
    description = {
        "schema": SCHEMA,
        "sealed": True,  # checkpoints are, see `str_kernels.training.checkpoints`
        "complete": result is not None and result.whole,
        "settings": settings.as_dict(),
        "processes": sharing().size,
        "versions": run_versions(),
        "data": prepared.data.facts(),
        "anchors": [file.facts() for file in prepared.anchors],
        "eval": prepared.held_out and prepared.held_out.facts(),
        "chat_template": prepared.tokenizer.chat_template,
        "safety_tokens": None
        if tokens is None
        else {"token_ids": list(tokens.token_ids), "tokens": list(tokens.tokens)},
        "result": None if result is None else result.as_dict(),
    }
    write_json(settings.folder / DESCRIPTION, description, indent=2)
