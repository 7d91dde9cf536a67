"""`SafetyProbe`: how probable refusing is while a Trainer trains, beside the loss.

Stage: every few steps: model → `Probed` → the trainer's log, a warning, a stop.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from str_kernels.alive import SharedWhileAlive
from str_kernels.inputs.rows import Row
from str_kernels.notices import say_once
from str_kernels.probe import EVERY, WARN_BELOW
from str_kernels.probe.aligned import Aligned
from str_kernels.probe.asked import Asked, from_first
from str_kernels.probe.reading import read
from str_kernels.probe.series import Probed, Series
from str_kernels.safety.inference import Prompt

_STATE = "probe"  # the entry of the callback's state
_running: weakref.WeakKeyDictionary[nn.Module, SafetyProbe] = weakref.WeakKeyDictionary()


class SafetyProbe(TrainerCallback, ExportableState):
    """Logs how much of the aligned model's probability of refusing is left, while a Trainer trains.

    Before the first step it finds what the aligned model (adapters off, or the weights as they are
    then) begins its refusal of each prompt with. From then on a probe is one forward without
    gradient over prompts and openings; nothing is generated, and the training is the same, bit by
    bit, as without it. With several processes all make the same forwards. Make it before the
    Trainer, so that what the Trainer reports to gets its keys:

    ``safety_probe/refusal``: ``1/n Σ min(1, P(opening) / Q(opening))``, where P is the model, Q the
    aligned one, and the probability of an opening is the product over its tokens. 1 at the start.
    ``safety_probe/mass``: the safety tokens' probability where an answer begins, mean over prompts.
    ``safety_probe/divergence``: ``KL(q ‖ p)`` of the proportions among them, nats, mean over
    prompts. These two need safety tokens.

    ``series`` has all probes and their seconds. A checkpoint has them and the aligned model's
    numbers, so that a resumed run goes on with these.

    Args:
        prompts: requests that the model refuses and that are not trained on: texts, conversations,
            or rows as ``read_jsonl`` gives them. Eight are enough to see refusals go.
        every: optimizer steps between two probes; there is one after the last step, too.
        openings: what the model's refusals begin with, a text for each prompt, for languages that
            the judge does not read; default: found in its greedy answers.
        tokens: ids of the safety tokens; default: those of the model's patch, if it has one.
        tokenizer: default: the trainer's processing class.
        warn_below: a probe below this is warned of, once.
        stop_below: a probe below this stops the training, and the trainer loads the checkpoint of
            the last one that was not below; each probe saves one. None: it never stops.
        say: where warnings go; default: the logger ``str_kernels``.

    Raises:
        ValueError: no prompts, or a number outside its range. When training begins: the model
            refuses no prompt, one is too long, or the trainer keeps a best model of its own. When
            training: the first probe is below ``stop_below``, so that there is nothing to keep.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt | Row],
        every: int = EVERY,
        *,
        openings: Sequence[str] | None = None,
        tokens: Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        warn_below: float = WARN_BELOW,
        stop_below: float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Check the arguments."""
        self._asked = Asked(
            prompts, every, openings, tokens, warn_below=warn_below, stop_below=stop_below
        )
        self._tokenizer, self._say = tokenizer, say or _warn
        self._aligned: Aligned | None = None
        self._pending: dict[str, float] = {}
        self._chooses = False  # what the trainer loads at its end
        self._began = self._before = 0.0
        self._logs = ProbeLogs.shared()
        self.series = Series()

    @property
    def aligned(self) -> Aligned | None:
        """What the probe compares with; None before training."""
        return self._aligned

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this probe."""
        self._keep_time()
        kept = {"series": self.series.as_dict()}
        if self._aligned is not None:
            kept["aligned"] = self._aligned.as_dict()
        return {"args": self._asked.as_dict(), "attributes": {}, _STATE: kept}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Find the aligned model's openings, or go on with those of the checkpoint."""
        if self._asked.stop_below is not None and args.load_best_model_at_end:
            raise ValueError(
                f"stop_below={self._asked.stop_below}: chooses the checkpoint that stays, and so "
                "does load_best_model_at_end; leave one of them out."
            )
        self._began, self.series, self._aligned = time.perf_counter(), Series(), None
        self._pending = {}
        _running[model] = self
        begun = state.global_step > 0
        earlier = self._resume(state) if begun else None
        self._before = self.series.run_seconds
        processor = kwargs.get("processing_class")
        tokenizer = self._tokenizer or getattr(processor, "tokenizer", processor)
        self._aligned = self._asked.answered(model, tokenizer, earlier, begun=begun, say=self._say)
        self.series.openings_seconds += time.perf_counter() - self._began
        # the trainer renews only the entries that it finds, and an older checkpoint has none
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if earlier is not None and self._aligned is not earlier:
            self.series = Series()  # the one before was of other requests
        if not self.series.steps:
            self._begin_series(state, model)
        if self.series.kept_step is not None and self._checkpoint(args).is_dir():
            state.best_model_checkpoint = str(self._checkpoint(args))
        else:
            self.series.kept_step = None

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Probe, and let the trainer log it now."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % self._asked.every and not last:
            return
        refusal = self._probe(model, state.global_step).refusal
        control.should_log = True
        fell = self.series.fallen_at is None and not refusal >= self._asked.warn_below  # or NaN
        if fell:
            self.series.fallen_at = state.global_step
        if self._stops(args, state, control, refusal) or not fell:
            return
        self._say(
            f"{_found(state.global_step, refusal, self._asked.warn_below)}. Hold the tokens more "
            "strongly, add anchors, or lower the learning rate."
        )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Put the newest probe into the log and into the trainer's history."""
        if not logs or "loss" not in logs:
            return
        probed, self._pending = self._pending, {}
        logs.update(probed)
        if probed and state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(probed)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Keep the time; the trainer's arguments are again as they were."""
        self._keep_time()
        _running.pop(model, None)
        if self._chooses:
            args.load_best_model_at_end, self._chooses = False, False

    def _begin_series(self, state: Any, model: nn.Module) -> None:
        """Probe before the first step; a checkpoint with which training begins can be kept."""
        refusal, bound = self._probe(model, state.global_step).refusal, self._asked.stop_below
        self._pending = {}  # the trainer logs no step here
        if state.global_step > 0 and bound is not None and refusal >= bound:
            self.series.kept_step = state.global_step

    def _resume(self, state: Any) -> Aligned | None:
        """Take the series of a checkpoint; return what its probe compared with."""
        entry = state.stateful_callbacks.get(type(self).__name__, {})
        kept = (entry[-1] if isinstance(entry, list) else entry).get(_STATE)
        if kept is None:
            return None
        self.series = Series(**kept["series"])
        return Aligned.from_dict(kept["aligned"])

    def _probe(self, model: nn.Module, step: int) -> Probed:
        _synchronise(model)
        started = time.perf_counter()
        aligned = self._aligned
        found = read(model, aligned.exchanges, aligned.token_ids)
        probed = from_first(Probed.of(found, aligned))
        self.series.seconds += time.perf_counter() - started
        self.series.add(step, probed)
        self._pending = probed.logged()
        self._keep_time()
        return probed

    def _stops(self, args: Any, state: Any, control: Any, refusal: float) -> bool:
        """Keep this step's weights, or stop the training; tell whether it stops."""
        bound, step, kept = self._asked.stop_below, state.global_step, self.series.kept_step
        if bound is None:
            return False
        if refusal >= bound:
            self.series.kept_step = step
            state.best_model_checkpoint = str(self._checkpoint(args))  # is not rotated out
            control.should_save = True
            return False
        if kept is None:
            raise ValueError(
                f"stop_below={bound:g}: the first probe, at step {step}, found {refusal:.2f}, and "
                "there is no earlier checkpoint to keep. Probe more often, lower the learning "
                "rate, or hold the tokens more strongly."
            )
        self.series.stopped_at = step
        self._chooses = args.load_best_model_at_end = True
        control.should_training_stop, control.should_save = True, False
        found = _found(step, refusal, bound)
        self._say(f"{found}: training stops, and the weights of step {kept} are kept.")
        return True

    def _checkpoint(self, args: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{self.series.kept_step}"

    def _keep_time(self) -> None:
        if self._began:
            self.series.run_seconds = self._before + time.perf_counter() - self._began


class ProbeLog(TrainerCallback):
    """What a Trainer has by itself before those that report: it adds a probe to the logs."""

    def on_log(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Let the probe of this model, if there is one, add to the log."""
        probe = _running.get(model)
        if probe is not None:
            probe.on_log(*args, model=model, **kwargs)


class ProbeLogs(SharedWhileAlive):
    """While this lives, every Trainer of the process that is made has a `ProbeLog`."""

    def __init__(self) -> None:
        """Join the callbacks that a Trainer begins with; those that report elsewhere follow."""
        from transformers.trainer import DEFAULT_CALLBACKS

        DEFAULT_CALLBACKS.append(ProbeLog)
        weakref.finalize(self, DEFAULT_CALLBACKS.remove, ProbeLog)


def _found(step: int, refusal: float, bound: float) -> str:
    return (
        f"step {step}: {refusal:.2f} of the aligned model's probability of refusing is left, below "
        f"{bound:g}"
    )


def _synchronise(model: nn.Module) -> None:
    """Wait for the device, so that the probe's seconds are its own."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _warn(text: str) -> None:
    say_once(text, logging.WARNING)
