"""What happens beside the steps: time, progress, a clean stop at Ctrl-C.

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


class Progress(Protocol):
    """Where a run says what it is doing; the command line draws it, tests record it."""

    def stage(self, text: str) -> None:
        """Something slow begins."""

    def step(self, done: int, total: int) -> None:
        """An optimizer step is done."""

    def log(self, values: dict[str, float]) -> None:
        """Averages since the last log: step, loss, cross_entropy, safety_penalty, …."""

    def notice(self, text: str) -> None:
        """Something the user should know, said once."""


class Silence:
    """A `Progress` that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def step(self, done: int, total: int) -> None:
        """Say nothing."""

    def log(self, values: dict[str, float]) -> None:
        """Say nothing."""

    def notice(self, text: str) -> None:
        """Say nothing."""


def show_clustering(progress: Progress, done: int, total: int) -> None:
    """Report the vocabulary index of the first step, a stage of its own inside the training."""
    if done == 0:
        progress.stage("clustering the head's vocabulary")
    progress.step(done, total)
    if done == total:
        progress.stage("training")


class StepTimer(TrainerCallback):
    """Wall-clock seconds of every optimizer step, accumulation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the watch."""
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def median(self) -> float:
        """Median step; NaN before the first."""
        return statistics.median(self.seconds) if self.seconds else math.nan


class Reporter(TrainerCallback):
    """Passes steps and logs on, logs the last step too, and stops a run whose loss is not finite.

    The trainer's own log of the whole run at its end is not passed on.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.not_finite_at: int | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the step; make the last one log."""
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
        """Pass a training log on."""
        if not logs or "loss" not in logs:
            return
        self._progress.log({"step": state.global_step, **logs})
        if not math.isfinite(logs["loss"]):
            self.not_finite_at = state.global_step
            control.should_training_stop = True


class Interrupt(TrainerCallback):
    """Ctrl-C finishes the step in hand, saves a checkpoint and ends; a second one ends at once."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.asked = False

    @contextmanager
    def installed(self) -> Any:
        """Listen to Ctrl-C inside this block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._heard)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _heard(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._progress.notice("Stopping after this step and saving; press Ctrl-C again to lose it.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop at the border of a step, where a checkpoint is exact."""
        if self.asked:
            control.should_save = control.should_log = control.should_training_stop = True
