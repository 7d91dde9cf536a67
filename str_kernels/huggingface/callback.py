"""Logs the two terms of the loss and the safety logits' drift, without synchronising a step.

The patch adds up detached device scalars; they are read once, when the trainer logs anyway. The
strength that a patch finds is saved in the trainer's checkpoints and taken up again.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from str_kernels.huggingface.install import find_patch
from str_kernels.huggingface.patch import Patch


class SafetyLogCallback(TrainerCallback, ExportableState):
    """Adds both terms, accuracy, the filter's part and the drift to every log of training.

    ``cross_entropy``, ``safety_penalty``, ``token_accuracy``, ``dead_mass`` and ``live_share`` are
    per labelled token, averaged over this process's tokens since the last log, accumulation steps
    included. For one optimizer step ``cross_entropy + safety_penalty`` is the
    loss (without a router's); over several the trainer weighs steps alike, these weigh tokens.

    With a constraint also ``safety_drift``, ``Σ w (1/K) Σ (z - r)² / Σ w`` over the same span: how
    far the safety logits (``logprob``: log-probabilities) are from their reference, whatever the
    constraint's kind, strength and token weights.

    With ``strength="auto"`` also ``safety_strength``, the λ of the next step, and
    ``budgeted_drift``, the drift that the budget bounds, over about the last ten steps. Both are in
    ``trainer_state.json`` of every checkpoint too, and a resumed run goes on from there.

    Args:
        patch: what ``patch_model`` returned; None: the one that the trained model carries.
    """

    def __init__(self, patch: Patch | None = None) -> None:
        """Log for this patch."""
        self._patch = patch
        self.saved: dict | None = None  # by the trainer, where it rebuilds callbacks on resuming

    def state(self) -> dict:
        """For the trainer's checkpoint."""
        budget = None if self._patch is None else self._patch.budget
        saved = None if budget is None else budget.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Go on with the strength of the checkpoint, if the trainer resumes from one.

        Raises:
            ValueError: no patch was given, and the model carries none.
        """
        if self._patch is None:
            self._patch = find_patch(model)
        if self._patch is None:
            raise ValueError("SafetyLogCallback: the model is not patched; call patch_model first.")
        # an older checkpoint has no entry, and the trainer only renews those that it finds
        entry = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        entry = entry[0] if isinstance(entry, list) else entry
        saved = self.saved or entry["attributes"]["saved"]
        if self._patch.budget is not None and state.global_step > 0 and saved is not None:
            self._patch.budget.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The strength of the next step, on every process."""
        if self._patch.budget is not None:
            self._patch.budget.settle()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Put the averages into the logs and into the trainer's history."""
        if not logs or "loss" not in logs:
            return
        totals = self._patch.meter.take()
        if totals and self._patch.budget is not None:
            totals |= self._patch.budget.report()
        logs.update(totals)
        if totals and state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(totals)
