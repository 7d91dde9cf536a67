"""Logs the two terms of the loss apart, without synchronising a step.

The patch adds up detached device scalars; they are read once, when the trainer logs anyway.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from str_kernels.huggingface.patch import Patch


class SafetyLogCallback(TrainerCallback):
    """Adds both terms, ``token_accuracy`` and ``dead_mass`` to every log of training.

    Both terms are per labelled token, averaged over this process's tokens since the last log,
    accumulation steps included. For one optimizer step ``cross_entropy + safety_penalty`` is the
    loss (without a router's); over several the trainer weighs steps alike, these weigh tokens.

    Args:
        patch: what ``patch_model`` returned.
    """

    def __init__(self, patch: Patch) -> None:
        """Log for this patch."""
        self._patch = patch

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Put the averages into the logs and into the trainer's history."""
        if not logs or "loss" not in logs:
            return
        totals = self._patch.meter.take()
        logs.update(totals)
        if totals and state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(totals)
