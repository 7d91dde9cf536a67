"""Logs the two terms of the loss and the safety logits' drift, without synchronising a step.

The patch adds up detached device scalars; they are read once, when the trainer logs anyway. What
the patch has learned becomes part of the trainer's checkpoints, in ``trainer_state.json``: the
trainer writes that file last, and reads it wherever the checkpoint is.
"""

from __future__ import annotations

import weakref
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from str_kernels.alive import SharedWhileAlive
from str_kernels.huggingface.deferred.head import find_patch
from str_kernels.huggingface.patch.patch import Patch

_TIMED = "_runtime"
_LEARNED = "patch"  # the entry of a callback's state


class SafetyLogCallback(TrainerCallback, ExportableState):
    """Adds both terms, accuracy, the filter's part and the drift to every log of training.

    A Trainer that is made after ``patch_model`` has one without asking (`PatchLog`), before those
    that report elsewhere; one that is made before is given it by ``trainer.add_callback``.

    It also keeps ``Patch.state_dict`` in every checkpoint, and a resumed run goes on with it, so
    that it is the uninterrupted one. With several processes all take over the first one's.

    ``cross_entropy``, ``safety_penalty``, ``token_accuracy``, ``dead_mass`` and ``live_share`` are
    per labelled token, averaged over the tokens of all processes since the last log, accumulation
    steps included; every process needs the callback. For one optimizer step ``cross_entropy +
    safety_penalty`` is the loss (without a router's); over several the trainer weighs steps alike,
    these weigh tokens.

    With a constraint also ``safety_drift``, ``√(Σ w (1/K) Σ (z - r)² / Σ w)`` over the same span:
    how far the safety logits (``logprob``, ``kl_mass``: log-probabilities) are from their
    reference, as a root mean square, whatever the constraint's kind, strength and token weights.

    Evaluations log the same with their prefix, over all processes. ``eval_loss`` is the loss that
    is trained, ``eval_cross_entropy + eval_safety_penalty``; the first is what ``eval_loss`` would
    be without the constraint, averaged as the trainer does (a batch's mean counts as its rows). So
    a perplexity is ``exp(eval_cross_entropy)``, and the best model by the data alone is that of
    ``metric_for_best_model="eval_cross_entropy"``.

    Args:
        patch: what ``patch_model`` returned; None: the one that the trained model carries.
    """

    _required = True

    def __init__(self, patch: Patch | None = None) -> None:
        """Log for this patch."""
        self._given = self._patch = patch
        self._evaluating = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the patch.

        Raises:
            ValueError: no patch was given, and the model carries none.
        """
        found = self._finds_patch(model)
        if self._required and not found:
            raise ValueError("SafetyLogCallback: the model is not patched; call patch_model first.")
        if found and state.global_step > 0:
            learned = _learned(state.stateful_callbacks)
            if learned is not None:
                self._patch.load_state_dict(learned)
        # the trainer renews only the entries that it finds, and an older checkpoint has none
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback and its patch."""
        learned = {} if self._patch is None else {_LEARNED: self._patch.state_dict()}
        return {"args": {}, "attributes": {}, **learned}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an evaluation that did not come to its end; a share is drawn by the step."""
        self._evaluating = False
        if self._patch is not None:
            self._patch.sharing.begin(state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Let an evaluation begin with its first batch: losses before it are not its own."""
        before = self._patch
        if self._finds_patch(model) and not (self._evaluating and self._patch is before):
            self._patch.evaluation_meter.forget_earlier()
        self._evaluating = self._patch is not None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Put the averages into the logs and into the trainer's history."""
        if not logs or self._patch is None:
            return
        prefix = _evaluated(logs) if self._evaluating else None
        if prefix is not None:
            totals = self._take_evaluation(args, prefix)
        elif "loss" in logs:
            totals = self._patch.meter.take(args.device)
        else:
            return
        logs.update(totals)
        if totals and state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(totals)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: dict, **kwargs: Any) -> None:
        """Put the averages into the metrics of ``Trainer.predict``, which logs none."""
        prefix = _evaluated(metrics) if self._evaluating else None
        if prefix is not None:
            metrics.update(self._take_evaluation(args, prefix))

    def _finds_patch(self, model: Any) -> bool:
        if self._given is None:  # another trial of a search has another model
            held = self._patch if self._patch is not None and self._patch.installed else None
            self._patch = find_patch(model) or held
        return self._patch is not None

    def _take_evaluation(self, args: Any, prefix: str) -> dict[str, float]:
        self._evaluating = False
        totals = self._patch.evaluation_meter.take(args.device)
        return {f"{prefix}_{name}": value for name, value in totals.items()}


class PatchLog(SafetyLogCallback):
    """What a Trainer has by itself: silent, and no error, where its model is not patched."""

    _required = False


class TrainerLogs(SharedWhileAlive):
    """While this lives, every Trainer of the process that is made has a `PatchLog`.

    ``TrainerLogs.shared()`` gives the one of the process; every patch keeps it alive.
    """

    def __init__(self) -> None:
        """Join the callbacks that a Trainer begins with; those that report elsewhere follow."""
        from transformers.trainer import DEFAULT_CALLBACKS

        DEFAULT_CALLBACKS.append(PatchLog)
        weakref.finalize(self, DEFAULT_CALLBACKS.remove, PatchLog)


def _evaluated(logs: dict) -> str | None:
    """The prefix of an evaluation's metrics: the trainer times every one; None: it is not one."""
    timed = [name.removesuffix(_TIMED) for name in logs if name.endswith(_TIMED)]
    return min(timed, key=len, default=None)


def _learned(stateful_callbacks: dict[str, Any]) -> dict[str, Any] | None:
    """The newest state of a patch among the states of a checkpoint's callbacks."""
    found = None
    for entries in stateful_callbacks.values():
        for entry in entries if isinstance(entries, list) else [entries]:
            found = entry.get(_LEARNED, found)
    return found
