"""Logs the two terms of the loss and the safety logits' drift, without synchronising a step.

The patch adds up detached device scalars; they are read once, when the trainer logs anyway. What
the patch has learned becomes part of the trainer's checkpoints, in ``trainer_state.json``: the
trainer writes that file last, and reads it wherever the checkpoint is.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from str_kernels.huggingface.patch.install import find_patch
from str_kernels.huggingface.patch.patch import Patch

_LEARNED = "patch"  # the entry of a callback's state


class SafetyLogCallback(TrainerCallback, ExportableState):
    """Adds both terms, accuracy, the filter's part and the drift to every log of training.

    It also keeps ``Patch.state_dict`` in every checkpoint, and a resumed run goes on with it, so
    that it is the uninterrupted one. With several processes all take over the first one's.

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
        if state.global_step > 0:
            learned = _learned(state.stateful_callbacks)
            if learned is not None:
                self._patch.load_state_dict(learned)
        # the trainer renews only the entries that it finds, and an older checkpoint has none
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback and its patch."""
        learned = {} if self._patch is None else {_LEARNED: self._patch.state_dict()}
        return {"args": {}, "attributes": {}, **learned}

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


def _learned(stateful_callbacks: dict[str, Any]) -> dict[str, Any] | None:
    """The newest state of a patch among the states of a checkpoint's callbacks."""
    found = None
    for entries in stateful_callbacks.values():
        for entry in entries if isinstance(entries, list) else [entries]:
            found = entry.get(_LEARNED, found)
    return found
