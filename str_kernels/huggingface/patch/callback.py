"""Logs the two terms of the loss and the safety logits' drift, without synchronising a step.

The patch adds up detached device scalars; they are read once, when the trainer logs anyway.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from str_kernels.huggingface.patch.install import find_patch
from str_kernels.huggingface.patch.patch import Patch


class SafetyLogCallback(TrainerCallback):
    """Adds both terms, accuracy, the filter's part and the drift to every log of training.

    ``cross_entropy``, ``safety_penalty``, ``token_accuracy``, ``dead_mass`` and ``live_share`` are
    per labelled token, averaged over this process's tokens since the last log, accumulation steps
    included. For one optimizer step ``cross_entropy + safety_penalty`` is the
    loss (without a router's); over several the trainer weighs steps alike, these weigh tokens.

    With a constraint also ``safety_drift``, ``Σ w (1/K) Σ (z - r)² / Σ w`` over the same span: how
    far the safety logits (``logprob``: log-probabilities) are from their reference, whatever the
    constraint's kind, strength and token weights.

    Args:
        patch: what ``patch_model`` returned; None: the one that the trained model carries.
    """

    def __init__(self, patch: Patch | None = None) -> None:
        """Log for this patch."""
        self._patch = patch

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the patch.

        Raises:
            ValueError: no patch was given, and the model carries none.
        """
        if self._patch is None:
            self._patch = find_patch(model)
        if self._patch is None:
            raise ValueError("SafetyLogCallback: the model is not patched; call patch_model first.")

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
