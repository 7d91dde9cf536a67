"""Callbacks of the trainer: step times, progress, a clean stop at Ctrl-C.

No callback reads a device tensor during a step.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from str_kernels.ranks import sharing


class Progress(Protocol):
    """What a run reports; the command line shows it, and tests record it."""

    def stage(self, text: str) -> None:
        """Report that something slow begins."""

    def step(self, done: int, total: int) -> None:
        """Report that an optimizer step is done."""

    def log(self, values: dict[str, float]) -> None:
        """Report averages since the last log: step, loss, cross_entropy, safety_penalty, …."""

    def notice(self, text: str) -> None:
        """Report something that the user should know, once."""


class NoProgress(Progress):
    """A `Progress` that ignores everything."""


def show_clustering(progress: Progress, done: int, total: int) -> None:
    """Report the clustering of the vocabulary in the first step, as a stage of its own."""
    if done == 0:
        progress.stage("clustering the head's vocabulary")
    progress.step(done, total)
    if done == total:
        progress.stage("training")


class StepTimer(TrainerCallback):
    """Measures the wall-clock seconds of every optimizer step, accumulation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def median(self) -> float:
        """Return the median step; NaN before the first."""
        return statistics.median(self.seconds) if self.seconds else math.nan


class Reporter(TrainerCallback):
    """Reports steps and logs, makes the last step log, and stops a run whose loss is not finite.

    It leaves out the trainer's log of the whole run at its end.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.not_finite_at: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the step, and make the last one log."""
        self._progress.step(state.global_step, state.max_steps)
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a log of training or of an evaluation."""
        if not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        self._progress.log({"step": state.global_step, **logs})
        if "loss" in logs and not math.isfinite(logs["loss"]):
            self.not_finite_at = state.global_step
            control.should_training_stop = True


class Interrupt(TrainerCallback):
    """Makes Ctrl-C finish the step, save a checkpoint and stop; a second one stops at once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.asked = False

    @contextmanager
    def installed(self) -> Any:
        """Handle Ctrl-C inside this block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._progress.notice(
            "Stopping after this step and saving; press Ctrl-C again to stop without saving."
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop at the end of a step, where a checkpoint is exact; all processes stop together."""
        self.asked = any(sharing().gathered(self.asked))
        if self.asked:
            control.should_save = control.should_log = control.should_training_stop = True
